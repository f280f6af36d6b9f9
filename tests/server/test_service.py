"""What operators rely on: several models, keys from a file, overload, health."""

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from types import SimpleNamespace

import httpx
import pytest
import sqlalchemy as sa

from halve.core.errors import ConfigError
from halve.engine import EngineMetrics
from halve.server.config import ServerConfig
from halve.server.desk import Desk
from halve.server.errors import ApiError
from halve.server.rates import RateLimits
from halve.server.running import Principal
from halve.server.served import Registry
from halve.server.store import Store
from tests.api.tiny import make_model

from .conftest import TINY, metric, start

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


def test_health_says_when_no_step_ends(tmp_path, monkeypatch):
    metrics = [EngineMetrics(num_running=1, num_steps=5)]
    engine = SimpleNamespace(metrics=lambda: metrics[0])
    served = SimpleNamespace(name="m", engine=engine)
    store = Store(f"sqlite:///{tmp_path}/a.db")
    clock = [100.0]
    monkeypatch.setattr("halve.server.desk.time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    desk = Desk(ServerConfig(stall_s=5), Registry([served]), store)
    desk._runs = [SimpleNamespace(served=served, is_finished=False)]
    assert desk.watch() is None
    clock[0] += 6
    assert "no step has ended for 6 s" in desk.watch()
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


def test_tokens_a_minute_are_counted():
    key = SimpleNamespace(id="k", requests_per_minute=None, tokens_per_minute=100)
    limits = RateLimits()
    headers = limits.take(key, 60)
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("100", "40")
    with pytest.raises(ApiError, match="60 are used and this request asks for 41") as error:
        limits.take(key, 41)
    assert error.value.status == 429
    assert 1 <= int(error.value.headers["retry-after"]) <= 60
    assert limits.take(key, 40)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(ApiError, match="ask for less") as error:
        limits.take(key, 101)
    assert "retry-after" not in error.value.headers


def test_lines_wait_for_a_database_that_does_not_answer(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/a.db")
    served = SimpleNamespace(name="m", engine=SimpleNamespace(metrics=EngineMetrics))
    settle, refuses = store.settle, [True]

    def settle_or_not(reservation, entry):
        if refuses[0]:
            raise sa.exc.OperationalError("insert", {}, Exception("gone"))
        settle(reservation, entry)

    store.settle = settle_or_not

    async def run():
        desk = Desk(ServerConfig(usd_per_hour=Decimal(3600)), Registry([served]), store)
        usage = await desk._bill(Principal(None), served, "r1", None, prompt_tokens=3, prefill_s=0.5)
        assert usage.micro_usd == 500_000
        assert store.usage()[0]["requests"] == 0
        refuses[0] = False
        await desk._write()
        await desk._write()

    asyncio.run(run())
    [sums] = store.usage()
    assert (sums["requests"], sums["usage_micro_usd"]) == (1, 500_000)
    store.close()


def test_clients_that_leave_long_prompts_give_their_blocks_back(tmp_path):
    make_model(tmp_path / "long", max_position_embeddings=16384)
    server = start(tmp_path, "--no-auth", "--cache-bytes", "30000000", "--max-queued", "300", model=tmp_path / "long")
    asked = {"model": "tiny", "prompt": [2 + i % 50 for i in range(10_000)], "max_tokens": 500, "ignore_eos": True}

    async def leave():
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:

            async def one():
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    await asyncio.wait_for(client.post("/v1/completions", json=asked), 0.5)

            await asyncio.gather(*(one() for _ in range(200)))

    asyncio.run(leave())
    short = {"model": "tiny", "prompt": [5, 6], "max_tokens": 2}
    assert httpx.post(server.url + "/v1/completions", json=short, timeout=5).status_code == 200
    until(lambda: metric(server, "halve:kv_blocks_used") == 0)
    assert server.stop() == 0


def until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
