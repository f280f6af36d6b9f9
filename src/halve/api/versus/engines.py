"""One engine behind one call, `serve`: Halve, llama.cpp, ONNX Runtime GenAI, OpenVINO GenAI, vLLM.

This runs in the Python of the engine's own environment, so nothing is imported at the top but the standard library.

`serve(requests)` returns when each token of each request arrived: (seconds since the call, request). Requests that come
at 0 s and are equally long are a batch: for these llama.cpp and ONNX Runtime have a call of their own, and prompts that
come again need not be computed again: each engine keeps their keys and values by whatever it has for that, so that a
round of decoding at batch 32 does not cost 4096 tokens of prompt. No two sequences of a batch share any, since their
prompts are random. Decoding is greedy and does not stop at the end-of-sequence token.
"""

from __future__ import annotations  # environments of peers may have an older Python

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BATCH_CONTEXT = 256  # tokens of each sequence of a batch, where an engine sets them aside

Prompts = Sequence[Sequence[int]]
Arrivals = list[tuple[float, int]]


@dataclass(frozen=True)
class Request:
    """One prompt. at: seconds after the call. text: the same prompt for servers that take no token ids, where known."""

    prompt: Sequence[int]
    new_tokens: int
    at: float = 0.0
    text: str | None = None


@dataclass(frozen=True)
class Settings:
    """What every engine is given alike. context: tokens of a sequence, at most. sequences: at once, at most.

    cache_gb: memory for keys and values, for engines that set it aside. serving: whether requests come one by one, not
    as batches. command: of the engine's server, where it has one. expert_cache: as for `halve.load`, in bytes.
    """

    cpus: Sequence[int]
    context: int
    sequences: int
    cache_gb: int
    serving: bool
    command: Sequence[str] = ()
    expert_cache: int | None = None

    @property
    def threads(self) -> int:
        """One for each processor."""
        return len(self.cpus)


class Engine:
    """One loaded model. shape: what it says of its model, by the names of config.json. format: of its weights.

    how: how it serves requests that come one by one.
    """

    version: str | None
    shape: Mapping[str, int]
    format: str | None
    how: str

    def serve(self, requests: Sequence[Request]) -> Arrivals:
        """When each new token of each request arrived."""
        raise NotImplementedError


SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")


def shape_of(config: Mapping[str, Any]) -> dict[str, int]:
    """What a config.json says of the model's shape."""
    return {name: config[name] for name in SHAPE if isinstance(config.get(name), int)}


def read_config(path: str) -> Mapping[str, Any]:
    """The config.json in a directory; nothing where there is none."""
    import json
    import os

    file = os.path.join(path, "config.json")
    if not os.path.exists(file):
        return {}
    with open(file, encoding="utf-8") as opened:
        config: Mapping[str, Any] = json.load(opened)
    return config


class Stepped(Engine):
    """Serves by an engine that is stepped by hand: requests are added when they are due, between two steps."""

    def serve(self, requests: Sequence[Request]) -> Arrivals:
        """As `Engine.serve`."""
        arrivals: Arrivals = []
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].at)
        started = time.perf_counter()
        while waiting or self.busy():
            now = time.perf_counter() - started
            while waiting and requests[waiting[0]].at <= now:
                self.add(waiting[0], requests[waiting.pop(0)])
            if not self.busy():
                time.sleep(max(0.0, requests[waiting[0]].at - now))
                continue
            news = self.step()
            now = time.perf_counter() - started
            arrivals += [(now, i) for i, count in news for _ in range(count)]
        return arrivals

    def busy(self) -> bool:
        """Whether any request is unfinished."""
        raise NotImplementedError

    def add(self, number: int, request: Request) -> None:
        """Take up a request under a number."""
        raise NotImplementedError

    def step(self) -> list[tuple[int, int]]:
        """Run a step; numbers of requests, and how many tokens each got."""
        raise NotImplementedError


