"""What does a grammar cost a token? Median and 99th percentile of mask and advance, and of compiling, in microseconds.

The text is JSON that the schema allows, tokenized by the model's tokenizer. xgrammar is measured beside llguidance
where it is installed (with transformers).

    python benchmarks/constrain.py MODEL [--rounds 20]

Prints one JSON line last.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street", "city", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
VALUE = {
    "name": "Ada Lovelace, Countess",
    "age": 36,
    "tags": ["mathematics", "the first program", "poetry"],
    "address": {"street": "12 St James's Square", "city": "London", "zip": "SW1Y 4JH"},
}


def summary(micros: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(micros)
    return {"median_us": statistics.median(ordered), "p99_us": ordered[int(0.99 * (len(ordered) - 1))]}


def llguidance(folder: Path, vocab: int, ids: list[int], rounds: int) -> dict[str, object]:
    """Ours."""
    from halve.engine.constrain import GuidanceConstrainer, json_grammar

    constrainer = GuidanceConstrainer(folder / "tokenizer.json", vocab_size=vocab, eos_token_ids=[vocab - 1])
    constrainer.check(json_grammar(None))  # reads the vocabulary
    started = time.perf_counter()
    grammar = json_grammar(SCHEMA)
    constrainer.check(grammar)
    compiled = time.perf_counter() - started
    row, tokens = np.zeros(-(-vocab // 32), np.uint32), []
    for _ in range(rounds):
        matcher = constrainer.matcher(grammar)
        for token_id in ids:
            began = time.perf_counter()
            matcher.fill(row)
            matcher.advance(token_id)
            tokens.append(1e6 * (time.perf_counter() - began))
            assert row[token_id // 32] >> token_id % 32 & 1, "the text is not what the schema allows"
    return {"compile_us": 1e6 * compiled, **summary(tokens)}


def xgrammar(folder: Path, vocab: int, ids: list[int], rounds: int) -> dict[str, object] | None:
    """The other one."""
    try:
        import xgrammar as xgr
        from transformers import AutoTokenizer
    except ImportError:
        return None
    info = xgr.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(folder), vocab_size=vocab)
    compiler = xgr.GrammarCompiler(info)
    started = time.perf_counter()
    compiled = compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False, separators=(",", ":"))
    took = time.perf_counter() - started
    bitmask, tokens = xgr.allocate_token_bitmask(1, vocab), []
    for _ in range(rounds):
        matcher = xgr.GrammarMatcher(compiled)
        for token_id in ids:
            began = time.perf_counter()
            matcher.fill_next_token_bitmask(bitmask)
            accepted = matcher.accept_token(token_id)
            tokens.append(1e6 * (time.perf_counter() - began))
            assert accepted
    return {"compile_us": 1e6 * took, **summary(tokens)}


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    vocab = json.loads((options.model / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    ids = tokenizer.encode(json.dumps(VALUE, separators=(",", ":")), add_special_tokens=False).ids
    record = {
        "question": "constrain",
        "vocab_size": vocab,
        "tokens": len(ids),
        "llguidance": llguidance(options.model, vocab, ids, options.rounds),
        "xgrammar": xgrammar(options.model, vocab, ids, options.rounds),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/constrain.py MODEL",
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
