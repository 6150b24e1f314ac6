"""A training run from the words of the command line and from configuration files, by jsonargparse."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from aufast.train.config import RECIPES, AARRun, MARGLRun, recipe
from aufast.train.run import CONFIG, read_config

_CLASSES = {"margl": MARGLRun, "aar": AARRun}
System = Literal["margl", "aar"]


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
            parser.default_config_files = [others.config]
        elif getattr(others, "resume", False) and (Path(others.out) / CONFIG).exists():
            base = read_config(Path(others.out))
            if not isinstance(base, cls):
                raise ValueError(f"{others.out}: is no run of {system}")
            parser.set_defaults(dataclasses.asdict(base))
        values = parser.instantiate(parser.parse_args(list(words)))
        if not others.out:
            raise ValueError("--out: name the folder that the run goes to")
        return cls(**vars(values)), others
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        raise ValueError(str(error)) from error
