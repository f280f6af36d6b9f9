"""One full report page; tests vary it with `dataclasses.replace`."""

import pytest

from halve.core.certificate import (
    Attempt,
    Certificate,
    Cost,
    Inputs,
    Measured,
    Quality,
    SealedText,
    Size,
    Speed,
)
from halve.core.plan import Plan, WeightRule, Weights
from halve.report import Candidate, GroupSize, LayerError, ReportPage, Sample


def measured(value: float, low: float, high: float, n: int = 40) -> Measured:
    return Measured(value=value, low=low, high=high, n=n)


LOSS = measured(1.0025, 1.0012, 1.00404)


@pytest.fixture
def certificate() -> Certificate:
    return Certificate(
        verdict="pass",
        max_quality_loss=0.01,
        quality=Quality(
            kl_mean=measured(0.00213, 0.0019, 0.0024),
            kl_p99=measured(0.0312, 0.027, 0.036),
            flip_rate=measured(0.0131, 0.012, 0.0144),
            ppl_ratio=LOSS,
            tasks={"arc_easy": measured(0.654, 0.63, 0.68, 1000)},
            num_documents=217,
            num_tokens=51234,
        ),
        size=Size(bytes=310_000_000, original_bytes=1_000_000_000, float32_bytes=2_000_000_000, ratio=0.155),
        cost=Cost(basis="bytes", usd_per_mtok=None, original_usd_per_mtok=None, ratio=0.297),
        speed=Speed(prefill_tok_s=measured(412, 401, 420, 7), decode_tok_s=measured(41.7, 41.1, 42.2, 7)),
        original_speed=Speed(prefill_tok_s=measured(300, 290, 310, 7), decode_tok_s=measured(22.1, 21.9, 22.4, 7)),
        inputs=Inputs(
            model_sha256="a1" * 32,
            calibration_sha256="b2" * 32,
            sealed_sha256="c3" * 32,
            device="a CPU with 2 cores",
            workload=None,
            price=None,
            versions={"halve": "0.1.0", "numpy": "2.3.4"},
            command="halve optimize model --max-quality-loss 1% --out smaller",
        ),
        sealed=SealedText(kept=True, source="text.jsonl, documents 800 to 999", window_tokens=256),
        attempts=(Attempt(plan="int4-g32 clip", ppl_ratio=LOSS, kl_mean=LOSS, passed=True),),
        max_attempts=3,
        weights_sha256="d4" * 32,
    )


@pytest.fixture
def page(certificate: Certificate) -> ReportPage:
    groups = [("embeddings", 200_000_000, "int8-g32"), ("attention", 300_000_000, "int4-g32")]
    return ReportPage(
        title="tiny, made smaller",
        model_name="someone/tiny",
        certificate=certificate,
        plan=Plan(
            weights=Weights(
                rules=(
                    WeightRule(pattern="lm_head", format="int8-g128", method="rtn"),
                    WeightRule(pattern="model.layers.*", format="int4-g32", method="clip"),
                )
            )
        ),
        architecture="LlamaForCausalLM",
        licence="apache-2.0",
        groups=tuple(
            GroupSize(
                pattern=name,
                parameters=n,
                format_before="bf16",
                bytes_before=2 * n,
                format_after=after,
                bytes_after=n // 2,
            )
            for name, n, after in groups
        ),
        layers=tuple(
            LayerError(
                name=f"model.layers.{i}.self_attn.q_proj",
                layer=i,
                group="attention",
                format="int4-g32",
                method="clip",
                relative_error=0.01 * (i + 1),
            )
            for i in range(4)
        ),
        candidates=(
            Candidate(
                format="int4-g32",
                method="clip",
                bytes_per_token=297_000_000,
                ppl_ratio=LOSS,
                outcome="fewest bytes within the limit",
                chosen=True,
            ),
            Candidate(
                format="int3-g32",
                method="rtn",
                bytes_per_token=210_000_000,
                ppl_ratio=measured(1.08, 1.07, 1.09),
                outcome="beyond the limit",
                chosen=False,
            ),
            Candidate(
                format="int4-g128",
                method="clip",
                bytes_per_token=280_000_000,
                ppl_ratio=None,
                outcome="group_size 128 does not divide in_features 172",
                chosen=False,
            ),
        ),
        samples=(Sample(prompt="Once upon", original=" a time there was", smaller=" a time they were"),),
        notes=("Speeds were taken with 2 threads.",),
        created="2026-01-31",
    )
