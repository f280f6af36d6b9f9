"""Make a smaller model, then check its certificate: `python examples/optimize_and_verify.py OUT [MODEL]`.

Without a limit the format is made and measured. One to two minutes for the model that Halve ships.
"""

# ruff: noqa: T201  (an example prints)
import sys

import halve
from halve.models.embedded import embedded_model_path


def main(arguments: list[str]) -> None:
    """Print the quality loss with its interval, before and after reading it all again from disk."""
    if not arguments:
        sys.exit("usage: optimize_and_verify.py OUT [MODEL]")
    out, model = arguments[0], arguments[1] if len(arguments) > 1 else embedded_model_path()
    made = halve.optimize(model, out, format="int6-g32")
    loss, size = made.certificate.quality.ppl_ratio, made.certificate.size
    print(f"{size.original_bytes:,} -> {size.bytes:,} bytes of weights")
    print(f"quality loss {loss.value - 1:.3%} [{loss.low - 1:.3%}, {loss.high - 1:.3%}]")
    again = halve.verify(out, against=model)
    print("certificate reproduces" if not again.differences else "\n".join(again.differences))
    print(f"report: {made.report}")


if __name__ == "__main__":
    main(sys.argv[1:])
