"""The page for other projects: every block of Python on it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "dropin.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_the_page_has_blocks() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b, id=b.split("aufast.")[-1].split("(")[0], marks=[pytest.mark.slow] * ("onnx" in b))
        for b in BLOCKS
    ],
)
def test_a_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "onnx" in block:
        pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript: install the extra `onnx`")
    monkeypatch.chdir(tmp_path)
    exec(block, {})


def test_the_key_map_is_the_layers() -> None:
    from aufast.nn import AdaptiveGraphGRU

    table = PAGE.split("| `AdaptiveGraphGRU` |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([\w.]+)`", table, re.M)) == set(AdaptiveGraphGRU(1, 2, 3).state_dict())
