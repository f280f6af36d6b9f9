"""A decoder on CUDA, operation by operation and as fused steps, against the reference; without a card by Triton's
interpreter.
"""

from dataclasses import replace
from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from halve.core.errors import ConfigError, HalveError, KernelError
from halve.engine import AheadModelRunner, EngineCore, ModelRunner, Request, SamplingParams
from halve.formats import FORMATS, Weight, pack_codes
from halve.formats.base import BF16
from halve.kernels.cuda.ops import CudaOps
from halve.kernels.ops import TokenBatch
from halve.kernels.reference import TorchOps
from halve.kernels.sampling import SamplingBatch
from halve.models import Decoder, LayerSpec, ModelConfig
from halve.models.captured import BUCKETS, MOST_ROWS, CapturedSteps
from halve.models.config import Rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16
ROPE = Rope(theta=10000.0)
CONFIG = ModelConfig(
    architecture="test",
    hidden_size=128,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=96,
    context=256,
    rms_norm_eps=1e-5,
    tied=False,
    attention_bias=True,
    mlp_bias=False,
    layers=(LayerSpec(rope=ROPE),),
)
TWO_LAYERS = replace(CONFIG, layers=(LayerSpec(rope=ROPE), LayerSpec(rope=None, window=20, sinks=True)))


class Random:
    """A `WeightSource` of random matrices, each in the format that `formats` names for the end of its name."""

    def __init__(self, default="bf16", **formats):
        self.default, self.formats = default, formats

    def weight(self, module, shape):
        fmt = FORMATS[next((f for end, f in self.formats.items() if module.endswith(end)), self.default)]
        rng = np.random.default_rng(crc32(module.encode()))
        scale = None
        if fmt.kind == "float":
            if fmt.scaled:
                scale = rng.uniform(0.05, 0.15, fmt.scale_shape(shape)).astype(BF16)
                return Weight(format=fmt, shape=shape, codes=rng.standard_normal(shape).astype(fmt.dtype), scale=scale)
            return Weight(format=fmt, shape=shape, codes=(rng.standard_normal(shape) * 0.1).astype(fmt.dtype))
        codes = rng.integers(-(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1), shape).astype(np.int8)
        scale = (rng.uniform(0.5, 1.0, fmt.scale_shape(shape)) * 0.4 / (1 << fmt.bits)).astype(BF16)
        return Weight(
            format=fmt, shape=shape, codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits), scale=scale
        )

    def vector(self, name, shape):
        return np.random.default_rng(crc32(name.encode())).normal(1, 0.3, shape).astype(np.float32)

    def forget(self):
        """Nothing is held."""


class AgainGraphs:
    """Graphs where there are none: what was recorded is called again. Counts both."""

    def __init__(self):
        self.num_captured = self.num_replayed = 0

    def capture(self, run):
        self.num_captured += 1

        def replay():
            self.num_replayed += 1
            run()

        return replay


