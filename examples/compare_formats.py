"""What every format does to one matrix of the shipped model: bits, bytes, and how far its output moves.

`python examples/compare_formats.py`. Rounded to nearest, all inputs counted alike; a whole model is judged by
`halve optimize`, which measures predictions.
"""

# ruff: noqa: T201  (an example prints)
from halve.checkpoint import open_checkpoint
from halve.compress.rounding import relative_error, round_weight
from halve.formats import FORMATS
from halve.models.embedded import embedded_model_path

MODULE = "model.layers.0.mlp.gate_proj"


def main() -> None:
    """Print one line for each format, smallest first."""
    with open_checkpoint(embedded_model_path()) as checkpoint:
        shape = checkpoint.reader.info(f"{MODULE}.weight").shape
        weight = checkpoint.read_weight(MODULE, shape).dequantize()
    print(f"{MODULE} {list(shape)}")
    print(f"{'format':10} {'bits':>7} {'bytes':>9} {'relative error':>15}")
    for fmt in sorted(FORMATS.values(), key=lambda f: f.size_bytes(shape)):
        stored = round_weight(weight, fmt, "rtn" if fmt.scaled else None)
        error = relative_error(weight, stored, None)
        print(f"{fmt.name:10} {fmt.bits_per_weight:7g} {stored.size_bytes:9,} {error:15.5f}")


if __name__ == "__main__":
    main()
