"""Sampling on CUDA against the definition, which it must follow to the token but for rounding."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from halve.core.errors import HalveError, KernelError
from halve.kernels import sampling as definition
from halve.kernels.cuda import sampling
from halve.kernels.sampling import Ragged, SamplingBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 4

SETTINGS = {
    "temperature": {"temperature": np.linspace(0, 3, ROWS)},
    "top_k": {"temperature": 1.5, "top_k": [1, 3, 50, 4000]},
    "top_p": {"temperature": 1.5, "top_p": np.linspace(0.05, 1, ROWS)},
    "min_p": {"temperature": 2, "min_p": np.linspace(0, 1, ROWS)},
    "typical_p": {"temperature": 1.5, "typical_p": np.linspace(0.05, 1, ROWS)},
    "all cuts": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
    "cold": {"temperature": 1e-30},
}


def normal(vocab=200, seed=0, rows=ROWS):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 3).astype(np.float32)


def logits_of(kind, seed):
    z = normal(seed=seed)
    if kind == "ties":
        z = z.round()
        z[np.random.default_rng(seed).random(z.shape) < 0.5] = -np.inf
    return z


def batch_of(settings, seed=7, **more):
    columns = {k: list(v) if isinstance(v, range) else v for k, v in settings.items()}
    return SamplingBatch.of(ROWS, seed=[seed * 2**40 + r for r in range(ROWS)], step=range(ROWS), **columns, **more)


def on_device(z):
    return torch.from_numpy(z.copy()).to(DEVICE)


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_every_cut_draws_the_token_of_the_definition(kind, settings):
    z = logits_of(kind, seed=len(kind))
    batch = batch_of(settings)
    found = sampling.sample(on_device(z), batch).to_host()
    assert np.array_equal(found.token_ids, definition.sample(z, batch).token_ids)


def test_penalties_bias_and_what_is_allowed_give_the_bits_of_the_definition():
    z, rng = normal(seed=1), np.random.default_rng(1)
    vocab = z.shape[1]
    ids = [rng.integers(0, vocab, n) for n in range(ROWS)]
    batch = batch_of(
        {"temperature": 1.0},
        presence_penalty=rng.standard_normal(ROWS),
        frequency_penalty=rng.standard_normal(ROWS),
        repetition_penalty=rng.random(ROWS) + 0.5,
        prompt_tokens=Ragged.of(ids[::-1]),
        output_tokens=Ragged.of([np.repeat(i, 3) for i in ids]),
        bias_tokens=Ragged.of([[r, 2 * r + 1] if r else [] for r in range(ROWS)]),
        bias_values=np.where(np.arange(2 * ROWS - 2) % 3 == 0, -np.inf, 1.7).astype(np.float32),
        allowed=rng.integers(1, 2**32, (ROWS, -(-vocab // 32)), dtype=np.uint32),
    )
    adjusted = sampling.adjust(on_device(z), batch).cpu().numpy()
    for r in range(ROWS):
        assert np.array_equal(adjusted[r], definition.adjusted(z[r], batch, r))
    found = sampling.sample(on_device(z), batch).to_host()
    assert np.array_equal(found.token_ids, definition.sample(z, batch).token_ids)


def test_a_draw_depends_on_its_row_alone_and_follows_the_seed():
    z, batch = np.repeat(normal(rows=1), ROWS, 0), batch_of({"temperature": 1.0})
    together = sampling.sample(on_device(z), batch).to_host().token_ids
    for r in (0, 3):
        alone = SamplingBatch.of(1, temperature=1.0, seed=batch.seed[r], step=batch.step[r])
        assert sampling.sample(on_device(z[:1]), alone).to_host().token_ids[0] == together[r]
    assert len(set(together.tolist())) > 1


def test_seeds_and_steps_of_64_bits_give_the_numbers_of_numpy():
    """A uniform row: token t is drawn where u is from t / V on."""
    vocab = 256
    seeds = np.array([0, 1, 2**63, 2**64 - 1, 0xDEADBEEF12345678] * 2, np.uint64)
    steps = [0, 1, 2, 2**40, 2**62] * 2
    batch = SamplingBatch.of(len(seeds), temperature=1.0, seed=seeds, step=steps)
    found = sampling.sample(torch.zeros(len(seeds), vocab, device=DEVICE), batch).to_host().token_ids
    assert found.tolist() == [int(definition.uniform(s, n) * vocab) for s, n in zip(seeds, steps, strict=True)]


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_log_probabilities_and_the_likeliest_are_those_of_the_definition(kind):
    z = logits_of(kind, seed=3)
    batch = batch_of({"temperature": 1.0}, num_logprobs=[-1, 0, 5, 1])
    found, expected = sampling.sample(on_device(z), batch).to_host(), definition.sample(z, batch)
    assert np.array_equal(found.token_ids, expected.token_ids)
    assert np.array_equal(found.top_ids, expected.top_ids)
    # Weights are float32 powers of two: 2^-20 of a sum, and logits reach 16.
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=2e-6)


def test_a_vocabulary_of_several_tiles_is_one_row():
    z = normal(vocab=5001, seed=4, rows=3)
    batch = SamplingBatch.of(3, temperature=[0, 1, 4], top_p=[1, 1, 0.99], top_k=[0, 2000, 0], seed=5)
    found = sampling.sample(on_device(z), batch).to_host()
    assert np.array_equal(found.token_ids, definition.sample(z, batch).token_ids)


def test_greedy_rows_and_bf16_logits_take_the_first_of_the_largest():
    z = on_device(normal(seed=5)).to(torch.bfloat16)
    found = sampling.sample(z, SamplingBatch.greedy(ROWS)).to_host()
    assert np.array_equal(found.token_ids, z.float().cpu().numpy().argmax(1))
    assert np.isnan(found.logprobs).all()
    assert found.top_ids.shape == (ROWS, 0)
    mixed = SamplingBatch.of(ROWS, temperature=[0, 1] * (ROWS // 2))
    wide = z.float().cpu().numpy()
    assert np.array_equal(sampling.sample(z, mixed).to_host().token_ids, definition.sample(wide, mixed).token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("adjusted", [False, True])
def test_broken_and_forbidden_rows_are_told_as_the_definition_tells_them(temperature, adjusted):
    more = {"bias_tokens": Ragged.of([[0]] * ROWS), "bias_values": np.ones(ROWS, np.float32)} if adjusted else {}
    batch = SamplingBatch.of(ROWS, temperature=temperature, **more)
    for value, whole in ((np.nan, False), (np.inf, False), (-np.inf, True)):
        z = normal(seed=6)
        z[2, slice(None) if whole else 100] = value
        with pytest.raises(HalveError) as expected:
            definition.sample(z, batch)
        with pytest.raises(HalveError) as found:
            sampling.sample(on_device(z), batch).to_host()
        assert str(found.value) == str(expected.value)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # numpy's, under the interpreter
def test_a_bias_beyond_float32_is_told():
    z = np.full((1, 40), 3e38, np.float32)
    batch = SamplingBatch.of(1, bias_tokens=Ragged.of([[3]]), bias_values=np.array([3e38], np.float32))
    with pytest.raises(HalveError, match="row 0 of the sampling batch: bias and penalties take a logit beyond float32"):
        sampling.sample(on_device(z), batch).to_host()


def test_no_rows_are_no_work_and_a_batch_of_another_size_is_refused():
    empty = torch.empty(0, 30, device=DEVICE)
    batch = SamplingBatch.of(0, temperature=1.0, num_logprobs=1)
    assert sampling.sample(empty, batch).to_host().token_ids.shape == (0,)
    with pytest.raises(KernelError, match="logits: 0 rows for a batch of 2"):
        sampling.sample(empty, SamplingBatch.of(2, temperature=1.0))
