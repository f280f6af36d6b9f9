"""`expert_cache`: a model larger than its memory answers as it does in memory, and says what that took."""

import json
import re
import sys

import numpy as np
import pytest

import halve
from halve.checkpoint import TensorWriter
from halve.core.errors import ConfigError
from halve.formats.base import BF16
from halve.kernels import native_library
from halve.models import read_config
from halve.models.names import modules, vectors
from tests.api.tiny import BOS, EOS, VOCABULARY, make_model, python, tokenizer
from tests.api.tiny import halve as shell_halve

pytestmark = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")

CACHE = 26_000_000
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
PROMPT = "dabo kuma tilo nan"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """100 MB of experts in bf16."""
    path = tmp_path_factory.mktemp("large")
    config, rng = read_config(CONFIG), np.random.default_rng(0)
    specs = {f"{m.name}.weight": ("BF16", m.shape) for m in modules(config)}
    specs |= {name: ("BF16", shape) for name, shape in vectors(config)}
    with TensorWriter(path, specs) as writer:
        for name, (_, shape) in specs.items():
            values = rng.standard_normal(shape, np.float32) * 0.06 if len(shape) == 2 else np.ones(shape, np.float32)
            writer.write(name, values.astype(BF16))
    (path / "config.json").write_text(json.dumps(CONFIG))
    tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    return path


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """One cache for all of these tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HALVE_CACHE", str(folder))
        yield folder


MEASURE = """
import json, re, sys, threading, time
import halve.api.model
from halve.kernels.native import NativeOps

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

NativeOps(num_threads=1)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.003)

