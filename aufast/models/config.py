"""Checks of model configurations: every message names the key, what came and what was expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from aufast.aus import AU_NAMES

Config = TypeVar("Config")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that look most like `name`, as the end of a sentence."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def build_config(cls: type[Config], variant: str, values: Mapping[str, Any]) -> Config:
    """Make a configuration from keyword arguments or from JSON, where lists stand for tuples.

    Args:
        cls: the configuration's dataclass.
        variant: the model's name.
        values: its other fields.

    Raises:
        ValueError: a key that the configuration does not have, or a value that it does not take.
    """
    known = [field.name for field in fields(cls) if field.name != "variant"]
    for key in values:
        if key not in known:
            raise ValueError(f"{variant}: unknown config key {key!r}; {nearest(key, known)}")
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return cls(variant=variant, **tuples)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Checker:
    """Checks the fields of one configuration."""

    def __init__(self, config: Any):
        self.config = config
        self.name = type(config).__name__

    def aus(self) -> None:
        """Check the list of action units: not empty, known, each once."""
        aus = self.config.aus
        if not isinstance(aus, tuple) or not aus:
            raise ValueError(f"{self.name}: aus must be a non-empty tuple of AU numbers, got {aus!r}")
        for au in aus:
            if isinstance(au, bool) or not isinstance(au, int) or au not in AU_NAMES:
                raise ValueError(f"{self.name}: aus must hold AU numbers of {tuple(AU_NAMES)}, got {au!r}")
        if len(set(aus)) != len(aus):
            raise ValueError(f"{self.name}: aus must name each AU once, got {aus}")

    def integers(self, *names: str, least: int = 1) -> None:
        """Check that these fields are integers of at least `least`."""
        for name in names:
            value = getattr(self.config, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{self.name}: {name} must be an integer of at least {least}, got {value!r}")

    def number(self, name: str, least: float | None = None) -> None:
        """Check that a field is a finite number, of at least `least`."""
        value = getattr(self.config, name)
        if not _is_number(value) or (least is not None and value < least):
            bound = "" if least is None else f" of at least {least:g}"
            raise ValueError(f"{self.name}: {name} must be a finite number{bound}, got {value!r}")

    def triples(self, *names: str, positive: bool = False) -> None:
        """Check that these fields are tuples of three finite numbers."""
        for name in names:
            value = getattr(self.config, name)
            fits = isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))
            if not fits or (positive and min(value) <= 0):
                kind = "positive" if positive else "finite"
                raise ValueError(f"{self.name}: {name} must be three {kind} numbers, got {value!r}")

    def flags(self, *names: str) -> None:
        """Check that these fields are True or False."""
        for name in names:
            value = getattr(self.config, name)
            if not isinstance(value, bool):
                raise ValueError(f"{self.name}: {name} must be true or false, got {value!r}")

    def choice(self, name: str, choices: Iterable[str]) -> None:
        """Check that a field is one of its choices."""
        value = getattr(self.config, name)
        choices = tuple(choices)
        if value not in choices:
            raise ValueError(f"{self.name}: {name} must be one of {', '.join(choices)}, got {value!r}")

    def image_size(self, multiple: int) -> None:
        """Check that the image's side is a multiple of what the network halves it to."""
        self.integers("image_size")
        if self.config.image_size % multiple:
            raise ValueError(
                f"{self.name}: image_size must be a multiple of {multiple}, got {self.config.image_size}"
            )
