"""A run's folder: its settings, who is in which part, and what was measured.

RUN/config.json     the settings; --resume refuses others
RUN/split.json      the data, and the subjects of training, validation and test; --resume refuses others
RUN/metrics.jsonl   a line every few steps and one an epoch
RUN/checkpoints/    see `aufast.train.checkpoint`
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aufast.data.packed import read_json
from aufast.files import locked, write_whole, writing
from aufast.train.batches import Split
from aufast.train.checkpoint import Position, finish_links, remove_unlinked
from aufast.train.config import AARRun, MARGLRun
from aufast.typed import from_json

CONFIG, SPLIT, METRICS = "config.json", "split.json", "metrics.jsonl"
FORMAT_VERSION = 1

# What may differ when a run goes on: where things are, and what is written down.
_FREE = (
    "data.root",
    "data.loaders",
    "device",
    "save_every",
    "log_every",
    "tensorboard",
    "initial",
    "imagenet",
)


def describe(config: MARGLRun | AARRun) -> dict[str, Any]:
    """A run's settings as JSON holds them."""
    system = "margl" if isinstance(config, MARGLRun) else "aar"
    values = {"format_version": FORMAT_VERSION, "system": system, **dataclasses.asdict(config)}
    return json.loads(json.dumps(values))


def read_config(run: Path) -> MARGLRun | AARRun:
    """The settings of a run that exists.

    Raises:
        ValueError: the folder holds none, or they are damaged or of a newer version.
    """
    values = read_json(run / CONFIG, "not a training run")
    version, system = values.pop("format_version", None), values.pop("system", None)
    if not isinstance(version, int) or system not in ("margl", "aar"):
        raise ValueError(f"{run / CONFIG}: damaged: of format {version!r} and system {system!r}")
    if version > FORMAT_VERSION:
        raise ValueError(f"{run / CONFIG}: written by a newer aufast; update aufast")
    if missing := {"data", "model"} - values.keys():
        raise ValueError(f"{run / CONFIG}: damaged: holds no {sorted(missing)[0]!r}")
    try:
        return from_json(MARGLRun if system == "margl" else AARRun, values)
    except TypeError as error:
        raise ValueError(f"{run / CONFIG}: damaged: {error}") from error


def read_split(run: Path) -> dict[str, Any]:
    """The data of a run that exists, and the subjects of its "train", "validation" and "test".

    Raises:
        ValueError: the folder does not say, or the file is damaged.
    """
    about = read_json(run / SPLIT, "which data the run was begun with is not known")
    for part in ("train", "validation", "test"):
        names = about.get(part)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{run / SPLIT}: damaged: {part} must be a list of subjects, got {names!r}")
    return about


@contextlib.contextmanager
def open_run(run: Path, config: MARGLRun | AARRun, split: Split, resume: bool) -> Iterator[None]:
    """Make or take over a run's folder, and keep others out of it.

    Raises:
        ValueError: the folder holds something and `resume` is False, its settings or its data differ, or
            another process is at work on it.
    """
    if not resume and run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"{run}: already exists; --resume goes on with it, or name a new folder")
    run.mkdir(parents=True, exist_ok=True)
    with locked(run, "training"):
        about = {"root": str(split.packed.root), "dataset": split.packed.dataset}
        about |= {"synthetic": split.packed.synthetic, **split.subjects()}
        if (run / CONFIG).exists():
            _compare(run, config, about)
        else:
            write_whole(run / SPLIT, (json.dumps(about, indent=1) + "\n").encode())
            write_whole(run / CONFIG, (json.dumps(describe(config), indent=1) + "\n").encode())
        finish_links(run)
        remove_unlinked(run)
        yield


def _compare(run: Path, config: MARGLRun | AARRun, about: dict[str, Any]) -> None:
    before, now = (_flat(describe(c)) for c in (read_config(run), config))
    for key in before.keys() | now.keys():
        if key not in _FREE and before.get(key) != now.get(key):
            raise ValueError(f"{run}: was begun with {key} {before.get(key)}, not {now.get(key)}")
    split = read_split(run)
    for key, value in about.items():
        if key != "root" and split.get(key) != value:
            raise ValueError(f"{run}: was begun with other data: {key} differs from {SPLIT}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class Log:
    """The run's measurements: metrics.jsonl always, TensorBoard where it is wanted.

    Args:
        run: the run's folder.
        position: of the checkpoint; what was written after it is of steps that are done again, and goes.
        tensorboard: write TensorBoard's files too.
        active: False for processes that write nothing.

    Raises:
        ImportError: TensorBoard is wanted and not installed.
        ValueError: metrics.jsonl has fewer bytes than the checkpoint knows.
    """

    def __init__(self, run: Path, position: Position, tensorboard: bool, active: bool):
        self._run = run
        self._file = self._board = None
        if not active:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "tensorboard is not installed: pip install 'aufast[tensorboard]'"
                ) from error
            self._board = SummaryWriter(run / "tensorboard", purge_step=position.step + 1)
        self._file, start = open(run / METRICS, "ab"), position.metrics
        if self._file.tell() < start:
            raise ValueError(f"{run / METRICS}: was cut short: the last checkpoint knows {start} bytes of it")
        self._file.truncate(start)
        self._file.seek(start)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                with contextlib.suppress(OSError):  # every line was flushed, or its failure was said
                    sink.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add a line; numbers go to TensorBoard too."""
        if self._file is None:
            return
        with self._writing():
            self._file.write((json.dumps({"step": step, **values}) + "\n").encode())
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(name, value, step)

    def sync(self) -> int:
        """Have all lines on disk; returns their bytes."""
        if self._file is None:
            return 0
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.tell()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self._run / METRICS, kept(self._run))


def kept(run: Path) -> str:
    """What a run loses when it cannot be written: nothing that was whole."""
    return f"{run / 'last'} is as it was, and --resume goes on from it"
