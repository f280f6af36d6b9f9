"""The verb `bench`: what it can be asked, and the rows that come out, on the tiny model with few rounds."""

import json
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

import halve
from halve.api.bench import BenchOptions, command_of, measures_of, processors, settings_of, workload_of
from halve.api.versus import rounds
from halve.api.versus.processes import WorkerError
from halve.api.versus.rounds import last_level_cache_bytes
from halve.checkpoint import open_checkpoint
from halve.core.errors import ConfigError, DataError, KernelError, OutputError
from halve.core.record import to_json
from halve.hardware.topology import Core, Topology
from halve.kernels import native_library
from halve.models import load_config
from halve.models.embedded import SPARSE, embedded_model_path

needs_library = pytest.mark.skipif(native_library.available() is not None, reason="the C++ library is not built")


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Ceilings that take no time, of a machine that can do anything."""

    class Arena:
        def read_gb_s(self, threads):
            return 1e6

    monkeypatch.setattr(rounds, "Arena", Arena)
    monkeypatch.setattr(rounds, "gmac_s", lambda loop, threads: 1e6)


def quick(model, **options):
    return halve.bench(model, **{"rounds": 1, "repeats": 0, "disturbed_above": 1000.0, **options})


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.00,20,3\n"
        "2023-11-16 18:15:46.10,900,3\n"
        "2023-11-16 18:15:46.20,30,4\n"
        "2023-11-16 18:15:46.25,10,1\n"
    )
    return path


@needs_library
def test_a_model_alone_is_told_in_rows_that_others_can_read(tiny, trace, tmp_path):
    result = quick(tiny, trace=trace, usd_per_hour="0.36", save=tmp_path / "b.json", plot=tmp_path / "b.html")
    told = json.loads((tmp_path / "b.json").read_text())
    assert told == json.loads(to_json(result))
    wanted = {"engine", "model", "format", "metric", "value", "low", "high", "runs", "ceiling_fraction", "usd_per_mtok"}
    assert all(wanted <= run.keys() for run in told["runs"])
    rows = {run.metric: run for run in result.runs}
    assert list(rows) == [
        *("decode_b1_tok_s", "prefill_64_tok_s", "decode_b8_tok_s", "decode_b32_tok_s"),
        *("replay_tok_s", "replay_ttft_p50_ms", "replay_ttft_p95_ms"),
        *("replay_time_per_token_p50_ms", "replay_time_per_token_p95_ms", "replay_at_once_tok_s"),
        *("peak_bytes_at_batch_1", "peak_bytes"),
    ]
    assert all(run.value and run.value > 0 and not run.refused for run in result.runs)
    assert rows["decode_b8_tok_s"].usd_per_mtok == pytest.approx(100 / rows["decode_b8_tok_s"].value)
    assert rows["peak_bytes"].usd_per_mtok is None
    assert (result.workload.num_requests, result.workload.num_output_tokens) == (
        3,
        8,
    )  # one is too long for its context
    assert result.failed == ()
    assert "no figure" not in (tmp_path / "b.html").read_text()


@needs_library
def test_engines_side_by_side_have_ratios(tiny):
    result = quick(tiny, vs=[f"halve:{tiny}"], parts=["decode"], batches=[1])
    assert [run.name for run in result.runs if run.metric == "decode_b1_tok_s"] == ["halve:tiny#1", "halve:tiny#2"]
    (ratio,) = result.ratios
    assert (ratio.engine, ratio.over, ratio.runs) == ("halve:tiny#1", "halve:tiny#2", 1)
    a, b = (run.value for run in result.runs if run.metric == "decode_b1_tok_s")
    assert ratio.value == pytest.approx(a / b)
    assert result.usd_per_hour is None
    assert all(run.usd_per_mtok is None for run in result.runs)


@needs_library
def test_experts_on_disk_are_measured_beside_all_of_them_in_memory():
    sparse = embedded_model_path(SPARSE)
    result = quick(sparse, parts=["decode"], batches=[1], seconds=0.2, expert_cache="4MB", vs=[f"halve:{sparse}"])
    assert [engine.failed for engine in result.engines] == [None, None]
    assert {run.metric for run in result.runs} >= {"decode_b1_tok_s"}
    assert "--expert-cache 4MB" in result.command


def test_a_cache_of_experts_is_refused_for_a_model_without_any(tiny):
    with pytest.raises(ConfigError, match="expert_cache: LlamaForCausalLM has no experts"):
        quick(tiny, expert_cache="4MB")


@needs_library
def test_an_engine_with_another_model_is_told_and_the_others_go_on(tiny, tmp_path):
    from tests.api.tiny import make_model

    other = make_model(tmp_path / "other", num_hidden_layers=1)
    result = quick(tiny, vs=[f"halve:{other}"], parts=["prefill"])
    (failed,) = result.failed
    assert failed.failed == "it has another model: num_hidden_layers 1 instead of 2"
    assert {run.name for run in result.runs if run.value} == {"halve:tiny"}


class Engine:
    """A worker that answers at once, as its name says."""

    peak_bytes = 5
    cpu_s = 0.0

    def __init__(self, kind, path, settings, *, python, log):
        self.path, self.turns = path, 0
        self.loaded = {"version": "1", "load_s": 0.1, "shape": {}, "format": None, "how": "at once"}

    def serve(self, requests):
        self.turns += 1
        if "crashes" in self.path and self.turns > 2:
            raise WorkerError("Segmentation fault")
        short = "short" in self.path and self.turns > 2
        step = 1e-12 if "impossible" in self.path and self.turns > 2 else 0.01
        tokens = [(i, r.at, n) for i, r in enumerate(requests) for n in range(r.new_tokens - short)]
        return [(at + step * (n + 1), i) for i, at, n in tokens]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        pass


@pytest.fixture
def fakes(monkeypatch, tmp_path, tiny):
    """Engines that are fakes; returns a function that makes one's model by what it does."""
    monkeypatch.setattr(rounds, "Worker", Engine)

    def make(name):
        path = tmp_path / name
        path.symlink_to(tiny)
        return f"halve:{path}"

    return make


