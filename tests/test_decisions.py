"""The page of decisions against the code: every option it names exists and has the default it states."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import aufast.faces
import aufast.label
import aufast.models
import aufast.models.aar
import aufast.models.inference
import aufast.models.margl
import aufast.nn
import aufast.ops
import aufast.train
import aufast.train.config
import aufast.train.evaluate

PAGE = Path(__file__).parent.parent / "docs" / "decisions.md"
MODULES = (
    aufast.ops,
    aufast.nn,
    aufast.models.inference,
    aufast.models.margl,
    aufast.models.aar,
    aufast.faces,
    aufast.label,
    aufast.train,
    aufast.train.config,
    aufast.train.evaluate,
)
OPTIONS = sorted(set(re.findall(r"`(\w+\(\w+=[^`]*\))`", PAGE.read_text(encoding="utf-8"))))


def test_the_page_states_options():
    assert len(OPTIONS) > 25


@pytest.mark.parametrize("option", OPTIONS)
def test_default_is_the_stated_one(option):
    call = ast.parse(option, mode="eval").body
    owners = [module for module in MODULES if hasattr(module, call.func.id)]
    assert owners, f"no {call.func.id} in aufast"
    parameters = inspect.signature(getattr(owners[0], call.func.id)).parameters
    (keyword,) = call.keywords
    assert parameters[keyword.arg].default == ast.literal_eval(keyword.value)
