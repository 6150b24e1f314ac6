"""Every kind of image and video that a labelling run must survive: what is given, and what must happen.

All files of a table are labelled by one run, as a user's folder is. Numbers are those of the list of bad
inputs that the run was designed against; a case with several files has several rows.
"""

from __future__ import annotations

import csv
import functools
import http.server
import importlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

from aufast.label import FINE, LabelConfig, label_files
from tests.label.bad_files import Case
from tests.label.bad_images import IMAGES
from tests.label.bad_videos import VIDEOS
from tests.label.clips import blank, encode, moving


class Fate(NamedTuple):
    """What became of a case's file."""

    status: str
    sentence: str
    sidecar: dict[str, Any] | None
    rows: list[dict[str, str]]


def label(cases: list[Case], folder: Path, model: str) -> dict[str, Fate]:
    paths = {case.given: str(case.make(folder)) for case in cases}
    out = folder / "out"
    label_files(list(paths.values()), out, LabelConfig(model, max_pixels=1_000_000))
    lines = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    by_path = {line["path"]: line for line in lines}
    fates = {}
    for given, path in paths.items():
        line = by_path[path]
        sidecar = out / line["sidecar"] if line["sidecar"] else None
        table = sidecar.with_suffix(".csv") if sidecar else None
        rows = list(csv.DictReader(table.open())) if table and table.exists() else []
        facts = json.loads(sidecar.read_text()) if sidecar else None
        fates[given] = Fate(line["status"], line["sentence"], facts, rows)
    return fates


