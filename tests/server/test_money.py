"""Keys, budgets and the ledger: exact, whoever asks at once and whatever is killed."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from halve.core.errors import ConfigError, OutputError
from halve.economics.ledger import LedgerEntry
from halve.server import tables as t
from halve.server.store import OverBudgetError, Store

from .conftest import halve, start

TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 5, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL of Debian's packages on loopback, in a folder of its own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    binaries = programs[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="halve-pg-"))  # pytest's own folders are closed to other users
    as_user: list[str] = []
    if os.geteuid() == 0:  # initdb refuses root
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("initdb does not run as root, and there is no user postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    made = subprocess.run(
        [*as_user, str(binaries / "initdb"), "-D", str(data), "-U", "halve", "-A", "trust"],
        check=False, capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    server = subprocess.Popen(
        [*as_user, str(binaries / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"],
        stderr=subprocess.DEVNULL, cwd=folder,
    )  # fmt: skip
    url = f"postgresql://halve@127.0.0.1:{port}/postgres"
    for _ in range(200):
        try:
            engine = sa.create_engine(url.replace("postgresql", "postgresql+psycopg"), poolclass=sa.NullPool)
            engine.connect().close()
            break
        except sa.exc.OperationalError:
            time.sleep(0.05)
    yield url
    server.send_signal(signal.SIGINT)
    server.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/a.db"
    url = request.getfixturevalue("postgres")
    store = Store(url)
    store.downgrade()
    store.close()
    return url


@pytest.fixture
def opened():
    """Opens databases, and closes them in the end."""
    stores = []

    def one(url):
        stores.append(Store(url))
        return stores[-1]

    yield one
    for store in stores:
        store.close()


def entry(key_id, request_id, micro_usd=7, tokens=10):
    return LedgerEntry(
        kind="request", at=time.time(), model="m", key_id=key_id, request_id=request_id, prompt_tokens=tokens,
        micro_usd=micro_usd, prefill_us=5,
    )  # fmt: skip


def test_tables_are_made_and_dropped_and_made_again(url, opened):
    with ThreadPoolExecutor(4) as pool:  # several servers begin at once
        stores = list(pool.map(opened, [url] * 4))
    key, secret = stores[0].add_key("a")
    assert stores[3].find_key(secret) == key
    stores[0].downgrade()
    assert not sa.inspect(stores[0].engine).has_table("keys")
    assert opened(url).all_keys() == []


def test_the_newest_version_of_the_tables_is_known():
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "src/halve/server/migrations")
    assert ScriptDirectory.from_config(config).get_current_head() == t.HEAD


def test_a_budget_holds_under_100_requests_at_once(url, opened):
    stores = [opened(url), opened(url)]
    key, _ = stores[0].add_key("a")
    stores[0].set_budget(key.id, "day", "tokens", 1000)
    stores[0].set_budget(key.id, "total", "micro_usd", 10**6)
    taken, refused, lock = [], [], threading.Lock()

    def ask(i):
        store = stores[i % 2]
        try:
            store.reserve(f"r{i}", key.id, {"tokens": 30, "micro_usd": 5})
        except OverBudgetError:
            with lock:
                refused.append(i)
            return
        with lock:
            taken.append(i)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(100)))
    assert (len(taken), len(refused)) == (33, 67)
    spent = {b["unit"]: b for b in stores[0].budgets(key.id)}
    assert (spent["tokens"]["reserved"], spent["micro_usd"]["reserved"]) == (990, 165)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: stores[i % 2].settle(f"r{i}", entry(key.id, f"r{i}")), taken))
        list(pool.map(lambda i: stores[i % 2].settle(f"r{i}", entry(key.id, f"r{i}")), taken))  # twice is once
    spent = {b["unit"]: b for b in stores[0].budgets(key.id)}
    assert (spent["tokens"]["reserved"], spent["tokens"]["spent"]) == (0, 330)
    assert (spent["micro_usd"]["reserved"], spent["micro_usd"]["spent"]) == (0, 231)
    [sums] = stores[0].usage()
    assert (sums["requests"], sums["usage_micro_usd"], sums["prompt_tokens"]) == (33, 231, 330)


def test_uses_of_a_stretch_of_time(url, opened):
    store = opened(url)
    key, _ = store.add_key("a")
    for i, (key_id, model, money) in enumerate([(key.id, "base", 7), (key.id, "base", None), (None, "adapter", 5)]):
        line = LedgerEntry(
            kind="request", at=100.0 + i, model=model, key_id=key_id, request_id=f"r{i}", prompt_tokens=6,
            completion_tokens=4, decode_us=500_000, micro_usd=money,
        )  # fmt: skip
        store.settle(None, line)
    store.settle(None, LedgerEntry(kind="idle", at=160.0, model="base", decode_us=1_000_000, micro_usd=11))
    found = store.uses()
    assert (found.start, found.end, found.idle_micro_usd) == (99.5, 160.0, 11)
    by = {use.model: use for use in found.uses}
    assert (by["base"].name, by["base"].requests, by["base"].micro_usd, by["base"].unpriced) == ("a", 2, 7, 1)
    assert (by["adapter"].key, by["adapter"].name, by["adapter"].prompt_tokens) == (None, None, 6)
    part = store.uses(101.0, 102.0)
    assert (part.start, part.end, part.idle_micro_usd) == (101.0, 102.0, 0)
    assert [use.requests for use in part.uses] == [1]
    nothing = store.uses(1000.0)
    assert (nothing.uses, nothing.end) == ((), None)


def test_what_a_dead_server_had_reserved_is_free_again(url, opened):
    dead, store = opened(url), opened(url)
    key, _ = store.add_key("a")
    store.set_budget(key.id, "month", "tokens", 100)
    dead.hello()
    dead.reserve("r", key.id, {"tokens": 100})
    store.hello()
    with pytest.raises(OverBudgetError, match="100 tokens, and 0 are left"):
        store.reserve("s", key.id, {"tokens": 1})
    store.change(sa.update(t.servers).where(t.servers.c.id == dead.server_id).values(seen_at=0))
    store.hello()
    assert store.reserve("s", key.id, {"tokens": 100})


def test_keys_are_kept_as_hashes_and_revoked(url, opened):
    store = opened(url)
    key, secret = store.add_key("team", requests_per_minute=3)
    assert secret.startswith("hk-")
    assert secret not in str(store.rows(sa.select(t.keys)))
    assert store.find_key(secret + "x") is None
    assert store.revoke("team").revoked_at is not None
    assert store.find_key(secret) is None
    with pytest.raises(ConfigError, match="there is none"):
        store.key("nobody")
    with pytest.raises(ConfigError, match="1 to 200"):
        store.add_key("")
    assert key.requests_per_minute == 3


def test_a_database_that_is_none_is_named(tmp_path):
    (tmp_path / "broken.db").write_bytes(b"no database at all, but long enough to be looked at" * 50)
    with pytest.raises(OutputError, match=r"broken\.db"):
        Store(f"sqlite:///{tmp_path}/broken.db")
    with pytest.raises(ConfigError, match="sqlite:///PATH"):
        Store("mysql://x")
    with pytest.raises(ConfigError, match="no database"):
        Store("nonsense")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with two keys, one of which has a small budget."""
    folder = tmp_path_factory.mktemp("keyed")
    db = f"sqlite:///{folder}/server.db"
    rich = json.loads(halve("keys", "add", "rich", "--db", db, "--json").stdout)
    poor = json.loads(halve("keys", "add", "poor", "--requests-per-minute", "3", "--db", db, "--json").stdout)
    assert halve("keys", "budget", "poor", "day", "--tokens", "40", "--db", db).returncode == 0
    server = start(folder, "--price-per-hour", "3600", db=db)
    yield server, rich["key"], poor["key"]
    server.stop()