class NoGraphs:
    """A driver that records nothing."""

    def capture(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")


def batch_of(*chunks, block_tables):
    """chunks: (start, token ids) of each sequence."""
    positions = [np.arange(start, start + len(ids), dtype=np.int32) for start, ids in chunks]
    tables = np.asarray(block_tables, np.int32)
    slots = [tables[s][p // BLOCK] * BLOCK + p % BLOCK for s, p in enumerate(positions)]
    lengths = [len(ids) for _, ids in chunks]
    return TokenBatch(
        token_ids=np.concatenate([np.asarray(ids, np.int32) for _, ids in chunks]),
        positions=np.concatenate(positions),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        slot_mapping=np.concatenate(slots).astype(np.int32),
        block_tables=tables,
    )


def cuda_decoder(config=CONFIG, source=None, activations="fp32"):
    return Decoder(config, CudaOps(DEVICE, activations=activations), source or Random())


def steps_of(config=CONFIG, source=None, activations="fp32", graphs=None, num_blocks=24):
    decoder = cuda_decoder(config, source, activations)
    decoder._captured = CapturedSteps(decoder, decoder.ops, decoder.new_cache(num_blocks, BLOCK), graphs)
    return decoder, decoder._captured


TABLES = [[3, 9], [0, 5], [7, 2]]
STEPS = [
    batch_of((0, range(5, 28)), (0, [7]), (0, range(60, 71)), block_tables=TABLES),
    batch_of((23, [40]), (1, [41]), (11, [42]), block_tables=TABLES),
    batch_of((24, [50]), (2, range(20, 31)), (12, [51]), block_tables=TABLES),
    batch_of((25, [1]), (13, [2]), (13, [3]), block_tables=TABLES),
]


def last_rows(batch):
    return batch.cu_seqlens[1:] - 1


# The stream is rounded to bf16 (2^-9), which then decides roundings of activations to int8 (2^-8) and e4m3 (2^-4).
TOLERANCE = {"bf16": 0.015, "int4": 0.015, "int8": 0.04, "fp8": 0.1}
CASES = {
    "bf16": ("bf16", "fp32", "bf16"),
    "fp8": ("fp8", "fp8", "fp8"),
    "int8": ("int8", "int8", "int8"),
    "int4": ("int4-g32", "fp32", "bf16"),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_on_cuda_say_what_the_reference_says(name):
    weights, activations, kv_format = CASES[name]
    config = (TWO_LAYERS if name == "bf16" else CONFIG).with_kv_format(kv_format)
    decoder, steps = steps_of(config, Random(weights), activations, AgainGraphs())
    reference = Decoder(config, TorchOps(activations=activations), Random(weights))
    cache = reference.new_cache(24, BLOCK)
    for batch in STEPS:
        expected = reference.step(batch, cache, last_rows(batch))
        found = decoder.step(batch, steps.cache, last_rows(batch))
        assert found.dtype == np.float32
        error = np.abs(found - expected).mean() / expected.std()
        assert error < TOLERANCE[name]


def test_single_operations_say_what_fused_steps_say():
    decoder, steps = steps_of()
    cache = decoder.new_cache(24, BLOCK)
    for batch in STEPS[:2]:
        fused = decoder.step(batch, steps.cache, last_rows(batch))
        decoder.head.hook = lambda group, x, outputs: outputs
        single = decoder.step(batch, cache, last_rows(batch))
        decoder.head.hook = None
        decoder._captured = steps
        np.testing.assert_allclose(single, fused, atol=0.02 * fused.std() + np.abs(fused).max() * 2**-7)


def test_whole_sequences_without_a_cache_give_the_logits_of_the_reference():
    tokens = [list(range(3, 40)), [9, 8, 7]]
    batch = TokenBatch.whole(tokens)
    decoder, reference = cuda_decoder(), Decoder(CONFIG, TorchOps(), Random())
    found = decoder.ops.to_host(decoder.logits(decoder.hidden(batch)))
    expected = reference.ops.to_host(reference.logits(reference.hidden(batch)))
    assert np.abs(found - expected).mean() < 0.01 * expected.std()


def test_the_first_step_of_a_bucket_is_recorded_and_the_next_replayed():
    graphs = AgainGraphs()
    decoder, steps = steps_of(graphs=graphs)
    first = decoder.step(STEPS[0], steps.cache, last_rows(STEPS[0]))
    assert (graphs.num_captured, steps.recorded) == (0, [])  # prompts run launch by launch
    assert first.shape == (3, 96)
    for _ in range(2):
        decoder.step(STEPS[1], steps.cache, last_rows(STEPS[1]))
    assert (graphs.num_captured, graphs.num_replayed, steps.recorded) == (1, 1, [4])
    alone = batch_of((24, [50]), block_tables=TABLES[:1])
    decoder.step(alone, steps.cache, last_rows(alone))
    assert steps.recorded == [1, 4]


def test_a_driver_that_records_nothing_is_told_once_and_steps_run_without(caplog):
    decoder, steps = steps_of(graphs=NoGraphs())
    decoder.step(STEPS[0], steps.cache, last_rows(STEPS[0]))
    for _ in range(2):
        logits = decoder.step(STEPS[1], steps.cache, last_rows(STEPS[1]))
    assert np.isfinite(logits).all()
    assert steps.recorded == []
    told = [r.message for r in caplog.records if "can't be recorded as a graph" in r.message]
    assert told == ["steps of 4 sequences can't be recorded as a graph and run without: " + str(_error())]


def _error():
    try:
        NoGraphs().capture(None)
    except RuntimeError as error:
        return error


def test_buckets_are_dense_where_padding_costs_most():
    assert BUCKETS[:6] == (1, 2, 4, 8, 16, 32)
    assert max(later / earlier for earlier, later in pairwise(BUCKETS[6:])) <= 1.5


PROMPTS = [[5, 6, 7], [9] * 18, [3]]


def tokens(runner, **config):
    from halve.engine import EngineConfig

    core = EngineCore(runner, config=EngineConfig(**config))
    for i, prompt in enumerate(PROMPTS):
        core.add(
            Request(
                request_id=str(i), prompt_token_ids=tuple(prompt), sampling=SamplingParams(max_tokens=3, n=1 + i // 2)
            )
        )
    outputs = []
    while core.has_unfinished:
        outputs += core.step()
    core.check_invariants()
    assert core.scheduler.pool.num_used == 0
    return {
        (r, i): [o.token_id for o in outputs if (o.request_id, o.index) == (r, i)]
        for r, i in {(o.request_id, o.index) for o in outputs}
    }


def test_an_engine_that_runs_ahead_on_cuda_says_what_one_step_after_the_other_says():
    decoder = cuda_decoder()
    one_by_one = tokens(ModelRunner(decoder, num_blocks=24), max_num_seqs=3, max_tokens_per_step=16)
    ahead = tokens(AheadModelRunner(decoder, num_blocks=24), max_num_seqs=3, max_tokens_per_step=16)
    assert ahead == one_by_one
    assert len(ahead) == 4
    assert all(len(told) == 3 for told in ahead.values())


def test_a_token_in_flight_is_the_one_that_the_step_before_chose():
    decoder, steps = steps_of()
    flights = [decoder.submit(STEPS[0], steps.cache, last_rows(STEPS[0]), SamplingBatch.greedy(3))]
    flying = replace_ids(STEPS[1], [-1, -2, -3])
    flights.append(decoder.submit(flying, steps.cache, last_rows(flying), SamplingBatch.greedy(3)))
    first, second = (flight.result().token_ids for flight in flights)
    again, cache = cuda_decoder(), None
    cache = again.new_cache(24, BLOCK)
    again.sample(STEPS[0], cache, last_rows(STEPS[0]), SamplingBatch.greedy(3))
    known = replace_ids(STEPS[1], first)
    np.testing.assert_array_equal(
        again.sample(known, cache, last_rows(known), SamplingBatch.greedy(3)).token_ids, second
    )


def replace_ids(batch, ids):
    return replace(batch, token_ids=np.asarray(ids, np.int32))


def test_what_is_sampled_is_what_the_definition_draws_from_the_same_logits():
    from halve.kernels.sampling import sample

    decoder, steps = steps_of()
    drawn = SamplingBatch.of(3, temperature=0.8, seed=[1, 2, 3], top_k=20, num_logprobs=2)
    found = decoder.sample(STEPS[0], steps.cache, last_rows(STEPS[0]), drawn)
    logits = decoder.step(STEPS[0], steps.cache, last_rows(STEPS[0]))
    expected = sample(logits, drawn)
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


class Broken(Random):
    def vector(self, name, shape):
        return super().vector(name, shape) * (np.nan if name == "model.norm.weight" else 1)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_without_a_largest_are_told_by_row():
    decoder, steps = steps_of(source=Broken())
    with pytest.raises(HalveError, match=r"row 0 of the sampling batch: its logits hold NaN or \+inf"):
        decoder.sample(STEPS[0], steps.cache, last_rows(STEPS[0]), SamplingBatch.greedy(3))


def test_matrices_of_different_formats_in_one_group_run_side_by_side():
    source = Random("int8", k_proj="int4-g32", up_proj="fp8")
    decoder, steps = steps_of(source=source, activations="int8")
    reference = Decoder(CONFIG, TorchOps(activations="int8"), source)
    cache = reference.new_cache(24, BLOCK)
    expected = reference.step(STEPS[0], cache, last_rows(STEPS[0]))
    found = decoder.step(STEPS[0], steps.cache, last_rows(STEPS[0]))
    assert np.abs(found - expected).mean() < 0.05 * expected.std()
    assert {"linear int8", "linear int4-g32", "linear fp8"} <= decoder.ops.kernels.keys()


def test_what_ranks_sum_is_summed_before_it_joins_the_stream():
    decoder, steps = steps_of()
    plain = decoder.step(STEPS[1], steps.cache, last_rows(STEPS[1]))
    for projection in decoder.projections():
        projection.after = torch.clone
    decoder._captured = CapturedSteps(decoder, decoder.ops, steps.cache)
    summed = decoder.step(STEPS[1], steps.cache, last_rows(STEPS[1]))
    assert np.abs(summed - plain).mean() < 0.01 * plain.std()


def test_more_tokens_than_a_step_can_choose_are_refused():
    decoder, steps = steps_of()
    rows = np.zeros(MOST_ROWS + 1, np.int32)
    with pytest.raises(KernelError, match="rows: 65537 tokens of one step, at most 65536; lower max_num_seqs"):
        decoder.submit(STEPS[0], steps.cache, rows, SamplingBatch.greedy(len(rows)))


def test_hooks_see_single_operations_and_refuse_to_run_ahead():
    decoder, steps = steps_of()
    decoder.head.hook = lambda group, x, outputs: outputs
    with pytest.raises(KernelError, match="don't run ahead here; take `sample`"):
        decoder.submit(STEPS[0], steps.cache, last_rows(STEPS[0]), SamplingBatch.greedy(3))


def test_activations_that_do_not_exist_and_packed_matrices_are_refused():
    from halve.kernels.ops import Packed

    with pytest.raises(ConfigError, match="activations: 'int4' is not one of"):
        CudaOps(DEVICE, activations="int4")
    packed = Packed(format=FORMATS["int8"], shape=(2, 2), record={}, blob=np.zeros(1, np.uint8))
    ops = CudaOps(DEVICE)
    for prepare in (ops.linear, ops.table):
        with pytest.raises(KernelError, match="packed for other kernels can't run on CUDA"):
            prepare(packed)
    with pytest.raises(KernelError, match=r"bias has shape \(3,\); a matrix \(96, 128\) needs \(96,\)"):
        ops.linear(Random().weight("x", (96, 128)), np.zeros(3, np.float32))


def test_a_recorded_step_says_what_it_said_launch_by_launch():
    decoder, steps = steps_of(graphs=None if DEVICE == "cuda" else AgainGraphs())
    decoder.step(STEPS[0], steps.cache, last_rows(STEPS[0]))
    first = decoder.step(STEPS[1], steps.cache, last_rows(STEPS[1]))
    assert steps.recorded == [4]
    np.testing.assert_array_equal(decoder.step(STEPS[1], steps.cache, last_rows(STEPS[1])), first)
    other = batch_of((23, [41]), (1, [42]), (11, [43]), block_tables=TABLES)
    assert not np.array_equal(decoder.step(other, steps.cache, last_rows(other)), first)
    steps.replay(4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("step", [0, 1])
def test_a_step_is_launched_without_waiting_for_the_device(step):
    decoder, steps = steps_of()
    drawn = SamplingBatch.of(3, temperature=0.8, seed=[1, 2, 3], num_logprobs=1)
    for sampling in (SamplingBatch.greedy(3), drawn):
        for _ in range(2):
            decoder.submit(STEPS[step], steps.cache, last_rows(STEPS[step]), sampling).result()
        torch.cuda.set_sync_debug_mode("error")
        try:
            flight = decoder.submit(STEPS[step], steps.cache, last_rows(STEPS[step]), sampling)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert flight.result().token_ids.shape == (3,)
