"""The decoder against transformers on small random checkpoints: float32 logits within 1e-4."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.models import Decoder, read_config
from tests.tools import StateDictSource, ops_under_test

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
SHAPES = {
    "llama2_mha_untied": {},
    "llama3_gqa_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "mqa_linear_rope": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "odd_head_dim": {"head_dim": 6, "num_key_value_heads": 2},
    "wide_head_dim": {"head_dim": 40},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "odd_widths": {"hidden_size": 36, "head_dim": 10, "intermediate_size": 50, "vocab_size": 97},
}


def random_model(**changes):
    torch.manual_seed(0)
    config = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


def decoder_of(model, ops):
    raw = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    return Decoder(read_config(raw).with_kv_format("fp32"), ops, StateDictSource(model.state_dict()))


@pytest.fixture(scope="module", params=SHAPES, name="pair")
def _pair(request):
    return random_model(**SHAPES[request.param])


@pytest.fixture(params=ops_under_test(), ids=lambda make: make.__name__, name="ops")
def _ops(request):
    return request.param()


def reference_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def sequences(vocab_size):
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab_size, n).tolist() for n in (1, 7, 100, 33)]


def test_prefill_of_a_ragged_batch_equals_each_sequence_alone(pair, ops):
    decoder = decoder_of(pair, ops)
    tokens = sequences(pair.config.vocab_size)
    together = ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole(tokens))))
    start = 0
    for sequence in tokens:
        part = together[start : start + len(sequence)]
        start += len(sequence)
        alone = ops.to_host(decoder.logits(decoder.hidden(TokenBatch.whole([sequence]))))
        np.testing.assert_allclose(part, alone, atol=2e-5)
        np.testing.assert_allclose(part, reference_logits(pair, sequence), atol=1e-4)


def paged_batch(chunks, tables, block_size):
    """A flat batch of (tokens, first position) chunks over the given block tables."""
    positions = np.concatenate([np.arange(p, p + len(t)) for t, p in chunks]).astype(np.int32)
    slots = np.concatenate(
        [
            [table[i // block_size] * block_size + i % block_size for i in range(p, p + len(t))]
            for (t, p), table in zip(chunks, tables, strict=True)
        ]
    )
    return TokenBatch(
        token_ids=np.concatenate([t for t, _ in chunks]).astype(np.int32),
        positions=positions,
        cu_seqlens=np.cumsum([0] + [len(t) for t, _ in chunks]).astype(np.int32),
        slot_mapping=slots.astype(np.int32),
        block_tables=np.array(tables, np.int32),
    )


def test_chunked_prefill_and_single_steps_over_scattered_blocks_equal_the_whole(pair, ops):
    decoder = decoder_of(pair, ops)
    block_size, tables = 4, [[9, 3, 14, 1, 12], [0, 7, 2, 11, 5], [8, 10, 4, 6, 13]]
    cache = decoder.new_cache(15, block_size)
    rng = np.random.default_rng(2)
    tokens = [rng.integers(0, pair.config.vocab_size, 20) for _ in tables]
    expected = [reference_logits(pair, t.tolist()) for t in tokens]
    done = [0, 0, 0]
    for lengths in [(5, 1, 8), (1, 9, 1), (3, 1, 1), (1, 1, 1), (10, 8, 9)]:
        chunks = [(t[d : d + n], d) for t, d, n in zip(tokens, done, lengths, strict=True)]
        batch = paged_batch(chunks, tables, block_size)
        logits = decoder.step(batch, cache, np.arange(batch.num_tokens))
        start = 0
        for s, n in enumerate(lengths):
            np.testing.assert_allclose(logits[start : start + n], expected[s][done[s] : done[s] + n], atol=1e-4)
            start += n
            done[s] += n
    assert done == [20, 20, 20]


def test_only_the_rows_asked_for_come_back(pair, ops):
    decoder = decoder_of(pair, ops)
    batch = paged_batch([([1, 2, 3], 0), ([4], 0)], [[0], [1]], 4)
    cache = decoder.new_cache(2, 4)
    rows = decoder.step(batch, cache, np.array([2, 3]))
    assert rows.shape == (2, pair.config.vocab_size)
    np.testing.assert_allclose(rows[0], reference_logits(pair, [1, 2, 3])[-1], atol=1e-4)


def test_gradients_flow_to_an_adapter_through_the_hook():
    model = random_model()
    ops = TorchOps()
    decoder = decoder_of(model, ops)
    delta = torch.zeros(64, requires_grad=True)
    decoder.layers[0].projections["o"].hook = lambda group, x, outputs: [outputs[0] + delta]
    ops_logits = decoder.logits(decoder.hidden(TokenBatch.whole([[1, 2, 3, 4]])))
    ops_logits.square().sum().backward()
    assert delta.grad is not None
    assert delta.grad.abs().sum() > 0
