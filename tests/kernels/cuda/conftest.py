"""Triton's interpreter stands in where there is no CUDA device (tests/conftest.py asks for it).

Triton 3.6's interpreter is wrong in three places, put right here: it cuts bits off where a device rounds to bf16 or
fp8, multiplies the bit patterns of bf16 as whole numbers in `tl.dot`, and takes int() of an array, which numpy 2.4
refuses.
"""

import importlib.util
import os

import ml_dtypes
import numpy as np


def _mend_interpreter():
    import triton.language as tl
    from triton.runtime import interpreter

    floats = {
        tl.bfloat16: ml_dtypes.bfloat16,
        tl.float8e4nv: ml_dtypes.float8_e4m3fn,
        tl.float16: np.float16,
        tl.float32: np.float32,
        tl.float64: np.float64,
    }

    def convert(values, source, target, rounding_mode):
        """To nearest, ties to even, as cvt.rn does; e4m3 saturates, as cvt.rn.satfinite does."""
        wide = values.view(floats[source]).astype(np.float32 if source != tl.float64 else np.float64)
        if target == tl.float8e4nv:
            wide = np.clip(wide, -448, 448)
        return wide.astype(floats[target]).view(f"uint{target.primitive_bitwidth}")

    def widen(handle):
        if handle.dtype.scalar in (tl.bfloat16, tl.float8e4nv):
            return handle.data.view(floats[handle.dtype.scalar]).astype(np.float32)
        return handle.data

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(widen(a), widen(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    patch = interpreter._patch_lang_tensor

    def patch_for_numpy(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._patch_lang_tensor = patch_for_numpy


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _mend_interpreter()
