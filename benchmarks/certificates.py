"""How often is a certificate wrong? Repeats of search and certification, each checked on a second sealed set.

A certificate at 1 % says that the loss on text like the sealed one is within 1 %, with an error rate of 5 %. Here many
plans of one model are scored once, on every document; then each repeat draws three sets of documents by its seed:
selection, sealed and a second sealed set. The cheapest plan that passes on the selection is certified on the sealed
text as `halve optimize` does it, three attempts at a third of the error each, by the same functions. The second set
contradicts a certificate when its own whole interval lies beyond the limit.

    PYTHONPATH=src python benchmarks/certificates.py MODEL TEXT.jsonl... [--repeats 100]
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from halve.api.model import load
from halve.api.pipeline import CONFIDENCE, MAX_ATTEMPTS, original_scorer
from halve.api.texts import window_of
from halve.checkpoint import open_checkpoint
from halve.compress import apply_plan, calibrate, resolve
from halve.core.errors import FormatError
from halve.core.plan import Activations, Plan, WeightRule, Weights
from halve.data import encode, read_documents
from halve.evaluate import PairedScores, answer, compare, passes, quality
from halve.evaluate.scorer import EngineScorer
from halve.formats import FORMATS
from halve.models import CheckpointSource, load_config, stored_formats
from halve.search import bytes_per_token
from halve.text import Tokenizer

LIMIT = 0.01
NUM_CALIBRATION = 150  # documents
LEAST_BITS = 5  # fewer are far beyond the limit on a model as small as stories260k


def plans(config, source):
    """Uniform plans, whose matrices take int8 where the format does not fit; the cheapest first."""
    found = {}
    for fmt in FORMATS.values():
        if fmt.kind != "int" or fmt.bits < LEAST_BITS:
            continue
        rules = []
        for pattern, width in (("*down_proj", config.intermediate_size), ("*", config.hidden_size)):
            name = fmt.name if fmt.refusal(width) is None else "int8"
            rules.append(WeightRule(pattern=pattern, format=name, method="clip"))
        plan = Plan(weights=Weights(rules=tuple(rules)), activations=Activations(format="int8"))
        try:
            size = bytes_per_token(config, resolve(plan, config), source)
        except FormatError:
            continue
        found[rules[1].format] = (size, plan)
    return sorted(((size, name, plan) for name, (size, plan) in found.items()), key=lambda row: row[:2])


def part(scores: PairedScores, documents: np.ndarray) -> PairedScores:
    """The scores of some documents."""
    chosen = np.isin(scores.document, documents)
    return PairedScores(
        kl=scores.kl[chosen],
        flip=scores.flip[chosen],
        nll_original=scores.nll_original[chosen],
        nll_smaller=scores.nll_smaller[chosen],
        document=scores.document[chosen],
    )


def score_all(model: Path, texts: list[Path]) -> tuple[list[tuple[str, PairedScores]], int]:
    """Every plan on every document but those of calibration, cheapest first."""
    with open_checkpoint(model) as checkpoint, tempfile.TemporaryDirectory() as folder:
        config = load_config(checkpoint).with_kv_format("fp32")
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        documents = encode([d for text in texts for d in read_documents(text)], tokenizer, vocab_size=config.vocab_size)
        documents = [documents[i] for i in np.random.RandomState(0).permutation(len(documents))]
        window = window_of(config)
        seen, rest = documents[:NUM_CALIBRATION], documents[NUM_CALIBRATION:]
        energies = calibrate(config, CheckpointSource(checkpoint), seen, window_tokens=window, device="cpu")
        original = original_scorer(checkpoint, config, "cpu")
        found = []
        for number, (_, name, plan) in enumerate(plans(config, stored_formats(checkpoint, config))):
            made = Path(folder) / str(number)
            made.mkdir()
            apply_plan(checkpoint, config, plan, made, energies=energies)
            served = load(made, keep=False)
            scores = compare(original, EngineScorer(served.decoder, served.engine_config), rest, window_tokens=window)
            found.append((name, scores))
            print(f"{name}: KL {scores.kl.mean():.5f}", flush=True)
    return found, len(rest)


def repeat(ranked: list[tuple[str, PairedScores]], num_documents: int, seed: int) -> dict[str, object]:
    """One search, its certificate, and what a second sealed set says of it."""
    order = np.random.RandomState(seed + 1).permutation(num_documents)
    selection, sealed, second = np.array_split(order, [num_documents // 4, num_documents * 5 // 8])
    confidence = 1 - (1 - CONFIDENCE) / MAX_ATTEMPTS
    first = next(
        (i for i, (_, s) in enumerate(ranked) if passes(quality(part(s, selection), confidence=confidence), LIMIT)),
        None,
    )
    if first is None:
        return {"certified": None}
    for name, scores in ranked[first : first + MAX_ATTEMPTS]:
        if passes(quality(part(scores, sealed), confidence=confidence), LIMIT):
            again = quality(part(scores, second), confidence=confidence)
            plain = quality(part(scores, second), confidence=CONFIDENCE)
            return {
                "certified": name,
                "contradicted": answer(again, LIMIT) == "contradicted",
                "contradicted_at_95": answer(plain, LIMIT) == "contradicted",
                "beyond_on_second": again.ppl_ratio.value > 1 + LIMIT,
            }
    return {"certified": None}


def main() -> None:
    """Print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    ranked, num_documents = score_all(options.model, options.text)
    done = [repeat(ranked, num_documents, seed) for seed in range(options.repeats)]
    certified = [one for one in done if one["certified"]]
    names = [str(one["certified"]) for one in certified]
    told = {
        "question": "certificates_contradicted",
        "value": sum(bool(one["contradicted"]) for one in certified),
        "contradicted_at_95": sum(bool(one["contradicted_at_95"]) for one in certified),
        "beyond_on_second": sum(bool(one["beyond_on_second"]) for one in certified),
        "certified": len(certified),
        "repeats": options.repeats,
        "documents": num_documents,
        "plans": {name: names.count(name) for name in sorted(set(names))},
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
