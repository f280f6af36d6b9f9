"""The verbs that only look: `inspect` a model, `doctor` a machine."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.api.bundle import read_certificate, read_plan
from halve.api.facts import versions
from halve.api.progress import SILENT, Progress
from halve.checkpoint import Checkpoint, open_checkpoint, resolve
from halve.checkpoint.header import spec_bytes
from halve.core.record import to_dict
from halve.hardware import Topology, default_threads, detect_cpu, detect_cuda, free_memory_bytes, read_topology
from halve.kernels import ceilings, native_library, native_rows
from halve.kernels.ceilings import Ceilings
from halve.kernels.cuda import rows as cuda_rows
from halve.models import load_config, stored_formats
from halve.models.names import group_pattern, groups, modules, num_active_parameters, num_parameters, vectors
from halve.models.sizes import bytes_per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFacts:
    """Matrices of one kind and format: a pattern of their names, how many weights, how many bytes."""

    pattern: str
    format: str
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What `halve inspect` says."""

    path: str
    architecture: str
    parameters: int
    active_parameters: int  # that one token runs through
    bytes_per_token: int  # of weights, that one decoded token reads
    experts: tuple[int, int] | None  # of a sparse layer, and how many of them a token runs through
    bytes: int  # of the weight files
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    tied: bool
    kv_cache_bytes_per_token: int
    licence: str | None
    bundle: bool
    verdict: str | None
    groups: tuple[GroupFacts, ...]
    version: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorFacts:
    """Where threads may run, and how many there are by default.

    num_cpus: logical processors of this process, of num_online that the machine has; num_cores: physical cores of
    these; nodes: node -> logical processors of this process at it; quota: processors' worth of time that the cgroup
    allows, null for no limit. default_threads: of the kernels, reason: why so many. advice: for several engines here.
    """

    num_cpus: int
    num_online: int
    num_cores: int
    nodes: Mapping[str, tuple[int, ...]]
    quota: float | None
    default_threads: int
    reason: str
    advice: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaFacts:
    """NVIDIA cards, and the kernel of each format on the first; without one, what would run and why it does not.

    reason: why there is no card, null where there is one. ceilings: of the first card; a mapping, so that looking loads
    no torch.
    """

    devices: tuple[Mapping[str, Any], ...]
    reason: str | None
    kernels: tuple[Mapping[str, Any], ...]
    ceilings: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFacts:
    """What `halve doctor` says. ceilings is null where they were not measured (`halve doctor --measure`)."""

    device: Mapping[str, Any]
    processors: ProcessorFacts
    features: tuple[str, ...]
    memory_bytes: int
    free_memory_bytes: int | None
    native: str  # "ready", or why the C++ kernels are not there
    kernels: tuple[Mapping[str, Any], ...]
    ceilings: Ceilings | None
    cuda: CudaFacts
    versions: Mapping[str, str]
    version: int = 1


def inspect(model: str | Path) -> ModelFacts:
    """Describe a checkpoint or a bundle without loading its weights."""
    with open_checkpoint(resolve(str(model))) as checkpoint:
        plan = read_plan(checkpoint)
        config = load_config(checkpoint, plan)
        parameters = num_parameters(config)
        return ModelFacts(
            path=str(checkpoint.path),
            architecture=config.architecture,
            parameters=parameters,
            active_parameters=num_active_parameters(config),
            bytes_per_token=bytes_per_token(config, stored_formats(checkpoint, config)),
            experts=next(((e.num_experts, e.top_k) for layer in config.layers if (e := layer.experts)), None),
            bytes=checkpoint.weight_bytes,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            context=config.context,
            tied=config.tied,
            kv_cache_bytes_per_token=config.kv_cache_bytes_per_token,
            licence=checkpoint.licence(),
            bundle=checkpoint.is_bundle,
            verdict=_verdict(checkpoint),
            groups=tuple(_group_facts(checkpoint)),
        )


def _verdict(checkpoint: Checkpoint) -> str | None:
    return read_certificate(checkpoint).verdict if checkpoint.is_bundle else None


