"""The router that `halve route --save` keeps, for use: it names the model to ask."""

import json
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from halve.core.errors import ConfigError, OutputError
from halve.data.prompt_parts import approximate_ids
from halve.economics.routing import Prices
from halve.evaluate.router import NUM_FEATURES, Router, features_of

Array = np.ndarray[Any, np.dtype[Any]]


def extra_usd(prompt_tokens: Array, answer_tokens: Array, cheap: Prices, dear: Prices) -> Array:
    """What a request costs more at the dear model, as far as is known before it is answered; above 0.

    Of its own prompt and of answers of the usual length [2], the cheap and the dear model's, in dollars of a million.
    """
    inputs = float(dear.input_usd_per_mtok - cheap.input_usd_per_mtok)
    answers = [answer_tokens[i] * float(p.output_usd_per_mtok) for i, p in enumerate((cheap, dear))]
    return np.asarray(np.maximum(prompt_tokens * inputs + answers[1] - answers[0], 1e-6), np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRouter:
    """A certified router: `SavedRouter.load(path).choose(prompt)` names the model to ask.

    power: of what a request costs more, by which its gain is divided. answer_tokens float64 [2]: the usual ones.
    """

    router: Router
    threshold: float
    power: float
    cheap: Prices
    dear: Prices
    answer_tokens: Array

    def choose(self, prompt: str) -> str:
        """The model's column: the dear one where its gain, for what it costs more, is at least the threshold."""
        gain = float(self.router.gain(features_of([prompt]))[0])
        tokens = np.array([max(1, len(approximate_ids(prompt)))])
        extra = float(extra_usd(tokens, self.answer_tokens, self.cheap, self.dear)[0])
        return (self.dear if gain / extra**self.power >= self.threshold else self.cheap).name

    def save(self, path: Path) -> None:
        """Write an .npz file. Raises OutputError."""
        prices = [[p.name, str(p.input_usd_per_mtok), str(p.output_usd_per_mtok), p.origin] for p in self._models]
        known = {"threshold": repr(self.threshold), "power": self.power, "models": prices, "version": 1}
        facts = np.array(json.dumps(known))
        try:
            with path.open("wb") as file:
                np.savez_compressed(file, weights=self.router.weights, answer_tokens=self.answer_tokens, facts=facts)
        except OSError as error:
            raise OutputError(f"{path}: can't be written: {error.strerror}; give --save a file in a folder") from error

    @property
    def _models(self) -> tuple[Prices, Prices]:
        return self.cheap, self.dear

    @classmethod
    def load(cls, path: Path | str) -> "SavedRouter":
        """Read what `save` wrote. Raises ConfigError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                weights, answers, facts = file["weights"], file["answer_tokens"], json.loads(str(file["facts"]))
            if facts["version"] != 1 or weights.shape != (2, NUM_FEATURES):
                raise ValueError(f"version {facts['version']}, weights {weights.shape}")
            cheap, dear = (
                Prices(name=name, input_usd_per_mtok=Decimal(first), output_usd_per_mtok=Decimal(second), origin=origin)
                for name, first, second, origin in facts["models"]
            )
            threshold, power = float(facts["threshold"]), float(facts["power"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, ArithmeticError, BadZipFile) as error:
            raise ConfigError(f"{path}: is no router of `halve route --save`: {error}") from error
        router = Router(weights=weights)
        return cls(router=router, threshold=threshold, power=power, cheap=cheap, dear=dear, answer_tokens=answers)
