"""A training run from the words of the command line and from configuration files, by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from aufast.train.config import RECIPES, AARRun, MARGLRun, recipe
from aufast.train.run import CONFIG, read_config
from aufast.typed import from_json

_CLASSES = {"margl": MARGLRun, "aar": AARRun}
System = Literal["margl", "aar"]
_LONGEST = 1000  # characters of an error that jsonargparse words


def parse_run(
    system: System, words: Sequence[str], also: argparse.ArgumentParser
) -> tuple[MARGLRun | AARRun, argparse.Namespace]:
    """Settings of a run.

    They begin as a recipe or a file (`--config`), or with `--resume` as those of the run in `--out`. On top
    comes every option of `MARGLRun` or `AARRun` by its name: `--data.root`, `--regions.optimizer.lr`.

    Args:
        system: whose options there are.
        words: of the command line.
        also: parser of the options that are not the run's; it has `config` and `out`.

    Returns:
        The settings, and the other options.

    Raises:
        ImportError: jsonargparse is not installed.
        ValueError: an option that does not exist, or a value that it does not take.
    """
    try:
        import jsonargparse
    except ImportError as error:
        raise ImportError("training needs jsonargparse: pip install 'aufast[train]'") from error
    others, words = also.parse_known_args(words)
    cls = _CLASSES[system]
    parser = jsonargparse.ArgumentParser(prog=also.prog, exit_on_error=False)
    parser.add_class_arguments(cls)
    try:
        if others.config in RECIPES:
            base = recipe(others.config)
            if not isinstance(base, cls):
                raise ValueError(f"{others.config} is no recipe of {system}")
            parser.set_defaults(dataclasses.asdict(base))
        elif others.config:
            if not Path(others.config).is_file():
                raise ValueError(
                    f"--config {others.config}: no such file, and recipes are {', '.join(RECIPES)}"
                )
            _refuse_classes(others.config)
            parser.default_config_files = [others.config]
        elif getattr(others, "resume", False) and (Path(others.out) / CONFIG).exists():
            base = read_config(Path(others.out))
            if not isinstance(base, cls):
                raise ValueError(f"{others.out}: is no run of {system}")
            parser.set_defaults(dataclasses.asdict(base))
        found = parser.parse_args(list(words))
        # jsonargparse lets a file say null, or a list where a group of settings belongs.
        values = {field.name: found.as_dict()[field.name] for field in dataclasses.fields(cls)}
        config = from_json(cls, values)
        if not others.out:
            raise ValueError("--out: name the folder that the run goes to")
        return config, others
    except (jsonargparse.ArgumentError, argparse.ArgumentError, TypeError) as error:
        text = str(error)  # which holds the value that does not fit, however long it is
        raise ValueError(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …") from error


def _refuse_classes(path: str) -> None:
    """Refuse a file of settings that names a class: jsonargparse imports its module before it looks at it."""
    import yaml  # which jsonargparse reads the file with

    try:
        waiting = [yaml.safe_load(Path(path).read_text(encoding="utf-8"))]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    seen = set()  # a file may name a part of itself many times
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not isinstance(value, (dict, list)):
            continue
        seen.add(id(value))
        if isinstance(value, dict) and "class_path" in value:
            raise ValueError(f"{path}: settings name no classes, but a class_path is {value['class_path']!r}")
        waiting += value.values() if isinstance(value, dict) else value
