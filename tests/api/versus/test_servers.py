"""Servers of OpenAI's completions: a tiny one that is no engine, and the ways in which it can be the wrong one."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from halve.api.versus import servers
from halve.api.versus.engines import Request, Settings
from halve.api.versus.processes import Worker
from halve.api.versus.servers import LlamaServer, OpenAi

SETTINGS = Settings(cpus=(0,), context=256, sequences=4, cache_gb=1, serving=True)


class Fake(BaseHTTPRequestHandler):
    """Streams as many pieces as tokens were asked for. The server's attributes say how it misbehaves."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.keys.append(self.headers.get("Authorization"))
        told = self.server.tells
        if isinstance(asked["prompt"], list) and not told.get("takes_ids", True):
            return self.answer(400, b"prompt must be a string")
        if "ignore_eos" in asked and not told.get("takes_ignore_eos", True):
            return self.answer(422, b"unknown field ignore_eos")
        prompt = told.get("prompt_tokens", len(asked["prompt"]) if isinstance(asked["prompt"], list) else 3)
        made = told.get("completion_tokens", asked["max_tokens"])
        events = [{"choices": [{"text": "x"}]} for _ in range(told.get("pieces", made))]
        events += told.get("events", [])
        if told.get("usage", True):
            events.append({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": made}})
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return self.answer(200, body.encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as made:
        made.models, made.tells, made.asked, made.keys = ["tiny"], {}, [], []
        made.daemon_threads, made.block_on_close = True, False
        made.url = f"http://127.0.0.1:{made.server_port}/v1"
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_tokens_are_counted_and_timed_at_this_end(server):
    client = OpenAi(server.url, SETTINGS)
    arrivals = client.serve([Request([1, 2, 3], 4), Request([4, 5], 2, at=0.02)])
    assert sorted(number for _, number in arrivals) == [0, 0, 0, 0, 1, 1]
    assert min(when for when, number in arrivals if number == 1) >= 0.02
    asked = server.asked[-1]
    assert (asked["model"], asked["temperature"], asked["stream"], asked["ignore_eos"]) == ("tiny", 0, True, True)
    assert asked["stream_options"] == {"include_usage": True}


def test_a_server_without_token_ids_gets_text(server):
    server.tells = {"takes_ids": False}
    client = OpenAi(server.url, SETTINGS)
    assert len(client.serve([Request([1, 2, 3], 2, text="a b c")])) == 2
    assert server.asked[-1]["prompt"] == "a b c"
    assert client.takes_ids is False


def test_a_server_that_refuses_what_others_take_is_asked_without(server):
    server.tells = {"takes_ignore_eos": False}
    assert len(OpenAi(server.url, SETTINGS).serve([Request([1, 2, 3], 2)])) == 2
    assert "ignore_eos" not in server.asked[-1]


def test_a_server_that_counts_other_tokens_serves_another_model(server):
    server.tells = {"prompt_tokens": 9}
    with pytest.raises(RuntimeError, match="it counts 9 tokens in a prompt that has 3: it serves another model"):
        OpenAi(server.url, SETTINGS).serve([Request([1, 2, 3], 2, text="a b c")])


def test_a_server_may_put_a_token_in_front_of_a_text(server):
    server.tells = {"takes_ids": False, "prompt_tokens": 4}
    assert len(OpenAi(server.url, SETTINGS).serve([Request([1, 2, 3], 2, text="a b c")])) == 2


def test_without_usage_tokens_cannot_be_counted(server):
    server.tells = {"usage": False}
    with pytest.raises(RuntimeError, match="its stream ends without usage"):
        OpenAi(server.url, SETTINGS).serve([Request([1, 2, 3], 2)])


def test_a_server_that_takes_neither_ids_nor_text_says_why(server):
    server.tells = {"takes_ids": False}
    with pytest.raises(RuntimeError, match=r"answers POST /v1/completions with 400: prompt must be a string"):
        OpenAi(server.url, SETTINGS).serve([Request([1, 2, 3], 2)])


def test_an_error_in_a_stream_is_told(server):
    client = OpenAi(server.url, SETTINGS)
    client.serve([Request([1, 2, 3], 1)])
    server.tells = {"events": [{"error": {"message": "out of memory"}}]}
    with pytest.raises(RuntimeError, match=r"failed: .*out of memory"):
        client.serve([Request([1, 2, 3], 2)])


def test_tokens_that_came_in_fewer_pieces_are_spread_evenly(server):
    client = OpenAi(server.url, SETTINGS)
    assert client._checked(Request([1], 5), [1.0, 3.0], {"prompt_tokens": 1, "completion_tokens": 5}, 3.5) == (
        pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    )
    assert client._checked(Request([1], 1), [], {"prompt_tokens": 1, "completion_tokens": 1}, 3.5) == [3.5]


def test_one_of_several_models_is_named_behind_the_address(server):
    server.models = ["a", "b"]
    with pytest.raises(RuntimeError, match=r"it serves \['a', 'b'\]; name one: openai:URL#MODEL"):
        OpenAi(server.url, SETTINGS)
    OpenAi(f"{server.url}#b", SETTINGS).serve([Request([1], 1)])
    assert server.asked[-1]["model"] == "b"


def test_a_key_of_the_environment_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    OpenAi(server.url, SETTINGS).serve([Request([1], 1)])
    assert server.keys[-1] == "Bearer secret"


def test_an_address_that_is_none_is_refused():
    with pytest.raises(RuntimeError, match=r"'localhost:80' is not http://HOST:PORT/v1"):
        OpenAi("localhost:80", SETTINGS)


def test_a_server_that_does_not_run_is_told():
    with pytest.raises(RuntimeError, match=r"127.0.0.1:9 can't be reached"):
        OpenAi("http://127.0.0.1:9/v1", SETTINGS)


def test_a_worker_asks_a_server(server, tmp_path):
    with Worker("openai", server.url, SETTINGS, python=Path(sys.executable), log=tmp_path / "log") as worker:
        assert worker.loaded["how"] == "over HTTP, as a server"
        assert len(worker.serve([Request([1, 2], 3)])) == 3


# llama.cpp's own, which is started here: a program that takes its arguments and answers as it does

PROGRAM = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if words["-m"].endswith("broken.gguf"):
    sys.exit("unknown architecture")
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        meta = {{"n_vocab": 7, "n_embd": int(words["-c"])}}
        body = json.dumps({{"data": [{{"id": words["-m"], "meta": meta}}], "build_info": "b7"}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
HTTPServer((words["--host"], int(words["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "llama-server"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return Settings(cpus=(0,), context=300, sequences=4, cache_gb=1, serving=True, command=(str(path),))


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_the_server_of_llama_cpp_is_started_with_room_for_all_and_ends_with_its_worker(program, tmp_path):
    with Worker("llama.cpp", "m.gguf", program, python=Path(sys.executable), log=tmp_path / "log") as worker:
        assert (worker.loaded["how"], worker.loaded["version"]) == ("over HTTP by llama-server, 4 slots", "b7")
        assert worker.loaded["shape"] == {"vocab_size": 7, "hidden_size": 4 * 512}
        pids = [int(stat.parent.name) for stat in worker._members()]
        assert len(pids) == 2
    deadline = time.monotonic() + 10  # a killed process ends when it is next given a core
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_runs, pids))


def test_a_server_that_ends_is_told(program):
    with pytest.raises(RuntimeError, match="its server ended with 1"):
        LlamaServer("broken.gguf", program)


def test_a_server_that_never_answers_is_given_up(program, monkeypatch):
    monkeypatch.setattr(servers, "LONGEST_LOAD_S", 0.0)
    started = []
    monkeypatch.setattr(servers.subprocess, "Popen", lambda *a, **k: started.append(a))
    with pytest.raises(RuntimeError, match="did not load within 0 s"):
        LlamaServer("m.gguf", program)


def test_the_server_of_the_python_package_gets_its_own_words():
    settings = Settings(
        cpus=(0, 1), context=300, sequences=4, cache_gb=1, serving=True, command=("p", "-m", "llama_cpp.server")
    )
    words = servers._arguments("m.gguf", settings, 8080)
    assert words[:4] == ["--model", "m.gguf", "--n_ctx", "300"]
    assert words[-4:] == ["--host", "127.0.0.1", "--port", "8080"]
