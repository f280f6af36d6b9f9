"""What does the server cost beside the engine it serves, and what does it leave behind?

Two questions, each with `halve serve` in a process of its own:

    load      so many streams at once for so many seconds, a share of them cancelled: errors, memory at the beginning
              and the end, blocks of the cache that are still used, answer tokens a second
    overhead  the same prompts and answers once through the engine in Python and once through HTTP, in turn: tokens a
              second and time to the first token

    python benchmarks/serve_load.py MODEL [--streams 64] [--seconds 600] [--cancel 0.2] [--tokens 64] [--rounds 3]

Prints one JSON line last.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

import halve
from halve.engine import SamplingParams

PROMPT = "The king looked at the old man, and the old man looked at the sea. " * 4


def start(model: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server of a model, and its address."""
    log = folder / "log"
    arguments = ["--port", "0", "--db", f"sqlite:///{folder}/a.db", "--no-auth", "--price-per-hour", "0.1"]
    with log.open("w") as file:
        command = [sys.executable, "-m", "halve.cli", "serve", f"m={model}", *arguments]
        process = subprocess.Popen(command, stderr=file, stdout=file)
    while not (found := re.search(r" at (http://\S+)/v1", log.read_text())):
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.05)
    for _ in range(200):
        try:
            httpx.get(found[1] + "/health")
            break
        except httpx.TransportError:
            time.sleep(0.05)
    return process, found[1]


def memory_bytes(process: subprocess.Popen[bytes]) -> int:
    """Memory that a process holds."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])  # type: ignore[index]


async def stream(client: httpx.AsyncClient, prompt: str, tokens: int, cancel: float | None) -> tuple[float, int]:
    """Ask once. Returns the seconds to the first token and the tokens; leaves after `cancel` tokens' share."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    started, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code} {(await answer.aread())[:200]!r}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                if "error" in line[:10]:
                    raise RuntimeError(line)
                first = first or time.perf_counter() - started
                count += 1
                if cancel is not None and count > cancel * tokens:
                    break
    return first, count


async def load(url: str, process: subprocess.Popen[bytes], options: argparse.Namespace) -> dict[str, object]:
    """Streams at once for some time."""
    rng, errors, requests, tokens, begun = random.Random(0), [], 0, 0, 0
    limits = httpx.Limits(max_connections=options.streams + 8)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        end = time.perf_counter() + options.seconds

        async def one() -> None:
            nonlocal requests, tokens
            while time.perf_counter() < end:
                cancel = rng.random() if rng.random() < options.cancel else None
                prompt = PROMPT[: rng.randrange(20, len(PROMPT))]
                try:
                    _, count = await stream(client, prompt, rng.randrange(1, 2 * options.tokens), cancel)
                    requests, tokens = requests + 1, tokens + count
                except Exception as error:
                    errors.append(repr(error)[:200])

        async def watch() -> int:
            await asyncio.sleep(min(30, options.seconds / 4))
            return memory_bytes(process)

        _, begun = await asyncio.gather(asyncio.gather(*(one() for _ in range(options.streams))), watch())
        await asyncio.sleep(2)
        metrics = (await client.get("/metrics")).text
    used = sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("halve:kv_blocks_used{"))
    ended = memory_bytes(process)
    return {
        "requests": requests, "errors": len(errors), "first_errors": errors[:3],
        "tokens_per_s": tokens / options.seconds,
        "memory_begin": begun, "memory_end": ended, "memory_growth": ended / begun - 1, "blocks_used": used,
    }  # fmt: skip


def overhead(url: str, model: str, options: argparse.Namespace) -> dict[str, object]:
    """The same work through Python and through HTTP, in turn. Both hold the model; one works at a time."""
    loaded = halve.load(model)
    prompts = [f"{i} {PROMPT}" for i in range(options.batch)]
    sampling = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    loaded.generate_all(prompts[:2], SamplingParams(max_tokens=4))

    async def through_http(salt: int) -> tuple[float, list[float]]:
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=300)) as client:
            await client.get("/health")
            began = time.perf_counter()
            answers = await asyncio.gather(*(stream(client, f"{salt} {p}", options.tokens, None) for p in prompts))
            return time.perf_counter() - began, [first for first, _ in answers]

    def through_python(salt: int) -> tuple[float, list[float]]:
        async def one(prompt: str) -> float:
            began, first = time.perf_counter(), 0.0
            async for _ in loaded.stream(f"{salt} {prompt}", sampling):
                first = first or time.perf_counter() - began
            return first

        async def all_() -> list[float]:
            return list(await asyncio.gather(*(one(p) for p in prompts)))

        began = time.perf_counter()
        firsts = asyncio.run(all_())
        return time.perf_counter() - began, firsts

    ratios, later = [], []
    for i in range(options.rounds):
        python_s, python_first = through_python(2 * i)
        http_s, http_first = asyncio.run(through_http(2 * i + 1))
        ratios.append(python_s / http_s)
        later.append(statistics.median(http_first) - statistics.median(python_first))
    loaded.close()
    return {
        "batch": options.batch, "tokens": options.tokens,
        "throughput_of_engine": {"value": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "ttft_later_s": {"value": statistics.median(later), "low": min(later), "high": max(later)},
    }  # fmt: skip


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--cancel", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = start(options.model, Path(folder))
        try:
            beside = overhead(url, options.model, options)
            found = asyncio.run(load(url, process, options))
        finally:
            process.terminate()
            process.wait(60)
    record = {
        "question": "serve_load", "model": Path(options.model).name, "streams": options.streams,
        "seconds": options.seconds, "cancelled": options.cancel, "load": found, "overhead": beside,
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
