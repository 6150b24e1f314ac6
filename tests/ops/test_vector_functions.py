"""exp, sigmoid and tanh of the CPU kernels, against extended precision."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.harness import compiler

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
COUNT = 1 << 16
WIDTHS = {"baseline": (16, ()), "avx2": (32, ("avx2", "fma")), "avx512": (64, ("avx512f", "avx512dq"))}
PROGRAM = """
#include <cstdint>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#define AUFAST_INLINE inline __attribute__((always_inline))
#include "vec.h"
#define EACH(NAME, T, FUNCTION) \\
  extern "C" void NAME(const T* x, T* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += lanes<T>) store<T>(y + i, FUNCTION<T>(load<T>(x + i))); \\
  }
EACH(exp_float32, float, vexp) EACH(sigmoid_float32, float, vsigmoid) EACH(tanh_float32, float, vtanh)
EACH(exp_float64, double, vexp) EACH(sigmoid_float64, double, vsigmoid) EACH(tanh_float64, double, vtanh)
"""
EXACT = {"exp": np.exp, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}
# Largest error in units of the last place of the exact value, as docs/operators/graph_gru.md states it.
LIMITS = {
    ("exp", "float32"): 1.1,
    ("sigmoid", "float32"): 2.5,
    ("tanh", "float32"): 2.7,
    ("exp", "float64"): 1.0,
    ("sigmoid", "float64"): 2.4,
    ("tanh", "float64"): 2.9,
}
RANGES = {"exp": [(-86, 86)], "sigmoid": [(-86, 86), (-8, 8)], "tanh": [(-10, 10), (-1e-3, 1e-3)]}


@pytest.fixture(scope="module", params=WIDTHS)
def functions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """name, arguments -> values, of one instruction-set level."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    width, features = WIDTHS[request.param]
    have = Path("/proc/cpuinfo").read_text().split() if features else ()
    if missing := [feature for feature in features if feature not in have]:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "functions.cpp").write_text(PROGRAM)
    levels = [f"-DAUFAST_{name}={int(width == size)}" for name, size in (("AVX2", 32), ("AVX512", 64))]
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-psabi", f"-I{SOURCES}", *levels]
    flags += [f"-DAUFAST_VECTOR_BYTES={width}", "-DAUFAST_BF16=0", *(f"-m{feature}" for feature in features)]
    subprocess.run([compiler(), *flags, "functions.cpp", "-o", "functions.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "functions.so"))

    def call(name: str, x: NDArray) -> NDArray:
        y = np.full_like(x, np.nan)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (x, y))
        getattr(library, f"{name}_{x.dtype}")(*pointers, ctypes.c_int64(x.size))
        return y

    return call


@pytest.mark.parametrize(("name", "dtype"), LIMITS, ids="-".join)
def test_error_in_units_of_the_last_place(functions, name, dtype):
    for low, high in RANGES[name]:
        x = np.linspace(low, high, COUNT).astype(dtype)
        exact = EXACT[name](x.astype(np.longdouble))
        _, exponent = np.frexp(exact)
        unit = np.ldexp(np.longdouble(1), exponent - np.finfo(dtype).nmant - 1)
        assert np.max(np.abs(functions(name, x) - exact) / unit) <= LIMITS[name, dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ends_of_the_range(functions, dtype):
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0, 20.0] * 2, dtype)
    for name in EXACT:
        y = functions(name, x)
        assert np.isnan(y[0]) and not np.isnan(y[1:8]).any()
    tanh = functions("tanh", x)
    assert list(tanh[1:6]) == [1, -1, 1, -1, 0] and np.signbit(tanh[6])
    assert list(functions("sigmoid", x)[[1, 3, 5]]) == [1, 1, 0.5]
    assert 0 <= functions("sigmoid", x)[2] < 1e-37
