"""How often tokens go to the experts of a layer: what a step reads of some of them."""

from dataclasses import dataclass

import numpy as np

from halve.kernels.ops import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """Shares of tokens that go to each expert. own: of some experts; layer: of all of their layer, in sum top_k."""

    own: tuple[float, ...]
    layer: tuple[float, ...]

    @classmethod
    def even(cls, num_experts: int, top_k: int) -> "Reads":
        """All experts of a layer, as if tokens went to all of them alike."""
        share = (top_k / num_experts,) * num_experts
        return cls(own=share, layer=share)

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return round(sum(self.layer))

    @property
    def of_token(self) -> float:
        """The share of these experts that a token reads."""
        return sum(self.own) / len(self.own)

    def of_step(self, tokens: float) -> float:
        """Of the experts that a step of so many tokens reads, the share that are among these."""
        return 1.0 if self.own == self.layer else _read(self.own, tokens) / _read(self.layer, tokens)


def _read(shares: tuple[float, ...], tokens: float) -> float:
    """How many experts are asked by one token at least, if each goes its own way."""
    missed: Array = (1 - np.minimum(shares, 1.0)) ** tokens
    return float(len(shares) - missed.sum())
