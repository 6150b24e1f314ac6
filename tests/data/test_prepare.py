"""Preparing: what is packed is aligned, and whole or not there; killed, it goes on; writers do not mix."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aufast.data import PackedDataset, Recipe, prepare, prepare_dataset, read_bp4d, synthesize
from aufast.data.landmarks import write_landmarks
from aufast.data.packed import ARRAYS, gather_labels
from aufast.faces import align_face, load_image
from tests.data import trees
from tests.disks import run_on_disk
from tests.memory import own_memory

RECIPE = Recipe(subjects=3, videos=1, frames=12, size=120, seed=1, occluders=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("prepare") / "tree", RECIPE)


@pytest.fixture(scope="module")
def packed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepare") / "packed"
    prepare_dataset(tree, out, size=64)
    return out


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ---- what is packed ------------------------------------------------------------------------------


def test_packs_aligned_faces(tree: Path, packed: Path) -> None:
    data = PackedDataset(packed, verify=True)
    assert (data.dataset, data.synthetic, data.size, len(data)) == ("bp4d", True, 64, 36)
    for video, record in zip(data.videos, read_bp4d(tree), strict=True):
        assert (video.name, video.subject, video.group) == (record.name, record.subject, "")
        assert isinstance(video.frames, np.memmap) and not video.frames.flags.writeable
        for name in ("labels", "mask", "numbers"):
            np.testing.assert_array_equal(getattr(video, name), getattr(record, name))
        points = record.landmarks(record.numbers)
        for k in (0, 7, 11):
            face = align_face(load_image(record.images[k]), points[k], 64)
            np.testing.assert_array_equal(video.frames[k], face.image)
            np.testing.assert_allclose(video.landmarks[k], face.landmarks, rtol=1e-6)
    labels, mask = gather_labels(data.videos)
    assert labels.shape == mask.shape == (36, 12)


def test_sums_are_those_sha256sum_checks(packed: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=packed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len((packed / "SHA256SUMS").read_text().splitlines()) == 3 * len(ARRAYS)


def test_workers_do_not_change_a_byte(tree: Path, packed: Path, tmp_path: Path) -> None:
    prepare_dataset(tree, tmp_path / "two", size=64, workers=2)
    assert contents(tmp_path / "two") == contents(packed)


def test_frames_that_cannot_be_packed_are_reported(tmp_path: Path) -> None:
    trees.bp4d(tmp_path / "tree", {"F001_T1": {k: {1: k % 2} for k in range(1, 7)}, "F002_T1": {1: {}}})
    (tmp_path / "tree/2D+3D/F001/T1/0002.jpg").write_bytes(b"no image")
    (tmp_path / "tree/2D+3D/F001/T1/0006.jpg").unlink()
    points = np.repeat(trees.POINTS[None], 6, axis=0)
    points[2, 5] = np.nan  # frame 3: one point is missing
    points[3] = 50  # frame 4: all in one place
    write_landmarks(tmp_path / "tree/Landmarks/F001_T1.csv", np.arange(1, 7), points)
    summary = prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32)
    assert summary.dropped == {
        "no landmarks": 1,
        "image cannot be read": 1,
        "landmarks no face can have": 1,
    }
    assert (summary.videos, summary.frames, summary.kept) == (2, 3, 0)
    assert summary.notes == (
        "F001_T1: no image for coded frames 6",
        "F001_T1: left out frames 3: no landmarks",
        "F001_T1: left out frames 2: image cannot be read",
        "F001_T1: left out frames 4: landmarks no face can have",
    )
    text = summary.text().splitlines()
    assert (
        text[0] == f"{tmp_path / 'out'}: 3 frames of 2 videos" and "left out 1 frames: no landmarks" in text
    )
    video = PackedDataset(tmp_path / "out", verify=True).videos[0]
    assert (
        len(video.frames) == 2 and video.numbers.tolist() == [1, 5] and video.labels[:, 0].tolist() == [1, 1]
    )


def test_a_video_without_a_usable_frame_is_not_in_the_set(tmp_path: Path) -> None:
    trees.bp4d(tmp_path / "tree", {"F001_T1": {1: {}}, "F002_T1": {1: {}}})
    blank = np.full((1, 49, 2), np.nan)
    write_landmarks(tmp_path / "tree/Landmarks/F001_T1.csv", np.array([1]), blank)
    summary = prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32)
    assert (summary.videos, summary.frames) == (1, 1)
    assert [v.name for v in PackedDataset(tmp_path / "out", verify=True).videos] == ["F002_T1"]
    write_landmarks(tmp_path / "tree/Landmarks/F002_T1.csv", np.array([1]), blank)
    with pytest.raises(ValueError, match="no frame could be packed; no landmarks"):
        prepare_dataset(tmp_path / "tree", tmp_path / "empty", size=32)


def test_dlib_finds_landmarks_where_there_are_none(tmp_path: Path) -> None:
    pytest.importorskip("dlib", reason="dlib is not installed")
    from PIL import Image
    from skimage import data

    trees.bp4d(tmp_path / "tree", {"F001_T1": {1: {}, 2: {}}}, landmarks=False)
    Image.fromarray(data.astronaut()).save(tmp_path / "tree/2D+3D/F001/T1/0001.jpg", quality=95)
    summary = prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32)
    assert summary.frames == 1 and summary.dropped == {"dlib found no face": 1}
    with pytest.raises(ValueError, match="no landmark file for F001_T1"):
        prepare_dataset(tmp_path / "tree", tmp_path / "other", landmarks="files")


# ---- interrupted ---------------------------------------------------------------------------------


def test_goes_on_where_it_stopped(tree: Path, packed: Path, tmp_path: Path, monkeypatch) -> None:
    real, calls = prepare._fill, []

    def stopping(job, folder):
        calls.append(job.video.name)
        if len(calls) == 2:
            real(job, folder)
            raise KeyboardInterrupt
        return real(job, folder)

    out = tmp_path / "out"
    monkeypatch.setattr(prepare, "_fill", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(tree, out, size=64)
    assert [p.name for p in (out / "videos").iterdir()] == [calls[0]]
    with pytest.raises(ValueError, match="whose preparing has not ended"):
        PackedDataset(out)
    (out / "videos" / ".F003_T1.123").mkdir()  # what a killed run leaves
    (out / "videos" / ".F003_T1.123" / "frames.npy").write_bytes(b"half")
    summary = prepare_dataset(tree, out, size=64)
    assert calls[2:] == ["F003_T1", "F004_T1"] and summary.kept == 1
    assert contents(out) == contents(packed)
    assert prepare_dataset(tree, out, size=64).kept == 3 and len(calls) == 4


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One video, its images one file by many names."""
    numbers = np.arange(1, 10_001)
    trees.bp4d(tmp_path / "tree", {"F001_T1": {1: {}}})
    folder = tmp_path / "tree" / "2D+3D" / "F001" / "T1"
    for number in numbers[1:]:
        os.link(folder / "0001.jpg", folder / f"{number:04d}.jpg")
    trees.write_codes(tmp_path / "tree/AUCoding/AU_OCC/F001_T1.csv", {int(number): {} for number in numbers})
    points = np.repeat(trees.POINTS[None], len(numbers), axis=0)
    write_landmarks(tmp_path / "tree" / "Landmarks" / "F001_T1.csv", numbers, points)
    sizes, inner = [], prepare.align_face

    def align(*arguments):
        sizes.append(own_memory())
        return inner(*arguments)

    monkeypatch.setattr(prepare, "align_face", align)
    assert prepare_dataset(tmp_path / "tree", tmp_path / "out", size=64).frames == 10_000
    assert sizes[-1] < sizes[len(sizes) // 4] + 16


def test_labels_that_changed_are_packed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.bp4d(tmp_path / "tree", {"F001_T1": {1: {}, 2: {}}, "F002_T1": {1: {}}})
    prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32)
    trees.write_codes(tmp_path / "tree/AUCoding/AU_OCC/F001_T1.csv", {1: {1: 1}, 2: {}})
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32)
    with pytest.raises(ValueError, match="whose preparing has not ended"):  # any more
        PackedDataset(tmp_path / "out")
    assert prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32).kept == 1
    assert PackedDataset(tmp_path / "out", verify=True).videos[0].labels[:, 0].tolist() == [1, 0]


