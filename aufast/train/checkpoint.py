"""Checkpoints of a run: model folders with the state of the optimiser, whole or not there at all.

RUN/checkpoints/00000120/   config.json, model.safetensors   as `save_pretrained` writes them
                            optimizer.safetensors            its moments
                            training.json                    where in the run this is
                            SHA256SUMS                       of the four
RUN/last, RUN/best          links to two of them

A checkpoint is written into a hidden folder and takes its name by a rename; then its links move to it, `last`
first. So at every moment `last` is a whole checkpoint, whenever the process is killed, and it says whether
it is `best` too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from aufast.data.packed import read_json
from aufast.files import file_sum, sync_folder, write_whole
from aufast.models import AAR, MARGL, load_model
from aufast.models.pretrained import SUMS
from aufast.typed import from_json

CHECKPOINTS, STATE, MOMENTS = "checkpoints", "training.json", "optimizer.safetensors"
Link = Literal["last", "best"]


@dataclass(frozen=True)
class Position:
    """Where in a run a checkpoint is.

    Attributes:
        stage: index of the stage that goes on.
        epoch: of the stage, that goes on.
        batch: steps of that epoch which are done.
        step: steps of the whole run which are done.
        metrics: bytes of metrics.jsonl that were written until then.
        best: the best validation result of this stage, in percent; None without one.
        finished: nothing is left to do.
        scaler: state of the gradient scaler of float16; empty without one.
        links: the names that its checkpoint gets, in the order in which they move.
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    metrics: int = 0
    best: float | None = None
    finished: bool = False
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)
    links: tuple[Link, ...] = ("last",)


def save_checkpoint(run: Path, model: MARGL | AAR, moments: dict[str, Tensor], position: Position) -> None:
    """Write a checkpoint and have its links point to it; checkpoints without a link are removed.

    Args:
        run: the run's folder.
        model: what is trained.
        moments: of the optimiser, from `optimizer_tensors`.
        position: where in the run this is, and which names it gets.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    folder = run / CHECKPOINTS / f"{position.step:08d}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        write_whole(temporary / MOMENTS, safetensors.torch.save(moments))
        write_whole(temporary / STATE, (json.dumps(dataclasses.asdict(position)) + "\n").encode())
        sums = (temporary / SUMS).read_text(encoding="utf-8")
        sums += "".join(f"{file_sum(temporary / name)}  {name}\n" for name in (MOMENTS, STATE))
        write_whole(temporary / SUMS, sums.encode())
        sync_folder(temporary)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for link in position.links:
        _move_link(run, link, folder.name)
    sync_folder(run)
    remove_unlinked(run)


def _move_link(run: Path, link: Link, name: str) -> None:
    fresh = run / f".{link}"
    fresh.unlink(missing_ok=True)  # a killed process's: a run has one writer
    fresh.symlink_to(Path(CHECKPOINTS) / name)
    os.replace(fresh, run / link)


def linked(run: Path, link: Link) -> Path:
    """The checkpoint of a name: `best` is the last one too where a kill came between the two moves."""
    last, named = run / "last", run / link
    behind = link == "best" and last.exists() and named.resolve() != last.resolve()
    return last if behind and "best" in read_position(last).links else named


def finish_links(run: Path) -> None:
    """Make the moves that a kill prevented."""
    if (found := linked(run, "best")).name == "last":
        _move_link(run, "best", found.resolve().name)
        sync_folder(run)


def read_position(folder: Path) -> Position:
    """Where in its run a checkpoint is.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return from_json(Position, read_json(folder / STATE, "it is no checkpoint of a run"))
    except TypeError as error:
        raise ValueError(f"{folder / STATE}: damaged: {error}") from error


def load_checkpoint(folder: Path) -> tuple[MARGL | AAR, dict[str, Tensor], Position]:
    """Read a checkpoint that `save_checkpoint` wrote.

    Returns:
        The model in evaluation mode on the CPU, the optimiser's tensors, and the position.

    Raises:
        ValueError: a file is missing, cut short or changed; it is named.
    """
    model = load_model(folder)
    sums = dict(line.split("  ", 1)[::-1] for line in (folder / SUMS).read_text("utf-8").splitlines())
    for name in (MOMENTS, STATE):
        if not (folder / name).is_file() or file_sum(folder / name) != sums.get(name):
            raise ValueError(f"{folder / name}: missing, cut short or changed: its SHA-256 is not in {SUMS}")
    position = read_position(folder)
    try:
        return model, safetensors.torch.load_file(folder / MOMENTS), position
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / MOMENTS}: not a safetensors file: {error}") from error


def remove_unlinked(run: Path) -> None:
    """Remove checkpoints that no link names, and what a killed process left half-written."""
    linked = {(run / link).resolve() for link in ("last", "best")}
    for folder in (run / CHECKPOINTS).glob("*"):
        if folder.resolve() not in linked:
            shutil.rmtree(folder)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of an optimiser by parameter and name, on the CPU."""
    return {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser the moments that `optimizer_tensors` took from its like.

    Raises:
        ValueError: a moment of a parameter that the optimiser does not move, or of another shape.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        known = index.isdecimal() and int(index) < len(parameters)
        if not known or value.shape not in ((), parameters[int(index)].shape):
            raise ValueError(f"{MOMENTS}: {key!r} of shape {tuple(value.shape)} belongs to no parameter here")
        if value.dim():
            # Fused updates walk over memory and look at no strides: a moment lies as its parameter does.
            like = parameters[int(index)]
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
