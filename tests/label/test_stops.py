"""Runs that stop: kills, at work and at every step of writing, and places that cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from aufast.label import LabelConfig, label_files
from aufast.label.files import OutputError
from tests.disks import run_on_disk
from tests.label.clips import encode, face, moving
from tests.label.runs import config, folder_of_inputs, given_faces, run_cli, tables, whole


@pytest.mark.slow
def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path: Path, models: dict[str, str]) -> None:
    """Killed at several moments; at the end the tables are those of a run that was left alone."""
    inputs = folder_of_inputs(tmp_path)
    encode(inputs / "long.mp4", moving(150))
    label_files([str(inputs)], tmp_path / "alone", config(models["aar"], overlay=True))
    arguments = (str(inputs), "--model", models["aar"], "--out", str(tmp_path / "out"), "--overlay")
    (tmp_path / "out").mkdir()
    unfinished = 0
    for moment in (0.3, 1.0, 2.0):
        process = run_cli(*arguments)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").glob(".*.tmp")) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.kill()
        process.communicate()
        unfinished += bool(list((tmp_path / "out").glob(".*.tmp")))
        whole(tmp_path / "out")
    assert unfinished, "at least one was killed at work"
    out, _ = run_cli(*arguments).communicate()
    assert "4 inputs: 3 ok, 1 no_face" in out
    assert tables(tmp_path / "out") == tables(tmp_path / "alone")
    assert not list((tmp_path / "out").glob(".*.tmp")), "what the killed ones left is gone"
    whole(tmp_path / "out")


@pytest.mark.slow
def test_no_decoder_outlives_a_killed_run(tmp_path: Path, models: dict[str, str]) -> None:
    video = encode(tmp_path / "v.mp4", moving(400))
    process = run_cli(str(video), "--model", models["aar"], "--out", str(tmp_path / "out"))
    children: list[int] = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        time.sleep(0.05)
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(word) for word in text.split()]
    process.kill()
    process.communicate()
    assert children
    while any(Path(f"/proc/{child}/fd/0").exists() for child in children):
        assert time.monotonic() < deadline, "the decoder ends when nobody reads"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_one_sentence(tmp_path: Path, models: dict[str, str]) -> None:
    """A limit on the size of files stands for the disk's end."""
    Image.fromarray(face()).save(tmp_path / "a.png")
    video = encode(tmp_path / "v.mp4", moving(30))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

    arguments = (
        str(tmp_path / "a.png"),
        str(video),
        "--model",
        models["aar"],
        "--out",
        str(tmp_path / "out"),
    )
    process = run_cli(*arguments, "--format", "pyfeat", preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 1
    assert re.search(
        r"^aufast: the labels of .*v\.mp4 cannot be written: File too large; finished files are", err, re.M
    )
    assert "Traceback" not in err
    assert tables(tmp_path / "out").keys() == {"a"} and not list((tmp_path / "out").glob(".*"))
    assert label_files(
        [str(tmp_path / "a.png")], tmp_path / "out", config(models["aar"], formats=("pyfeat",))
    ).kept


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, models: dict[str, str]) -> None:
    Image.fromarray(face()).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file/run.jsonl cannot be written: "):
        label_files([str(tmp_path / "a.png")], tmp_path / "file", config(models["aar"]))
    (tmp_path / "locked").mkdir(mode=0o555)
    model = shutil.copytree(models["aar"], tmp_path / "model")
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.name.startswith(("pytest-", "test_")):
            folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:  # the root user may write everywhere, so become nobody for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(
            (OutputError, ValueError), match="cannot be written: Permission denied|Permission"
        ):
            label_files(
                [str(tmp_path / "a.png")], tmp_path / "locked", config(str(model), faces=str(tmp_path))
            )
    finally:
        os.seteuid(user)
    assert not list((tmp_path / "locked").iterdir())


