"""The parts of a frame and of an image, plain and optimized, drawn from records.

python -m benchmarks.picture RECORD.json... PICTURE.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.table import by_run

PARTS = {"aar": ("stem", "branches", "relations"), "margl": ("backbone", "after backbone")}
NAMES = {"aar": "AAR, a frame", "margl": "MARGL, an image"}
FORMS = {
    "plain form": ("float32", "reference"),
    "float32": ("float32", "cpu"),
    "bfloat16": ("bfloat16", "cpu"),
}


def parts(record: dict[str, Any], model: str) -> dict[str, list[float]]:
    """For every part of a model its milliseconds in each of `FORMS`, at B=1.

    Raises:
        ValueError: the record does not hold one of them; it is named.
    """
    results, found = by_run(record), {}
    for part in PARTS[model]:
        times = []
        for form, (dtype, provider) in FORMS.items():
            run = results.get((model, "B1", part, dtype), {}).get(provider)
            if run is None:
                raise ValueError(f"the record holds no run of {model}'s {part}, {form}")
            times.append(1e3 * run["median"])
        found[part] = times
    return found


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Write the picture: one panel for each model that a record holds, one bar a form.

    Raises:
        ValueError: no record holds a model.
    """
    from matplotlib.figure import Figure

    panels = [
        (record, model)
        for record in records
        for model in PARTS
        if any(result["operator"] == model for result in record["results"])
    ]
    if not panels:
        raise ValueError(f"the records hold no run of {' or '.join(PARTS)}")
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axes, (record, model) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        left = [0.0] * len(FORMS)
        for part, times in parts(record, model).items():
            axes.barh(list(FORMS), times, left=left, label=part)
            left = [a + b for a, b in zip(left, times, strict=True)]
        axes.bar_label(axes.containers[-1], [f"{total:.3g} ms" for total in left], padding=3)
        machine = f"{record['machine']['cpu']}, {record['threads']} threads, {record['date'][:10]}"
        axes.set_title(f"{NAMES[model]}\n{machine}", fontsize=9)
        axes.set(xlabel="milliseconds", xlim=(0, 1.25 * max(left)))
        axes.invert_yaxis()
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    draw([json.loads(record.read_text()) for record in options.records], options.picture)


if __name__ == "__main__":
    main()
