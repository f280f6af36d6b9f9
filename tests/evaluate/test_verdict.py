from dataclasses import replace

import numpy as np
import pytest

from halve.core.certificate import Measured, Quality
from halve.evaluate import answer, compare, differences, documents_needed, fails, passes, quality
from halve.evaluate.verdict import CACHE_NOISE, NOISE, noise_of


def measured(value, low=None, high=None, n=40):
    return Measured(
        value=value, low=value * 0.9 if low is None else low, high=value * 1.1 if high is None else high, n=n
    )


def with_ratio(low, high):
    return replace(RECORDED, ppl_ratio=Measured(value=(low + high) / 2, low=low, high=high, n=40))


RECORDED = Quality(
    kl_mean=measured(0.01),
    kl_p99=measured(0.2),
    flip_rate=measured(0.05),
    ppl_ratio=measured(1.004, 1.001, 1.007),
    num_documents=40,
    num_tokens=80000,
)


@pytest.mark.parametrize(
    ("low", "high", "limit", "expected"),
    [
        (0.999, 1.008, 0.01, "holds"),
        (1.001, 1.01, 0.01, "holds"),  # 1.01 - 1 is more than 0.01 in floating point
        (1.005, 1.0101, 0.01, "inconclusive"),
        (1.01, 1.02, 0.01, "inconclusive"),
        (1.0101, 1.02, 0.01, "contradicted"),
        (1.0, 1.0, 0.0, "holds"),
        (0.9, 0.95, 0.0, "holds"),
    ],
)
def test_the_whole_interval_decides(low, high, limit, expected):
    assert answer(with_ratio(low, high), limit) == expected
    certain = replace(with_ratio(low, high), kl_mean=measured(0.0))
    assert passes(certain, limit) == (expected == "holds")
    assert fails(certain, limit) == (expected == "contradicted")


def test_predictions_that_differ_do_not_pass_by_a_lower_perplexity():
    foreign = replace(with_ratio(0.11, 0.13), kl_mean=measured(1.7, 1.5, 1.9))
    assert not passes(foreign, 0.01)
    assert fails(foreign, 0.01)
    near = replace(with_ratio(0.99, 1.0), kl_mean=measured(0.0099, 0.0098, 0.00996))
    assert not passes(near, 0.01)  # exp(0.00996) - 1 is more than 0.01
    assert not fails(near, 0.01)


def test_without_a_limit_the_figures_are_measured():
    assert answer(RECORDED, None) == "measured"


def test_one_figure_alone_can_be_asked_for():
    kl_only = replace(with_ratio(1.4, 1.6), kl_mean=measured(0.001))
    ppl_only = replace(with_ratio(1.0, 1.001), kl_mean=measured(0.5))
    for quality_, good, bad in ((kl_only, "kl", "ppl"), (ppl_only, "ppl", "kl")):
        assert passes(quality_, 0.01, good)
        assert not fails(quality_, 0.01, good)
        for by in (bad, "both"):
            assert not passes(quality_, 0.01, by)
            assert fails(quality_, 0.01, by)


def test_nan_never_passes():
    assert not passes(with_ratio(float("nan"), float("nan")), 0.5)
    assert answer(with_ratio(float("nan"), float("nan")), 0.5) == "inconclusive"


def test_the_same_figures_reproduce():
    assert differences(RECORDED, RECORDED) == []


@pytest.mark.parametrize("name", ["kl_mean", "kl_p99", "flip_rate", "ppl_ratio"])
@pytest.mark.parametrize("end", ["value", "low", "high"])
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_a_figure_that_moved_by_two_percent_is_named(name, end, factor):
    figure = getattr(RECORDED, name)
    again = replace(RECORDED, **{name: replace(figure, **{end: getattr(figure, end) * factor})})
    (line,) = differences(RECORDED, again)
    assert line.startswith(f"{name}.{end}: recorded ")


def test_a_figure_that_is_not_a_number_is_named():
    again = replace(RECORDED, kl_mean=measured(float("nan")))
    assert len(differences(RECORDED, again)) == 3