FILLED = """
import json, sys
from pathlib import Path
from aufast.label import LabelConfig, label_files
from aufast.label.files import OutputError

inputs, disk, model, faces, free, options = sys.argv[1:]
small, large = sorted(str(path) for path in Path(inputs).iterdir())
config = LabelConfig(model, faces=faces, workers=1, **json.loads(options))
out, ballast = Path(disk, "out"), Path(disk, "ballast")
label_files([small], out, config)
before = {path.name: path.read_bytes() for path in out.glob("*-*")}
with open(ballast, "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        file.truncate(max(0, file.tell() - int(free)))
try:
    label_files([small, large], out, config)
except OutputError as error:
    print(error)
assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.jsonl"} == before
ballast.unlink()
again = label_files([small, large], out, config)
print(again.kept, dict(again.inputs))
print(*sorted(path.name.split("-")[0] + "".join(path.suffixes) for path in out.glob("*-*")))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "options", "free", "input"),
    [
        (".csv", {}, 0, "video"),
        (".parquet", {"formats": ["parquet"]}, 0, "video"),
        (".elan.tsv", {"formats": ["elan"], "threshold": 1e-6}, 0, "wild"),
        (".overlay.mp4", {"overlay": True}, 40 << 10, "video"),
        (".overlay.png", {"overlay": True}, 40 << 10, "image"),
        (".html", {"report": True}, 2 << 20, "video"),
        (".json", {"formats": ["elan"], "threshold": 1.0}, 4096, "video"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith(".") else "",
)
def test_a_disk_that_fills_up_keeps_what_is_whole(
    what: str, options: dict, free: int, input: str, tmp_path: Path, models: dict[str, str]
) -> None:
    """So much is left that this file does not fit; where there is room again the same command ends."""
    if "report" in options:
        pytest.importorskip("plotly", reason="reports need plotly")
    if ".parquet" in what:
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    inputs, disk = tmp_path / "inputs", tmp_path / "disk"
    inputs.mkdir()
    disk.mkdir()
    Image.fromarray(face()).save(inputs / "a.png")
    if input == "image":
        Image.fromarray(moving(2)[1]).save(inputs / "b.png")
    else:
        encode(inputs / "b.mp4", moving(60))
    faces = given_faces(tmp_path, "b", range(1, 61, 2 if input == "wild" else 1))
    given_faces(tmp_path, "a", [1])
    arguments = (inputs, disk, models["aar"], faces, free, json.dumps(options))
    sentence, after, names = run_on_disk("size=64m", disk, FILLED, *arguments).splitlines()
    place = f"{disk}/out/b-" if what == ".json" else f"the labels of {inputs}/b."
    assert sentence.startswith(place) and " cannot be written: " in sentence
    assert "No space left on device" in sentence
    assert sentence.endswith("; finished files are whole, and the same command goes on")
    assert after == "1 {'ok': 2}" and f"b{what}" in names.split()


# Stands where the run is about to do its n-th step of finishing an input, and dies there.
KILLED = """
import os, signal, sys
from aufast.label import LabelConfig, files, label_files

path, out, model, faces, step = sys.argv[1:]
count = [int(step)]

def before(call):
    def run(*arguments):
        if not count[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] -= 1
        return call(*arguments)
    return run

files.sync_folder, files.os.replace = before(files.sync_folder), before(os.replace)
formats = ("openface", "pyfeat")
label_files([path], out, LabelConfig(model, faces=faces, workers=1, formats=formats, overlay=True))
print(count[0])
"""


@pytest.mark.slow
def test_killed_at_each_step_of_finishing_an_input(tmp_path: Path, models: dict[str, str]) -> None:
    """Four files are written through and renamed, the sidecar last, and the folder is written through."""
    Image.fromarray(face()).save(tmp_path / "a.png")
    faces = given_faces(tmp_path, "a", [1])
    options = {"faces": faces, "workers": 1, "formats": ("openface", "pyfeat"), "overlay": True}
    config = LabelConfig(models["aar"], **options)
    label_files([str(tmp_path / "a.png")], tmp_path / "alone", config)
    names = sorted(path.name for path in (tmp_path / "alone").glob("a-*"))
    assert len(names) == 4

    def written(out: Path) -> dict[str, bytes]:
        """All but the sidecar, which holds times."""
        return {path.name: path.read_bytes() for path in out.glob("a-*") if path.suffix != ".json"}

    expected = written(tmp_path / "alone")
    steps = 4 + 4 + 1
    for step in range(steps + 1):
        out = tmp_path / str(step)
        command = [sys.executable, "-c", KILLED, tmp_path / "a.png", out, models["aar"], faces, str(step)]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if step == steps:
            assert (done.returncode, done.stdout) == (0, b"0\n"), "there is no other step"
            break
        assert done.returncode == -signal.SIGKILL
        named = sorted(path.name for path in out.glob("a-*"))
        assert len(named) == min(max(step - 4, 0), 4), "one after the other"
        assert any(name.endswith(".json") for name in named) == (len(named) == 4), "the sidecar last"
        assert written(out).items() <= expected.items(), "what has its name is whole"
        whole(out)
        again = label_files([str(tmp_path / "a.png")], out, config)
        assert again.kept == (len(named) == 4) and dict(again.inputs) == {"ok": 1}
        assert sorted(path.name for path in out.glob("a-*")) == names and written(out) == expected
        assert not list(out.glob(".*")), "what the killed one left is gone"