def ask(server, key, path="/v1/completions", **more):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(server.url + path, json={**TEXT, **more}, headers=headers, timeout=30)


def test_every_route_but_health_needs_a_key(keyed):
    server, rich, _ = keyed
    document = httpx.get(server.url + "/openapi.json", headers={"authorization": f"Bearer {rich}"}).json()
    for path, operations in document["paths"].items():
        for method in operations:
            answer = httpx.request(method, server.url + path.replace("{id}", "x"))
            expected = 200 if path in ("/health", "/console") else 401
            assert answer.status_code == expected, (path, method)
    assert ask(server, "hk-wrong").status_code == 401
    assert httpx.post(server.url + "/v1/completions", json=TEXT, headers={"x-api-key": rich}).status_code == 200


def test_limits_and_budgets_are_told(keyed):
    server, _, poor = keyed
    first = ask(server, poor)
    assert first.headers["x-ratelimit-limit-requests"] == "3"
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    too_much = ask(server, poor, max_tokens=60)
    assert too_much.status_code == 429
    assert too_much.json()["error"]["type"] == "insufficient_quota"
    codes = [ask(server, poor) for _ in range(3)]
    limited = next(answer for answer in codes if answer.status_code == 429)
    assert limited.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(limited.headers["retry-after"]) >= 1


