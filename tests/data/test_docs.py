"""The page about data: its example runs, its table description is one, and its choices are the defaults."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest

from aufast import data
from aufast.aus import AU_SETS
from aufast.data import clips
from tests.data import trees

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    data.synthesize(tmp_path / "BP4D", data.Recipe(subjects=3, videos=1, frames=50, size=64))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example.replace("workers=8", "workers=1"), names)
    assert (len(names["frames"]), len(names["clips"])) == (100, 2)
    assert "synthetic bp4d: 3 subjects" in capsys.readouterr().out


def test_the_described_table_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    (tmp_path / "gft.json").write_text(text)
    spec = json.loads(text)
    names = [*spec["columns"].values(), *spec["labels"].values()]
    codes = ",".join("019" + "0" * 7)
    (tmp_path / "frames.csv").write_text(",".join(names) + f"\na.jpg,001A,001A,1,train,{codes}\n")
    columns = [f"{axis}_{k}" for k in range(49) for axis in "xy"]
    cells = ",".join(map(str, trees.POINTS.ravel()))
    (tmp_path / "landmarks.csv").write_text(f"path,{','.join(columns)}\na.jpg,{cells}\n")
    (video,) = data.read_table(tmp_path / "gft.json")
    assert video.aus == AU_SETS["gft"], "whole, so that a recipe's model finds its AUs"
    assert video.labels[0, :3].tolist() == [0, 1, 0]
    assert video.mask[0].tolist() == [True, True, False, *[True] * 7]
    np.testing.assert_allclose(video.landmarks(video.numbers)[0], trees.POINTS)


@pytest.mark.parametrize("option", ["ClipDataset(max_gap=10)", 'read_disfa(bad_landmarks="drop")'])
def test_a_choice_is_the_default(option: str) -> None:
    assert f"`{option}`" in PAGE
    call = ast.parse(option, mode="eval").body
    (keyword,) = call.keywords
    parameters = inspect.signature(getattr(data, call.func.id)).parameters
    assert parameters[keyword.arg].default == ast.literal_eval(keyword.value)


def test_margl_is_cropped_as_the_page_says() -> None:
    (option,) = re.findall(r"`(Cropping\(.*?\))`", PAGE)
    assert eval(option, {"Cropping": clips.Cropping}) == clips.MARGL_CROPPING
