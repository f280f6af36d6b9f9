"""Does `halve price` foretell what the ledger of `halve serve` says after a trace was served?

Steps are timed and the trace is priced first (`halve price MODEL --measure --workload TRACE`); then the model is served
with a price and the trace is replayed at its own pace; then the ledger is summed up. The trace is sped up so that the
machine has work for a share of the time, and cut to some minutes.

    python benchmarks/price_against_ledger.py MODEL TRACE [--minutes 10] [--load 0.4] [--price-per-hour 0.10]

Prints one JSON line last: dollars per million tokens, predicted and billed, and the ratio of both, for usage (the work)
and allocation (the machine's time). The ledger has no more to say than whole micro-dollars a line.
"""

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path

import httpx

import halve
from halve.api.price import Priced, price
from halve.core.workload import Workload
from halve.data import read_trace
from halve.server.store import Store


def shortened(model: str, trace: str, options: argparse.Namespace) -> Workload:
    """The trace's requests that the model can hold, at the pace that loads the machine, for some minutes."""
    loaded = halve.load(model)
    whole = read_trace(trace).fitting(loaded.config.context - 1)
    loaded.close()
    found = price(model=model, price_per_hour=Decimal(1), measure=True, vs=[])
    speed = found.throughput
    busy = whole.num_prompt_tokens / speed.prefill_tok_s + whole.num_output_tokens / speed.decode_tok_s
    paced = whole.faster(options.load * whole.duration_s / busy)
    count = sum(request.arrival_s <= 60 * options.minutes for request in paced.requests)
    return paced.first(count)


def write(workload: Workload, path: Path) -> None:
    """As a file that `--workload` reads."""
    rows = [f"{r.arrival_s:.6f},{r.prompt_tokens},{r.output_tokens}\n" for r in workload.requests]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(rows))


def start(model: str, folder: Path, usd_per_hour: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server of a model, and its address."""
    log = folder / "log"
    arguments = ["--port", "0", "--db", f"sqlite:///{folder}/a.db", "--no-auth", "--price-per-hour", usd_per_hour]
    with log.open("w") as file:
        command = [sys.executable, "-m", "halve.cli", "serve", f"m={model}", *arguments]
        process = subprocess.Popen(command, stderr=file, stdout=file)
    while not (found := re.search(r" at (http://\S+)/v1", log.read_text())):
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.05)
    while True:
        try:
            httpx.get(found[1] + "/health")
            return process, found[1]
        except httpx.TransportError:
            time.sleep(0.05)


async def replay(url: str, workload: Workload, vocab_size: int) -> float:
    """Every request at its time. Returns the seconds to the last answer. Raises RuntimeError for one that failed."""
    limits = httpx.Limits(max_connections=2000)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()

        async def one(index: int) -> None:
            request = workload.requests[index]
            await asyncio.sleep(max(0.0, request.arrival_s - (time.perf_counter() - began)))
            prompt = workload.prompt_token_ids(index, vocab_size).tolist()
            body = {"model": "m", "prompt": prompt, "max_tokens": request.output_tokens, "ignore_eos": True}
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {answer.text[:200]}")

        await asyncio.gather(*(one(i) for i in range(len(workload.requests))))
        return time.perf_counter() - began


def compared(predicted: Priced, store: Store) -> dict[str, object]:
    """Both prices of a million tokens, and what they are made of."""
    [total] = store.usage()
    tokens = total["prompt_tokens"] + total["completion_tokens"]
    fresh = total["prompt_tokens"] - total["cached_tokens"]
    billed = {
        "usage": total["usage_micro_usd"] / tokens,
        "allocation": total["allocation_micro_usd"] / tokens,
        "prefill_tok_s": fresh / (total["prefill_us"] / 1e6),
        "decode_tok_s": total["completion_tokens"] / (total["decode_us"] / 1e6),
    }
    said = {
        "usage": float(predicted.usage_usd_per_mtok),
        "allocation": float(predicted.allocation_usd_per_mtok),
        "prefill_tok_s": predicted.throughput.prefill_tok_s,
        "decode_tok_s": predicted.throughput.decode_tok_s,
    }
    return {
        "predicted": said,
        "billed": billed,
        "ratio": {name: said[name] / billed[name] for name in said},
        "requests": total["requests"],
        "tokens": tokens,
        "busy_share_billed": total["usage_micro_usd"] / total["allocation_micro_usd"],
        "busy_share_predicted": float(predicted.cost.utilization),
    }


def main() -> None:
    """Price, serve, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("trace")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--load", type=float, default=0.4)
    parser.add_argument("--price-per-hour", default="0.10")
    options = parser.parse_args()
    workload = shortened(options.model, options.trace, options)
    print(f"{len(workload.requests)} requests in {workload.duration_s:.0f} s", file=sys.stderr)
    loaded = halve.load(options.model)
    vocab_size = loaded.config.vocab_size
    loaded.close()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(workload, folder / "trace.csv")
        predicted = price(
            model=options.model,
            price_per_hour=Decimal(options.price_per_hour),
            workload=str(folder / "trace.csv"),
            measure=True,
            vs=[],
        )
        print(predicted.utilization_origin, file=sys.stderr)
        process, url = start(options.model, folder, options.price_per_hour)
        try:
            took = asyncio.run(replay(url, workload, vocab_size))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        store = Store(f"sqlite:///{folder}/a.db")
        found = compared(predicted, store)
        store.close()
    print(json.dumps({"model": options.model, "trace": workload.name, "replay_s": took, **found}))


if __name__ == "__main__":
    main()
