"""A tensor's values in another dtype, as torch casts them. Never imports torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from freezekit.audit.state import TensorState, counter_value

__all__ = ["FLOATS", "fits", "recast"]

FLOATS = ("float64", "float32", "float16", "bfloat16")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")


def recast(tensor: TensorState, dtype: str) -> TensorState:
    """Return a tensor with its values in another dtype, where that can hold them."""
    if tensor.dtype == dtype:
        return tensor
    return replace(tensor, dtype=dtype, read=lambda: _rounded(tensor.values(), dtype))


def fits(tensor: TensorState, dtype: str) -> bool:
    """Tell whether another dtype can hold a tensor's values: a counter's all, a float's rounded."""
    if tensor.dtype == dtype:
        return True
    stored = recast(tensor, dtype)
    if tensor.role == "num_batches_tracked" and {tensor.dtype, dtype} <= {*FLOATS, *_INTEGERS}:
        count = counter_value(tensor)
        return count is not None and abs(count) < 2**53 and counter_value(stored) == count
    if not {tensor.dtype, dtype} <= {*FLOATS}:
        return False
    return bool((np.isfinite(stored.values()) == np.isfinite(tensor.values())).all())


def _rounded(values: npt.NDArray[np.float64], dtype: str) -> bytes:
    """Return the bytes of values in another dtype: rounded half to even, by way of float32, as in torch."""
    with np.errstate(all="ignore"):  # what does not fit is told by what comes out
        if dtype not in ("float32", "float16", "bfloat16"):
            return values.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        single = values.astype("<f4")
        if dtype != "bfloat16":
            return single.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        raw = single.view("<u4")
        nearest = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        # rounding could make an infinity of a NaN
        return np.where(np.isnan(single), 0x7FC0, nearest).astype("<u2").tobytes()
