"""Fewer experts: a sparse model with some of its experts left out or merged, and with fewer of them for a token.

Routers lose the rows of experts that are left out, and take the mean of rows of merged ones. Sources: REAP
(arXiv:2510.13999) for pruning, M-SMoE (arXiv:2310.01334) for merging by the mean.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halve.checkpoint import Checkpoint, TensorWriter
from halve.compress.apply import carry_files, write_text
from halve.core.errors import PlanError
from halve.core.plan import ExpertGroup, ExpertPlan
from halve.formats import FORMATS, Weight
from halve.kernels.ops import Array
from halve.models.config import ModelConfig, read_config
from halve.models.decoder import WeightSource
from halve.models.names import layer_of, modules, router_name, vectors

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # keys of config.json


def shrunk_config(config: ModelConfig, plan: ExpertPlan) -> ModelConfig:
    """The model with the experts of a plan. Raises PlanError for a plan that names what is not there."""
    groups = {layer.layer: layer.groups for layer in plan.layers}
    sparse = {i for i, layer in enumerate(config.layers) if layer.experts is not None}
    if groups and groups.keys() != sparse:
        raise PlanError(f"experts.layers: they are {sorted(groups)}, the model's sparse layers {sorted(sparse)}")
    layers = []
    for i, layer in enumerate(config.layers):
        experts = layer.experts
        if experts is None:
            layers.append(layer)
            continue
        kept = groups.get(i)
        most = max((m for group in kept for m in group.members), default=0) if kept else 0
        if most >= experts.num_experts:
            raise PlanError(f"experts.layers: layer {i} has no expert {most}; it has {experts.num_experts}")
        count, top_k = len(kept) if kept else experts.num_experts, plan.top_k or experts.top_k
        if top_k > count:
            raise PlanError(f"experts.top_k: {top_k} of {count} experts of layer {i}; take fewer, or keep more experts")
        if kept and not experts.removable:
            raise PlanError(
                f"experts.layers: layer {i} of a {config.architecture} has biases or groups of experts, which are kept "
                "whole; change top_k alone"
            )
        layers.append(replace(layer, experts=replace(experts, num_experts=count, top_k=top_k)))
    return replace(config, layers=tuple(layers))


class ShrunkSource:
    """`WeightSource` of the smaller model over that of the original. config: of the original."""

    def __init__(self, source: WeightSource, config: ModelConfig, plan: ExpertPlan) -> None:
        self.source = source
        self._counts = {i: x.num_experts for i, layer in enumerate(config.layers) if (x := layer.experts) is not None}
        self._groups = {layer.layer: layer.groups for layer in plan.layers}
        self._experts = {m.name: m.expert for m in modules(config) if m.expert is not None}
        self._routers = {
            router_name(config, i): i for i, layer in enumerate(config.layers) if layer.experts is not None
        }

    def weight(self, module: str, shape: tuple[int, int]) -> Any:
        """An expert of the original as it is stored, the mean of several in float32, or what is no expert's."""
        expert = self._experts.get(module)
        if expert is None or layer_of(module) not in self._groups:
            return self.source.weight(module, shape)
        group = self._groups[layer_of(module)][expert]
        names = [module.replace(f".experts.{expert}.", f".experts.{m}.") for m in group.members]
        if len(names) == 1:
            return self.source.weight(names[0], shape)
        total = np.zeros(shape, np.float32)
        for name, share in zip(names, group.weights, strict=True):
            one = self.source.weight(name, shape)
            assert isinstance(one, Weight)
            total += np.float32(share) * one.dequantize()
        return Weight(format=FORMATS["fp32"], shape=shape, codes=total)

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """A router with the rows of the experts that stay, or another vector as it is."""
        layer = self._routers.get(name)
        if layer is None or layer not in self._groups:
            return self.source.vector(name, shape)
        whole = self.source.vector(name, (self._counts[layer], *shape[1:]))
        return _rows(whole, self._groups[layer])

    def forget(self) -> None:
        """As the original's."""
        self.source.forget()


def _rows(router: Array, groups: tuple[ExpertGroup, ...]) -> Array:
    return np.stack([np.asarray(g.weights, np.float32) @ router[list(g.members)] for g in groups]).astype(np.float32)


def write_shrunk(
    checkpoint: Checkpoint,
    source: WeightSource,
    config: ModelConfig,
    plan: ExpertPlan,
    directory: Path,
    progress: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write the smaller model into `directory` in the original's number formats; returns its configuration.

    config: of the original; source: over its checkpoint, which stores floats. Raises PlanError, OutputError.
    """
    made = shrunk_config(config, plan)
    shrunk = ShrunkSource(source, config, plan)
    reader = checkpoint.reader
    found = list(modules(made))
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module in found:  # every layer stores its experts alike, so that one of the same name tells of it
        specs[f"{module.name}.weight"] = (reader.info(f"{module.name}.weight").dtype, module.shape)
    for name, shape in vectors(made):
        specs[name] = (reader.info(name).dtype, shape)
    directory.mkdir(parents=True, exist_ok=True)
    with TensorWriter(directory, specs) as writer:
        for i, module in enumerate(found):
            values = shrunk.weight(module.name, module.shape).dequantize()
            writer.write(f"{module.name}.weight", values.astype(reader.read(f"{module.name}.weight").dtype))
            reader.forget()
            if progress:
                progress(i + 1, len(found))
        for name, shape in vectors(made):
            writer.write(name, shrunk.vector(name, shape).astype(reader.read(name).dtype).reshape(shape))
    raw = shrunk_raw(checkpoint.config, plan)
    write_text(directory / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    carry_files(checkpoint, directory)
    return read_config(raw)


def shrunk_raw(raw: Mapping[str, Any], plan: ExpertPlan) -> dict[str, Any]:
    """config.json of the smaller model."""
    made = dict(raw)
    if plan.layers:
        made |= {key: len(plan.layers[0].groups) for key in COUNTS if raw.get(key) is not None}
    if plan.top_k is not None:
        made["num_experts_per_tok"] = plan.top_k
    return made
