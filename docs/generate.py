"""What the site has beyond the pages: the API from the public names, and recorded runs as tables and plots.

Called by conf.py; everything is written below one folder, which git ignores.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pprint
import shutil
from pathlib import Path
from typing import Any

from benchmarks.table import HEADER, by_run, cost, head, judged, rows, summary

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
# Every module whose `__all__` is a promise, as a reader meets them.
PUBLIC = ("aufast", "aufast.ops", "aufast.nn", "aufast.models", "aufast.faces", "aufast.data", "aufast.train")
PUBLIC += ("aufast.label", "aufast.plot", "aufast.reference")


def everything(folder: Path) -> None:
    """Write all pages anew."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "api").mkdir(parents=True)
    for module in PUBLIC:
        (folder / "api" / f"{module}.md").write_text(api_page(module), encoding="utf-8")
    (folder / "records").mkdir()
    for record in sorted(RESULTS.glob("*.json"), reverse=True):
        page = record_page(record, folder / "records")
        (folder / "records" / f"{record.stem}.md").write_text(page, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------
# The API


def directive(name: str, value: Any) -> list[str]:
    """How a public name is shown: a class or function by its docstring, a constant by its value."""
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "   :members:"]
    if callable(value):
        return [f".. autofunction:: {name}"]
    shown = pprint.pformat(value, width=110, compact=True).splitlines()
    return [f".. py:data:: {name}", "", "   .. code-block:: python", "", *(f"      {line}" for line in shown)]


def api_page(module: str) -> str:
    """Every public name of a module; names that are modules themselves have pages of their own."""
    public = importlib.import_module(module)
    lines = [f"# {module}", "", inspect.getdoc(public), "", f"```{{py:currentmodule}} {module}", "```"]
    for name in public.__all__:
        value = getattr(public, name)
        if inspect.ismodule(value) or name == "__version__":
            continue
        lines += ["", f"## {name}", "", "```{eval-rst}", *directive(f"{module}.{name}", value), "```"]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------
# Recorded runs


def record_page(path: Path, folder: Path) -> str:
    """A record as a page: machine, table and one plot an operator; a record of another form as it is."""
    record = json.loads(path.read_text(encoding="utf-8"))
    file = os.path.relpath(path, folder)
    lines = [f"# {path.stem}", "", f"The file: [{path.name}]({file})", ""]
    if "results" not in record:
        return "\n".join([*lines, "```json", json.dumps(record, indent=1, ensure_ascii=False), "```", ""])
    lines += ["```text", head(record), "", summary(record), "```"]
    for operator in dict.fromkeys(result["operator"] for result in record["results"]):
        lines += ["", f"## {operator}", ""]
        picture = folder / f"{path.stem}-{operator}.svg"
        if draw(record, operator, picture):
            lines += [f"![{operator}: what every provider takes, ours = 1]({picture.name})", ""]
        lines += ["| " + " | ".join(HEADER[1:]) + " |", "|" + "---|" * len(HEADER[1:])]
        lines += ["| " + " | ".join(row[1:]) + " |" for row in rows(record) if row[0] == operator]
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], operator: str, path: Path) -> bool:
    """Plot how many times as much each provider takes as ours; whether there is anything to plot."""
    from matplotlib.figure import Figure

    bars = []  # (label, whether it is ours, ratio), in the record's order
    for (name, case, mode, dtype), providers in by_run(record).items():
        ours = judged(record, providers)
        if name == operator and ours is not None:
            bars += [
                (f"{case} {mode} {dtype}: {provider}", provider == ours, cost(result) / cost(providers[ours]))
                for provider, result in providers.items()
            ]
    if not bars:
        return False
    figure = Figure(figsize=(8, 0.8 + 0.24 * len(bars)), layout="constrained")
    axes = figure.subplots()
    labels, are_ours, ratios = zip(*bars, strict=True)
    drawn = axes.barh(labels, ratios, color=["tab:orange" if ours else "tab:gray" for ours in are_ours])
    axes.bar_label(drawn, [f"{ratio:.2g}" for ratio in ratios], padding=3, fontsize=8)
    axes.set(xscale="log", xlim=(0.5 * min(1, *ratios), 2 * max(ratios)), xlabel="time or memory, ours = 1")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_title(operator)
    figure.savefig(path, metadata={"Date": None})
    return True
