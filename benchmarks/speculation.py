"""How much faster does one answer come by guessing ahead, and what does it cost where guesses are wrong?

Bound: a step of one answer reads every weight once; a step that judges k guesses reads them once too and multiplies
them with k + 1 rows. With a guess right with probability a, it gives (1 - a**(k + 1)) / (1 - a) tokens for
cost(k + 1) / cost(1) steps' time, which is the most that guessing can gain. On two cores rows are not free: arithmetic
binds from a few rows on.

Speed needs no trained weights, acceptance does. So the texts are real and the model runs for its time: a large model of
random weights computes every step, and what it "chooses" is what the text says next. Guesses are judged against that.

    code     a file of this repository in the prompt, the same file with names changed as the answer
    quotes   an article in the prompt, an answer of its own words that quotes it
    prose    an article's beginning in the prompt, its going on as the answer: little comes again, guessing loses
    oracle   guesses that are right with a set probability (--rates), to see the whole curve

with `ngram`, and with DRAFT (a smaller bundle) a draft model that computes for its time and is right at the set rates.
Off and on take turns on the same prompts, whose beginnings are in the prefix cache. Told are medians over the rounds of
decode tokens/s off and on and of their ratio in a round, and how many guesses were right. Then the same model without a
text: random weights say what they say, greedily, and the answers must be equal token for token.

    python benchmarks/speculation.py MODEL [--draft DRAFT] [--rounds 5] [--tokens 160] [--threads 2]
"""

import argparse
import json
import platform
import re
import statistics
import sys
import time
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import halve
from halve.data import read_documents
from halve.engine import EngineConfig, EngineCore, ModelRunner, Request, Runner, SamplingParams
from halve.engine.draft_model import DraftModel
from halve.engine.ngram import NgramIndex
from halve.engine.scheduler import Chunk
from halve.engine.sequence import Sequence
from halve.engine.speculative import Guess, NgramProposer, Proposer, Speculator
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.sampling import Sampled, SamplingBatch
from halve.models.embedded import embedded_model_path
from halve.text import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
MIXED = ROOT / "src" / "halve" / "data" / "mixed"
MAX_TOKENS = 8  # guesses


