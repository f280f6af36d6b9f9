"""Engines behind HTTP: any server of OpenAI's completions with streaming, and llama.cpp's, which is started here.

Everything is timed at this end. A server that takes token ids gets them; another gets the same prompt as text. What it
counts (`usage`) is checked against what was sent and asked for, so that a server of another model is noticed. A piece
of a stream may hold several tokens or none: where pieces and tokens are not as many, tokens are taken to be spread
evenly between the first piece and the last.

This runs in a process without Halve, like `engines.py`: the standard library only.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from .engines import Arrivals, Engine, Request, Settings

LONGEST_LOAD_S = 600.0
LONGEST_ANSWER_S = 1800.0
MAY_DIFFER = 2  # tokens that a server puts around a text


class OpenAi(Engine):
    """A server that runs already: `http://HOST:PORT/v1`, with `#MODEL` behind it where it serves several.

    Raises RuntimeError for a server that can't be reached, refuses, or counts other tokens than this model's tokenizer.
    """

    how = "over HTTP, as a server"

    def __init__(self, path: str, settings: Settings) -> None:
        del settings  # it runs already
        url, _, self.model = path.partition("#")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RuntimeError(f"{path!r} is not http://HOST:PORT/v1, https or http")
        self.secure, self.address = parts.scheme == "https", parts.netloc.rpartition("@")[2]
        self.base = parts.path.rstrip("/")
        self.version = self.format = None
        self.shape = {}
        self.takes_ids: bool | None = None  # not known yet
        self.takes_ignore_eos = True
        if not self.model:
            self.model = self._only_model()

    def _only_model(self) -> str:
        served = [str(one.get("id")) for one in self._json(f"{self.base}/models").get("data", [])]
        if len(served) != 1:
            raise RuntimeError(f"it serves {served}; name one: openai:URL#MODEL")
        return served[0]

    def serve(self, requests: Sequence[Request]) -> Arrivals:
        """As `Engine.serve`; each request has a thread and a connection of its own."""
        if self.takes_ids is None:
            self._find_words(requests[0])
        found: list[list[float]] = [[] for _ in requests]
        failed: list[BaseException] = []

        def follow(number: int, request: Request) -> None:
            try:
                time.sleep(max(0.0, request.at - (time.perf_counter() - started)))
                found[number] = self._stream(request, started)
            except BaseException as error:  # told by the thread that waits
                failed.append(error)

        threads = [threading.Thread(target=follow, args=(i, r), daemon=True) for i, r in enumerate(requests)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return [(when, number) for number, times in enumerate(found) for when in times]

    def _find_words(self, request: Request) -> None:
        """Find out what this server takes: token ids or text, with `ignore_eos` or without."""
        reasons = []
        for self.takes_ids in (True, False):
            if not self.takes_ids and request.text is None:
                continue
            for self.takes_ignore_eos in (True, False):
                try:
                    self._stream(Request(request.prompt, 1, text=request.text), time.perf_counter())
                except RuntimeError as error:
                    reasons.append(str(error))
                else:
                    return
        self.takes_ids = None
        raise RuntimeError(f"{self.address}: {reasons[0]}" + (f"; {reasons[-1]}" if reasons[-1] != reasons[0] else ""))

    def _stream(self, request: Request, started: float) -> list[float]:
        """Send a request; when each of its tokens came, in seconds since `started`."""
        body = {
            "model": self.model,
            "prompt": list(request.prompt) if self.takes_ids else request.text,
            "max_tokens": request.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.takes_ignore_eos:
            body["ignore_eos"] = True
        connection, response = self._ask("POST", f"{self.base}/completions", body)
        pieces: list[float] = []
        usage: Mapping[str, Any] = {}
        try:
            for line in response:
                words = line.strip()
                if not words.startswith(b"data:") or words.endswith(b"[DONE]"):
                    continue
                event = json.loads(words[5:])
                if "error" in event:
                    raise RuntimeError(f"{self.address} failed: {event['error']}")
                if any(choice.get("text") or choice.get("tokens") for choice in event.get("choices") or ()):
                    pieces.append(time.perf_counter() - started)
                usage = event.get("usage") or usage
            ended = time.perf_counter() - started
        finally:
            connection.close()
        return self._checked(request, pieces, usage, ended)

    def _checked(self, request: Request, pieces: list[float], usage: Mapping[str, Any], ended: float) -> list[float]:
        prompt, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not isinstance(prompt, int) or not isinstance(made, int):
            raise RuntimeError("its stream ends without usage, so that its tokens can't be counted")
        if abs(prompt - len(request.prompt)) > (0 if self.takes_ids else MAY_DIFFER):
            raise RuntimeError(
                f"it counts {prompt} tokens in a prompt that has {len(request.prompt)}: it serves another model"
            )
        if len(pieces) == made:
            return pieces
        first, last = (pieces[0], pieces[-1]) if pieces else (ended, ended)
        step = (last - first) / (made - 1) if made > 1 else 0.0
        return [first + i * step for i in range(made)]

    def _json(self, path: str) -> Any:
        connection, response = self._ask("GET", path, None)
        try:
            return json.loads(response.read())
        finally:
            connection.close()

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.address, timeout=LONGEST_ANSWER_S)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
        except OSError as error:
            connection.close()
            raise RuntimeError(f"{self.address} can't be reached: {error}") from error
        if response.status != 200:
            said = response.read(500).decode(errors="replace")
            connection.close()
            raise RuntimeError(f"{self.address} answers {method} {path} with {response.status}: {said}")
        return connection, response


class LlamaServer(OpenAi):
    """llama.cpp's server with a GGUF file, started here on a free port; it ends with this process."""

    def __init__(self, path: str, settings: Settings) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [*settings.command, *_arguments(path, settings, port)]
        self.process = subprocess.Popen(command, stdout=2, preexec_fn=_end_with_parent)  # noqa: PLW1509  # before any thread
        self._wait_for(port)
        super().__init__(f"http://127.0.0.1:{port}/v1", settings)
        self.how = f"over HTTP by {os.path.basename(settings.command[0])}, {settings.sequences} slots"
        if _is_module(settings.command):
            self.how = "over HTTP by llama_cpp.server, which answers one request after another"
        else:
            self.version = self._json("/props").get("build_info")
        told = self._json(f"{self.base}/models")["data"][0].get("meta") or {}
        names = {"n_vocab": "vocab_size", "n_embd": "hidden_size"}
        self.shape = {name: told[key] for key, name in names.items() if isinstance(told.get(key), int)}

    def _wait_for(self, port: int) -> None:
        """Until it says that its model is loaded."""
        until = time.monotonic() + LONGEST_LOAD_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"its server ended with {self.process.returncode}")
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass  # it does not listen yet
            finally:
                connection.close()
            time.sleep(0.1)
        raise RuntimeError(f"its server did not load within {LONGEST_LOAD_S:.0f} s")


def _is_module(command: Sequence[str]) -> bool:
    return command[-1] == "llama_cpp.server"


def _arguments(path: str, settings: Settings, port: int) -> list[str]:
    threads = str(settings.threads)
    if _is_module(settings.command):
        words = {"model": path, "n_ctx": settings.context, "n_threads": threads, "n_threads_batch": threads}
        return [w for k, v in {**words, "host": "127.0.0.1", "port": port}.items() for w in (f"--{k}", str(v))]
    context = settings.sequences * -(-settings.context // 256) * 256
    words = {"-m": path, "-c": context, "-np": settings.sequences, "-t": threads, "-tb": threads}
    return [w for k, v in {**words, "--host": "127.0.0.1", "--port": port}.items() for w in (k, str(v))]


def _end_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


SERVERS = {"openai": OpenAi, "llama.cpp": LlamaServer}
