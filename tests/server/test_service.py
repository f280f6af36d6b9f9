"""What operators rely on: several models, keys from a file, overload, health."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from halve.core.errors import ConfigError
from halve.engine import EngineMetrics
from halve.server.config import ServerConfig
from halve.server.desk import Desk
from halve.server.served import Registry
from halve.server.store import Store

from .conftest import TINY, start

LONG = {"model": "tiny", "prompt": "x", "max_tokens": 300, "ignore_eos": True}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """Two models, keys from a file, room for two answers."""
    folder = tmp_path_factory.mktemp("crowded")
    (folder / "keys").write_text("# two of them\nsecret-of-the-first-one\n\nsecret-of-the-second-one\n")
    server = start(
        folder, f"other={TINY}", "--keys", str(folder / "keys"), "--max-num-seqs", "1", "--max-queued", "1",
        "--isolate-cache", "--deterministic",
    )  # fmt: skip
    yield server
    assert server.stop() == 0


def ask(server, key="secret-of-the-first-one", **more):
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(server.url + "/v1/completions", json={**LONG, **more}, headers=headers, timeout=60)


def test_models_are_served_under_their_names(crowded):
    headers = {"authorization": "Bearer secret-of-the-second-one"}
    names = [one["id"] for one in httpx.get(crowded.url + "/v1/models", headers=headers).json()["data"]]
    assert names == ["tiny", "other"]
    assert ask(crowded, model="other", max_tokens=1).json()["model"] == "other"


def test_too_many_are_told_to_come_again(crowded):
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: ask(crowded), range(12)))
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 503}
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert ask(crowded, max_tokens=1).status_code == 200


def test_keys_share_no_prefix_when_isolated(crowded):
    prompt = "The king looked at the old man and said nothing at all. " * 6

    def cached(key):
        return ask(crowded, key, prompt=prompt, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("secret-of-the-first-one") == 0
    assert cached("secret-of-the-second-one") == 0
    assert cached("secret-of-the-second-one") > 16


def test_health_says_when_no_step_ends(tmp_path):
    metrics = [EngineMetrics(num_running=1, num_steps=5)]
    engine = SimpleNamespace(metrics=lambda: metrics[0])
    served = SimpleNamespace(name="m", engine=engine)
    store = Store(f"sqlite:///{tmp_path}/a.db")
    desk = Desk(ServerConfig(stall_s=0.05), Registry([served]), store)
    desk._runs = [SimpleNamespace(served=served, is_finished=False)]
    assert desk.watch() is None
    time.sleep(0.1)
    assert "no step has ended" in desk.watch()
    metrics[0] = EngineMetrics(num_running=1, num_steps=6)
    assert desk.watch() is None
    store.close()


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"max_queued": 0}, {"drain_s": 0.0}, {"stall_s": float("nan")}])
def test_a_setting_out_of_range_is_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServerConfig(**wrong)


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True),
                                                ("0.0.0.0", False), ("example.org", False)])  # fmt: skip
def test_only_this_machine_is_loopback(host, loopback):
    assert ServerConfig(host=host).is_loopback is loopback
