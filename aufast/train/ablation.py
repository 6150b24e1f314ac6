"""The ablations of both papers for a data set at hand: MARGL Table 1, AAR Tables VI and VII."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aufast.files import write_whole, writing
from aufast.models import AAR, MARGL
from aufast.models.margl import VARIANTS as MARGL_VARIANTS
from aufast.train.config import AARRun, MARGLRun
from aufast.train.loop import train
from aufast.train.metrics import F1Result, mean_defined
from aufast.train.processes import join
from aufast.train.report import evaluate_runs, grid, published

_MARGL_PARTS = ("ROI", "AROI", "multi-level", "intra", "inter")


def ablate(
    config: MARGLRun | AARRun,
    out: str | os.PathLike[str],
    *,
    variants: Sequence[str] = (),
    parts: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
) -> str | None:
    """Train every variant on every part with every seed, test it, and write the paper's table.

    What is finished is not trained again, and what was stopped goes on: the same command may be repeated.

    Args:
        config: of the runs; their variant, part and seed are replaced.
        out: a folder; OUT/VARIANT/part-P-seed-S are the runs, OUT/ablation.txt and .json the table.
        variants: names of models; none means all of the system.
        parts: which parts are tested, from 1; none means all three, or the one of data with their own split.
        seeds: F1 is averaged over them.

    Returns:
        The table; None when SIGTERM stopped it.

    Raises:
        ValueError: a variant of another system, several parts of data with their own split, or what `train`
            and `evaluate_runs` raise.
    """
    system = MARGL if isinstance(config, MARGLRun) else AAR
    variants = tuple(variants) or system.variants
    for name in variants:
        if name not in system.variants:
            raise ValueError(f"variants must be of {', '.join(system.variants)}, got {name!r}")
    parts, out, results = _which_parts(config, parts), Path(out), {}
    for name in variants:
        by_seed = []
        for seed in seeds:
            runs = []
            for part in parts:
                run = out / name / f"part-{part}-seed-{seed}"
                one = replace(
                    config,
                    seed=seed,
                    model=replace(config.model, variant=name),
                    data=replace(config.data, part=part),
                )
                if not train(one, run, resume=True):
                    return None
                runs.append(run)
            by_seed.append(evaluate_runs(runs, device=config.device))
        results[name] = by_seed
    synthetic = by_seed[0].synthetic
    rows = {name: [evaluation.pooled for evaluation in by_seed] for name, by_seed in results.items()}
    dataset = by_seed[0].dataset
    text = table(rows, dataset, synthetic)
    values = {
        "dataset": dataset,
        "synthetic": synthetic,
        "parts": list(parts),
        "seeds": list(seeds),
        "aus": list(config.model.aus),
        "f1": {name: [list(result.f1) for result in found] for name, found in rows.items()},
        "mean": {name: [result.mean for result in found] for name, found in rows.items()},
    }
    if join(config.device).first:
        with writing(out, "the runs are as they were"):
            write_whole(out / "ablation.txt", (text + "\n").encode())
            found = json.dumps(values, indent=1).replace("NaN", "null")
            write_whole(out / "ablation.json", (found + "\n").encode())
    return text


def _which_parts(config: MARGLRun | AARRun, parts: Sequence[int]) -> tuple[int, ...]:
    """The parts that are asked for; data with their own split test one group, whatever its number."""
    groups = config.data.split == "groups"
    if groups and len(parts) > 1:
        raise ValueError(f"parts must be one where data.split is groups, got {', '.join(map(str, parts))}")
    return tuple(parts) or ((1,) if groups else (1, 2, 3))


def table(rows: dict[str, list[F1Result]], dataset: str, synthetic: bool) -> str:
    """The table of a system's variants in its paper's form, and the paper's own below it.

    Args:
        rows: variant to its result of each seed.
        dataset: the data set's name.
        synthetic: the faces were drawn; then every row says so.
    """
    mark = "SYNTHETIC " if synthetic else ""
    aus = next(iter(rows.values()))[0].aus
    seeds = len(next(iter(rows.values())))
    averaged = f", averaged over {seeds} seeds" if seeds > 1 else ""
    lines = [f"{mark}{dataset}: what each variant has, and its F1-frame (%){averaged}"]
    lines += structure(tuple(rows))
    means = {
        mark + name: [mean_defined([[*r.f1, r.mean][k] for r in found]) for k in range(len(aus) + 1)]
        for name, found in rows.items()
    }
    lines += ["", *grid("F1-frame (%)", aus, means)]
    if seeds > 1:
        lines += [
            f"{name}: mean F1 of each seed {', '.join(f'{r.mean:.1f}' for r in found)}"
            for name, found in rows.items()
        ]
    paper = published()["margl-1" if next(iter(rows)) in MARGL.variants else "aar-7"]
    lines += ["", f"published, on {paper['dataset']}: {paper['source']}"]
    if "average" in paper:
        lines += [f"{name:<20} {value:6.1f}" for name, value in paper["average"].items()]
    else:
        lines += grid("F1-frame (%)", paper["aus"], paper["rows"])
    return "\n".join(lines)


def structure(variants: Sequence[str]) -> list[str]:
    """Which parts each variant has: the columns of MARGL Table 1, or AAR Table VI."""
    if variants[0] in MARGL_VARIANTS:
        parts, has = _MARGL_PARTS, {}
        for name in variants:
            v = MARGL_VARIANTS[name]
            has[name] = (v.levels > 0 and not v.adaptive, v.adaptive, v.levels == 3, v.intra, v.inter)
    else:
        paper = published()
        parts, rows = paper["aar-6"]["parts"], paper["aar-6"]["rows"]
        titles = {name: title for title, name in paper["aar-7"]["variants"].items()}
        has = {name: [part in rows[titles[name]] for part in parts] for name in variants}
    width = max(map(len, variants))
    lines = [" " * width + "  " + "  ".join(parts)]
    for name in variants:
        cells = (f"{'x' if there else '':^{len(part)}}" for part, there in zip(parts, has[name], strict=True))
        lines.append(f"{name:<{width}}  " + "  ".join(cells).rstrip())
    return lines