def test_landmarks_that_were_corrected_are_used(tmp_path: Path) -> None:
    trees.bp4d(tmp_path / "tree", {"F001_T1": {1: {}}, "F002_T1": {1: {}}})
    prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32)
    before = PackedDataset(tmp_path / "out").videos[0].landmarks.copy()
    moved = trees.POINTS + (0, 10) * (np.arange(49) > 40)[:, None]  # parts of the mouth
    write_landmarks(tmp_path / "tree/Landmarks/F001_T1.csv", np.array([1]), moved[None])
    assert prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32).kept == 1
    after = PackedDataset(tmp_path / "out", verify=True).videos[0].landmarks
    assert (after[0, 41:, 1] > before[0, 41:, 1]).all()
    assert prepare_dataset(tmp_path / "tree", tmp_path / "out", size=32).kept == 2


SCRIPT = """
import sys
from aufast.data import prepare_dataset
if __name__ == "__main__":
    prepare_dataset(sys.argv[1], sys.argv[2], size=64, workers=int(sys.argv[3]))
"""


def start(tree: Path, out: Path, workers: int, **options) -> subprocess.Popen:
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tree), str(out), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, workers: int) -> None:
    tree = synthesize(tmp_path / "tree", Recipe(subjects=6, videos=1, frames=40, size=100, seed=2))
    prepare_dataset(tree, tmp_path / "whole", size=64)
    out = tmp_path / "out"
    seen = set()
    for attempt in range(12):
        process = start(tree, out, workers)
        wanted = min(len(seen) + 1, 5)
        while process.poll() is None and len(list(out.glob("videos/[!.]*"))) < wanted:
            time.sleep(0.005)
        time.sleep(0.03 * (attempt % 4))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        left = children.read_text().split() if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in left):  # workers end with their parent
            assert time.monotonic() < wait
            time.sleep(0.01)
        finished = {p.name for p in out.glob("videos/[!.]*")}
        assert seen <= finished
        for name in finished:  # what has a name is whole
            entry = json.loads((out / "videos" / name / "video.json").read_text())
            assert entry["frames"] == len(np.load(out / "videos" / name / "frames.npy", mmap_mode="r")) == 40
        seen = finished
    prepare_dataset(tree, out, size=64)
    assert contents(out) == contents(tmp_path / "whole")
    assert PackedDataset(out, verify=True)


