"""Scales and norms that learn under codes that stay."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from halve.checkpoint import open_checkpoint
from halve.compress import apply_plan
from halve.compress.tune import loss_and_slopes, tune, write_tuned
from halve.core.errors import DataError
from halve.core.plan import Plan
from halve.formats import FORMATS
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import load_config, load_decoder, stored_formats
from halve.models.embedded import embedded_model_path
from halve.models.names import modules
from halve.search import plan_for

WINDOW = 64


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The embedded model in int3-g64, and the original beside it."""
    original = open_checkpoint(embedded_model_path())
    config = load_config(original).with_kv_format("fp32")
    folder = tmp_path_factory.mktemp("rounded") / "model"
    plan = plan_for(config, FORMATS["int3-g64"], "rtn", portable=False, source=stored_formats(original, config))
    apply_plan(original, config, plan, folder)
    yield original, config, folder
    original.close()


def decoder(folder, *, widened=False):
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint).with_kv_format("fp32")
    return checkpoint, load_decoder(checkpoint, config, TorchOps("cpu", widened=widened))


def documents(config, n=6):
    return list(np.random.default_rng(0).integers(0, config.vocab_size, (n, 2 * WINDOW)).astype(np.int32))


def test_the_loss_falls_and_codes_stay(rounded, tmp_path):
    _, config, folder = rounded
    torch.manual_seed(0)
    _, teacher = decoder(embedded_model_path(), widened=True)
    bundle, student = decoder(folder)
    text = documents(config)
    found = tune(teacher, student, text, window_tokens=WINDOW, steps=24, seconds=600.0)
    assert found.record.steps == 24
    assert found.record.last_kl < 0.9 * found.record.first_kl
    plan = Plan.from_json((Path(folder) / "halve/plan.json").read_text())
    out = tmp_path / "tuned"
    write_tuned(bundle, config, plan, found, out)
    with open_checkpoint(out) as tuned:
        assert tuned.weight_bytes == bundle.weight_bytes
        changed = 0
        for module in modules(config):
            before, after = (c.read_weight(module.name, module.shape) for c in (bundle, tuned))
            assert before.format == after.format
            assert (before.codes == after.codes).all()
            changed += bool((before.scale != after.scale).any())
            assert (np.sign(np.float32(before.scale)) == np.sign(np.float32(after.scale))).all()
        assert changed > len(list(modules(config))) / 2
        name = "model.layers.0.input_layernorm.weight"
        assert (bundle.reader.read(name) != tuned.reader.read(name)).any()
    bundle.close()


def test_the_same_seed_gives_the_same_scales_and_time_ends_it(rounded):
    _, config, folder = rounded
    _, teacher = decoder(embedded_model_path(), widened=True)
    text = documents(config, 3)
    found = []
    for _ in range(2):
        _, student = decoder(folder)
        found.append(tune(teacher, student, text, window_tokens=WINDOW, steps=2, seconds=600.0))
    for name, scale in found[0].scales.items():
        np.testing.assert_allclose(scale, found[1].scales[name], rtol=1e-5)
    ticks = iter(range(1000))
    _, student = decoder(folder)
    cut = tune(teacher, student, text, window_tokens=WINDOW, steps=99, seconds=1.0, clock=lambda: float(next(ticks)))
    assert cut.record.steps == 1


def test_without_text_there_is_nothing_to_learn(rounded):
    _, _, folder = rounded
    _, teacher = decoder(embedded_model_path(), widened=True)
    _, student = decoder(folder)
    with pytest.raises(DataError, match="holds no tokens"):
        tune(teacher, student, [], window_tokens=WINDOW, steps=1, seconds=1.0)


def test_what_is_closest_on_held_out_text_is_kept(rounded, monkeypatch):
    _, config, folder = rounded
    _, teacher = decoder(embedded_model_path(), widened=True)
    _, student = decoder(folder)
    monkeypatch.setattr("halve.compress.tune.LEARNING_RATE", 5.0)  # far too much: every step makes it worse
    monkeypatch.setattr("halve.compress.tune.CHECK_STEPS", 1)
    text, other = documents(config, 4)[:3], documents(config, 4)[3:]
    found = tune(teacher, student, text, window_tokens=WINDOW, steps=2, seconds=600.0, held_out=other)
    assert found.record.kept_step == 0
    assert found.record.held_out_kl == found.record.held_out_first_kl
    with open_checkpoint(folder) as bundle:
        for module in modules(config):
            stored = bundle.read_weight(module.name, module.shape).scale.astype(np.float32)
            np.testing.assert_array_equal(found.scales[module.name].reshape(stored.shape), stored)


def test_the_loss_and_every_slope_are_those_of_the_equation_in_float64(rounded):
    """KL of transformers' own model in double, its weights codes * s * exp(t), differentiated by t."""
    _, config, folder = rounded
    _, teacher = decoder(embedded_model_path(), widened=True)
    _, student = decoder(folder)
    ids = documents(config, 1)[0][:32]
    loss, slopes = loss_and_slopes(teacher, student, TokenBatch.whole([ids]))
    model = transformers.LlamaForCausalLM.from_pretrained(embedded_model_path()).double().eval()
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    exponents, weights = {}, {}
    with open_checkpoint(folder) as bundle:
        for module in modules(config):
            stored = bundle.read_weight(module.name, module.shape)
            ones = replace(stored, scale=np.ones_like(stored.scale))
            scale = torch.from_numpy(stored.scale.astype(np.float64))
            exponents[module.name] = t = torch.zeros_like(scale, requires_grad=True)
            wide = (scale * t.exp()).repeat_interleave(module.shape[1] // scale.shape[1], dim=1)
            weights[f"{module.name}.weight"] = torch.from_numpy(ones.dequantize().astype(np.float64)) * wide
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.no_grad():
        aim = model(tokens).logits[0].log_softmax(-1)
    found = torch.func.functional_call(model, weights, (tokens,)).logits[0].log_softmax(-1)
    expected = (aim.exp() * (aim - found)).sum(-1).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert slopes.keys() == exponents.keys()
    for name, t in exponents.items():
        most = float(t.grad.abs().max())
        np.testing.assert_allclose(slopes[name].reshape(t.shape).numpy(), t.grad.numpy(), atol=1e-4 * most)
