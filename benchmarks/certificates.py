"""How often is a certificate wrong? Repeats of search and certification, each checked on a second sealed set.

A certificate at 1 % says that the loss on text like the sealed one is within 1 %, with an error rate of 5 %. Here the
search studies a model on a pool of text and makes its front of plans, as `halve optimize` does; every plan near the
limit is written, loaded as it is served and scored once, token by token, on documents that the pool does not hold.
Each repeat then draws three sets of those documents by its seed: selection, sealed and a second sealed set. The
cheapest plan that passes on the selection is certified on the sealed text, three attempts at a third of the error each,
by the functions that `halve optimize` calls; the scores of a document do not depend on which set it is in, so that
nothing needs to be computed twice. The second set contradicts a certificate when all of an interval that counts lies
beyond the limit, at 95 %: more often than `halve verify` would say so, whose intervals are those of the certificate.

    python benchmarks/certificates.py [MODEL TEXT.jsonl...] [--repeats 100]

Without arguments: stories260k on TinyStories, from `../shared`. Prints progress, and one JSON line last.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from math import log1p
from pathlib import Path

import numpy as np

from halve.api.facts import environment
from halve.api.job import CONFIDENCE, MAX_ATTEMPTS, label
from halve.api.judging import EXPECTED_SHARE
from halve.api.model import load
from halve.api.progress import SILENT
from halve.api.scorers import original_scorer
from halve.api.study import Question, study
from halve.api.texts import prepare_texts, window_of
from halve.checkpoint import open_checkpoint
from halve.compress import apply_plan
from halve.data import encode, read_documents, write_documents
from halve.data.split import clusters
from halve.evaluate import PairedScores, compare, fails, passes, quality
from halve.evaluate.scorer import DecoderScorer
from halve.models import load_config, stored_formats
from halve.search import Candidate, Judged, cheapest_passing, likely_start
from halve.search.front import Offer, bytes_cost, candidates, retreat
from halve.text import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.01
POOL = 240  # documents that the search studies
MOST_DOCUMENTS = 500  # of the others
SHARES = (0.2, 0.6)  # of the others: selection up to here, sealed up to there, then the second set
NEAR = (0.3, 3.0)  # plans whose predicted loss is this far from the limit; others always pass or always fail
MOST_PLANS = 24


def shared(name: str) -> Path:
    """A file or folder of `../shared`."""
    found = next((p / "shared" for p in ROOT.parents if (p / "shared/data").is_dir()), None)
    if found is None:
        raise SystemExit("there is no ../shared here; name a model and texts")
    return found / name


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


def score_all(model: Path, texts: list[Path]) -> tuple[list[tuple[Candidate, PairedScores]], int]:
    """Every plan near the limit, cheapest first, on every document that the search does not see."""
    read = [document for text in texts for document in read_documents(text)]
    alone = [d for i, (d, root) in enumerate(zip(read, clusters(read), strict=True)) if root == i]
    order = np.random.RandomState(0).permutation(len(alone))
    pool, rest = ([alone[i] for i in part] for part in (order[:POOL], order[POOL : POOL + MOST_DOCUMENTS]))
    with open_checkpoint(model) as checkpoint, tempfile.TemporaryDirectory() as folder:
        config = load_config(checkpoint).with_kv_format("fp32")
        source = stored_formats(checkpoint, config)
        tokenizer = Tokenizer.from_directory(checkpoint.path, vocab_size=config.vocab_size)
        write_documents(Path(folder) / "pool.jsonl", pool)
        question = Question(
            checkpoint=checkpoint,
            config=config,
            source=source,
            method="auto",
            portable=False,
            activations=("int8",),
            kv_caches=("bf16",),
            device="cpu",
            texts=prepare_texts(Path(folder) / "pool.jsonl", tokenizer, config, selected=True),
            model_sha256=checkpoint.sha256(),
        )
        original = original_scorer(checkpoint, config, "cpu")
        studied = study(question, original, Path(folder), SILENT)
        offers = [Offer(setting=setting) for setting in studied.settings]
        parts, sensitivity = studied.parts(config)
        front = candidates(config, parts, sensitivity, bytes_cost, source, offers, portable=False, num_points=96)
        low, high = (share * log1p(LIMIT) for share in NEAR)
        near = [c for c in front if low <= (c.predicted_kl or 0.0) <= high]
        near = near[:: -(-len(near) // MOST_PLANS)]
        tokens = encode(rest, tokenizer, vocab_size=config.vocab_size)
        print(f"{len(front)} plans, {len(near)} near the limit; {sum(map(len, tokens)):,} tokens", flush=True)
        found = []
        for number, candidate in enumerate(near):
            made = Path(folder) / str(number)
            made.mkdir()
            given = {"energies": studied.statistics.energies, "hessians": studied.statistics.hessians}
            apply_plan(checkpoint, config, candidate.plan, made, **given)
            served = load(made, keep=False)
            # Whole texts at once, by the served kernels: the engine's steps say the same, five times as slowly.
            scores = compare(original, DecoderScorer(served.decoder), tokens, window_tokens=window_of(config))
            found.append((candidate, scores))
            told = f"KL {scores.kl.mean():.5f}, foretold {candidate.predicted_kl:.5f}"
            print(f"{number + 1} of {len(near)}: {label(candidate)}: {told}", flush=True)
    return found, len(rest)


def repeat(ranked: list[tuple[Candidate, PairedScores]], num_documents: int, seed: int) -> dict[str, object]:
    """One search, its certificate, and what a second sealed set says of it."""
    order = np.random.RandomState(seed + 1).permutation(num_documents)
    selection, sealed, second = np.array_split(order, [int(share * num_documents) for share in SHARES])
    confidence = 1 - (1 - CONFIDENCE) / MAX_ATTEMPTS
    scores = {id(candidate): of_all for candidate, of_all in ranked}
    plans = [candidate for candidate, _ in ranked]

    def judge(candidate: Candidate) -> Judged:
        measured = quality(part(scores[id(candidate)], selection), confidence=confidence)
        return Judged(
            format=candidate.format,
            method=candidate.method,
            bytes_per_token=candidate.bytes_per_token,
            ppl_ratio=measured.ppl_ratio,
            kl_mean=measured.kl_mean,
            passed=passes(measured, LIMIT),
        )

    first, _ = cheapest_passing(plans, judge, start=likely_start(plans, EXPECTED_SHARE * log1p(LIMIT)))
    if first is None:
        return {"certified": None}
    for attempt, candidate in enumerate(plans[i] for i in retreat(plans, first, MAX_ATTEMPTS)):
        if passes(quality(part(scores[id(candidate)], sealed), confidence=confidence), LIMIT):
            again = quality(part(scores[id(candidate)], second), confidence=CONFIDENCE)
            return {
                "certified": label(candidate),
                "attempts": attempt + 1,
                "contradicted": fails(again, LIMIT),
                "beyond": again.ppl_ratio.value > 1 + LIMIT or again.kl_mean.value > log1p(LIMIT),
                "room": 1 - again.kl_mean.value / log1p(LIMIT),
            }
    return {"certified": None}


def main() -> None:
    """Print progress, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("text", type=Path, nargs="*")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    os.environ.setdefault("HALVE_CACHE", "off")
    model = options.model or shared("data/models/stories260k")
    texts = options.text or [shared(f"data/corpora/tinystories/{name}.jsonl") for name in ("heldout", "train")]
    started = time.monotonic()
    ranked, num_documents = score_all(model, texts)
    done = []
    for seed in range(options.repeats):
        done.append(repeat(ranked, num_documents, seed))
        if (seed + 1) % 10 == 0:
            wrong = sum(bool(one.get("contradicted")) for one in done)
            print(f"{seed + 1} of {options.repeats}: {wrong} contradicted", flush=True)
    certified = [one for one in done if one["certified"]]
    told = {
        "question": "certificates_contradicted",
        "value": sum(bool(one["contradicted"]) for one in certified),
        "certified": len(certified),
        "repeats": options.repeats,
        "beyond_on_second": sum(bool(one["beyond"]) for one in certified),
        "attempts": dict(sorted(Counter(str(one["attempts"]) for one in certified).items())),
        "median_room_by_kl": round(float(np.median([one["room"] for one in certified])), 3) if certified else None,
        "plans": dict(Counter(str(one["certified"]) for one in certified).most_common()),
        "documents": num_documents,
        "seconds": round(time.monotonic() - started),
        "model": model.name,
        "hardware": environment("cpu"),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
