"""Evaluation of finished runs, printed and saved beside the published tables."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from aufast.files import write_whole, writing
from aufast.models import load_model
from aufast.train.batches import Split, make_split
from aufast.train.checkpoint import STATE, Link, linked, read_position
from aufast.train.config import AARRun, MARGLRun
from aufast.train.evaluate import score
from aufast.train.metrics import F1Result, mean_defined
from aufast.train.processes import Processes, join
from aufast.train.run import read_config, read_split

Row = Sequence[float]


@cache
def published() -> dict[str, Any]:
    """The tables of both papers, each with its source, as `published.json` holds them."""
    return json.loads((files("aufast.train") / "published.json").read_text(encoding="utf-8"))


def published_tables(dataset: str, aus: Sequence[int]) -> list[dict[str, Any]]:
    """The tables that compare methods on a data set and its AUs."""
    tables = (table for table in published().values() if "variants" not in table)
    return [t for t in tables if t.get("dataset") == dataset and t["aus"] == list(aus)]


@dataclass(frozen=True)
class Evaluation:
    """What runs reached on their test videos.

    Attributes:
        title: model and data.
        synthetic: the faces were drawn; then every row says so.
        dataset: the data set's name.
        parts: each run's result by the name of what it tested.
        pooled: all test frames counted together, the measure of the papers.
        notes: what a reader must know.
    """

    title: str
    synthetic: bool
    dataset: str
    parts: dict[str, F1Result]
    pooled: F1Result
    notes: tuple[str, ...]

    def rows(self) -> dict[str, Row]:
        """F1 of each AU and their mean: each part, all frames together, and the mean of the parts."""
        rows = {name: [*result.f1, result.mean] for name, result in self.parts.items()}
        if len(rows) > 1:
            means = [mean_defined(column) for column in zip(*rows.values(), strict=True)]
            rows |= {"all parts together": [*self.pooled.f1, self.pooled.mean], "mean of the parts": means}
        mark = "SYNTHETIC, " if self.synthetic else ""
        return {mark + name: row for name, row in rows.items()}

    def text(self) -> str:
        """The table for people, with the published rows, without a final line break."""
        lines = [self.title, *grid("F1-frame (%)", self.pooled.aus, self.rows()), *self.notes]
        for table in published_tables(self.dataset, self.pooled.aus):
            lines += ["", f"published: {table['source']}"]
            lines += grid("F1-frame (%)", table["aus"], table["rows"])
        if self.synthetic:
            lines += [
                "",
                "Drawn faces were tested: these rows say nothing about people, nor beside the published.",
            ]
        return "\n".join(lines)

    def save(self, out: str | os.PathLike[str]) -> None:
        """Write evaluation.json and evaluation.txt into the folder `out`."""
        out = Path(out)
        values = dataclasses.asdict(self)
        values["published"] = published_tables(self.dataset, self.pooled.aus)
        with writing(out, "the runs are as they were"):
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(values, indent=1, ensure_ascii=False).replace("NaN", "null")
            write_whole(out / "evaluation.json", (text + "\n").encode())
            write_whole(out / "evaluation.txt", (self.text() + "\n").encode())


def grid(corner: str, aus: Sequence[int], rows: dict[str, Row]) -> list[str]:
    """Lines of a table with a column for each AU and their mean."""
    width = max(len(corner), *map(len, rows))
    head = " ".join(f"{name:>6}" for name in (*map(str, aus), "mean"))
    lines = [f"{corner:<{width}} {head}"]
    for name, row in rows.items():
        cells = " ".join(f"{value:6.1f}" if value == value else f"{'-':>6}" for value in row)
        lines.append(f"{name:<{width}} {cells}")
    return lines


def evaluate_runs(
    runs: Sequence[str | os.PathLike[str]],
    *,
    link: Link = "best",
    root: str = "",
    device: str = "auto",
    loaders: int = 0,
) -> Evaluation:
    """Test finished runs, one for each part of the data.

    Args:
        runs: their folders.
        link: which checkpoint.
        root: the packed data where they are no longer where the runs found them.
        device: as for training; under `torchrun` the work is shared, and the result is the same.
        loaders: processes that load.

    Raises:
        ValueError: a run that is not finished, whose data hold a subject it was trained on, whose checkpoint
            is for other AUs, or runs that do not belong together.
    """
    if not runs:
        raise ValueError("there is no run to evaluate")
    parts: dict[str, F1Result] = {}
    notes, heads = [], []
    processes = join(device)
    for run in map(Path, runs):
        config = read_config(run)
        if root:
            config = replace(config, data=replace(config.data, root=root))
        split, name = make_split(config.data, config.model.aus), _part_name(config)
        if name in parts:
            raise ValueError(f"{run}: tests {name}, as another of these runs does")
        parts[name] = _test(run, link, config, split, processes, loaders)
        head = (config.model.variant, split.packed.dataset, split.packed.synthetic, config.model.aus)
        heads.append(head)
        if head != heads[0]:
            raise ValueError(f"{run}: is of {head}, but {runs[0]} of {heads[0]}; they make no table")
        if config.data.validation == "test":
            notes.append(f"{name}: the checkpoint was CHOSEN ON THE TEST DATA")
    variant, dataset, synthetic, _ = heads[0]
    pooled = F1Result.pooled(list(parts.values()))
    title = f"{variant} on {'SYNTHETIC faces in the layout of ' if synthetic else ''}{dataset}"
    return Evaluation(title, synthetic, dataset, parts, pooled, tuple(notes))


def _test(
    run: Path, link: Link, config: MARGLRun | AARRun, split: Split, processes: Processes, loaders: int
) -> F1Result:
    """Score one run on its test videos."""
    if not (run / "last" / STATE).is_file() or not read_position(run / "last").finished:
        raise ValueError(f"{run}: the run is not finished; go on with it by --resume")
    about = read_split(run)
    known = set(about["train"]) | set(about["validation"] if config.data.validation == "subjects" else ())
    if seen := sorted({video.subject for video in split.test} & known):
        raise ValueError(f"{run}: subject {seen[0]} is in the test data, and the run was trained on it")
    folder = linked(run, link)
    model = load_model(folder).to(processes.device)
    if model.config.aus != config.model.aus:
        raise ValueError(
            f"{folder}: the checkpoint is for AUs {model.config.aus}, the run for {config.model.aus}"
        )
    return score(model, split.test, split.columns, processes, loaders=loaders).compute()


def _part_name(config: MARGLRun | AARRun) -> str:
    return f"group {config.data.test_group}" if config.data.split == "groups" else f"part {config.data.part}"
