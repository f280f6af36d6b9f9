"""How far the roofline is from figures that others published: the error that stands beside every estimate.

Each row is a published figure and the estimate of the same quantity by `roofline.py`, with its assumptions as they
ship. docs/ECONOMICS.md has the table; a test holds it to this module.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from halve.economics.catalogue import load_catalogue
from halve.economics.roofline import Assumptions, estimate, step_seconds
from halve.economics.shapes import SHAPES, ModelShape

TRT = "TensorRT-LLM, docs perf-overview"
FAST = "gpt-fast, README"
KOYEB = "Koyeb, benchmark page"
AHELPME = "ahelpme, blog"
IK = "ik_llama.cpp, discussion 164"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A figure. batch: sequences side by side at `context` tokens; None for as many as fit with 1000 tokens in and 1000
    out, prompts included.
    """

    model: str
    device: str
    weight_bits: float
    tok_s: float
    source: str
    kv_bits: float = 16
    activations: str = "bf16"
    batch: int | None = None
    context: int = 128
    sparse: bool = False

    def shape(self) -> ModelShape:
        """The model as it was run."""
        known = SHAPES[self.model]
        return known.quantized(self.weight_bits, kv_bits=self.kv_bits, activations=self.activations)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A figure beside its estimate. factor: estimate over figure."""

    published: Published
    estimated: float

    @property
    def factor(self) -> float:
        """Above 1: too high."""
        return self.estimated / self.published.tok_s


PUBLISHED = (
    Published(
        model="llama-3.1-8b", device="H100", weight_bits=8, kv_bits=8, activations="fp8", tok_s=15220, source=TRT
    ),
    Published(
        model="llama-3.1-8b", device="H200", weight_bits=8, kv_bits=8, activations="fp8", tok_s=17744, source=TRT
    ),
    Published(
        model="llama-3.3-70b", device="H200", weight_bits=8, kv_bits=8, activations="fp8", tok_s=2909, source=TRT
    ),
    Published(
        model="llama-3.3-70b", device="B200", weight_bits=4, kv_bits=8, activations="fp4", tok_s=6920, source=TRT
    ),
    Published(model="llama-2-7b", device="A100", weight_bits=16, tok_s=104.9, source=FAST, batch=1),
    Published(model="llama-2-7b", device="A100", weight_bits=8, tok_s=155.6, source=FAST, batch=1),
    Published(model="llama-2-7b", device="A100", weight_bits=4.375, tok_s=196.8, source=FAST, batch=1),
    Published(model="llama-3.1-8b", device="A100", weight_bits=16, tok_s=93.9, source=FAST, batch=1),
    Published(model="llama-3.1-8b", device="A100", weight_bits=8, tok_s=137.6, source=FAST, batch=1),
    Published(model="llama-3.1-8b", device="L40S", weight_bits=16, tok_s=44, source=KOYEB, batch=1),
    Published(model="llama-3.1-8b", device="L40S", weight_bits=16, tok_s=1124, source=KOYEB, batch=32, context=1000),
    Published(model="llama-3.1-8b", device="A100", weight_bits=16, tok_s=79, source=KOYEB, batch=1),
    Published(model="llama-3.1-8b", device="A100", weight_bits=16, tok_s=1933, source=KOYEB, batch=32, context=1000),
    Published(model="llama-3.1-8b", device="H100", weight_bits=16, tok_s=93, source=KOYEB, batch=1),
    Published(model="llama-3.1-8b", device="H100", weight_bits=16, tok_s=2462, source=KOYEB, batch=32, context=1000),
    Published(model="phi-4-14b", device="EPYC-9554", weight_bits=4.7, tok_s=28.7, source=AHELPME, batch=1),
    Published(model="phi-4-14b", device="EPYC-9554", weight_bits=8.5, tok_s=19.2, source=AHELPME, batch=1),
    Published(model="llama-3.1-8b", device="Ryzen-7950X", weight_bits=4.45, tok_s=13.48, source=IK, batch=1),
    Published(model="llama-3.1-8b", device="Ryzen-7950X", weight_bits=16, tok_s=4.27, source=IK, batch=1),
    Published(
        model="gpt-oss-20b", device="H200", weight_bits=4.25, kv_bits=8, tok_s=13858, source=TRT, sparse=True
    ),
    Published(
        model="gpt-oss-20b", device="H100", weight_bits=4.25, kv_bits=8, tok_s=11557, source=TRT, sparse=True
    ),
    Published(
        model="gpt-oss-120b", device="H200", weight_bits=4.25, kv_bits=8, tok_s=6868, source=TRT, sparse=True
    ),
    Published(
        model="gpt-oss-120b", device="B200", weight_bits=4.25, kv_bits=8, activations="fp8", tok_s=25943, source=TRT,
        sparse=True,
    ),
    Published(
        model="qwen3-30b-a3b", device="B200", weight_bits=4, kv_bits=8, activations="fp4", tok_s=26971, source=TRT,
        sparse=True,
    ),
    Published(model="mixtral-8x7b", device="A100", weight_bits=8, tok_s=97.9, source=FAST, batch=1, sparse=True),
)  # fmt: skip


def validate(assume: Assumptions | None = None, figures: Sequence[Published] = PUBLISHED) -> list[Row]:
    """Every figure beside its estimate."""
    assume, catalogue = assume or Assumptions(), load_catalogue(shipped_alone=True)
    rows = []
    for one in figures:
        device, shape = catalogue.device(one.device), one.shape()
        if one.batch is not None:
            found = one.batch / step_seconds(device, shape, one.batch, one.context, assume)
        else:
            found = estimate(device, shape, prompt_tokens=1000, output_tokens=1000, assume=assume).output_tok_s(
                1000, 1000
            )
        rows.append(Row(published=one, estimated=found))
    return rows


def error_of(rows: Sequence[Row]) -> float:
    """The factor that estimates are off by, as a rule: exp of the root of the mean square of log(estimate / figure).

    Estimates of 2 and of 1/2 of their figures are off by a factor of 2.
    """
    return math.exp(math.sqrt(sum(math.log(row.factor) ** 2 for row in rows) / len(rows)))


@cache
def known_error(*, sparse: bool) -> float:
    """The error of the roofline as it ships, for dense or for sparse models."""
    return error_of([row for row in validate() if row.published.sparse == sparse])
