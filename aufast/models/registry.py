"""Models by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from aufast.models.aar import AAR
from aufast.models.config import build_config, nearest
from aufast.models.margl import MARGL
from aufast.models.pretrained import CONFIG, build_model, read_folder

_CLASSES: dict[str, type[MARGL] | type[AAR]] = {name: cls for cls in (MARGL, AAR) for name in cls.variants}


def list_models() -> list[str]:
    """The names that `create_model` takes: MARGL and AAR, each after the variants of its paper's ablation."""
    return list(_CLASSES)


def create_model(name: str, **config: Any) -> MARGL | AAR:
    """Build a model with fresh weights.

    Args:
        name: one of `list_models()`.
        config: fields of `MARGLConfig` or `AARConfig`, e.g. `aus=(1, 2, 4)`.

    Raises:
        ValueError: an unknown name or config key, with the nearest known ones, or a value that does not fit.
    """
    if name not in _CLASSES:
        raise ValueError(f"create_model: unknown model {name!r}; {nearest(str(name), _CLASSES)}")
    cls = _CLASSES[name]
    return cls(build_config(cls.config_class, name, config))


def load_model(folder: str | os.PathLike[str]) -> MARGL | AAR:
    """Load whichever model a folder holds, in evaluation mode, in the dtype it was saved in, on the CPU.

    Args:
        folder: written by `save_pretrained`.

    Raises:
        ValueError: a file is missing, cut short or changed, or does not fit the model; the sentence names it.
    """
    folder = Path(folder)
    content = read_folder(folder)
    if content.name not in _CLASSES:
        raise ValueError(
            f"{folder / CONFIG}: unknown model {content.name!r}; {nearest(content.name, _CLASSES)}"
        )
    return build_model(_CLASSES[content.name], folder, content)