@needs_library
def test_an_engine_that_crashes_is_told_and_the_others_go_on(tiny, fakes, caplog):
    result = quick(tiny, vs=[fakes("crashes")], rounds=2, parts=["decode", "replay"], batches=[1, 8])
    (failed,) = result.failed
    assert (failed.name, failed.failed) == ("halve:crashes", "Segmentation fault")
    assert [run.metric for run in result.runs if run.name == "halve:crashes" and run.value] == ["peak_bytes_at_batch_1"]
    assert next(run.runs for run in result.runs if run.metric == "decode_b8_tok_s") == 2
    assert "halve:crashes: Segmentation fault" in caplog.text


@needs_library
@pytest.mark.parametrize(
    ("name", "said"),
    [("impossible", r"tokens/s would (read|take)"), ("short", "asked for 1 sequences of 3 tokens, got")],
)
def test_a_figure_that_cannot_be_is_refused_and_says_why(tiny, fakes, monkeypatch, name, said):
    monkeypatch.setattr("halve.api.bench.NEW_TOKENS", 3)
    result = quick(tiny, vs=[fakes(name)], parts=["decode"], batches=[1], rounds=3)
    run = next(run for run in result.runs if run.name == f"halve:{name}")
    assert (run.value, run.ceiling_fraction, run.runs) == (None, None, 0)
    assert len(run.refused) == 3
    assert re.search(said, run.refused[0])
    assert result.ratios == ()


@needs_library
def test_a_machine_that_is_too_busy_is_measured_again_and_then_told(tiny, fakes, monkeypatch):
    class Others:
        made = 0

        def __init__(self, workers):
            Others.made += 1

        def cores(self):
            return 1.5

    monkeypatch.setattr(rounds, "Others", Others)
    result = quick(tiny, vs=[fakes("peer")], parts=["decode", "replay"], batches=[1], repeats=2, disturbed_above=0.15)
    assert all(run.disturbed for run in result.runs if run.metric.endswith("_tok_s"))
    assert Others.made == 2 * 3 + 2 * 3  # two engines, three attempts, at both
    assert result.replays["halve:peer"][0]["attempts"] == 3
    assert result.rounds["decode_b1"][0]["attempts"] == 3


@needs_library
def test_loads_of_a_replay_follow_what_an_engine_kept(tiny, fakes, trace):
    result = quick(tiny, vs=[fakes("peer")], parts=["replay"], trace=trace, rounds=3, tpot_ms=1.0)
    loads = [replay["load"] for replay in result.replays["halve:peer"]]
    assert loads[0] is None
    assert loads[1] / loads[2] == pytest.approx(2.0)  # 10 ms a token are never 1 ms
    assert [run.value for run in result.runs if run.metric == "replay_tok_s"] == [None, None]
    assert (result.engines[1].how, result.engines[1].load_s) == ("at once", 0.1)


def test_without_the_library_nothing_is_loaded(tiny, monkeypatch):
    def absent():
        raise KernelError("not built")

    monkeypatch.setattr(rounds, "library", absent)
    monkeypatch.setattr(rounds, "Worker", None)
    with pytest.raises(KernelError, match="not built"):
        quick(tiny)