class Halve(Engine):
    """Our own engine by its public interface: `halve.load`, `Engine.stream`. The one place that knows it."""

    how = "in its own process, continuous batching"

    def __init__(self, path: str, settings: Settings) -> None:
        import halve

        self.version = halve.__version__
        self.model = halve.load(
            path,
            cache_bytes=settings.cache_gb * 10**9,
            num_threads=settings.threads,
            expert_cache=settings.expert_cache,
        )
        self.shape = shape_of(read_config(path))
        self.format = None  # read from the checkpoint by whoever asks

    def serve(self, requests: Sequence[Request]) -> Arrivals:
        """As `Engine.serve`."""
        import asyncio

        from halve.engine import SamplingParams

        engine = self.model.engine
        arrivals: Arrivals = []

        async def follow(number: int, request: Request) -> None:
            if (wait := request.at - (time.perf_counter() - started)) > 0:
                await asyncio.sleep(wait)
            sampling = SamplingParams(max_tokens=request.new_tokens, ignore_eos=True)
            async for output in engine.stream(request.prompt, sampling):
                if output.token_id is not None:
                    arrivals.append((time.perf_counter() - started, number))

        async def all_of_them() -> None:
            await asyncio.gather(*(follow(i, request) for i, request in enumerate(requests)))

        started = time.perf_counter()
        asyncio.run(all_of_them())
        return arrivals


class LlamaCpp(Engine):
    """llama.cpp by the C interface that its Python package exposes; one context for each size of batch.

    Batches only; requests that come one by one are served by its server (`servers.LlamaServer`).
    """

    how = "batches, by its C interface"

    def __init__(self, path: str, settings: Settings) -> None:
        import llama_cpp
        import numpy

        self.c, self.numpy, self.settings = llama_cpp, numpy, settings
        self.version = llama_cpp.__version__
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.shape = {
            "vocab_size": self.vocab_size,
            "hidden_size": llama_cpp.llama_model_n_embd(self.model),
            "num_hidden_layers": llama_cpp.llama_model_n_layer(self.model),
        }
        self.format = self._format()
        self.contexts: dict[int, tuple[Any, Any, list[Prompts]]] = {}

    def _format(self) -> str:
        import ctypes

        told = ctypes.create_string_buffer(256)  # such as "llama 1B Q4_0"
        self.c.llama_model_desc(self.model, told, len(told))
        return told.value.decode(errors="replace").rpartition(" ")[2]

    def serve(self, requests: Sequence[Request]) -> Arrivals:
        """As `Engine.serve`, for a batch."""
        prompts, new_tokens = batch_of(requests)
        context, batch, seen = self._context(len(prompts))
        memory = self.c.llama_get_memory(context)
        started = time.perf_counter()
        if seen != [prompts]:
            self.c.llama_memory_clear(memory, True)
            for first in range(0, len(prompts), 16):  # 16 prompts of 128 tokens fill a batch of 2048
                part = range(first, min(first + 16, len(prompts)))
                self._decode(context, batch, [(t, i, s) for s in part for i, t in enumerate(prompts[s][:-1])], ())
            seen[:] = [prompts]
        for sequence, prompt in enumerate(prompts):
            self.c.llama_memory_seq_rm(memory, sequence, len(prompt) - 1, -1)
        arrivals: Arrivals = []
        rows = range(len(prompts))
        tokens, position = [prompt[-1] for prompt in prompts], len(prompts[0]) - 1
        for _ in range(new_tokens):
            tokens = self._decode(context, batch, [(tokens[s], position, s) for s in rows], rows)
            now = time.perf_counter() - started
            arrivals += [(now, s) for s in rows]
            position += 1
        return arrivals

    def _context(self, num_sequences: int) -> tuple[Any, Any, list[Prompts]]:
        if num_sequences not in self.contexts:
            params = self.c.llama_context_default_params()
            params.n_ctx = num_sequences * (self.settings.context if num_sequences == 1 else BATCH_CONTEXT)
            params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 512, num_sequences
            params.n_threads = params.n_threads_batch = self.settings.threads
            context = self.c.llama_init_from_model(self.model, params)
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {num_sequences} sequences")
            self.contexts[num_sequences] = context, self.c.llama_batch_init(2048, 0, 1), []
        return self.contexts[num_sequences]

    def _decode(self, context: Any, batch: Any, tokens: list[tuple[int, int, int]], wanted: Sequence[int]) -> list[int]:
        """Run (token, position, sequence); the most likely next tokens of the wanted rows."""
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, i in wanted
        batch.n_tokens = len(tokens)
        if failed := self.c.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens: {failed}")
        as_array, logits = self.numpy.ctypeslib.as_array, self.c.llama_get_logits_ith
        return [int(as_array(logits(context, i), (self.vocab_size,)).argmax()) for i in wanted]


