"""The reader of MATLAB level 5 files against SciPy, and on damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st

from aufast.data.matlab import read_matrix

DTYPES = ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(66, 2), (1, 1), (0, 2), (3, 1, 2)], ids=str)
def test_reads_what_scipy_writes(tmp_path: Path, shape: tuple, dtype: str, compressed: bool) -> None:
    matrix = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    variables = {"before": "text", "pts": matrix, "long_name_" * 3: np.ones(3)}
    path = tmp_path / "m.mat"
    scipy.io.savemat(path, variables, do_compression=compressed)
    read = read_matrix(path, "pts")
    assert read.dtype == np.float64
    np.testing.assert_array_equal(read, matrix)


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "m.mat"
    for content, message in ((b"", "not a MATLAB level 5"), (b"x" * 300, "not a MATLAB level 5")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"m.mat: {message}"):
            read_matrix(path, "pts")
    scipy.io.savemat(path, {"other": np.ones(2), "complex": np.ones(2) * 1j, "text": "abc"})
    with pytest.raises(ValueError, match="holds no variable 'pts'"):
        read_matrix(path, "pts")
    with pytest.raises(ValueError, match="complex is not a matrix of real numbers"):
        read_matrix(path, "complex")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_matrix(tmp_path / "none.mat", "pts")


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_a_file_cut_short_says_so(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "m.mat"
    scipy.io.savemat(path, {"pts": np.ones((66, 2))}, do_compression=compressed)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="m.mat: the file is damaged .*: it ends early"):
        read_matrix(path, "pts")


def test_refuses_a_file_made_to_burst(tmp_path: Path) -> None:
    path = tmp_path / "m.mat"
    scipy.io.savemat(path, {"pts": np.zeros((1 << 22, 2))}, do_compression=True)  # 64 MiB in 65 kB
    assert path.stat().st_size < 1 << 17
    with pytest.raises(ValueError, match="damaged"):
        read_matrix(path, "pts")


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, compressed: bool) -> None:
    path = tmp_path_factory.mktemp("mat") / "m.mat"
    scipy.io.savemat(path, {"pts": np.arange(8.0).reshape(4, 2)}, do_compression=compressed)
    whole = path.read_bytes()

    @given(st.integers(0, len(whole) - 1), st.integers(0, 255), st.integers(0, len(whole)))
    def check(place: int, value: int, end: int) -> None:
        path.write_bytes((whole[:place] + bytes([value]) + whole[place + 1 :])[:end])
        try:
            assert read_matrix(path, "pts").dtype == np.float64
        except ValueError as error:
            assert str(path) in str(error)

    check()
