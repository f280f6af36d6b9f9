"""Rotary angles against transformers', with the parameters of published models."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from halve.models.config import Rope
from halve.models.rope import RopeTable, inverse_frequencies

EPS = 2.0**-24


def llama3(factor, context=8192):
    return Rope(
        theta=500000.0,
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=context,
    )


ROPES = {
    "llama2": (Rope(theta=10000.0), 128),
    "llama3": (Rope(theta=500000.0), 128),
    "llama31": (llama3(8.0), 128),
    "llama32": (llama3(32.0), 64),
    "short_context": (llama3(4.0, 64), 32),
    "linear": (Rope(theta=10000.0, kind="linear", factor=4.0), 128),
    "linear_third": (Rope(theta=10000.0, kind="linear", factor=3.0), 80),
    "two": (Rope(theta=10000.0), 2),
}


def theirs(rope, head_dim):
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context,
        }
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


@pytest.mark.parametrize("name", ROPES)
def test_inverse_frequencies_are_those_of_transformers(name):
    rope, head_dim = ROPES[name]
    ours = inverse_frequencies(rope, head_dim)
    assert ours.dtype == np.float32
    assert ours.shape == (head_dim // 2,)
    # Two libraries' float32 powers and at most four operations after them: a few roundings each.
    np.testing.assert_allclose(ours, theirs(rope, head_dim), rtol=16 * EPS)


def test_llama3_scaling_leaves_short_waves_and_divides_long_ones():
    plain, scaled = inverse_frequencies(Rope(theta=500000.0), 128), inverse_frequencies(llama3(8.0), 128)
    wave = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wave < 8192 / 4], plain[wave < 8192 / 4])
    np.testing.assert_allclose(scaled[wave > 8192], plain[wave > 8192] / 8, rtol=2 * EPS)
    between = (wave > 8192 / 4) & (wave < 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_a_table_gives_cosine_and_sine_of_each_position():
    rope = Rope(theta=10000.0)
    positions = np.array([0, 5, 3, 1000], np.int32)
    cos, sin = RopeTable(16).at(positions, rope)
    angles = positions[:, None] * inverse_frequencies(rope, 16).astype(np.float64)
    # The angle itself is rounded to float32.
    np.testing.assert_allclose(cos, np.cos(angles), atol=1000 * EPS + 4 * EPS)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1000 * EPS + 4 * EPS)
    assert (cos.dtype, cos.shape, sin.shape) == (np.float32, (4, 8), (4, 8))


def test_a_table_that_grew_gives_the_same_bits_as_one_made_large():
    rope = Rope(theta=500000.0)
    grown, large = RopeTable(64), RopeTable(64)
    large.at(np.array([70000]), rope)
    for position in (0, 1, 2, 17, 4096, 70000):
        at = np.array([position], np.int32)
        for ours, other in zip(grown.at(at, rope), large.at(at, rope), strict=True):
            np.testing.assert_array_equal(ours, other)


def test_one_table_serves_layers_of_different_ropes():
    table, positions = RopeTable(16), np.array([7], np.int32)
    first = table.at(positions, Rope(theta=10000.0))
    second = table.at(positions, Rope(theta=500000.0))
    assert not np.array_equal(first[0], second[0])
    np.testing.assert_array_equal(table.at(positions, Rope(theta=10000.0))[0], first[0])
