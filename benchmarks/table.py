"""One readable table of a benchmark run, and the small file that is kept of it.

    python -m benchmarks.table RUN.json [--save RECORD.json]

RUN.json is what `pytest benchmarks --benchmark-only --benchmark-json=RUN.json` wrote, or a record: an earlier
one, or that of a GPU, which `benchmarks/gpu.py` writes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.bars import BACKENDS, BARS, STEPS, Bar

HEADER = ("operator", "shape", "pass", "dtype", "ours", "", "reference", "best peer", "of ceiling", "bar")

Results = dict[tuple[str, str, str, str], dict[str, dict[str, Any]]]


def condense(raw: dict[str, Any]) -> dict[str, Any]:
    """Keep of pytest-benchmark's file what a reader needs: machine, versions, threads, ceilings, medians."""
    machine, ours = raw["machine_info"], raw["machine_info"]["aufast"]
    ceilings, results = {}, []
    for benchmark in raw["benchmarks"]:
        facts, stats = benchmark["extra_info"], benchmark["stats"]
        if "ceiling" in facts:
            amount = facts.get("flops") or facts.get("bytes")
            # A ceiling is what the machine can do at most: the best round.
            ceilings[facts["ceiling"]] = {"unit": facts["unit"], "rate": amount / stats["min"]}
        elif "memory" in facts:
            results.append(facts)
        else:
            results.append(facts | {key: stats[key] for key in ("median", "iqr", "rounds")})
    return {
        "date": raw["datetime"],
        "commit": raw["commit_info"].get("id"),
        "uncommitted": raw["commit_info"].get("dirty"),
        "machine": {
            "cpu": machine["cpu"].get("brand_raw", machine["processor"]),
            "architecture": machine["machine"],
            "cores": ours["cores"],
            "vectors": ours["vectors"],
            "AUFAST_CPU_ISA": ours["AUFAST_CPU_ISA"],
            "system": f"{machine['system']} {machine['release']}",
        },
        "versions": {
            "aufast": ours["version"],
            "torch": ours["torch"],
            "python": machine["python_version"],
            "compiler": ours["compiler"],
        },
        "backends": ours["backends"],
        "threads": ours["threads"],
        "ceilings": ceilings,
        "results": results,
    }


def by_run(record: dict[str, Any]) -> Results:
    """(operator, case, pass, dtype) -> provider -> its result."""
    found: Results = {}
    for result in record["results"]:
        key = tuple(result[field] for field in ("operator", "case", "pass", "dtype"))
        found.setdefault(key, {})[result["provider"]] = result
    return found


def kind(record: dict[str, Any]) -> str:
    """ "cuda" for a GPU's record, else "cpu"."""
    return "cuda" if "gpu" in record["machine"] else "cpu"


def cost(result: dict[str, Any]) -> float:
    """Seconds, or bytes of a memory run: less is better."""
    return result["memory"] if result["pass"] == "memory" else result["median"]


def fma_rate(record: dict[str, Any], dtype: str) -> float | None:
    """Multiply-add ceiling in flop/s for a dtype: bfloat16 has its own unit, or is widened to float32.

    A GPU's is that of a large matrix product.
    """
    ceilings, unit = record["ceilings"], "matmul" if kind(record) == "cuda" else "fma"
    found = [ceilings[name]["rate"] for name in (f"{unit} {dtype}", f"{unit} float32") if name in ceilings]
    return max(found, default=None)


def fraction(record: dict[str, Any], result: dict[str, Any]) -> str:
    """How much of the fitting ceiling is reached: of the one, FMA or copy, that asks for more time."""
    if result["pass"] == "memory":
        return ""
    copy, fma = record["ceilings"].get("copy"), fma_rate(record, result["dtype"])
    if copy is None or fma is None:
        return "not measured"
    product = "matmul" if kind(record) == "cuda" else "FMA"
    floors = {product: result["flops"] / fma, "copy": result["bytes"] / copy["rate"]}
    name = max(floors, key=floors.get)
    return f"{floors[name] / result['median']:.0%} {name}"


def judged(record: dict[str, Any], providers: dict[str, Any]) -> str | None:
    """The backend that bars are about: the first of ours that is there, as "auto" takes it."""
    return next((name for name in BACKENDS[kind(record)] if name in providers), None)


def reached(record: dict[str, Any], results: Results, bar: Bar) -> float | None:
    """The number that a bar is about, None where the run does not hold it."""
    providers = results.get((bar.operator, bar.case, bar.mode, bar.dtype), {})
    backend = judged(record, providers)
    if backend is None:
        return None
    ours = providers[backend]
    if bar.against == "step":
        return STEPS / ours["median"]
    if bar.against == "copy":
        copy = record["ceilings"].get("copy")
        return copy and ours["bytes"] / ours["median"] / copy["rate"]
    if bar.against == "fma":
        rate = fma_rate(record, bar.dtype)
        return rate and ours["flops"] / ours["median"] / rate
    if bar.against == "float32":
        if "fma bfloat16" not in record["ceilings"]:
            return None
        other = results.get((bar.operator, bar.case, bar.mode, "float32"), {}).get(backend)
    else:
        other = providers.get(bar.against)
    return None if other is None else cost(other) / cost(ours)