class OnnxRuntime(Engine):
    """ONNX Runtime GenAI. It cannot go back in a batch, so that the sequences of the round before go on.

    Its generators batch what starts together; requests that come one by one are answered one after another.
    """

    how = "in its own process, one request after another (its generators batch only what starts together)"

    def __init__(self, path: str, settings: Settings) -> None:
        import json
        import os

        import numpy
        import onnxruntime_genai

        self.numpy, self.og = numpy, onnxruntime_genai
        self.version = onnxruntime_genai.__version__
        config = onnxruntime_genai.Config(path)
        session = {"session_options": {"intra_op_num_threads": settings.threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self.model = onnxruntime_genai.Model(config)
        with open(os.path.join(path, "genai_config.json"), encoding="utf-8") as opened:
            told = json.load(opened)["model"]
        self.shape = shape_of({"vocab_size": told.get("vocab_size"), **told.get("decoder", {})})
        self.format = None
        self.live: dict[int, tuple[Prompts, Any]] = {}
        self.serving = settings.serving

    def serve(self, requests: Sequence[Request]) -> Arrivals:
        """As `Engine.serve`."""
        if not self.serving:
            return self._batch(*batch_of(requests))
        arrivals: Arrivals = []
        started = time.perf_counter()
        for number in sorted(range(len(requests)), key=lambda i: requests[i].at):
            request = requests[number]
            time.sleep(max(0.0, request.at - (time.perf_counter() - started)))
            begun = time.perf_counter() - started
            arrivals += [(begun + when, number) for when, _ in self._batch([request.prompt], request.new_tokens)]
        return arrivals

    def _batch(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        room = 0 if len(prompts) == 1 else BATCH_CONTEXT
        started = time.perf_counter()
        seen, generator = self.live.pop(len(prompts), ((), None))
        length = generator.token_count() if seen == prompts and generator else 0
        if not length or length + new_tokens > len(prompts[0]) + room:
            params, longest = self.og.GeneratorParams(self.model), len(prompts[0]) + max(room, new_tokens)
            params.set_search_options(batch_size=len(prompts), max_length=longest, min_length=longest, do_sample=False)
            generator = self.og.Generator(self.model, params)
            generator.append_tokens(self.numpy.array(prompts, self.numpy.int32))
            length = len(prompts[0])
        arrivals: Arrivals = []
        for _ in range(new_tokens):
            generator.generate_next_token()
            now = time.perf_counter() - started
            arrivals += [(now, s) for s in range(len(prompts))]
        if (reached := len(generator.get_sequence(0))) != length + new_tokens:
            raise RuntimeError(f"{reached} tokens in a sequence that should hold {length} + {new_tokens}")
        if room:
            self.live[len(prompts)] = prompts, generator
        return arrivals


class OpenVino(Stepped):
    """OpenVINO GenAI's continuous batching, with its prefix cache; long prompts are split when requests are served."""

    how = "in its own process, continuous batching"

    def __init__(self, path: str, settings: Settings) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.ov, self.og = numpy, openvino, openvino_genai
        self.version = openvino.__version__.split("-")[0]
        self.shape, self.format = shape_of(read_config(path)), None
        schedule = openvino_genai.SchedulerConfig()
        schedule.cache_size, schedule.max_num_seqs = settings.cache_gb, settings.sequences
        schedule.max_num_batched_tokens, schedule.dynamic_split_fuse = 512, settings.serving
        schedule.enable_prefix_caching = True
        options = {"INFERENCE_NUM_THREADS": settings.threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(path, schedule, "CPU", options)
        self.count = 0
        self.handles: dict[int, Any] = {}

    def busy(self) -> bool:
        """As `Stepped.busy`."""
        return bool(self.pipeline.has_non_finished_requests())

    def add(self, number: int, request: Request) -> None:
        """As `Stepped.add`."""
        config = self.og.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = request.new_tokens
        config.ignore_eos, config.do_sample = True, False
        prompt = self.ov.Tensor(self.numpy.array([request.prompt], self.numpy.int64))
        self.handles[number] = self.pipeline.add_request(self.count, prompt, config)
        self.count += 1

    def step(self) -> list[tuple[int, int]]:
        """As `Stepped.step`."""
        self.pipeline.step()
        news = []
        for number, handle in self.handles.items():
            while handle.can_read():
                news.append((number, sum(len(output.generated_ids) for output in handle.read().values())))
        return news


class Vllm(Stepped):
    """vLLM's CPU build, stepped by hand, with its prefix cache."""

    how = "in its own process, continuous batching"

    def __init__(self, path: str, settings: Settings) -> None:
        import os

        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": str(settings.cache_gb),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, settings.cpus)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }.items():
            os.environ.setdefault(name, value)
        import vllm

        self.vllm = vllm
        self.version = vllm.__version__
        config = read_config(path)
        self.shape, self.format = shape_of(config), None if "quantization_config" in config else "bf16"
        self.engine = vllm.LLM(
            path,
            dtype="bfloat16",
            max_model_len=settings.context,
            max_num_seqs=settings.sequences,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            disable_log_stats=True,
        ).llm_engine
        self.count = 0
        self.places: dict[str, int] = {}
        self.told: dict[str, int] = {}

    def busy(self) -> bool:
        """As `Stepped.busy`."""
        return bool(self.engine.has_unfinished_requests())

    def add(self, number: int, request: Request) -> None:
        """As `Stepped.add`."""
        sampling = self.vllm.SamplingParams(
            max_tokens=request.new_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        name = str(self.count)
        self.places[name], self.told[name] = number, 0
        self.engine.add_request(name, {"prompt_token_ids": list(request.prompt)}, sampling)
        self.count += 1

    def step(self) -> list[tuple[int, int]]:
        """As `Stepped.step`."""
        news = []
        for output in self.engine.step():
            name, total = output.request_id, len(output.outputs[0].token_ids)
            news.append((self.places[name], total - self.told[name]))
            self.told[name] = total
        return news


def batch_of(requests: Sequence[Request]) -> tuple[Prompts, int]:
    """Prompts and new tokens of requests that are a batch. Raises ValueError where they are none."""
    new_tokens = {request.new_tokens for request in requests}
    if len(new_tokens) != 1 or len({len(request.prompt) for request in requests}) != 1:
        raise ValueError("a batch has prompts of one length and one number of new tokens")
    return [list(request.prompt) for request in requests], new_tokens.pop()


ENGINES: dict[str, Callable[[str, Settings], Engine]] = {
    "halve": Halve,
    "llama.cpp": LlamaCpp,
    "onnx": OnnxRuntime,
    "openvino": OpenVino,
    "vllm": Vllm,
}
MODULES = {  # whose presence tells that an environment has the engine
    "llama.cpp": "llama_cpp",
    "onnx": "onnxruntime_genai",
    "openvino": "openvino_genai",
    "vllm": "vllm",
}
