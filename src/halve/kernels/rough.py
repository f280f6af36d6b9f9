"""Products in bf16 arithmetic, for statistics that need two digits: half of the memory traffic, twice the rate.

Not the definition of anything and never behind a certificate; calibration of large models runs on it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from halve.formats import Weight
from halve.kernels.ops import Array
from halve.kernels.reference import Matrix, TorchOps

# Without these a processor emulates bf16 products and is slower than in float32.
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16"})


class RoughOps(TorchOps):
    """`TorchOps` whose products take and give bf16: relative error about 2^-8 each."""

    def linear(self, weight: Weight, bias: Array | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Prepare a matrix [out, in] for `project`."""
        matrix = Matrix(weight, self.torch_device).dense().to(torch.bfloat16)
        return matrix, None if bias is None else self.vector(bias).to(torch.bfloat16)

    def project(self, linear: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:  # type: ignore[override]
        """x @ weight.T + bias, rounded to bf16."""
        matrix, bias = linear
        return F.linear(x.to(torch.bfloat16), matrix, bias).float()


def rough_ops(device: str) -> TorchOps:
    """RoughOps where the device multiplies bf16 itself, else TorchOps."""
    exact = TorchOps(device)
    native_bf16 = exact.device.kind != "cpu" or bool(BF16_FEATURES & exact.device.features)
    return RoughOps(device) if native_bf16 else exact
