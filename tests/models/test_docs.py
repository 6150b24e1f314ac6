"""The page of the models against the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from aufast.models import AARConfig, MARGLConfig, create_model
from tests.models.examples import NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
TABLE = PAGE.split("| Model | Parameters |")[1].split("\n\n")[0]
COUNTS = dict(re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \|", TABLE, re.MULTILINE))


def test_every_model_is_listed():
    assert list(COUNTS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_the_measured_ones(name):
    with torch.device("meta"):
        model = create_model(name)
    assert f"{sum(p.numel() for p in model.parameters()):,}" == COUNTS[name]


@pytest.mark.parametrize("cls", [MARGLConfig, AARConfig])
def test_every_field_and_default_is_listed(cls):
    table = PAGE.split(f"| Field of `{cls.__name__}` |")[1].split("\n\n")[0]
    listed = {}
    for names, values in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", table, re.MULTILINE):
        names = re.findall(r"`(\w+)`", names)
        parts = re.findall(r"\([^)]*\)|[^, ][^,]*", values.replace("`", ""))
        listed.update(zip(names, parts if len(names) > 1 else [values.replace("`", "")], strict=True))
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name != "variant"}
    assert listed.pop("aus") == "BP4D's twelve"
    fields.pop("aus")
    assert listed == {
        name: f'"{value}"' if isinstance(value, str) else str(value) for name, value in fields.items()
    }