def verdict(bar: Bar, value: float | None) -> str:
    """A bar in words, e.g. "≥ 3.5× merged met"."""
    wanted = {
        "fma": f"≥ {bar.at_least:.0%} FMA",
        "copy": f"≥ {bar.at_least:.0%} copy",
        "step": f"≤ {1e6 / bar.at_least:g} µs a step",
    }.get(bar.against, f"≥ {bar.at_least:g}× {bar.against}")
    state = "not measured" if value is None else "met" if value >= bar.at_least else "MISSED"
    detail = f" ({value:.2f}×)" if state != "not measured" and bar.against == "float32" else ""
    return f"{wanted} {state}{detail}"


def amount(result: dict[str, Any]) -> str:
    if result["pass"] == "memory":
        return f"{result['memory'] / 1e6:.1f} MB"
    return (
        f"{result['median'] * 1e3:.3g} ms" if result["median"] >= 1e-3 else f"{result['median'] * 1e6:.3g} µs"
    )


def beside(other: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """Another provider's ratio to ours, and what it takes."""
    if other is None:
        return ""
    return amount(other) if ours is None else f"{cost(other) / cost(ours):.1f}× ({amount(other)})"


def rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's lines: one for each run and backend, or one without a backend where none can run."""
    results, lines, ours_are = by_run(record), [], BACKENDS[kind(record)]
    for key, providers in results.items():
        operator, case, mode, dtype = key
        peers = {name: r for name, r in providers.items() if name not in ("reference", *ours_are)}
        best = min(peers, key=lambda name: cost(peers[name])) if peers else None
        any_of = next(iter(providers.values()))
        about = [b for b in BARS[kind(record)] if (b.operator, b.case, b.mode, b.dtype) == key]
        for backend in [name for name in ours_are if name in providers] or [None]:
            ours = providers.get(backend)
            bars = about if backend and backend == judged(record, providers) else []
            lines.append(
                (
                    operator,
                    any_of["shape"],
                    mode,
                    dtype,
                    "no kernel" if ours is None else amount(ours),
                    backend or "",
                    beside(providers.get("reference"), ours),
                    f"{best} {beside(peers[best], ours)}" if best else "",
                    "" if ours is None else fraction(record, ours),
                    ", ".join(verdict(b, reached(record, results, b)) for b in bars),
                )
            )
    return lines


def summary(record: dict[str, Any]) -> str:
    """How many bars are met, and which are not."""
    results = by_run(record)
    bars = BARS[kind(record)]
    values = [(bar, reached(record, results, bar)) for bar in bars]
    missed = [(bar, value) for bar, value in values if value is not None and value < bar.at_least]
    absent = sum(value is None for _, value in values)
    lines = [f"bars: {len(bars) - absent - len(missed)} met, {len(missed)} missed, {absent} not measured"]
    for bar, value in missed:
        what = f"{bar.operator} {bar.case} {bar.mode} {bar.dtype}"
        lines.append(f"  {what}: {value:.3g} of {bar.at_least:g} against {bar.against}")
    return "\n".join(lines)


def head(record: dict[str, Any]) -> str:
    """Where, with what, and the machine's ceilings."""
    machine, versions = record["machine"], record["versions"]
    forced = f", AUFAST_CPU_ISA={machine['AUFAST_CPU_ISA']}" if machine["AUFAST_CPU_ISA"] else ""
    lines = [
        f"{machine['cpu']} ({machine['architecture']}, {machine['vectors']}{forced}),"
        f" {machine['cores']} cores, {record['threads']} threads",
        ", ".join(f"{name} {version or 'none'}" for name, version in versions.items())
        + f"; {record['date']}",
        *(f"{name}: {state}" for name, state in record["backends"].items()),
    ]
    names = {"fma float32": "FMA float32", "fma bfloat16": "FMA bfloat16", "sgemm": "sgemm"}
    if kind(record) == "cuda":
        lines.insert(0, f"{machine['gpu']}, driver {machine['driver']}")
        names = {f"matmul {dtype}": f"matmul {dtype}" for dtype in ("float32", "tf32", "bfloat16")}
    for key, name in (names | {key: key for key in ("copy", "cached copy", "fill")}).items():
        found = record["ceilings"].get(key)
        if found is None:
            reason = "" if versions["compiler"] or not key.startswith("fma") else ": no compiler"
            lines.append(f"{name}: not measured{reason}")
        else:
            unit = "GFLOP/s" if key in names else "GB/s"
            lines.append(f"{name}: {found['rate'] / 1e9:.4g} {unit} ({found['unit']})")
    return "\n".join(lines)


def render(record: dict[str, Any]) -> str:
    """The whole report as text."""
    lines = [HEADER, *rows(record)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADER))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    table.insert(1, "─" * max(map(len, table)))
    return "\n\n".join([head(record), "\n".join(table), summary(record)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="pytest-benchmark's JSON file, or a record")
    parser.add_argument("--save", type=Path, help="where to keep the record (medians, machine, versions)")
    options = parser.parse_args(arguments)
    found = json.loads(options.run.read_text())
    record = condense(found) if "benchmarks" in found else found
    print(render(record))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(f"\nkept in {options.save}")


if __name__ == "__main__":
    main()