watcher = threading.Thread(target=watch)
watcher.start()
size = int(sys.argv[2])
model = halve.api.model.load(sys.argv[1], num_threads=1, expert_cache=size or None)
answers = model.generate_all([sys.argv[3], sys.argv[3] + " nan"], max_tokens=24, ignore_eos=True)
done.set()
watcher.join()
print(json.dumps({"tokens": [a.token_ids for a in answers], "memory": max(peak, anonymous()) - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_model_of_several_times_the_memory_answers_the_same_in_it(large):
    ran = python(MEASURE, large, CACHE, PROMPT)  # packs, too
    assert ran.code == 0, ran.err
    whole = python(MEASURE, large, 0, PROMPT)
    assert ran.json["tokens"] == whole.json["tokens"]
    experts = 2 * 64 * 3 * 256 * 512 * 2
    assert experts > 3.5 * CACHE
    assert whole.json["memory"] > experts  # what the measure would show if it were not so
    beside = 30_000_000  # tokenizer, grammar, one matrix while it is packed, attention
    assert ran.json["memory"] < CACHE + beside < experts


def test_answers_tell_what_experts_did(large):
    model = halve.load(large, num_threads=1, expert_cache="26 MB")
    whole = halve.load(large, num_threads=1)
    options = {"max_tokens": 20, "ignore_eos": True}
    prompts = [PROMPT, "nan", "tilo kuma " * 9]
    found, expected = (m.generate_all(prompts, **options) for m in (model, whole))
    assert [a.token_ids for a in found] == [a.token_ids for a in expected]
    metrics, all_there = model.engine.metrics(), whole.engine.metrics()
    assert metrics.expert_tokens == all_there.expert_tokens
    assert all_there.expert_cache is None
    use = metrics.expert_cache
    assert use.hits + use.misses == metrics.experts_per_step * 2 * metrics.num_steps
    assert 0 < use.hit_rate < 1
    assert use.read_bytes > use.size_bytes
    assert 0 < use.wait_s < metrics.busy_s

    pytest.importorskip("prometheus_client")
    from halve.api.serve import served_model
    from halve.server.metrics import Metrics
    from halve.server.served import Registry

    text = Metrics(Registry([served_model("large", model), served_model("whole", whole)])).text()
    values = dict(re.findall(r'^halve:(\w+){model_name="large"} (\S+)$', text, re.MULTILINE))
    assert float(values["expert_cache_hits_total"]) == use.hits
    assert float(values["expert_cache_misses_total"]) == use.misses
    assert float(values["expert_cache_hit_rate"]) == use.hit_rate
    assert float(values["expert_cache_read_bytes_total"]) == use.read_bytes
    assert float(values["expert_cache_wait_seconds_total"]) == use.wait_s
    assert float(values["expert_cache_ahead_right_total"]) == use.num_ahead_right <= use.num_ahead
    assert float(values["expert_cache_size_bytes"]) == use.size_bytes
    assert 'expert_cache_hits_total{model_name="whole"}' not in text
    model.close()
    whole.close()


def test_guesses_of_tokens_go_with_it(large):
    plain = halve.load(large, num_threads=1).generate(PROMPT, max_tokens=30, ignore_eos=True)
    guessing = halve.load(large, num_threads=1, expert_cache=CACHE, speculation="ngram")
    assert guessing.generate(PROMPT, max_tokens=30, ignore_eos=True).token_ids == plain.token_ids


def test_the_command_tells_it_in_json_and_in_a_line(large, tmp_path):
    asked = ["generate", large, PROMPT, "--max-tokens", 8, "--threads", 1]
    plain = shell_halve(*asked, "--json")
    assert plain.json["experts"]["cache"] is None
    ran = shell_halve(*asked, "--json", "--expert-cache", "25MiB")
    assert ran.json["token_ids"] == plain.json["token_ids"]
    experts = ran.json["experts"]
    assert experts["tokens"] == plain.json["experts"]["tokens"]
    assert (len(experts["tokens"]), len(experts["tokens"][0])) == (2, 64)
    assert experts["per_step"] >= 4
    assert experts["imbalance"] >= 1
    assert experts["cache"].keys() == {
        "size_bytes", "expert_bytes", "hits", "misses", "hit_rate", "num_ahead", "num_ahead_right", "read_bytes",
        "wait_s",
    }  # fmt: skip
    assert experts["cache"]["size_bytes"] == 25 * 2**20
    line = ran.err.splitlines()[-1]
    assert re.fullmatch(
        r"halve: experts: [\d.]+% of [\d,]+ were in memory \(26\.2 MB of 101 MB\); [\d.]+ [MG]B read"
        r"(, \d+% of [\d,]+ rightly ahead)?; [\d.]+ s of [\d.]+ s waited",
        line,
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": PROMPT}) + "\n")
    ran = shell_halve(
        "batch", large, prompts, "-o", tmp_path / "out.jsonl", "--max-tokens", 8, "--expert-cache", "26MB", "--json"
    )
    assert ran.json["experts"]["cache"]["misses"] > 0
    answer = json.loads((tmp_path / "out.jsonl").read_text())["completions"][0]
    assert answer["token_ids"] == plain.json["token_ids"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"expert_cache": "1MB"}, r"1,000,000 bytes hold fewer than the 4 experts of [\d,]+ bytes that one token runs"),
        ({"expert_cache": "lots"}, "expert_cache: 'lots' is no size; write it as 2GB"),
        ({"expert_cache": 0}, "must be 1 byte or more"),
        ({"expert_cache": CACHE, "device": "cuda"}, "device cuda has all of them in its memory; take device cpu"),
        ({"expert_cache": CACHE, "keep": False}, "read from weights kept on disk; leave it out, or keep=False"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(large, options, said):
    with pytest.raises(ConfigError, match=said):
        halve.load(large, **options)


def test_a_dense_model_is_refused_at_the_shell(tmp_path):
    ran = shell_halve("generate", make_model(tmp_path / "dense"), "dabo", "--expert-cache", "2GB")
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == (
        "halve: expert_cache: a LlamaForCausalLM without experts reads all of its weights for every token; leave the "
        "expert cache out"
    )


def test_without_the_kernels_it_is_refused(large, monkeypatch):
    monkeypatch.setattr(native_library, "available", lambda: "not built")
    with pytest.raises(ConfigError, match=r"by the C\+\+ kernels, and this model would run on torch instead"):
        halve.load(large, expert_cache=CACHE)
