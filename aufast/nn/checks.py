"""Checks of constructor arguments: one sentence that names the layer, the argument and what was expected."""

from __future__ import annotations


def positive(layer: str, **sizes: int) -> None:
    """Check that every size is an integer of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{layer}: {name} must be an integer of at least 1, got {size!r}")


def one_of(layer: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that an option is one of its choices."""
    if value not in choices:
        raise ValueError(f"{layer}: {name} must be one of {', '.join(choices)}, got {value!r}")
