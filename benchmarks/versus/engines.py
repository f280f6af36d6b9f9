"""One engine behind one call, `generate`: Halve, llama.cpp, ONNX Runtime GenAI, OpenVINO GenAI, vLLM.

This runs in the Python of the engine's own environment, so nothing is imported at the top but the standard library.

`generate(prompts, new_tokens)` returns when each token of each sequence arrived: (seconds since the call, sequence).
Prompts that come again need not be computed again: each engine keeps their keys and values by whatever it has for
that, so that a round of decoding at batch 32 does not cost 4096 tokens of prompt. No two sequences of a batch share
any, since their prompts are random. Decoding is greedy and does not stop at the end-of-sequence token.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]
Arrivals = list[tuple[float, int]]

CACHE_GB = 1  # keys and values, for engines that set them aside: 33 sequences of 384 tokens are 0.42 GB in bf16
CONTEXT = 1024  # tokens of a sequence, at most


class Engine(Protocol):
    """One loaded model."""

    version: str

    def generate(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        """When each new token of each sequence arrived."""


class Halve:
    """Our own engine by its public interface: `halve.load`, `Engine.stream`. The one place that knows it."""

    def __init__(self, path: str, threads: int) -> None:
        import halve

        del threads  # it takes the cores that this process may use
        self.version = halve.__version__
        self.model = halve.load(path, cache_bytes=CACHE_GB * 10**9)

    def generate(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        """As `Engine.generate`."""
        import asyncio

        from halve.engine import SamplingParams

        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        arrivals: Arrivals = []

        async def follow(sequence: int, stream: Any) -> None:
            async for output in stream:
                if output.token_id is not None:
                    arrivals.append((time.perf_counter() - started, sequence))

        async def all_of_them() -> None:
            streams = [self.model.engine.stream(prompt, sampling) for prompt in prompts]
            await asyncio.gather(*(follow(i, stream) for i, stream in enumerate(streams)))

        started = time.perf_counter()
        asyncio.run(all_of_them())
        return arrivals


class LlamaCpp:
    """llama.cpp by the C interface that its Python package exposes; one context for each size of batch."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp
        import numpy

        self.c, self.numpy, self.threads = llama_cpp, numpy, threads
        self.version = llama_cpp.__version__
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[int, tuple[Any, Any, list[Prompts]]] = {}

    def generate(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        """As `Engine.generate`."""
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
            params.n_ctx = num_sequences * (CONTEXT if num_sequences == 1 else 256)
            params.n_batch, params.n_ubatch, params.n_seq_max = 2048, 512, num_sequences
            params.n_threads = params.n_threads_batch = self.threads
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


class OnnxRuntime:
    """ONNX Runtime GenAI. It cannot go back in a batch, so that the sequences of the round before go on."""

    def __init__(self, path: str, threads: int) -> None:
        import json

        import numpy
        import onnxruntime_genai

        self.numpy, self.og = numpy, onnxruntime_genai
        self.version = onnxruntime_genai.__version__
        config = onnxruntime_genai.Config(path)
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self.model = onnxruntime_genai.Model(config)
        self.live: dict[int, tuple[Prompts, Any]] = {}

    def generate(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        """As `Engine.generate`."""
        room = 0 if len(prompts) == 1 else 256
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


class OpenVino:
    """OpenVINO GenAI's continuous batching, with its prefix cache."""

    def __init__(self, path: str, threads: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.ov, self.og = numpy, openvino, openvino_genai
        self.version = openvino.__version__.split("-")[0]
        schedule = openvino_genai.SchedulerConfig()
        schedule.cache_size, schedule.max_num_seqs, schedule.max_num_batched_tokens = CACHE_GB, 32, 512
        schedule.dynamic_split_fuse, schedule.enable_prefix_caching = False, True
        options = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(path, schedule, "CPU", options)
        self.count = 0

    def generate(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        """As `Engine.generate`."""
        config = self.og.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        arrays = [self.numpy.array([prompt], self.numpy.int64) for prompt in prompts]
        started = time.perf_counter()
        handles = [self.pipeline.add_request(self.count + i, self.ov.Tensor(a), config) for i, a in enumerate(arrays)]
        self.count += len(prompts)
        arrivals: Arrivals = []
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter() - started
            for sequence, handle in enumerate(handles):
                while handle.can_read():
                    got = sum(len(output.generated_ids) for output in handle.read().values())
                    arrivals += [(now, sequence)] * got
        return arrivals


class Vllm:
    """vLLM's CPU build, stepped by hand, with its prefix cache."""

    def __init__(self, path: str, threads: int) -> None:
        import os

        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }.items():
            os.environ.setdefault(name, value)
        import vllm

        self.vllm = vllm
        self.version = vllm.__version__
        self.engine = vllm.LLM(
            path,
            dtype="bfloat16",
            max_model_len=CONTEXT,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            disable_log_stats=True,
        ).llm_engine
        self.count = 0

    def generate(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        """As `Engine.generate`."""
        sampling = self.vllm.SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        places = {}
        for sequence, prompt in enumerate(prompts):
            places[str(self.count)] = sequence
            self.engine.add_request(str(self.count), {"prompt_token_ids": list(prompt)}, sampling)
            self.count += 1
        arrivals: Arrivals = []
        told = [0] * len(prompts)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                sequence, total = places[output.request_id], len(output.outputs[0].token_ids)
                arrivals += [(now, sequence)] * (total - told[sequence])
                told[sequence] = total
        return arrivals


ENGINES: dict[str, Callable[[str, int], Engine]] = {
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
