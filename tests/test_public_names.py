"""Every public name is documented: what it does, every argument, and what comes back."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

ROOMS = ("aufast", "aufast.ops", "aufast.nn", "aufast.models", "aufast.faces", "aufast.data", "aufast.train")
ROOMS += ("aufast.label", "aufast.plot", "aufast.reference")
# Every layer and model takes them, as every module of torch does.
USUAL = {"self", "cls", "device", "dtype"}
INHERITED = vars(torch.nn.Module).keys() - {"forward"}


def functions(room: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions of a room, and public methods of its classes that are its own."""
    module = importlib.import_module(room)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield f"{room}.{name}", value
        elif inspect.isclass(value):
            for method, member in vars(value).items():
                member = getattr(member, "__func__", member)
                if inspect.isfunction(member) and method not in INHERITED and not method.startswith("_"):
                    yield f"{room}.{name}.{method}", member


def classes(room: str) -> Iterator[tuple[str, type]]:
    module = importlib.import_module(room)
    for name in module.__all__:
        if inspect.isclass(getattr(module, name)):
            yield f"{room}.{name}", getattr(module, name)


def told(text: str, name: str) -> bool:
    """Whether an argument stands in a section of its own, or is named in a sentence as `name`."""
    return bool(re.search(rf"^ +\*{{0,2}}(\w+, )*{name}(, \w+)*:|`{name}`", text, re.M))


FUNCTIONS = dict(pair for room in ROOMS for pair in functions(room))
CLASSES = dict(pair for room in ROOMS for pair in classes(room))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_does_takes_and_returns(name: str) -> None:
    function = FUNCTIONS[name]
    text = function.__doc__ or ""
    assert text.strip(), f"{name} has no docstring"
    signature = inspect.signature(function)
    silent = [p for p in signature.parameters if p not in USUAL and not told(text, p)]
    assert not silent, f"{name} does not tell {', '.join(silent)}"
    comes_back = signature.return_annotation not in (None, "None", inspect.Parameter.empty)
    if comes_back and set(signature.parameters) - USUAL:
        first_line = text.strip().splitlines()[0]
        assert "Returns:" in text or "Yields:" in text or len(first_line) > 20, f"{name}: what comes back?"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_is_and_takes(name: str) -> None:
    """A field may have a docstring of its own, and an argument be told by the class that it comes from."""
    value = CLASSES[name]
    own = value.__doc__ or ""
    assert own.strip() and not own.startswith(f"{value.__name__}("), f"{name} has no docstring"
    family = [base for base in value.__mro__ if base.__module__.startswith("aufast")]
    text = "\n".join((base.__doc__ or "") + (base.__init__.__doc__ or "") for base in family)
    fields = set(re.findall(r'^    (\w+): .*\n    """', inspect.getsource(value), re.M))
    silent = [p for p in inspect.signature(value).parameters if p not in USUAL | fields and not told(text, p)]
    assert not silent, f"{name} does not tell {', '.join(silent)}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_and_lists_what_it_has(room: str) -> None:
    module = importlib.import_module(room)
    assert (module.__doc__ or "").strip()
    assert all(hasattr(module, name) for name in module.__all__)
    if room != "aufast":
        here = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and not isinstance(value, ModuleType) and name not in vars(typing)
        }
        assert here - {"annotations"} == {
            name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)
        }
