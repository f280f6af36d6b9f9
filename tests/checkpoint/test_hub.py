import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from halve.checkpoint.hub import ALLOWED, IGNORED, resolve
from halve.core.errors import CheckpointError


def whole(path):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"x")
    return path


class FakeHub:
    """Stands in for snapshot_download: an answer, or an error, for the cache and for the network."""

    def __init__(self, cached, remote):
        self.answers = {True: cached, False: remote}
        self.calls = []

    def __call__(self, model, *, allow_patterns, ignore_patterns, local_files_only=False):
        self.calls.append((model, local_files_only))
        answer = self.answers[local_files_only]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


NOT_CACHED = errors.LocalEntryNotFoundError("no")


def http_error(kind, status):
    return kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


def test_a_path_wins_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    hub = FakeHub(NOT_CACHED, NOT_CACHED)
    assert resolve(str(tmp_path), snapshot_download=hub) == tmp_path
    whole(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", snapshot_download=hub).samefile(tmp_path / "org" / "name")
    assert hub.calls == []


def test_a_cached_model_is_used_without_the_network(tmp_path):
    hub = FakeHub(whole(tmp_path), RuntimeError("asked the network"))
    assert resolve("org/name", snapshot_download=hub) == tmp_path
    assert hub.calls == [("org/name", True)]


def test_a_model_that_is_not_cached_is_downloaded(tmp_path):
    hub = FakeHub(NOT_CACHED, whole(tmp_path))
    assert resolve("org/name", snapshot_download=hub) == tmp_path
    assert hub.calls == [("org/name", True), ("org/name", False)]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "shard"])
def test_a_cached_model_without_all_its_weights_is_completed(tmp_path, missing):
    cached = whole(tmp_path / "cached")
    if missing == "shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "b.safetensors"}}
        (cached / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (cached / missing).unlink()
    hub = FakeHub(cached, whole(tmp_path / "remote"))
    assert resolve("org/name", snapshot_download=hub) == tmp_path / "remote"


def test_whole_weights_that_others_fetched_are_used_when_the_hub_is_out_of_reach(tmp_path, caplog):
    incomplete = errors.LocalEntryNotFoundError("README.md is missing")
    incomplete.snapshot_path = str(whole(tmp_path))
    assert resolve("org/name", snapshot_download=FakeHub(incomplete, incomplete)) == tmp_path
    assert "files beside its weights may be missing" in caplog.text
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not in the local cache"):
        resolve("org/name", snapshot_download=FakeHub(incomplete, incomplete))


@pytest.mark.parametrize(
    "name", ["", " ", "llama", "a/b/c", "./no", "../no/no", "org/na me", "org/", "x.gguf", "org/ñame"]
)
def test_what_is_neither_path_nor_name_is_refused(name):
    with pytest.raises(CheckpointError, match=r"no such directory, and not a name on the Hub \(org/name\); give"):
        resolve(name, snapshot_download=FakeHub(NOT_CACHED, NOT_CACHED))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            http_error(errors.GatedRepoError, 403),
            "access is gated; accept its terms on huggingface.co and set HF_TOKEN",
        ),
        (http_error(errors.RepositoryNotFoundError, 404), "not on the Hub, or private; check the name, set HF_TOKEN"),
        (http_error(errors.HfHubHTTPError, 500), "the Hub refused: HfHubHTTPError: refused; try again"),
        (errors.OfflineModeIsEnabled("offline"), "the Hub can't be reached; run `hf download`"),
        (NOT_CACHED, "the Hub can't be reached; run `hf download`"),
        (OSError(28, "No space left on device"), "the Hub refused: OSError: .*No space left on device"),
        (ConnectionError("reset"), "the Hub refused: ConnectionError: reset"),
        (errors.HFValidationError("bad name"), "the Hub refused: HFValidationError: bad name"),
    ],
)
def test_every_failure_of_the_hub_says_the_way_out(error, words):
    expected = f"org/name: no such directory here; as a name on the Hub: .*{words}.*directory of a copy on this machine"
    with pytest.raises(CheckpointError, match=expected):
        resolve("org/name", snapshot_download=FakeHub(NOT_CACHED, error))


def test_a_cache_that_cannot_be_read_is_an_error_too():
    with pytest.raises(CheckpointError, match="the Hub refused: PermissionError"):
        resolve("org/name", snapshot_download=FakeHub(PermissionError(13, "Permission denied"), NOT_CACHED))


@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("LICENSE", True),
        ("README.md", True),
        ("halve/plan.json", True),
        ("halve/sealed.jsonl", True),
        ("pytorch_model.bin", False),
        ("original/consolidated.00.pth", False),
        ("consolidated.safetensors", False),
        ("original/model.safetensors", False),
        ("modeling_custom.py", False),
        ("halve/evil.py", False),
        ("tokenizer.pkl", False),
        ("model.gguf", False),
    ],
)
def test_text_and_one_copy_of_the_weights_are_fetched(name, fetched):
    assert (any(fnmatch(name, p) for p in ALLOWED) and not any(fnmatch(name, p) for p in IGNORED)) == fetched


def run_offline(cache, model):
    """resolve with the real huggingface_hub over a cache made by hand, no network allowed."""
    code = f"from halve.checkpoint import resolve; print(resolve({model!r}))"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_real_cache_is_read_offline(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    snapshot = whole(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = run_offline(tmp_path, "org/name")
    assert found.stdout.strip() == str(snapshot), found.stderr
    missing = run_offline(tmp_path, "org/other")
    assert "CheckpointError: org/other: no such directory here" in missing.stderr
    assert "not in the local cache, and the Hub can't be reached; run `hf download`" in missing.stderr
