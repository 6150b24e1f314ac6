"""Dataclasses from JSON: what fits comes back, anything else is named."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from aufast.typed import from_json


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    count: int
    kind: Literal["a", "b"] = "a"
    best: float | None = None
    crop: tuple[int, int] = (1, 2)
    links: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    frames: dict[str, int | None] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    inner: Inner = field(default_factory=Inner)


WHOLE = Outer(3, "b", 1.5, (4, 5), ("x", "y"), ["n"], {"a": None, "b": 2}, {"c": [1]}, True, Inner(2))


def test_what_json_wrote_comes_back() -> None:
    assert from_json(Outer, json.loads(json.dumps(asdict(WHOLE)))) == WHOLE
    assert from_json(Outer, {"count": 1}) == Outer(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "3"}, "count must be int, got '3'"),
        ({"count": True}, "count must be int, got True"),
        ({"count": 1.5}, r"count must be int, got 1\.5"),
        ({"kind": "c"}, "kind must be .*'a', 'b'.*, got 'c'"),
        ({"kind": ["a"]}, "kind must be"),
        ({"best": "much"}, "best must be"),
        ({"crop": [1]}, "crop must be tuple"),
        ({"crop": 1}, "crop must be tuple"),
        ({"links": ["a", 1]}, "links must be tuple"),
        ({"notes": [1]}, "notes must be list"),
        ({"frames": {"a": "b"}}, "frames must be dict"),
        ({"frames": []}, "frames must be dict"),
        ({"done": 1}, "done must be bool, got 1"),
        ({"inner": {"rate": None}}, "rate must be float, got None"),
        ({"inner": 3}, "3 is no object of a Inner"),
        ({"more": 1}, "Outer has no 'more'"),
    ],
    ids=str,
)
def test_anything_else_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        from_json(Outer, {**asdict(WHOLE), **change})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(TypeError, match="count"):
        from_json(Outer, {})
