"""How fast a model could run on a device that is not at hand: bytes over bandwidth, operations over rate.

A step of B sequences whose contexts hold c tokens on average takes

    step = max(read / (memory * bandwidth), 2 * active * B / (matrix * rate)) + layers * per_layer_s
    read = weights(B) + B * c * kv_bytes

A prompt of n tokens takes n * 2 * active / (matrix * rate) seconds. B is as many as memory holds at full length, and no
more than a service level on time per token allows. Several devices share weights and cache, at `parallel` of their
speed. What is assumed is `Assumptions`; how far it is from published figures is `validation.py`'s to say.
"""

import math
from dataclasses import dataclass
from typing import Literal

from halve.core.errors import ConfigError
from halve.economics.catalogue import CatalogueDevice
from halve.economics.shapes import ModelShape

Basis = Literal["measured", "scaled", "roofline"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Shares of what makers state that engines reach, and what memory is not for the cache.

    memory, matrix: of bandwidth and of the rate. per_layer_s: what a layer costs beside both on a GPU; cpu_layer_s: on
    a processor. spare: share of the memory that is used; reserve_gb: of activations and programs, on a GPU.
    parallel: speed of two devices or more over as many single ones. most_sequences: of a step.
    """

    memory: float = 0.70
    matrix: float = 0.36
    cpu_memory: float = 0.60
    per_layer_s: float = 40e-6
    cpu_layer_s: float = 60e-6
    spare: float = 0.90
    reserve_gb: float = 2.0
    parallel: float = 0.85
    most_sequences: int = 1024
    cpu_most_sequences: int = 64

    def lines(self) -> list[str]:
        """In words, to be printed beside every estimate."""
        return [
            f"memory is read at {self.memory:.0%} of its stated bandwidth ({self.cpu_memory:.0%} on a processor)",
            f"products reach {self.matrix:.0%} of the stated dense rate",
            f"a layer costs {self.per_layer_s * 1e6:.0f} us more a step ({self.cpu_layer_s * 1e6:.0f} on a processor)",
            f"{self.spare:.0%} of memory, less {self.reserve_gb:g} GB, holds weights and cache",
            f"several devices run at {self.parallel:.0%} of the sum of their speeds",
            f"at most {self.most_sequences} sequences run side by side ({self.cpu_most_sequences} on a processor)",
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """How fast a machine answers, as money needs it.

    prefill_tok_s, decode_tok_s: tokens of prompts, of answers, a second when it does nothing else. sequences: that
    decode side by side. time_per_token_s: of one of them. basis: "measured" there; "scaled" from a measurement
    elsewhere; "roofline", an estimate. error: the factor by which figures of this basis have been off, None for a
    measurement. watts: drawn at work, None where not known.
    """

    prefill_tok_s: float
    decode_tok_s: float
    sequences: float
    basis: Basis
    origin: str
    error: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        for name in ("prefill_tok_s", "decode_tok_s", "sequences"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"throughput {self.origin}: {name} {getattr(self, name)} must be above 0 and finite")

    @property
    def time_per_token_s(self) -> float:
        """Seconds between two tokens of one answer, while nothing else runs."""
        return self.sequences / self.decode_tok_s

    def output_tok_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Tokens of answers a second with their prompts worked off in between: out / (in / prefill + out / decode).

        1000 in at 50,000 a second take 20 ms, 1000 out at 20,000 take 50 ms: 1000 / 0.07 = 14,286.
        """
        return output_tokens / (prompt_tokens / self.prefill_tok_s + output_tokens / self.decode_tok_s)


class DoesNotFitError(ConfigError):
    """A model is larger than a machine's memory, or slower than the service level on it."""


def step_seconds(
    device: CatalogueDevice, shape: ModelShape, batch: float, context: float, assume: Assumptions, share: float = 1
) -> float:
    """Seconds of a decode step; the top of this file says how. share: of the device; above 1, several of them.

    A 16.06 GB model (7.5e9 weights read in bf16: 15.01 GB) on an H100, alone, context 0: 15.01 / (0.7 * 3350) s and
    32 * 40 us are 6.40 + 1.28 = 7.68 ms.
    """
    cpu = device.kind == "cpu"
    rate, _ = device.rate(shape.activations)
    speed = share * (assume.parallel if share > 1 else 1)
    read = shape.read_bytes(batch) + batch * shape.context_read(context) * shape.kv_bytes_per_token
    memory = (assume.cpu_memory if cpu else assume.memory) * device.bandwidth_gb_s * 1e9 * speed
    products = 2 * shape.active_parameters * batch / (assume.matrix * rate * speed)
    return max(read / memory, products) + shape.num_layers * (assume.cpu_layer_s if cpu else assume.per_layer_s)


def most_sequences(
    device: CatalogueDevice, shape: ModelShape, tokens: float, assume: Assumptions, memory_gb: float
) -> int:
    """Sequences of so many tokens that memory holds beside the weights. Raises DoesNotFitError for none."""
    reserve = assume.reserve_gb if device.kind != "cpu" else 0.5
    room = (assume.spare * memory_gb - reserve) * 1e9 - shape.weight_bytes
    fits = int(room / (tokens * shape.kv_bytes_per_token)) if room > 0 else 0
    if fits < 1:
        raise DoesNotFitError(
            f"{shape.name}: {shape.weight_bytes / 1e9:.1f} GB of weights and a cache of {tokens:.0f} tokens do not fit "
            f"{memory_gb:.0f} GB ({device.name}); use fewer bits, more devices, or larger ones"
        )
    return min(fits, assume.cpu_most_sequences if device.kind == "cpu" else assume.most_sequences)


def estimate(
    device: CatalogueDevice,
    shape: ModelShape,
    *,
    prompt_tokens: float,
    output_tokens: float,
    devices: int = 1,
    share: float = 1,
    memory_gb: float | None = None,
    time_per_token_s: float | None = None,
    assume: Assumptions | None = None,
    error: float | None = None,
) -> Throughput:
    """What `devices` devices, or a share of one, could do with requests of these lengths.

    memory_gb: of the machine, where it is less than the devices'. time_per_token_s: of a service level. Raises
    DoesNotFitError.
    """
    assume = assume or Assumptions()
    speed = devices * share
    memory = memory_gb if memory_gb is not None else device.memory_gb * speed
    batch = most_sequences(device, shape, prompt_tokens + output_tokens, assume, memory)
    context = prompt_tokens + output_tokens / 2

    def seconds(count: float) -> float:
        return step_seconds(device, shape, count, context, assume, speed)

    if time_per_token_s is not None and seconds(batch) > time_per_token_s:
        if seconds(1) > time_per_token_s:
            raise DoesNotFitError(
                f"{shape.name} on {devices} x {device.name}: one token takes {seconds(1) * 1e3:.1f} ms alone, the "
                f"service level asks for {time_per_token_s * 1e3:.1f}; the nearest that it can keep is "
                f"{seconds(1) * 1e3:.0f} ms"
            )
        low, high = 1, batch
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if seconds(middle) <= time_per_token_s else (low, middle)
        batch = low
    rate, unit = device.rate(shape.activations)
    prefill = assume.matrix * rate * speed * (assume.parallel if speed > 1 else 1) / (2 * shape.active_parameters)
    whole = f"{devices} x {device.name}" if share == 1 else f"{share:.3g} of a {device.name}"
    return Throughput(
        prefill_tok_s=prefill,
        decode_tok_s=batch / seconds(batch),
        sequences=batch,
        basis="roofline",
        origin=f"{shape.name} on {whole}, {unit} products, {batch} sequences",
        error=error,
        watts=None if device.tdp_w is None else device.tdp_w * speed,
    )


def scaled(measured: Throughput, source: Throughput, target: Throughput, *, error: float | None = None) -> Throughput:
    """A measurement carried to another device: as far from its estimate there as it was here.

    source, target: estimates of the same shape on the device that was measured, and on the other one. A model that
    decodes at 400 a second where 500 were estimated is taken for 0.8 of any estimate.
    """
    return Throughput(
        prefill_tok_s=target.prefill_tok_s * measured.prefill_tok_s / source.prefill_tok_s,
        decode_tok_s=target.decode_tok_s * measured.decode_tok_s / source.decode_tok_s,
        sequences=target.sequences,
        basis="scaled",
        origin=f"{target.origin}; scaled from {measured.origin}",
        error=error,
        watts=target.watts,
    )