# What can be asked


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds: 0 must be 1 or more"),
        ({"repeats": -1}, "repeats: -1 must be 0 or more"),
        ({"trace_requests": 0}, "trace_requests: 0 must be 1 or more"),
        ({"trace_tokens": 1}, "trace_tokens: 1 must be 2 or more"),
        ({"seconds": 0.0}, "seconds: 0.0 must be above 0 and finite"),
        ({"tpot_ms": float("inf")}, "tpot_ms: inf must be above 0 and finite"),
        ({"disturbed_above": -0.1}, "disturbed_above: -0.1 must be 0 or more"),
        ({"batches": [1, 64]}, r"batches: \[1, 64\] must be one or more sizes from 1 to 32"),
        ({"batches": []}, r"batches: \[\] must be one or more"),
        ({"parts": ["decode", "speed"]}, "parts: speed; there are decode, prefill, replay"),
        ({"parts": []}, "parts: none; there are decode"),
        ({"usd_per_hour": "cheap"}, "usd_per_hour: 'cheap' is not a number"),
        ({"usd_per_hour": "0"}, "usd_per_hour: 0 must be above 0; leave it out where it is not known"),
        ({"plot": "bench.png"}, r"plot: bench.png must end in .html or .svg"),
        ({"round": 3}, "bench: there is no 'round'; there are"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(options, said):
    with pytest.raises(ConfigError, match=said):
        BenchOptions.of(**options)


def test_places_that_cannot_be_written_are_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(OutputError, match=r"save: .*there is no directory"):
        BenchOptions.of(save=tmp_path / "no" / "b.json")
    with pytest.raises(OutputError, match=r"logs: .* is not a directory"):
        BenchOptions.of(logs=tmp_path / "no")


def test_loose_arguments_become_what_they_mean():
    asked = BenchOptions.of(vs=["onnx:x"], peers_env=["env"], usd_per_hour=0.5, rounds=None)
    assert (asked.vs, asked.peers_env, asked.usd_per_hour, asked.rounds) == (
        ("onnx:x",),
        (Path("env"),),
        Decimal("0.5"),
        3,
    )


def test_a_trace_with_bad_columns_is_refused_before_anything_is_measured(tiny, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("when,prompt\n1,2\n")
    with pytest.raises(DataError, match=r"trace.csv:2: columns \['prompt', 'when'\] are of no trace"):
        quick(tiny, trace=path)


def test_a_trace_of_which_nothing_fits_is_refused(trace):
    said = r"trace_tokens: no request of .*azure.csv has at most 5 tokens, answer included; the shortest has 11, and"
    with pytest.raises(ConfigError, match=said):
        workload_of(BenchOptions.of(trace=trace, trace_tokens=5), 128)


def test_without_a_trace_requests_of_one_length_are_replayed():
    made = workload_of(BenchOptions.of(trace_requests=4), 128)
    assert [(r.prompt_tokens, r.output_tokens) for r in made.requests] == [(64, 64)] * 4
    assert made.service_level.time_per_token_s == 0.2


def test_measures_have_room_in_the_context_of_the_model():
    large = measures_of(BenchOptions(), 4096)
    assert [(m.name, m.batch, m.prompt, m.new_tokens) for m in large] == [
        ("decode_b1", 1, 128, 64),
        ("prefill_512", 1, 512, 1),
        ("decode_b8", 8, 128, 64),
        ("decode_b32", 32, 128, 64),
    ]
    small = measures_of(BenchOptions.of(parts=["prefill"]), 100)
    assert [(m.name, m.prompt) for m in small] == [("prefill_50", 50)]
    assert measures_of(BenchOptions.of(parts=["replay"]), 100) == []


def test_caches_have_room_for_what_is_asked(tiny):
    with open_checkpoint(tiny) as checkpoint:
        config = load_config(checkpoint)
    settings = settings_of(config, [0], 90, 32, serving=True)
    assert (settings.context, settings.cache_gb, settings.threads) == (128, 1, 1)
    large = replace(config, context=100_000, layers=config.layers * 400)
    assert settings_of(large, [0], 1000, 32, serving=True).cache_gb == 4  # 32 of 1024 tokens of 102 kB


TOPOLOGY = Topology(
    cores=tuple(Core(cpus=(cpu, cpu + 2), node=0) for cpu in range(2)), quota=None, here=None, num_online=4
)


@pytest.mark.parametrize(
    ("threads", "cpus"), [(None, [0, 1]), (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])]
)
def test_engines_get_physical_cores_before_hyper_threads(threads, cpus):
    assert processors(threads, TOPOLOGY) == cpus


@pytest.mark.parametrize("threads", [0, 5])
def test_more_threads_than_processors_are_refused(threads):
    with pytest.raises(ConfigError, match=f"threads: {threads} is not between 1 and the 4 that this process may use"):
        processors(threads, TOPOLOGY)


def test_the_recorded_command_names_files_and_not_where_they_lie(tmp_path):
    asked = BenchOptions.of(
        vs=["onnx:/data/ort/dir", "openai:http://host:80/v1#m"],
        peers_env=["/home/me/peers"],
        batches=[1, 8],
        trace="/data/azure.csv",
        usd_per_hour="0.17",
        save=tmp_path / "x.json",
    )
    assert command_of(tmp_path, asked) == (
        f"halve bench {tmp_path.name} --vs onnx:dir --vs 'openai:host:80/v1#m' --peers-env peers --batch 1,8 "
        "--trace azure.csv --usd-per-hour 0.17"
    )
    assert command_of("org/name", BenchOptions()) == "halve bench org/name"


def test_the_last_level_cache_is_the_largest_that_the_system_names(tmp_path):
    for name, size in (("index0", "32K"), ("index3", "32M"), ("index4", "?")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    assert last_level_cache_bytes(tmp_path / "none") == 0