def test_counts_are_compared_exactly_and_before_the_figures():
    again = replace(RECORDED, num_documents=41, num_tokens=0, confidence=0.99, kl_mean=measured(0.5))
    expected = [
        "num_documents: recorded 40, now 41",
        "num_tokens: recorded 80000, now 0",
        "confidence: recorded 0.95, now 0.99",
    ]
    assert differences(RECORDED, again) == expected
    assert len(differences(again, RECORDED)) == 3
    again = replace(RECORDED, kl_mean=measured(0.01, n=41))
    assert differences(RECORDED, again) == ["kl_mean.n: recorded 40, now 41"]


def test_tasks_must_be_the_same_and_agree_to_one_item():
    recorded = replace(RECORDED, tasks={"a": measured(0.5, n=100), "b": measured(0.5, n=100)})
    again = replace(RECORDED, tasks={"a": measured(0.505, 0.45, 0.55, n=100), "c": measured(0.5, n=100)})
    assert differences(recorded, again) == ["tasks.b: recorded, but not measured again", "tasks.c: not recorded"]
    again = replace(recorded, tasks={**recorded.tasks, "a": measured(0.52, 0.45, 0.55, n=100)})
    assert [line.split(":")[0] for line in differences(recorded, again)] == ["tasks.a.value"]


class Noisy:
    """Random logits for each document, with float32 noise of another machine."""

    vocab_size = 50

    def __init__(self, seed, change, noise, noise_seed):
        self.seed, self.change, self.noise = seed, change, noise
        self.random = np.random.default_rng(noise_seed)

    def logits(self, tokens):
        shape = (len(tokens), self.vocab_size)
        key = [self.seed, *map(int, tokens[:4])]
        logits = np.random.default_rng(key).normal(size=shape) * 3
        logits += self.change * np.random.default_rng([*key, 1]).normal(size=shape)
        yield (logits + self.noise * self.random.normal(size=shape)).astype(np.float32)


def figures(noise_seed=0, change=0.2, noise=3e-4):
    documents = [np.random.default_rng(n).integers(0, 50, 150).astype(np.int32) for n in range(20)]
    models = [Noisy(5, some, noise, [noise_seed, which]) for which, some in enumerate((0.0, change))]
    return quality(compare(*models, documents, window_tokens=256))


def test_noise_of_float32_reproduces_and_a_change_of_the_weights_does_not():
    recorded = figures()
    for noise_seed in range(1, 4):
        assert differences(recorded, figures(noise_seed)) == []
    assert differences(recorded, figures(1, noise=6e-3), activations="bf16") == []
    assert differences(recorded, figures(1, noise=6e-3)) != []
    rounded = figures(noise=4e-2)
    for noise_seed in range(1, 4):
        assert differences(rounded, figures(noise_seed, noise=4e-2), activations="int8") == []
    unlike = differences(rounded, figures(1, change=0.3, noise=4e-2), activations="int8")
    assert {"kl_mean", "ppl_ratio"} & {line.split(".")[0] for line in unlike}
    names = {line.split(".")[0] for line in differences(recorded, figures(change=0.21))}
    assert {"kl_mean", "ppl_ratio"} <= names


def test_how_many_documents_would_do_follows_from_the_interval():
    wide = replace(with_ratio(0.99, 1.012), kl_mean=measured(0.0))  # 1.001, half of the interval 0.011
    assert documents_needed(wide, 0.01) == 60  # 40 * (0.011 / 0.009)^2
    assert documents_needed(wide, 0.02) < 40
    assert documents_needed(replace(wide, kl_mean=measured(0.009, 0.008, 0.0105)), 0.01) == 100  # by KL
    assert documents_needed(replace(wide, kl_mean=measured(0.009, 0.008, 0.0105)), 0.01, "ppl") == 60


def test_no_text_is_enough_for_a_value_beyond_the_limit():
    assert documents_needed(with_ratio(1.005, 1.02), 0.01) is None
    assert documents_needed(replace(with_ratio(0.99, 1.001), kl_mean=measured(0.02)), 0.01) is None


def test_what_may_move_a_logit_is_the_most_that_activations_or_a_cache_make_of_it():
    assert noise_of("fp32") == noise_of("fp32", ("bf16", "int8")) == NOISE["fp32"]
    assert noise_of("fp32", ("int8", "int4")) == CACHE_NOISE["int4"] > noise_of("bf16", ("int8",))
    assert noise_of("int8", ("int4",)) == NOISE["int8"]