class Told:
    """A model that computes for its time and chooses what a text says next. text: None lets it choose itself."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.vocab_size, self.context = runner.vocab_size, runner.context
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self.batch_invariant = runner.batch_invariant
        self.text: Array | None = None

    def run(self, batch: TokenBatch, rows: Array, sampling: SamplingBatch) -> Sampled:
        """As `Runner.run`."""
        sampled = self._runner.run(batch, rows, sampling)
        if self.text is not None:
            sampled.token_ids[:] = self.text[batch.positions[rows] + 1]
        return sampled

    def copy_blocks(self, pairs: Array) -> None:
        """As `Runner.copy_blocks`."""
        self._runner.copy_blocks(pairs)


def some_right(text: Array, rate: float, vocab_size: int) -> Array:
    """A text in which tokens are right with a probability, whatever those before them are."""
    rng = np.random.default_rng(1)
    wrong = rng.random(len(text)) >= rate
    return np.where(wrong, (text + 1) % vocab_size, text).astype(np.int32)


class Oracle(NgramProposer):
    """Guesses that are right at a set rate, for nothing."""

    name = "an oracle"
    first_rates: Mapping[int, float] = MappingProxyType({0: 0.6})

    def __init__(self, text: Array) -> None:
        super().__init__()
        self.text = text

    def look(self, sequence: Sequence, most: int) -> Guess | None:
        """What the text says next."""
        at = len(sequence.token_ids)
        self._found[sequence] = array("i", self.text[at : at + most].tolist())
        return Guess(0, len(self._found[sequence]))


class OracleDraft(DraftModel):
    """A draft model that computes for its time and is right at a set rate."""

    text: Array

    def fill(self, chunks: SequenceOf[Chunk]) -> None:
        """As `Proposer.fill`."""
        super().fill(chunks)
        for chunk in chunks:
            chunk.draft[:] = array("i", self.text[chunk.end : chunk.end + len(chunk.draft)].tolist())


def texts(tokenizer: Tokenizer, num_tokens: int, context: int) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and answer of each kind, in tokens; shorter where a context is short."""
    size = min(2400, 3 * (context - num_tokens) // 2)  # letters
    source = (ROOT / "src" / "halve" / "engine" / "scheduler.py").read_text()
    source = source[source.index("class Scheduler:") :][:size]
    edited = re.sub(r"\bsequence\b", "stream", re.sub(r"\bself\.pool\b", "self._blocks", source))
    articles = [d.text for d in read_documents(MIXED / "english.jsonl") if d.text and 2500 < len(d.text) < 60_000][:2]
    sentences = re.split(r"(?<=[.!?])\s+", articles[0][:size])
    own = re.split(r"(?<=[.!?])\s+", articles[1][:4000])
    quotes = " ".join(f'{mine} The text says: "{theirs}"' for mine, theirs in zip(own, sentences, strict=False))
    made = {
        "code": (f"Rename sequence to stream, and the pool.\n\n{source}\n\nThe file after the change:\n\n", edited),
        "quotes": (f"{articles[0][:size]}\n\nA summary with quotes: ", quotes),
        "prose": (articles[1][:size], articles[1][size:6000]),
    }
    return {
        name: (tokenizer.encode(prompt), tokenizer.encode(answer, add_special_tokens=False)[:num_tokens])
        for name, (prompt, answer) in made.items()
    }


class Bench:
    """One model, whose engine guesses or does not."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model = halve.load(arguments.model, num_threads=arguments.threads, keep=False)
        self.vocab_size = self.model.config.vocab_size
        self.runner = Told(ModelRunner(self.model.decoder, num_blocks=160))
        self.draft = None
        if arguments.draft:
            small = halve.load(arguments.draft, num_threads=arguments.threads, keep=False)
            self.draft = ModelRunner(small.decoder, num_blocks=160)
        self.core = EngineCore(self.runner, config=EngineConfig(max_num_seqs=8))
        self.speculators: dict[str, Speculator] = {}

    def speculator(self, name: str, text: Array, rate: float | None) -> Speculator:
        """Kept over the rounds, since it learns."""
        guessed = text if rate is None else some_right(text, rate, self.vocab_size)
        if name not in self.speculators:
            proposer: Proposer = NgramProposer()
            if name.startswith("draft"):
                assert self.draft is not None
                proposer = OracleDraft(self.draft, self.runner)
                proposer.text = guessed
            elif rate is not None:
                proposer = Oracle(guessed)
            self.speculators[name] = Speculator(proposer, max_tokens=MAX_TOKENS)
        return self.speculators[name]

    def turn(self, prompt: list[int], num_tokens: int, speculator: Speculator | None) -> dict[str, Any]:
        """Answer once; tokens/s from the first token on."""
        self.core.speculator = speculator
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        self.core.add(Request(request_id="a", prompt_token_ids=tuple(prompt), sampling=params))
        outputs = []
        started = 0.0
        while self.core.has_unfinished:
            outputs += self.core.step()
            started = started or (time.perf_counter() if outputs else 0.0)
        seconds = time.perf_counter() - started
        return {
            "tok_s": (len(outputs) - 1) / seconds,
            "tokens": [output.token_id for output in outputs],
            "guessed": outputs[-1].num_draft_tokens,
            "right": outputs[-1].num_accepted_tokens,
        }

    def compare(self, name: str, prompt: list[int], answer: list[int] | None, rate: float | None) -> dict[str, Any]:
        """Rounds of off and on in turns."""
        num_tokens = len(answer) if answer else self.arguments.tokens
        text = np.array([*prompt, *(answer or []), *([0] * (MAX_TOKENS + 1))], np.int32)
        self.runner.text = text if answer else None
        self.turn(prompt, 4, None)  # the prompt is in the cache from here on
        off, on, ratios = [], [], []
        for number in range(self.arguments.rounds):
            speculator = self.speculator(name, text, rate)
            turns = [None, speculator] if number % 2 else [speculator, None]
            one, other = (self.turn(prompt, num_tokens, which) for which in turns)
            plain, guessing = (one, other) if number % 2 else (other, one)
            assert plain["tokens"] == guessing["tokens"], "guessing has changed an answer"
            off.append(plain["tok_s"])
            on.append(guessing["tok_s"])
            ratios.append(guessing["tok_s"] / plain["tok_s"])
        row = {
            "case": name,
            "off_tok_s": round(statistics.median(off), 2),
            "on_tok_s": round(statistics.median(on), 2),
            "ratio": round(statistics.median(ratios), 3),
            "low": round(min(ratios), 3),
            "high": round(max(ratios), 3),
            "guessed": guessing["guessed"],
            "right": guessing["right"],
            "tokens": num_tokens,
        }
        print(row, flush=True)
        return row


def lookup_us(tokens: list[int]) -> float:
    """Microseconds of a lookup by n-grams, one for each token of a text."""
    index, growing = NgramIndex(), array("i", tokens[:2])
    started = time.perf_counter()
    for token in tokens[2:]:
        growing.append(token)
        index.guess(growing, MAX_TOKENS)
    return (time.perf_counter() - started) / len(tokens) * 1e6


def main() -> None:
    """Measure and print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.0, 0.5, 0.8, 0.95])
    parser.add_argument("--only", nargs="*", help="cases whose name begins so")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    # Ids of the small vocabulary stand for words as well in a larger one.
    cases = texts(Tokenizer.from_directory(embedded_model_path()), arguments.tokens, bench.model.config.context)
    plans: list[tuple[str, list[int], list[int] | None, float | None]] = [
        (name, *case, None) for name, case in cases.items()
    ]
    prose = cases["prose"]
    plans += [(f"oracle {rate}", *prose, rate) for rate in arguments.rates]
    if arguments.draft:
        plans += [(f"draft {rate}", *prose, rate) for rate in arguments.rates]
    plans.append(("as it says", prose[0], None, None))
    chosen = tuple(arguments.only or [""])
    rows = [bench.compare(*plan) for plan in plans if plan[0].startswith(chosen)]
    costs = max((s.costs for s in bench.speculators.values()), key=lambda c: len(c.seen()), default=None)
    print(
        json.dumps(
            {
                "question": "speculation_decode_ratio",
                "value": {row["case"]: row["ratio"] for row in rows},
                "runs": rows,
                "rounds": arguments.rounds,
                "step_ms": {n: round(s * 1e3, 2) for n, s in costs.seen()} if costs else {},
                "lookup_us": round(lookup_us(prose[0] * 4), 2),
                "model": Path(arguments.model).name,
                "draft": Path(arguments.draft).name if arguments.draft else None,
                "threads": arguments.threads,
                "hardware": platform.processor() or platform.machine(),
                "command": " ".join(sys.argv),
            }
        )
    )


if __name__ == "__main__":
    main()
