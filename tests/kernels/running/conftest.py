"""These tests run the kernels: on a GPU, or where TRITON_INTERPRET=1 was set before Triton is imported.

Without a GPU `tests/kernels/test_interpreter.py` runs them in a process of their own, so that the interpreter
never leaks into the tests that compile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def _to_float32(data: np.ndarray) -> np.ndarray:
    """Numbers from bfloat16 bits."""
    return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 numbers."""
    numbers = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
    return numbers.view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(autouse=True)
def bfloat16_as_on_a_gpu() -> Iterator[None]:
    """Triton 3.9 interprets a product of bfloat16 as one of its bits, and cuts where a GPU rounds."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def exact_cast(self: InterpreterBuilder, source: TensorHandle, kind: tl.dtype) -> TensorHandle:
        change = source.dtype.scalar, kind.scalar
        if change == (tl.bfloat16, tl.float32):
            return TensorHandle(_to_float32(source.data), tl.float32)
        if change == (tl.float32, tl.bfloat16):
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, kind)

    def exact_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(_to_float32(t.data), tl.float32) for t in (a, b))
        return dot(self, a, b, *rest)

    with mock.patch.multiple(InterpreterBuilder, cast_impl=exact_cast, create_dot=exact_dot):
        yield
