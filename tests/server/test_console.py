"""The console in a real browser: log in, chat, watch the numbers move."""

import itertools
import json
import shutil
import subprocess
import time

import pytest
from websockets.sync.client import connect

from .conftest import halve, start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A page, by the DevTools protocol."""

    def __init__(self, socket):
        self._socket, self._numbers = socket, itertools.count(1)

    def call(self, method, **parameters):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=30))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script, seconds=20):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise AssertionError(f"never true: {script}; the page says {self.run('document.body.innerText')}")


@pytest.fixture
def page(tmp_path):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    profile = tmp_path / "profile"
    browser = subprocess.Popen(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        told = profile / "DevToolsActivePort"
        for _ in range(400):
            if told.exists() and len(told.read_text().split()) == 2:
                break
            time.sleep(0.05)
        port, path = told.read_text().split()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as socket:
            socket.send(json.dumps({"id": 0, "method": "Target.getTargets"}))
            while (answer := json.loads(socket.recv(timeout=30))).get("id") != 0:
                pass
            [target] = [t for t in answer["result"]["targetInfos"] if t["type"] == "page"]
        with connect(f"ws://127.0.0.1:{port}/devtools/page/{target['targetId']}", max_size=None) as socket:
            yield Page(socket)
    finally:
        browser.terminate()
        browser.wait(20)


def test_someone_logs_in_and_chats_and_sees_what_it_costs(page, tmp_path):
    db = f"sqlite:///{tmp_path}/server.db"
    key = json.loads(halve("keys", "add", "team", "--db", db, "--json").stdout)["key"]
    halve("keys", "add", "others", "--db", db)
    server = start(tmp_path, "--price-per-hour", "3600", db=db)
    try:
        page.call("Page.enable")
        page.call("Page.navigate", url=server.url + "/console")
        page.until("document.getElementById('login') && !document.getElementById('login').hidden")
        enter = "document.getElementById('key').value={};document.querySelector('#login form').requestSubmit()"
        page.run(enter.format(json.dumps("hk-wrong-key-of-nobody")))
        page.until("document.getElementById('why').textContent.includes('unknown')")
        page.run(enter.format(json.dumps(key)))
        page.until("!document.getElementById('all').hidden")
        page.run(
            "document.getElementById('text').value='Once upon a time';document.getElementById('ask').requestSubmit()"
        )
        page.until("document.getElementById('said').textContent.length > 60")
        page.until("document.getElementById('rows').textContent.includes('team')")
        page.until("[...document.querySelectorAll('.tile')].some(t => t.textContent.includes('requests in a minute') "
                   "&& parseInt(t.textContent) > 0)")  # fmt: skip
        assert "OpenAI" in page.run("document.getElementById('cost').textContent")
        assert "$3,600" in page.run("document.getElementById('cost').textContent")
        assert key not in page.run("location.href")
        for width in (1280, 390):
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            assert page.run("document.documentElement.scrollWidth") <= width
        reachable = page.run("[...document.querySelectorAll('button,textarea,input')].every(e => e.tabIndex >= 0)")
        assert reachable
    finally:
        server.stop()
