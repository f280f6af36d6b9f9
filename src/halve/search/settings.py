"""What a plan rounds beside its weights, as options with losses of their own: activations, and the cache of each layer.

Losses are measured once, on the original. A cache's: keys and values are rounded in all layers, and, of the format with
the fewest bits, in one layer at a time, which says how its loss is shared out. Activations': the input of every product
is rounded. Errors that do not know of each other add up, so that a plan's loss is that of its weights and of its
setting.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from halve.core.plan import ActivationFormat, KVFormat
from halve.models import ModelConfig
from halve.search.swaps import Swaps

KEPT_SHARES = (0.25, 0.5)  # of the layers, those that lose most by int4: they keep int8
SHORT = {"fp32": "32", "bf16": "16", "fp8": "f8", "int8": "8", "int4": "4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """An option. caches: the format of each layer's. loss: nats per token, beside that of weights."""

    activations: ActivationFormat
    caches: tuple[KVFormat, ...]
    loss: float = 0.0

    def beside(self, usual: "Setting") -> str:
        """What is not as usual, for the name of a plan: `-a16`, or `-kv4.8-3` for int4 with three layers in int8."""
        words = []
        if self.activations != usual.activations:
            words.append(f"-a{SHORT[self.activations]}")
        if self.caches != usual.caches:
            few = sorted(set(self.caches), key=list(SHORT).index, reverse=True)
            share = f"-{sum(one != few[0] for one in self.caches)}" if len(few) > 1 else ""
            words.append(f"-kv{'.'.join(SHORT[name] for name in few)}{share}")
        return "".join(words)


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingLosses:
    """Nats per token. activations: by format; caches: by format, of each layer."""

    activations: Mapping[str, float]
    caches: Mapping[str, tuple[float, ...]]
    version: int = 1

    def missing(self, activations: Sequence[str], caches: Sequence[str]) -> bool:
        """Whether anything is asked for that is not known."""
        return bool(set(activations) - self.activations.keys() or set(caches) - self.caches.keys())


def measure_losses(
    swaps: Swaps,
    config: ModelConfig,
    activations: Sequence[ActivationFormat],
    caches: Sequence[KVFormat],
    *,
    by_layer: bool,
    progress: Callable[[int, int], None] | None = None,
) -> SettingLosses:
    """Measure every format on the windows of `swaps`. by_layer: whether layers are told apart at all."""
    rounded = [name for name in activations if name != "fp32"]
    stored = [name for name in caches if name != "fp32"]
    layers, fewest = config.num_layers, stored[-1] if by_layer and len(stored) > 1 else None
    num_todo = len(stored) + (layers if fewest else 0) + len(rounded)
    num_done = 0

    def told(value: float) -> float:
        nonlocal num_done
        num_done += 1
        if progress:
            progress(num_done, num_todo)
        return value

    by_cache: dict[str, tuple[float, ...]] = {"fp32": (0.0,) * layers}
    for name in stored:
        whole = told(swaps.kl_of_caches(dict.fromkeys(range(layers), name)))
        shares = [1.0] * layers
        if name == fewest:
            shares = [told(swaps.kl_of_caches({i: name})) for i in range(layers)]
        total = sum(shares)
        by_cache[name] = tuple(whole * one / total if total else whole / layers for one in shares)
    by_activations: dict[str, float] = {name: told(swaps.kl_of_activations(name)) for name in rounded}
    return SettingLosses(activations={"fp32": 0.0, **by_activations}, caches=by_cache)


def settings_of(
    losses: SettingLosses, activations: Sequence[ActivationFormat], caches: Sequence[KVFormat], num_layers: int
) -> list[Setting]:
    """Every option: each format of activations with each of the whole cache, and with int8 in part of an int4 one."""
    chosen: list[tuple[KVFormat, ...]] = [(name,) * num_layers for name in caches]
    if {"int8", "int4"} <= set(caches):
        more = [a - b for a, b in zip(losses.caches["int4"], losses.caches["int8"], strict=True)]
        order = sorted(range(num_layers), key=lambda layer: -more[layer])
        for share in KEPT_SHARES:
            kept = set(order[: round(share * num_layers)])
            if 0 < len(kept) < num_layers:
                chosen.append(tuple("int8" if layer in kept else "int4" for layer in range(num_layers)))
    return [
        Setting(
            activations=one,
            caches=formats,
            loss=losses.activations[one] + sum(losses.caches[name][layer] for layer, name in enumerate(formats)),
        )
        for one, formats in product(activations, dict.fromkeys(chosen))
    ]
