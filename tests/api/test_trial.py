"""Whether the kernels that serve a model agree with the reference."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from halve.api import trial
from halve.core.errors import KernelError
from halve.core.plan import Activations, KVCache, Plan


@dataclass(frozen=True)
class Of:
    """Stands for a decoder, and for its scorer."""

    name: str

    def let_go(self):
        pass


def agreement(monkeypatch, activations, apart):
    """What `_agreement` says of kernels and a reference that lie `apart`, by pairs of names, in nats a token."""
    asked = []

    def compare(one, other, documents, *, window_tokens):
        asked.append((one.name, other.name))
        return SimpleNamespace(kl=np.full(7, apart[one.name, other.name]))

    monkeypatch.setattr(trial, "compare", compare)
    monkeypatch.setattr(trial, "DecoderScorer", lambda decoder, *, keep_bytes: decoder)
    model = SimpleNamespace(
        config=SimpleNamespace(context=64),
        plan=Plan(activations=Activations(format=activations), kv_cache=KVCache(format="bf16")),
        ops=SimpleNamespace(name="native"),
        kernels={"linear int4-g32": "avx2"},
        decoder=Of("served"),
    )
    return trial._agreement(model, lambda rounded: Of(f"reference {rounded}"), []), asked


def test_kernels_within_what_rounding_usually_makes_are_not_asked_further(monkeypatch):
    found, asked = agreement(monkeypatch, "int8", {("reference int8", "served"): 1e-3})
    assert found == pytest.approx(1e-3)
    assert asked == [("reference int8", "served")]


def rounded(served, judged, between=2e-3):
    """Distances of both from what is not rounded, and between them."""
    return {
        ("reference int8", "served"): between,
        ("reference fp32", "served"): served,
        ("reference fp32", "reference int8"): judged,
    }


def test_a_model_that_answers_to_rounding_more_may_lie_as_far_from_what_is_not_rounded(monkeypatch):
    found, _ = agreement(monkeypatch, "int8", rounded(1.1e-2, 1e-2, between=1.5e-2))
    assert found == pytest.approx(1.5e-2)


@pytest.mark.parametrize(
    ("activations", "apart"),
    [
        ("int8", rounded(1.6e-2, 1e-2)),
        ("int8", rounded(np.nan, 1e-2, between=np.nan)),
        ("fp32", {("reference fp32", "served"): 2e-4}),
    ],
)
def test_kernels_beyond_it_are_a_defect(monkeypatch, activations, apart):
    with pytest.raises(KernelError, match="differ from the reference"):
        agreement(monkeypatch, activations, apart)
