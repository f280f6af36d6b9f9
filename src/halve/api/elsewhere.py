"""What a plan would cost on a device of the catalogue that is not here: a roofline's estimate, and never certified."""

from collections.abc import Mapping
from decimal import Decimal
from statistics import fmean

from halve.api.model import torch_ops
from halve.api.versus.figures import usd_per_mtok
from halve.core.certificate import WorkloadCost
from halve.core.errors import ConfigError, RequestError
from halve.core.plan import Activations, Plan
from halve.core.workload import Workload
from halve.economics.catalogue import CatalogueDevice, load_catalogue
from halve.economics.roofline import estimate
from halve.economics.shapes import ModelShape
from halve.economics.validation import known_error
from halve.formats import Format
from halve.models import ModelConfig
from halve.models.names import modules, num_active_parameters, num_parameters


def where(name: str) -> tuple[str, str, CatalogueDevice | None]:
    """A device as it was named, what computes here, and the catalogue's device where it is that.

    Raises RequestError for what is neither a torch device that is here nor in the catalogue.
    """
    try:
        return name, "cpu", load_catalogue().device(name)
    except ConfigError as unknown:
        try:
            torch_ops(name)
        except RequestError as error:
            raise RequestError(f"{error}; {unknown}") from error
    return name, name, None


def refuse_elsewhere(
    device: CatalogueDevice | None,
    config: ModelConfig,
    formats: tuple[Mapping[str, Format], Mapping[str, Format]],
    workload: Workload,
) -> None:
    """Raise DoesNotFitError where no plan can be estimated there, before anything is searched.

    formats: of the original's modules, and the fewest bytes that each may take.
    """
    if device is not None:
        estimated_cost(device, config, formats, Plan(activations=Activations(format="int8")), workload, None)


def estimates_warning(device: CatalogueDevice | None, config: ModelConfig) -> tuple[str, ...]:
    """What must be said of cost there; nothing where the device is here."""
    if device is None:
        return ()
    factor = known_error(sparse=any(layer.experts is not None for layer in config.layers))
    return (
        f"{device.name} is not here: plans are ranked by the bytes that a token reads, and cost there is an estimate, "
        f"off by a factor of {factor:.2f} as a rule, never certified",
    )


def estimated_cost(
    device: CatalogueDevice,
    config: ModelConfig,
    formats: tuple[Mapping[str, Format], Mapping[str, Format]],
    plan: Plan,
    workload: Workload,
    usd_per_hour: Decimal | None,
) -> WorkloadCost:
    """A workload on that device. formats: of the modules of the original, which runs in bf16, and of the smaller model.

    Raises DoesNotFitError, a ConfigError, for a model that is larger than the device's memory, and for a smaller one
    that is slower than the service level.
    """
    prompt = fmean(request.prompt_tokens for request in workload.requests)
    output = fmean(request.output_tokens for request in workload.requests)
    kv_bytes = config.with_kv_format(plan.kv_cache.formats(config.num_layers)).kv_cache_bytes_per_token
    kept = config.with_kv_format("bf16").kv_cache_bytes_per_token
    shapes = (
        _shape("original", config, formats[0], kept, "bf16"),
        _shape("smaller", config, formats[1], kv_bytes, plan.activations.format),
    )
    level = workload.service_level
    original, smaller = (
        estimate(device, shape, prompt_tokens=prompt, output_tokens=output, time_per_token_s=slowest)
        for shape, slowest in zip(shapes, (None, level.time_per_token_s), strict=True)
    )
    before, after = (found.output_tok_s(prompt, output) for found in (original, smaller))
    longest = max(request.prompt_tokens for request in workload.requests)
    first, last = (tokens / smaller.prefill_tok_s for tokens in (prompt, longest))
    return WorkloadCost(
        workload=workload.name,
        num_requests=len(workload.requests),
        output_tok_s=after,
        original_output_tok_s=before,
        ttft_p50_s=first,
        ttft_p99_s=last,
        time_per_token_p50_s=smaller.time_per_token_s,
        time_per_token_p99_s=smaller.time_per_token_s,
        level_met=level.keeps(last, smaller.time_per_token_s),
        usd_per_hour=None if usd_per_hour is None else str(usd_per_hour),
        usd_per_mtok=usd_per_mtok(usd_per_hour, after),
        original_usd_per_mtok=usd_per_mtok(usd_per_hour, before),
        basis="estimated",
        device=device.name,
    )


def _shape(
    name: str, config: ModelConfig, formats: Mapping[str, Format], kv_bytes: int, activations: str
) -> ModelShape:
    """A model as a roofline sees it."""
    experts = next((layer.experts for layer in config.layers if layer.experts is not None), None)
    return ModelShape.of_stored(
        name,
        parameters=num_parameters(config),
        active_parameters=num_active_parameters(config),
        table_parameters=0 if config.tied else config.vocab_size * config.hidden_size,
        num_layers=config.num_layers,
        kv_numbers=config.with_kv_format("bf16").kv_cache_bytes_per_token // 2,
        weight_bytes=sum(formats[m.name].size_bytes(m.shape) for m in modules(config)),
        kv_bytes_per_token=kv_bytes,
        activations=activations,
        num_experts=0 if experts is None else experts.num_experts,
        top_k=0 if experts is None else experts.top_k,
        expert_parameters=sum(m.shape[0] * m.shape[1] for m in modules(config) if m.expert is not None),
    )
