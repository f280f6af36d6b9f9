"""Is a dense model, cut into experts, worth its bytes? At 25, 50 and 75 % active, before and after recovery.

For each share `halve sparsify` cuts the model and measures: perplexity and KL on sealed text, bytes a token, decoded
tokens a second, each beside the dense model in formats of no more bytes. Documents are pieces of 1500 characters or
more; the last 172 or so of --text are sealed, --lessons is what recovery reads. A token's bytes bound its speed.

    python benchmarks/sparsify.py MODEL --text FILE.gz --lessons FILE.xz [--steps 400] [--active 2,4,6] [--shared 0]

Prints a table for each share, and one JSON line last.
"""

import argparse
import gzip
import json
import lzma
import shutil
import tempfile
from pathlib import Path

import torch

from halve.api.sparsify import sparsify
from halve.core.record import to_dict

PIECE = 1500  # characters
LESSON_CHARACTERS = 4_000_000


def main() -> None:
    """Cut, recover, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lessons", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--active", default="2,4,6")
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--experts", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    folder = Path(tempfile.mkdtemp())
    try:
        for name, path, most in (("text", options.text, None), ("lessons", options.lessons, LESSON_CHARACTERS)):
            pieces(read(path, most), folder / f"{name}.jsonl")
        for active in map(int, options.active.split(",")):
            made = sparsify(
                options.model,
                folder / f"sparse-{active}",
                experts=options.experts,
                active=active,
                shared=options.shared,
                calibration=folder / "text.jsonl",
                recover_on=folder / "lessons.jsonl",
                recover_steps=options.steps,
            )
            for row in made.rows:
                kl = "" if row.kl is None else f"{row.kl.value:.4f} [{row.kl.low:.4f}, {row.kl.high:.4f}]"
                speed = 0.0 if row.decode_tok_s is None else row.decode_tok_s.value
                print(f"{row.name:46} {row.of_dense:6.3f} {row.perplexity:8.2f} {kl:26} {speed:8.1f}", flush=True)
            print(made.recovery, made.verdict, sep="\n", flush=True)
            records.append(to_dict(made) | {"path": f"sparse-{active}"})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"question": "sparsify", "model": str(options.model), "runs": records}))


def read(path: Path, most: int | None) -> str:
    """A text, plain or packed."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        return str(file.read(most))


def pieces(text: str, path: Path) -> None:
    """Write whole paragraphs as documents of PIECE characters or more, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        found = ""
        for paragraph in text.split("\n\n"):
            found += paragraph + "\n\n"
            if len(found) >= PIECE:
                file.write(json.dumps({"text": found}) + "\n")
                found = ""


if __name__ == "__main__":
    main()