def test_two_writers_do_not_mix(tree: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"{out}: another process is preparing it"):
            prepare_dataset(tree, out, size=64)
    prepare_dataset(tree, out, size=64)


# ---- refused -------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_loses_nothing_whole(tree: Path, tmp_path: Path) -> None:
    """A limit on file sizes fails as a full disk does: the write does."""
    out = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a video's frames are 147 kB

    process = start(tree, out, 1, preexec_fn=limit)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith(
        f"OSError: {out}/videos/F001_T1: cannot be written: File too large"
    )
    assert list((out / "videos").iterdir()) == []
    assert prepare_dataset(tree, out, size=64).frames == 36


FILLED = """
import subprocess, sys
from pathlib import Path
from aufast.data import PackedDataset, prepare_dataset
tree, disk = map(Path, sys.argv[1:])
try:
    prepare_dataset(tree, disk / "out", size=64)
except OSError as error:
    print(error)
print(*sorted(path.name for path in (disk / "out" / "videos").iterdir()))
subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
print(prepare_dataset(tree, disk / "out", size=64).kept, len(PackedDataset(disk / "out", verify=True)))
"""


def test_a_disk_that_fills_up_keeps_the_videos_that_are_whole(tree: Path, tmp_path: Path) -> None:
    """Two videos of 150 kB fit on this disk; the third goes on where there is room again."""
    sentence, whole, after = run_on_disk("size=400k", tmp_path, FILLED, tree, tmp_path).splitlines()
    assert sentence == (
        f"{tmp_path}/out/videos/F004_T1: cannot be written: No space left on device; "
        "videos that are whole are kept, and the same command goes on"
    )
    assert (whole, after) == ("F001_T1 F003_T1", "2 36")


READ_ONLY = """
import sys
from pathlib import Path
from aufast.data import Recipe, prepare_dataset, synthesize
tree, disk = map(Path, sys.argv[1:])
for write in (lambda: prepare_dataset(tree, disk / "out"), lambda: synthesize(disk / "tree", Recipe())):
    try:
        write()
    except OSError as error:
        print(error)
"""


def test_a_read_only_disk_is_one_sentence(tree: Path, tmp_path: Path) -> None:
    assert run_on_disk("ro", tmp_path, READ_ONLY, tree, tmp_path).splitlines() == [
        f"{tmp_path}/out: cannot be written: Read-only file system; videos that are whole are kept, and the "
        "same command goes on",
        f"{tmp_path}/tree: cannot be written: Read-only file system; nothing of it is there",
    ]


def test_a_folder_that_cannot_be_made(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    with pytest.raises(OSError, match=f"{out}: cannot be written: Not a directory"):
        prepare_dataset(tree, out, size=64)


def test_other_settings_need_a_new_folder(tree: Path, tmp_path: Path) -> None:
    prepare_dataset(tree, tmp_path / "out", size=32)
    with pytest.raises(ValueError, match="was prepared with size 32, not 64; use a new folder"):
        prepare_dataset(tree, tmp_path / "out", size=64)
    with pytest.raises(ValueError, match="was prepared with aus"):
        prepare_dataset(tree, tmp_path / "out", size=32, aus=(1, 2))
    for options, message in (
        ({"landmarks": "guess"}, "landmarks must be auto, files or dlib"),
        ({"size": 1}, "size must be at least 2"),
        ({"workers": 0}, "workers must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_dataset(tree, tmp_path / "new", **options)


@pytest.mark.parametrize("name", ["frames", "landmarks", "labels"])
def test_changed_and_cut_arrays_are_found(tree: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    prepare_dataset(tree, out, size=32)
    path = out / "videos/F003_T1" / f"{name}.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    data = PackedDataset(out)  # quick, and so it does not look
    with pytest.raises(ValueError, match=f"F003_T1/{name}.npy: was changed"):
        data.verify()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"F003_T1/{name}.npy: missing, cut short or damaged"):
        getattr(PackedDataset(out).videos[1], name)
    np.save(path, np.load(out / "videos/F001_T1/numbers.npy"))
    with pytest.raises(ValueError, match=f"{name}.npy: is int64"):
        getattr(PackedDataset(out).videos[1], name)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}.npy: is missing"):
        PackedDataset(out, verify=True)


def test_a_damaged_index(packed: Path, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "must hold an object"),
        ('{"format_version": 99}', "format 99, this aufast reads up to 1"),
        ('{"format_version": 1, "dataset": "x"}', "damaged: KeyError"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"index.json: {message}"):
            PackedDataset(tmp_path)