def test_the_ledger_adds_up_to_the_price_of_the_machine(tmp_path):
    server = start(tmp_path, "--price-per-hour", "3600", "--no-auth")
    began = time.time()
    told = []
    with ThreadPoolExecutor(8) as pool:
        asked = [{"max_tokens": n, "prompt": "word " * n} for n in range(1, 25)]
        told += [
            a.json()["usage"]["halve"]["cost_micro_usd"] for a in pool.map(lambda m: ask(server, None, **m), asked)
        ]
    cost = "usage", "allocation"
    assert server.stop() == 0
    passed = time.time() - began
    [sums] = json.loads(halve("usage", "--db", server.db, "--json").stdout)["usage"]
    assert sums["requests"] == 24
    assert sums["usage_micro_usd"] == sum(told) > 0
    usage, allocation = (sums[f"{name}_micro_usd"] / 1e6 for name in cost)
    assert usage < allocation
    assert allocation == pytest.approx(passed, abs=2.5)  # a dollar a second
    days = halve("usage", "--by", "day", "--csv", "--db", server.db).stdout.splitlines()
    assert days[0].startswith("day,requests")
    assert len(days) == 2
    assert "allocation" in halve("usage", "--db", server.db).stdout


def test_a_killed_server_loses_nothing_that_was_answered(tmp_path, opened):
    server = start(tmp_path, "--no-auth")
    answers = [ask(server, None).json()["id"] for _ in range(3)]
    kept = httpx.post(server.url + "/v1/responses", json={"model": "tiny", "input": "x", "max_output_tokens": 4}).json()
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {**TEXT, "max_tokens": 200}}
        for i in range(30)
    ]
    files = {"file": ("a.jsonl", "\n".join(map(json.dumps, lines)))}
    file = httpx.post(server.url + "/v1/files", files=files, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = httpx.post(server.url + "/v1/batches", json=asked).json()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        counts = httpx.get(f"{server.url}/v1/batches/{batch['id']}").json()["request_counts"]
        if counts["completed"]:
            break
        time.sleep(0.02)
    assert 0 < counts["completed"] < 30
    server.stop(signal.SIGKILL)
    store = opened(server.db)
    before = {(row.line, row.result) for row in store.rows(sa.select(t.batch_lines))}
    ids = {row.request_id for row in store.rows(sa.select(t.ledger))}
    assert set(answers) <= ids
    store.change(sa.update(t.servers).values(seen_at=0))  # a minute has passed
    again = start(tmp_path, "--no-auth", db=server.db)
    assert httpx.get(f"{again.url}/v1/responses/{kept['id']}").json()["id"] == kept["id"]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        batch = httpx.get(f"{again.url}/v1/batches/{batch['id']}").json()
        if batch["status"] == "completed":
            break
        time.sleep(0.1)
    assert batch["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    content = httpx.get(f"{again.url}/v1/files/{batch['output_file_id']}/content").text
    results = [json.loads(line) for line in content.splitlines()]
    assert sorted(int(r["custom_id"]) for r in results) == list(range(30))
    assert before <= {(row.line, row.result) for row in store.rows(sa.select(t.batch_lines))}
    assert again.stop() == 0


def test_a_batch_whose_key_is_revoked_fails(keyed):
    server, rich, _ = keyed
    headers = {"authorization": f"Bearer {rich}"}
    key = json.loads(halve("keys", "add", "short-lived", "--db", server.db, "--json").stdout)
    own = {"authorization": f"Bearer {key['key']}"}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {**TEXT, "max_tokens": 400}}
    lines = "\n".join(json.dumps({**line, "custom_id": str(i)}) for i in range(200))
    file = httpx.post(server.url + "/v1/files", files={"file": ("a", lines)}, data={"purpose": "batch"}, headers=own)
    asked = {"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    assert httpx.get(f"{server.url}/v1/files/{file.json()['id']}", headers=headers).status_code == 404  # another's
    halve("keys", "revoke", "short-lived", "--db", server.db)
    store = Store(server.db)
    made = {**asked, "id": "batch_x", "status": "in_progress", "expires_at": time.time() + 60, "errors": None}
    row = {"id": "batch_x", "key_id": key["id"], "status": "in_progress", "body": json.dumps(made)}
    store.change(sa.insert(t.batches).values(**row))
    deadline = time.monotonic() + 20
    while (now := store.rows(sa.select(t.batches))[0]).status != "failed" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "revoked" in json.loads(now.body)["errors"]["data"][0]["message"]
    store.close()


def test_told_to_stop_it_lets_answers_end_or_says_that_they_do_not(tmp_path, opened):
    server = start(tmp_path, "--no-auth", "--drain", "0.3")
    text = []
    with httpx.stream(
        "POST", server.url + "/v1/completions", json={**TEXT, "max_tokens": 400, "stream": True, "n": 8}, timeout=60
    ) as stream:
        chunks = stream.iter_lines()
        text.append(next(chunks))
        server.process.send_signal(signal.SIGTERM)
        text += list(chunks)
    assert server.stop() == 0
    last = [line for line in text if line.startswith("data: ")][-1]
    assert last == "data: [DONE]" or json.loads(last[6:])["error"]["code"] == "shutdown"
    store = opened(server.db)
    assert len(store.rows(sa.select(t.ledger).where(t.ledger.c.kind == "request"))) == 1


def test_starting_is_refused_with_the_reason(tmp_path):
    tiny = str(Path(__file__).resolve().parents[2] / "src/halve/models/embedded/tiny-en")
    db = f"sqlite:///{tmp_path}/a.db"
    open_to_all = halve("serve", tiny, "--host", "0.0.0.0", "--port", "0", "--db", db)
    assert (open_to_all.returncode, "halve keys add" in open_to_all.stderr) == (1, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        used = halve("serve", tiny, "--port", port, "--db", db)
    assert "another with --port" in used.stderr
    assert "/nowhere" in halve("serve", "/nowhere", "--port", "0", "--db", db).stderr
    for wrong in (("--price-per-hour", "-1"), ("--price-per-hour", "x"), ("--max-queued", "0")):
        refused = halve("serve", tiny, "--port", "0", "--db", db, *wrong)
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
    short = tmp_path / "keys"
    short.write_text("# ours\nshort\n")
    assert "line 2" in halve("serve", tiny, "--port", "0", "--db", db, "--keys", str(short)).stderr


def test_prices_are_read_exactly():
    from halve.api.serve import read_price

    assert read_price("$0.10") == Decimal("0.10")
    assert read_price(None) is None
    with pytest.raises(ConfigError):
        read_price("1e99")
