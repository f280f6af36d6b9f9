"""How an engine divides its steps for a workload, and whether guesses pay."""

from types import SimpleNamespace

import pytest

import halve
from halve.api.guesses import Counted
from halve.api.serving import best_serving, engine_for
from halve.core.errors import ConfigError
from halve.core.plan import Plan, Serving
from halve.engine import EngineConfig

USUAL = EngineConfig()


def simulated(speed, level_met=lambda engine: True):
    def run(engine):
        return SimpleNamespace(output_tok_s=speed(engine), level_met=level_met(engine))

    return run


def test_what_saves_clearly_is_kept_and_no_more():
    seen = []
    found = best_serving(simulated(lambda e: 100.0 + (e.max_num_seqs >= 64) * 10), lambda *at: seen.append(at))
    assert found == Serving(max_num_seqs=64)
    assert engine_for(found).max_num_seqs == 64
    assert seen[-1] == (12, 12)
    little = simulated(lambda e: 100.0 + (e.max_num_seqs >= 64) * 4)
    assert best_serving(little, lambda *at: None) == Serving()
    assert engine_for(Serving()) == USUAL


def test_a_level_that_is_kept_goes_before_speed():
    def keeps(engine):
        return engine.max_prefill_beside_decode <= 128

    found = best_serving(simulated(lambda e: 100.0 if not keeps(e) else 50.0, keeps), lambda *at: None)
    assert found == Serving(max_prefill_beside_decode=64)


def test_steps_hold_a_token_of_every_sequence():
    def speed(engine):
        assert engine.max_num_seqs <= engine.max_tokens_per_step
        return float(engine.max_num_seqs * 100 + 1e6 / engine.max_tokens_per_step)

    assert best_serving(simulated(speed), lambda *at: None).chosen == {"max_num_seqs": 128, "max_tokens_per_step": 128}


@pytest.mark.parametrize("name", ["max_num_seqs", "max_tokens_per_step", "max_prefill_beside_decode"])
def test_a_step_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"serving.{name}: 0 must be 1 or more"):
        Serving(**{name: 0})


def test_a_model_is_served_as_its_plan_says_unless_told(tiny):
    plan = Plan(serving=Serving(max_num_seqs=5, max_prefill_beside_decode=70))
    model = halve.load(tiny, plan=plan)
    assert (model.engine_config.max_num_seqs, model.engine_config.max_prefill_beside_decode) == (5, 70)
    assert model.engine_config.max_tokens_per_step == USUAL.max_tokens_per_step
    told = halve.load(tiny, plan=plan, engine=EngineConfig(max_num_seqs=3))
    assert told.engine_config.max_num_seqs == 3
    for one in (model, told):
        one.close()


@pytest.mark.parametrize("counted", [(100, 200, 60), (100, 30, 10), (100, 0, 0), (100, 400, 400)])
def test_the_rate_of_guesses_keeps_as_many_a_step_as_were_kept(counted):
    steps, made, right = counted
    found = Counted(steps=steps, made=made, right=right)
    assert found.length == max(1, round(made / steps))
    assert sum(found.rate**i for i in range(1, found.length + 1)) == pytest.approx(right / steps, abs=1e-9)
