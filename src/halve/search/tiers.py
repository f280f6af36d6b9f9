"""Experts of a sparse layer that need not be stored alike.

A layer's experts are one part where one format is chosen for all of them. But some lose more than others for each token
that comes to them: tokens differ in how large they are, and in how much their outputs count. So experts are ordered by
what they lose per token at one format, and cut into tiers of about equally many, for each of which the search chooses
on its own. A tier loses its experts' share of what the part loses, by the screen; it costs its share of the experts
that a step reads, by how often tokens of the calibration text went to them.

The screen sees few tokens of each expert, and a search over many such estimates finds those that are wrong by chance.
So an expert's loss per token is drawn towards that of its layer, all the way where no token was seen (an
empirical-Bayes estimate of its logarithm; Efron and Morris 1975): the exponent of the ratio between both is
n / (n + PRIOR_TOKENS).

Whoever reads bundles of other engines wants one format a layer, so that portable plans have no tiers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from halve.formats import FORMATS
from halve.kernels.ops import Array
from halve.search.reads import Reads
from halve.search.sensitivity import Part, Score, Sensitivity

TIERS = 4
ORDERED_AT = 4  # bits of the format that experts are ordered at
PRIOR_TOKENS = 512  # that the loss of an expert of its layer is worth, beside those that the screen saw
LEAST_RATIO = 1e-3  # of losses per token: an expert that the screen saw lose nothing has one all the same
LEAST_SPREAD = 1.25  # between the losses per token of the first and the last expert, below which they stay together


def tiered(
    parts: Sequence[Part], sensitivity: Sensitivity, routed: Mapping[int, Array], num_screened: int
) -> tuple[list[Part], Sensitivity]:
    """Parts with experts in tiers, and the sensitivity of these beside what it held.

    routed: int64 [experts], tokens of the calibration text that went to each, by layer. num_screened: tokens of the
    text that the screen saw. A part stays whole where its experts were not told apart, or are other ones than those
    that were.
    """
    found: list[Part] = []
    scores = dict(sensitivity.parts)
    for part in parts:
        tokens = _tokens(part, routed)
        losses = None if tokens is None else _losses(part, scores[part.name], tokens, num_screened)
        if tokens is None or losses is None:
            found.append(part)
            continue
        for tier, own in _split(part, scores[part.name], losses, tokens):
            found.append(tier)
            scores[tier.name] = own
    return found, replace(sensitivity, parts=scores)


def _tokens(part: Part, routed: Mapping[int, Array]) -> Array | None:
    """Tokens that went to each expert of a part, where they are its experts."""
    if part.reads is None or part.group is None or part.group.layer is None:
        return None
    tokens = routed.get(part.group.layer)
    return None if tokens is None or len(tokens) != len(part.reads.layer) else tokens


def _losses(part: Part, scores: Sequence[Score], tokens: Array, num_screened: int) -> dict[str, Array] | None:
    """Of each scaled option what each expert loses, float64 [experts]; None where that is not known."""
    scaled = [score for score in scores if FORMATS[score.format].scaled]
    if not scaled or not tokens.any() or any(len(s.by_expert) != len(tokens) for s in scaled):
        return None
    assert part.reads is not None
    seen = num_screened * part.reads.top_k * tokens / tokens.sum()
    trust = seen / (seen + PRIOR_TOKENS)
    found = {}
    for score in scaled:
        losses = np.array(score.by_expert)
        if losses.sum() <= 0:
            return None
        typical = losses.sum() / tokens.sum()
        ratios = np.maximum(losses / np.maximum(tokens, 1) / typical, LEAST_RATIO) ** trust
        found[str(score.choice)] = (tokens + 1) * typical * ratios
    return found


def _split(
    part: Part, scores: Sequence[Score], losses: Mapping[str, Array], tokens: Array
) -> list[tuple[Part, tuple[Score, ...]]]:
    """Tiers, and their options; the part itself where its experts hardly differ. losses: of `_losses`."""
    assert part.group is not None
    assert part.reads is not None
    asked = tokens + part.reads.of_token
    layer = part.reads.top_k * asked / asked.sum()
    reference = min(
        (s for s in scores if str(s.choice) in losses),
        key=lambda s: abs(FORMATS[s.format].bits_per_weight - ORDERED_AT),
    )
    hurt = losses[str(reference.choice)] / layer
    if hurt.max() < LEAST_SPREAD * hurt.min():
        return [(part, tuple(scores))]
    order = np.argsort(hurt, kind="stable")
    found = []
    for members in np.array_split(order, min(TIERS, len(order))):
        experts = sorted(members.tolist())
        group = part.group.of_experts(experts)
        reads = Reads(own=tuple(layer[experts].tolist()), layer=tuple(layer.tolist()))
        own = tuple(_of_some(score, losses.get(str(score.choice)), experts) for score in scores)
        found.append((Part(name=group.name, group=group, modules=group.members, reads=reads), own))
    return found


def _of_some(score: Score, losses: Array | None, experts: Sequence[int]) -> Score:
    """An option of some experts: their share of what it loses."""
    if losses is None:
        return score
    share = float(losses[experts].sum() / losses.sum())
    by_expert = tuple(score.by_expert[e] for e in experts)
    return replace(score, predicted=sum(by_expert), measured=None, loss=share * score.loss, by_expert=by_expert)
