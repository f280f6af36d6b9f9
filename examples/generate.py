"""Continue a prompt: `python examples/generate.py [MODEL] [PROMPT]`. Without arguments, the model that Halve ships."""

# ruff: noqa: T201  (an example prints)
import sys

import halve
from halve.models.embedded import embedded_model_path


def main(arguments: list[str]) -> None:
    """Print the answer, why it ended, and which kernels made it."""
    path = arguments[0] if arguments else embedded_model_path()
    prompt = arguments[1] if len(arguments) > 1 else "Once upon a time there was a little girl named"
    model = halve.load(path)
    answer = model.generate(prompt, max_tokens=24)
    print(prompt + answer.text)
    print(f"{answer.completion_tokens} tokens, ended by {answer.finish_reason}")
    for what, kernel in sorted(model.kernels.items()):
        print(f"{what}: {kernel}")


if __name__ == "__main__":
    main(sys.argv[1:])
