"""A planned step as arrays: what the model computes, and how the next tokens are chosen."""

from array import array
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from halve.engine.scheduler import Chunk, Step
from halve.engine.sequence import Sequence
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Ragged, SamplingBatch

_NONE = array("i")
_TINY, _HUGE = np.finfo(np.float32).tiny, np.finfo(np.float32).max


def token_batch(step: Step, block_size: int) -> tuple[TokenBatch, Array]:
    """The chunks of a step that was just planned, as one flat batch over the paged cache, and the rows to sample.

    Rows int32 [R]: the last token of each chunk that leaves nothing pending, once for each sequence that samples from
    it, and each token of a draft behind it. A token that is still in flight is -1 - r, r its row in the step before;
    only a runner that has that step's tokens at hand can be given such a batch.
    """
    chunks = step.chunks
    counts = np.fromiter([chunk.num_tokens + len(chunk.draft) for chunk in chunks], np.int32, len(chunks))
    starts = np.fromiter([chunk.start for chunk in chunks], np.int32, len(chunks))
    cu_seqlens = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(counts, out=cu_seqlens[1:])
    widths = -(-(starts + counts) // block_size)
    block_tables = np.full((len(chunks), int(widths.max())), -1, np.int32)
    token_ids = array("i")
    rows = []
    for i, (chunk, width) in enumerate(zip(chunks, widths.tolist(), strict=True)):
        block_tables[i, :width] = chunk.sequence.blocks[:width]
        _append_tokens(token_ids, chunk)
        if chunk.sampled:
            rows += [len(token_ids) - 1] * len(chunk.sampled)
        if chunk.draft:
            rows += range(len(token_ids), len(token_ids) + len(chunk.draft))
            token_ids.extend(chunk.draft)
    positions = np.arange(len(token_ids), dtype=np.int32)
    positions += np.repeat(starts - cu_seqlens[:-1], counts)
    of = np.repeat(np.arange(len(chunks)), counts)
    slots = block_tables[of, positions // block_size] * np.int32(block_size) + positions % np.int32(block_size)
    batch = TokenBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        cu_seqlens=cu_seqlens,
        slot_mapping=slots,
        block_tables=block_tables,
    )
    return batch, np.array(rows, np.int32)


def _append_tokens(token_ids: "array[int]", chunk: Chunk) -> None:
    known = chunk.sequence.token_ids
    if chunk.num_tokens == 1 and chunk.start < len(known):
        token_ids.append(known[chunk.start])
        return
    token_ids.extend(known[chunk.start : chunk.end])
    if chunk.end > len(known):
        token_ids.append(-1 - chunk.source)


def block_copies(step: Step) -> list[Array]:
    """The copies of a step as int32 [n, 2], (from, to), one call after the other; in none is a block both.

    More than one only where a block that was copied from became free in the same step and another's copy goes there.
    """
    calls: list[list[tuple[int, int]]] = [[]] if step.copies else []
    read: set[int] = set()
    for source, target in step.copies:
        if target in read:
            calls.append([])
            read.clear()
        calls[-1].append((source, target))
        read.add(source)
    return [np.array(pairs, np.int32) for pairs in calls]


class SampledRow(NamedTuple):
    """A row that is sampled: whose, after how many tokens of the answer, and the guessed ones among them."""

    sequence: Sequence
    num_generated: int
    guessed: "array[int]"


def sampled_rows(step: Step) -> list[SampledRow]:
    """The rows of `token_batch`."""
    rows = []
    for chunk in step.chunks:
        rows += [SampledRow(one, chunk.end - one.num_prompt_tokens, _NONE) for one in chunk.sampled]
        if chunk.draft:
            sequence, num_generated, _ = rows[-1]
            behind = range(1, 1 + len(chunk.draft))
            rows += [SampledRow(sequence, num_generated + i, chunk.draft[:i]) for i in behind]
    return rows


def sampling_batch(step: Step, eos_token_ids: Collection[int] = (), allowed: Array | None = None) -> SamplingBatch:
    """How each row of a step is sampled: `sampling_of` its `sampled_rows`."""
    return sampling_of(sampled_rows(step), eos_token_ids, allowed)


def sampling_of(
    rows: list[SampledRow], eos_token_ids: Collection[int] = (), allowed: Array | None = None
) -> SamplingBatch:
    """How each row is sampled. eos_token_ids: what `min_tokens` forbids, with a request's stop tokens. allowed: tokens
    that may be chosen, as `SamplingBatch` has them.

    Penalties count the tokens that are known, and guessed ones; a token in flight is not among them.
    """
    if all(row.sequence.is_greedy and row.num_generated >= row.sequence.request.sampling.min_tokens for row in rows):
        return SamplingBatch.greedy(len(rows))
    sequences = [row.sequence for row in rows]
    table = np.array([sequence.sampler_row for sequence in sequences]).T
    penalized = any(sequence.is_penalized for sequence in sequences)
    bias_tokens, bias_values = _biases(rows, eos_token_ids)
    return SamplingBatch(
        temperature=np.minimum(table[0], _HUGE).astype(np.float32),
        top_k=table[1].astype(np.int32),
        top_p=np.maximum(table[2], _TINY).astype(np.float32),
        min_p=table[3].astype(np.float32),
        typical_p=np.maximum(table[4], _TINY).astype(np.float32),
        presence_penalty=table[5].astype(np.float32),
        frequency_penalty=table[6].astype(np.float32),
        repetition_penalty=table[7].astype(np.float32),
        num_logprobs=table[8].astype(np.int32),
        seed=np.array([sequence.seed for sequence in sequences], np.uint64),
        step=np.array([row.num_generated for row in rows], np.int64),
        prompt_tokens=_histories(rows, answer=False) if penalized else None,
        output_tokens=_histories(rows, answer=True) if penalized else None,
        bias_tokens=bias_tokens,
        bias_values=bias_values,
        allowed=allowed,
    )


def _histories(rows: list[SampledRow], *, answer: bool) -> Ragged:
    """Prompt or answer of each row that a penalty acts on; nothing for the others."""
    token_ids, offsets = array("i"), [0]
    for sequence, _, guessed in rows:
        if sequence.is_penalized:
            cut = sequence.num_prompt_tokens
            token_ids += sequence.token_ids[cut:] if answer else sequence.token_ids[:cut]
            if answer:
                token_ids += guessed
        offsets.append(len(token_ids))
    return Ragged(np.array(token_ids, np.int32), np.array(offsets, np.int64))


def _biases(rows: list[SampledRow], eos_token_ids: Collection[int]) -> tuple[Ragged | None, Array | None]:
    """What is added to logits, row by row; None where nothing is."""
    token_ids, values, offsets = array("i"), array("f"), [0]
    for sequence, num_generated, _ in rows:
        p = sequence.request.sampling
        if p.logit_bias or num_generated < p.min_tokens:
            bias = dict(p.logit_bias)
            if num_generated < p.min_tokens:
                ends = p.stop_token_ids if p.ignore_eos else (*p.stop_token_ids, *eos_token_ids)
                bias.update(dict.fromkeys(ends, -np.inf))
            token_ids.extend(bias)
            values.extend(bias.values())
        offsets.append(len(token_ids))
    if not token_ids:
        return None, None
    return Ragged(np.array(token_ids, np.int32), np.array(offsets, np.int64)), np.array(values, np.float32)
