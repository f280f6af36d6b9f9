"""One model over two ranks says what it says on one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from halve.core.errors import ConfigError
from halve.engine import EngineCore, ModelRunner, Request, SamplingParams
from halve.formats import FORMATS, Weight, pack_codes
from halve.formats.base import BF16
from halve.kernels.ops import Packed
from halve.kernels.reference import TorchOps
from halve.models import Decoder, LayerSpec, ModelConfig
from halve.models.config import Rope
from halve.models.parallel import Shard, ShardSource, cut_columns, cut_rows

CONFIG = ModelConfig(
    architecture="test",
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=101,  # the last rank has fewer
    context=128,
    rms_norm_eps=1e-5,
    tied=False,
    attention_bias=True,
    mlp_bias=True,
    layers=(LayerSpec(rope=Rope(theta=10000.0), sinks=True),) * 2,
)
CASES = {
    "fp32": (CONFIG, "fp32"),
    "tied": (replace(CONFIG, tied=True, vocab_size=100), "bf16"),
    "int4-g32": (CONFIG, "int4-g32"),
    "int8": (CONFIG, "int8"),
}
PROMPTS = [[1, 2, 3, 4, 5], [7] * 20, list(range(30, 47))]


class Random:
    """A `WeightSource` of random matrices of one format."""

    def __init__(self, name):
        self.format = FORMATS[name]

    def weight(self, module, shape):
        fmt, rng = self.format, np.random.default_rng(crc32(module.encode()))
        if fmt.kind == "float":
            return Weight(format=fmt, shape=shape, codes=(rng.standard_normal(shape) * 0.2).astype(fmt.dtype))
        codes = rng.integers(-(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1), shape).astype(np.int8)
        scale = (rng.uniform(0.5, 1.0, fmt.scale_shape(shape)) * 0.4 / (1 << fmt.bits)).astype(BF16)
        return Weight(
            format=fmt, shape=shape, codes=codes if fmt.bits == 8 else pack_codes(codes, fmt.bits), scale=scale
        )

    def vector(self, name, shape):
        return np.random.default_rng(crc32(name.encode())).normal(1, 0.3, shape).astype(np.float32)

    def forget(self):
        """Nothing is held."""


def tokens(runner):
    core = EngineCore(runner)
    for i, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(max_tokens=8, n=1 + i % 2, temperature=0.7 * (i == 1), seed=i)
        core.add(Request(request_id=str(i), prompt_token_ids=tuple(prompt), sampling=sampling))
    outputs = []
    while core.has_unfinished:
        outputs += core.step()
    core.check_invariants()
    return sorted((o.request_id, o.index, i, o.token_id) for i, o in enumerate(outputs))


RANK = """
import sys
import numpy as np
import torch, torch.distributed as dist
from halve.engine import ModelRunner
from halve.kernels.reference import TorchOps
from halve.models.parallel import Leader, follow, parallel_decoder
from tests.models.test_parallel import CASES, Random, tokens

rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
for name, (config, weights) in CASES.items():
    runner = ModelRunner(parallel_decoder(config, TorchOps(), Random(weights)), num_blocks=32)
    if rank:
        follow(runner)
        continue
    leader = Leader(runner)
    print(name, tokens(leader))
    broken = np.array([[99, 0]], np.int32)
    try:
        leader.copy_blocks(broken)
    except IndexError:
        print(name, "survives")
    leader.close()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What rank 0 of 2 printed, and the log of rank 1."""
    root = Path(__file__).parents[2]
    path = tmp_path_factory.mktemp("ranks") / "rendezvous"
    command = [sys.executable, "-W", "ignore", "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(path)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return outputs[0][0].splitlines(), outputs[1][1]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_choose_the_tokens_of_one(name, told):
    config, weights = CASES[name]
    alone = tokens(ModelRunner(Decoder(config, TorchOps(), Random(weights)), num_blocks=32))
    assert f"{name} {alone}" in told[0]


def test_a_call_that_fails_leaves_leader_and_follower_going(told):
    lines, log = told
    assert [line for line in lines if line.endswith("survives")] == [f"{name} survives" for name in CASES]
    assert log.count("a step failed on rank 1") == len(CASES)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "int8", "int8-g32", "int4-g32", "int3-g32", "int5-g32"])
def test_cuts_of_a_matrix_are_cuts_of_what_it_means(name):
    fmt, rng = FORMATS[name], np.random.default_rng(1)
    if fmt.kind == "float":
        scale = rng.uniform(0.5, 1, (8, 1)).astype(BF16) if fmt.scaled else None
        weight = Weight(format=fmt, shape=(8, 96), codes=rng.standard_normal((8, 96)).astype(fmt.dtype), scale=scale)
    else:
        weight = Random(name).weight("x", (8, 96))
    whole = weight.dequantize()
    np.testing.assert_array_equal(cut_rows(weight, slice(2, 5)).dequantize(), whole[2:5])
    np.testing.assert_array_equal(cut_columns(weight, slice(32, 96), "x").dequantize(), whole[:, 32:96])


def test_a_cut_through_a_group_of_weights_is_refused_by_name():
    weight = Random("int4-g64").weight("x", (8, 128))
    with pytest.raises(
        ConfigError, match=r"layer\.o_proj: columns 32 to 64 cut a group of 64 \(int4-g64\); take fewer"
    ):
        cut_columns(weight, slice(32, 64), "layer.o_proj")


def test_sizes_that_ranks_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="num_kv_heads 2 can't be divided by 4 ranks"):
        Shard(CONFIG, 0, 4)
    with pytest.raises(ConfigError, match="rank 2 of 2 ranks; it must be 0 to 1"):
        Shard(CONFIG, 2, 2)


def test_a_matrix_that_is_packed_already_is_refused():
    class PackedSource(Random):
        def weight(self, module, shape):
            return Packed(format=self.format, shape=shape, record={}, blob=np.zeros(1, np.uint8))

    with pytest.raises(ConfigError, match="lm_head: it is packed already and can't be cut"):
        ShardSource(PackedSource("int8"), Shard(CONFIG, 0, 2)).weight("lm_head", (101, 64))