@pytest.fixture(scope="module")
def fates(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> dict[str, Fate]:
    folder = tmp_path_factory.mktemp("bad")
    cases = IMAGES + VIDEOS
    assert len({case.given for case in cases}) == len(cases)
    return label(cases, folder, models["aar"])


@pytest.mark.parametrize("case", IMAGES + VIDEOS, ids=lambda case: f"{case.number}: {case.given}"[:60])
def test_what_must_happen(case: Case, fates: dict[str, Fate]) -> None:
    fate = fates[case.given]
    assert fate.status in case.status.split("|"), fate
    assert re.search(case.sentence, fate.sentence, re.I), fate.sentence
    assert "\n" not in fate.sentence and "Traceback" not in fate.sentence
    assert bool(fate.sentence) == (fate.status != "ok"), "a sentence for all but ok"
    if case.rows is not None:
        assert len(fate.rows) == case.rows
    if fate.sidecar is not None:
        assert len(fate.rows) == fate.sidecar["frames"]["decoded"], "a row for every decoded frame"
        warnings = fate.sidecar["warnings"]
        assert not case.warning or any(case.warning in warning for warning in warnings), warnings
    if fate.status in FINE:
        expected = fate.sidecar["frames"]["expected"]
        assert expected in (None, len(fate.rows)), "nothing is lost in silence"
    if case.same:
        (other,) = fates[case.same].rows
        assert fate.rows == [other] and float(other["AU01_p"]) > 0
    if case.faces:
        assert "".join(row["success"] for row in fate.rows) == case.faces
    if case.times is not None:
        found = [float(row["timestamp"]) if row["timestamp"] else None for row in fate.rows]
        assert found == [None if t is None else pytest.approx(t, abs=1.1e-3) for t in case.times]


# ---- cases that need more than a file ------------------------------------------------------------


class _Counting(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and keeps what was asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`."""
    _Counting.asked.clear()
    handler = functools.partial(_Counting, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def unguarded(path: str) -> int:
    """How many frames FFmpeg gives where nobody holds it."""
    import av

    options = {
        "allowed_extensions": "ALL",
        "extension_picky": "0",
        "protocol_whitelist": "file,concat,http,tcp",
    }
    with av.open(path, options=options) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("kind", ["a local file", "an address", "concat: within", "ffconcat"])
def test_31_nothing_that_a_file_names_is_opened(
    kind: str, tmp_path: Path, server: str, models: dict[str, str]
) -> None:
    """Left to itself FFmpeg opens each: that is checked first, so that the test means something."""
    private = encode(tmp_path / "private.ts", moving(3), "mpeg2video")
    inner = {
        "a local file": f"file://{private}",
        "an address": f"{server}/private.ts",
        "concat: within": f"concat:{private}|{private}",
        "ffconcat": "",
    }[kind]
    listed = "\n".join(["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", inner, "#EXT-X-ENDLIST"])
    text = listed if inner else "ffconcat version 1.0\nfile private.ts\n"
    bare = tmp_path / "list.m3u8"
    bare.write_text(text)
    if kind != "concat: within":  # which today's FFmpeg does not open from a playlist by itself
        assert unguarded(str(bare)) == 3
    assert bool(_Counting.asked) == (kind == "an address")
    _Counting.asked.clear()
    paths = [bare, *(tmp_path / name for name in ("list.mp4", "list.ts", "list.png"))]
    for path in paths[1:]:
        path.write_text(text)
    out = tmp_path / "out"
    summary = label_files([str(path) for path in paths], out, LabelConfig(models["aar"]))
    assert dict(summary.inputs) == {"undecodable": len(paths)} and summary.frames == 0
    assert _Counting.asked == [] and not list(out.glob("*.csv"))


def test_31_an_address_is_a_file_name_and_nothing_else(
    tmp_path: Path, server: str, models: dict[str, str]
) -> None:
    private = encode(tmp_path / "private.ts", moving(3), "mpeg2video")
    addresses = [
        f"{server}/private.ts",
        f"concat:{private}|{private}",
        f"file:{private}",
        f"file://{private}",
    ]
    assert [unguarded(address) for address in addresses] == [3, 6, 3, 3]
    assert _Counting.asked
    _Counting.asked.clear()
    summary = label_files(addresses, tmp_path / "out", LabelConfig(models["aar"]))
    assert dict(summary.inputs) == {"undecodable": 4} and _Counting.asked == []
    assert {sentence for _, _, sentence in summary.troubled} == {"there is no such file"}


MEASURE = """
import json, resource, sys
from aufast.label import LabelConfig, label_files
summary = label_files([sys.argv[1]], sys.argv[2], LabelConfig(sys.argv[3], workers=1))
kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
print(json.dumps([summary.frames, *(resource.getrusage(kind).ru_maxrss for kind in kinds)]))
"""


@pytest.mark.slow
def test_34_three_hours_take_the_memory_of_minutes(tmp_path: Path, models: dict[str, str]) -> None:
    """A frame a second for three hours; this process and the decoder's, each within a tenth."""
    peaks = []
    for count in (600, 10_800):
        frames = (blank(96, 96) for _ in range(count))
        path = encode(tmp_path / f"{count}.mp4", frames, "mpeg4", times=[1000 * k for k in range(count)])
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / f"out-{count}"), models["aar"]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        labelled, *peak = json.loads(done.stdout.splitlines()[-1])
        assert labelled == count
        peaks.append(peak)
    last = next((tmp_path / "out-10800").glob("*.csv")).read_text().splitlines()[-1]
    assert last.startswith("10800,0,10799,"), "three hours"
    for few, many in zip(*peaks, strict=True):
        assert many <= 1.1 * few, peaks


# Where the cases are that no file of the tables stands for.
ELSEWHERE = {
    33: "tests.label.test_inputs",
    34: "tests.label.test_bad_input",
    **dict.fromkeys((37, 38, 44, 45, 46, 47), "tests.label.test_faces"),
}


def test_every_case_of_the_list_is_tested() -> None:
    from tests.label.test_faces import UNUSABLE

    found = {case.number for case in IMAGES + VIDEOS} | {int(name.split(":")[0]) for name in UNUSABLE}
    for number, module in ELSEWHERE.items():
        names = vars(importlib.import_module(module))
        if any(name.startswith(f"test_{number}_") for name in names):
            found.add(number)
    assert found >= set(range(1, 48)), set(range(1, 48)) - found