def _group_facts(checkpoint: Checkpoint) -> list[GroupFacts]:
    config = load_config(checkpoint)
    stored = stored_formats(checkpoint, config)
    group_of = {m.name: g for g in groups(config) for m in g.members}
    totals: dict[tuple[str, str], tuple[int, int]] = {}

    def add(pattern: str, format_name: str, parameters: int, size: int) -> None:
        old = totals.get((pattern, format_name), (0, 0))
        totals[pattern, format_name] = (old[0] + parameters, old[1] + size)

    vector_shapes = list(vectors(config))
    sizes = _module_bytes(checkpoint, {name for name, _ in vector_shapes})
    for module in modules(config):
        fmt = stored[module.name]
        group = group_of.get(module.name)
        pattern = module.name
        if group is not None and group.layer is not None:
            pattern = group_pattern(config, group.layer, group.kind).format("*")
        add(pattern, fmt.name, math.prod(module.shape), sizes[module.name])
    for name, shape in vector_shapes:
        info = checkpoint.reader.info(name)
        what = "routers" if len(shape) == 2 else "norms and biases"
        add(what, info.dtype.lower(), math.prod(shape), math.prod(shape) * int(info.dtype[-2:]) // 8)
    return [
        GroupFacts(pattern=pattern, format=name, parameters=parameters, bytes=size)
        for (pattern, name), (parameters, size) in totals.items()
    ]


def _module_bytes(checkpoint: Checkpoint, vector_names: set[str]) -> Counter[str]:
    """Bytes of each module's tensors in the files: codes, scales, and what a layout keeps beside them."""
    sizes: Counter[str] = Counter()
    for name in set(checkpoint.reader.names) - vector_names:
        info = checkpoint.reader.info(name)
        sizes[name.rpartition(".")[0]] += spec_bytes((info.dtype, info.shape))
    return sizes


def doctor(*, measure: bool = False, progress: Progress = SILENT) -> MachineFacts:
    """Describe this machine: its features, the kernel of each format and why others refuse, versions, memory.

    measure: also its ceilings, in some seconds and a gigabyte of memory. Raises KernelError without the C++ library,
    and ConfigError where memory has no room for the measurement.
    """
    device = detect_cpu()
    reason = native_library.available()
    kernels = native_rows.format_report(device)
    if reason is not None:
        kernels = [
            {
                "op": row["op"],
                "format": row["format"],
                "kernel": "torch_reference",
                "refused": [{"kernel": "native", "reason": reason}],
            }
            for row in kernels
        ]
    return MachineFacts(
        device={"name": device.name, "model": device.model, "cores": device.num_cores, "machine": device.machine},
        processors=processor_facts(read_topology()),
        features=tuple(sorted(device.features)),
        memory_bytes=device.memory_bytes,
        free_memory_bytes=free_memory_bytes(),
        native="ready" if reason is None else reason,
        kernels=tuple(kernels),
        ceilings=_ceilings(progress) if measure else None,
        cuda=_cuda(progress, measure=measure),
        versions=versions(),
    )


def processor_facts(topology: Topology) -> ProcessorFacts:
    """Cores, nodes and quota of this process, the number of threads that follows, and how engines share a machine."""
    threads = default_threads(topology)
    nodes = {n: [core.cpus for core in topology.cores if core.node == n] for n in topology.nodes}
    return ProcessorFacts(
        num_cpus=len(topology.cpus),
        num_online=topology.num_online,
        num_cores=len(topology.cores),
        nodes={str(n): tuple(sorted(cpu for cpus in cores for cpu in cpus)) for n, cores in nodes.items()},
        quota=topology.quota,
        default_threads=threads.num_threads,
        reason=threads.reason,
        advice=_advice(topology),
    )


def _advice(topology: Topology) -> str | None:
    """How two engines share this machine, each with cores that the other leaves alone; None where one has all there is.

    Whole cores with all their hyper-threads on either side, and a memory node for each where there are nodes.
    """
    if len(topology.nodes) > 1:
        each = [f"numactl --cpunodebind={n} --membind={n} halve ..." for n in topology.nodes]
        return f"an engine on one node leaves the others idle; run one for each: {'; '.join(each)}"
    if len(topology.cores) < 2:
        return None
    half = len(topology.cores) // 2
    sides = (topology.cores[:half], topology.cores[half:])
    lists = [",".join(str(cpu) for cpu in sorted(cpu for core in side for cpu in core.cpus)) for side in sides]
    each = [f"taskset -c {cpus} halve ..." for cpus in lists]
    return f"two engines at once slow each other down unless each has cores of its own: {'; '.join(each)}"


def _cuda(progress: Progress, *, measure: bool) -> CudaFacts:
    devices, reason = detect_cuda()
    first = devices[0] if devices else None
    measured = None
    if first is not None and measure:
        from halve.kernels.cuda import ceilings as cuda_ceilings

        with progress.task(f"Measuring {first.model}", "rates") as advance:
            measured = to_dict(cuda_ceilings.measure(first.name, progress=advance))
    return CudaFacts(
        devices=tuple(
            {
                "name": device.name,
                "model": device.model,
                "capability": max(device.features, key=lambda level: int(level[3:])),
                "multiprocessors": device.num_cores,
                "memory_bytes": device.memory_bytes,
            }
            for device in devices
        ),
        reason=reason,
        kernels=tuple(cuda_rows.format_report(first, reason)),
        ceilings=measured,
    )


def _ceilings(progress: Progress) -> Ceilings:
    with progress.task("Measuring", "samples") as advance:
        return ceilings.measure(progress=advance)
