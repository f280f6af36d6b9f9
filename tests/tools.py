"""What several test modules share: weight sources made from state dicts, and the Ops that run here."""

import numpy as np

from halve.formats import FORMATS, Weight
from halve.kernels import native, native_library

# NATIVE
from halve.kernels.reference import TorchOps


class StateDictSource:
    """A `WeightSource` over a torch state dict, float32; a tied table answers for the head."""

    def __init__(self, state):
        self.state = state

    def weight(self, module, shape):
        values = self.state[f"{module}.weight"].detach().numpy()
        assert values.shape == tuple(shape)
        return Weight(format=FORMATS["fp32"], shape=tuple(shape), codes=np.ascontiguousarray(values))

    def forget(self):
        """A state dict stays."""

    def vector(self, name, shape):
        values = self.state[name].detach().numpy()
        assert values.shape == tuple(shape)
        return values


def not_of_time(differences):
    """What `verify` found that no clock decides: a tiny model's speed is whatever else the machine does meanwhile."""
    timed = ("speed", "original_speed", "rooflines", "workload_cost")
    return [line for line in differences if not line.startswith(timed)]


def ops_under_test():
    """Constructors of every Ops that this machine runs."""

    def torch_cpu():
        return TorchOps("cpu")

    def native_cpu():
        return native.NativeOps()

    return [torch_cpu] + ([native_cpu] if native_library.available() is None else [])
