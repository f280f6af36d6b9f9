"""What of a model decides its speed: how many weights, of how many bytes, how many of them a token runs through."""

from dataclasses import dataclass, replace
from typing import Self

from halve.core.errors import ConfigError
from halve.economics.fields import nearest

GROUP = 128  # weights under one scale of 16 bits, where they have fewer than 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder as a roofline sees it.

    parameters: all. active_parameters: that one token runs through. table_parameters: of the input embedding, of which
    a token reads one row. weight_bits, kv_bits: of one number as it is read, scales included. kv_numbers: keys and
    values that a token of the context keeps. num_experts, top_k: of a sparse model; expert_parameters: of all experts.
    activations: what products multiply ("bf16", "fp8", "int8", "fp4"). window: tokens that half of the layers see.
    """

    name: str
    parameters: float
    active_parameters: float
    table_parameters: float
    num_layers: int
    kv_numbers: int
    weight_bits: float = 16
    kv_bits: float = 16
    activations: str = "bf16"
    num_experts: int = 0
    top_k: int = 0
    expert_parameters: float = 0
    window: int | None = None

    @classmethod
    def of_stored(
        cls,
        name: str,
        *,
        parameters: int,
        active_parameters: int,
        table_parameters: int,
        num_layers: int,
        kv_numbers: int,
        weight_bytes: int,
        kv_bytes_per_token: int,
        activations: str,
        num_experts: int = 0,
        top_k: int = 0,
        expert_parameters: int = 0,
    ) -> Self:
        """The shape of a model as its files hold it.

        active_parameters: with the table, of which `table_parameters` are looked up and not multiplied (0 where it is
        the head too). weight_bytes: of all weights; kv_bytes_per_token: of keys and values. activations: of a plan;
        what no accelerator multiplies in counts as bf16.
        """
        return cls(
            name=name,
            parameters=parameters,
            active_parameters=active_parameters - table_parameters,
            table_parameters=table_parameters,
            num_layers=num_layers,
            kv_numbers=kv_numbers,
            weight_bits=8 * weight_bytes / parameters,
            kv_bits=8 * kv_bytes_per_token / kv_numbers,
            activations=activations if activations in ("int8", "fp8") else "bf16",
            num_experts=num_experts,
            top_k=top_k,
            expert_parameters=expert_parameters,
        )

    @property
    def weight_bytes(self) -> float:
        """Bytes that must fit the memory."""
        return self.parameters * self.weight_bits / 8

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of keys and values of one token."""
        return self.kv_numbers * self.kv_bits / 8

    def read_bytes(self, batch: float) -> float:
        """Bytes of weights that a step of `batch` tokens reads.

        Each token goes to top_k of E experts as if at random: E * (1 - (1 - top_k / E)^batch) are read. Mixtral's 8 of
        which 2, at batch 1: 2; at batch 8: 7.2.
        """
        read = self.parameters - self.table_parameters
        if self.num_experts:
            share = 1 - (1 - self.top_k / self.num_experts) ** max(batch, 1)
            read -= self.expert_parameters * (1 - share)
        return read * self.weight_bits / 8

    def context_read(self, tokens: float) -> float:
        """Tokens of a context whose keys are read, on average over the layers."""
        return tokens if self.window is None else (tokens + min(tokens, self.window)) / 2

    def quantized(self, weight_bits: float, *, kv_bits: float | None = None, activations: str | None = None) -> Self:
        """The same in fewer bits; below 8 bits each group's scale adds 16 / 128."""
        bits = weight_bits if weight_bits >= 8 else weight_bits + 16 / GROUP
        return replace(
            self, weight_bits=bits, kv_bits=kv_bits or self.kv_bits, activations=activations or self.activations
        )


def _dense(name: str, parameters: float, table: float, layers: int, kv_heads: int, head_dim: int) -> ModelShape:
    return ModelShape(
        name=name,
        parameters=parameters,
        active_parameters=parameters - table,
        table_parameters=table,
        num_layers=layers,
        kv_numbers=2 * layers * kv_heads * head_dim,
    )


def _sparse(
    name: str, total: float, active: float, table: float, layers: int, kv: tuple[int, int], experts: tuple[int, int],
    expert_parameters: float, window: int | None = None,
) -> ModelShape:  # fmt: skip
    return ModelShape(
        name=name,
        parameters=total,
        active_parameters=active,
        table_parameters=table,
        num_layers=layers,
        kv_numbers=2 * layers * kv[0] * kv[1],
        num_experts=experts[0],
        top_k=experts[1],
        expert_parameters=expert_parameters,
        window=window,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        _dense("llama-3.2-1b", 1.236e9, 0.0, 16, 8, 64),  # its embedding is its output layer, too
        _dense("llama-3.2-3b", 3.213e9, 0.0, 28, 8, 128),
        _dense("llama-2-7b", 6.738e9, 0.131e9, 32, 32, 128),
        _dense("llama-3.1-8b", 8.030e9, 0.525e9, 32, 8, 128),
        _dense("phi-4-14b", 14.66e9, 0.514e9, 40, 10, 128),
        _dense("llama-3.3-70b", 70.55e9, 1.05e9, 80, 8, 128),
        _sparse("mixtral-8x7b", 46.70e9, 12.88e9, 0.131e9, 32, (8, 128), (8, 2), 45.1e9),
        _sparse("qwen3-30b-a3b", 30.53e9, 3.35e9, 0.311e9, 48, (4, 128), (128, 8), 28.99e9),
        _sparse("gpt-oss-20b", 20.91e9, 3.61e9, 0.579e9, 24, (8, 64), (32, 4), 19.1e9, 128),
        _sparse("gpt-oss-120b", 116.8e9, 5.13e9, 0.579e9, 36, (8, 64), (128, 4), 114.7e9, 128),
    )
}
DEFAULT_SHAPE = "llama-3.1-8b"


def find_shape(name: str) -> ModelShape:
    """A known shape. Raises ConfigError with the nearest name."""
    try:
        return SHAPES[name.lower()]
    except KeyError:
        raise ConfigError(
            f"model {name!r}: neither a directory nor a known shape{nearest(name.lower(), SHAPES) or ';'} known shapes "
            f"are {', '.join(SHAPES)}"
        ) from None
