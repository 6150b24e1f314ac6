"""The pictures of a record, from image files and from a video file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from aufast.data import check_dataset, iterate_frames, prepare_dataset, read_bp4d
from aufast.data.landmarks import write_landmarks
from aufast.data.records import Video
from tests.data import trees


def test_images_in_order_and_errors_in_their_place(tmp_path: Path) -> None:
    trees.bp4d(tmp_path, {"F001_T1": {10: {}, 90: {}, 170: {}}})
    (video,) = read_bp4d(tmp_path)
    video.images[1].write_bytes(video.images[1].read_bytes()[:300])
    first, second, third = iterate_frames(video)
    assert abs(first.mean() - 10) < 2 and abs(third.mean() - 170) < 2
    assert isinstance(second, ValueError) and "0090.jpg" in str(second)


def make_movie(path: Path, frames: int) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed; it reads videos")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(frames):
            image = np.full((48, 64, 3), 10 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def movie_record(path: Path, positions: list[int]) -> Video:
    n = len(positions)
    empty = np.zeros((n, 1), np.int8)
    places = np.array(positions)
    return Video("disfa", "SN003", "SN003", (1,), places + 1, empty, empty == 0, movie=path, positions=places)


def test_movie(tmp_path: Path) -> None:
    make_movie(tmp_path / "a.avi", 20)
    frames = list(iterate_frames(movie_record(tmp_path / "a.avi", [0, 3, 4, 19, 20])))
    assert [round(float(f.mean()) / 10) for f in frames[:4]] == [0, 3, 4, 19]
    assert "ends before frame 21" in str(frames[4])


@pytest.mark.parametrize("frames", [9, 10, 12])
def test_a_film_with_more_or_fewer_frames_than_labels_is_told(tmp_path: Path, frames: int) -> None:
    trees.disfa(tmp_path / "DISFA", "SN003", 10)
    shutil.rmtree(tmp_path / "DISFA" / "Images")
    (tmp_path / "DISFA" / "Videos_LeftCamera").mkdir()
    make_movie(tmp_path / "DISFA" / "Videos_LeftCamera" / "LeftVideoSN003_comp.avi", frames)
    (tmp_path / "DISFA" / "Landmarks").mkdir()
    points = np.repeat(trees.POINTS[None] * 0.4, 10, axis=0)
    write_landmarks(tmp_path / "DISFA" / "Landmarks" / "SN003.csv", np.arange(1, 11), points)
    said = f"SN003: LeftVideoSN003_comp.avi has {frames} frames, and the labels end with frame 10"
    for text in (
        check_dataset(tmp_path / "DISFA").text(),
        prepare_dataset(tmp_path / "DISFA", tmp_path / "out", size=32).text(),
    ):
        assert (said in text) == (frames != 10)


def test_a_playlist_is_no_video(tmp_path: Path) -> None:
    """FFmpeg would follow it to whatever file it names."""
    make_movie(tmp_path / "other.ts", 5)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/other.ts\n#EXT-X-ENDLIST\n"
    )
    import av

    with av.open(str(playlist)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    with pytest.raises(ValueError, match="list.m3u8: cannot be opened as a video"):
        list(iterate_frames(movie_record(playlist, [0])))
