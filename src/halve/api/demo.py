"""The verb `demo`: the whole path on the model that the package ships."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from halve.api.bundle import read_plan
from halve.api.optimize import Optimized, optimize
from halve.api.progress import SILENT, Progress
from halve.api.shape_cost import ShapeCost, shape_cost
from halve.checkpoint import open_checkpoint
from halve.core.errors import HalveError
from halve.data.mixed import KINDS, mixed_text_paths
from halve.models import load_config, stored_formats
from halve.models.embedded import embedded_model_path

PROMPT = "Once upon a time there was a little girl named"
MAX_TOKENS = 48
LIMIT = "1%"
SEARCH_TIME = "105s"  # so that all of it stays below three minutes on two cores


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One model's answer in a process of its own. peak_memory_bytes: of that whole process."""

    text: str
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Demonstrated:
    """What the demo shows. shape_cost: of the plan in layers of a larger shape; None where they can't be timed."""

    optimized: Optimized
    prompt: str
    original: Answered
    smaller: Answered
    shape_cost: ShapeCost | None = None


def demo(out: str | Path = "halve-demo", *, progress: Progress = SILENT) -> Demonstrated:
    """Optimize the embedded model under a 1 % quality limit, certify it, and let both models answer a prompt.

    A tiny model shows what quality is kept, and hardly what is saved: the plan is also timed on layers of the shape of
    Llama-3.2-1B, with random weights.

    out: where the bundle goes; a bundle that an earlier demo left there is replaced.
    """
    model = embedded_model_path()
    english = mixed_text_paths()[KINDS.index("english")]  # the one kind of text that this model was trained on
    optimized = optimize(
        model, out, max_quality_loss=LIMIT, calibration=english, time=SEARCH_TIME, force=True, progress=progress
    )
    return Demonstrated(
        optimized=optimized,
        prompt=PROMPT,
        original=_answer(model),
        smaller=_answer(optimized.path),
        shape_cost=_shape_cost(optimized.path, progress),
    )


def _shape_cost(bundle: Path, progress: Progress) -> ShapeCost | None:
    with open_checkpoint(bundle) as checkpoint:
        plan = read_plan(checkpoint)
        config = load_config(checkpoint, plan)
        return shape_cost(stored_formats(checkpoint, config), config, plan.activations.format, progress)


# Peak memory is a process's own high-water mark, so each model answers in a fresh one. Linux lets ru_maxrss of a new
# process begin at its parent's, so there VmHWM is read instead.
_ANSWER = """
import re, resource, sys
from halve.cli.main import main
sys.argv = ["halve", "generate", sys.argv[1], sys.argv[2], "--max-tokens", sys.argv[3], "--json"]
try:
    main()
finally:
    try:
        peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(peak, file=sys.stderr)
"""


def _answer(model: Path) -> Answered:
    command = [sys.executable, "-c", _ANSWER, str(model), PROMPT, str(MAX_TOKENS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise HalveError(f"generating with {model} failed: {result.stderr.strip()[-2000:]}")
    return Answered(
        text=json.loads(result.stdout)["text"], peak_memory_bytes=int(result.stderr.strip().splitlines()[-1])
    )
