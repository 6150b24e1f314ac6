"""The decoding process: what comes out of good files, and what is said of bad ones."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from aufast.label import InputError, decoder
from aufast.label.video import Finding, VideoReader, open_regular
from tests.label.clips import RATE, blank, cut, encode, face, moving, remux, turn_mp4

LIMITS = {"max_pixels": 10**7, "memory": 4 << 30, "stall": 300.0}


def opened(path: Path, **limits) -> VideoReader:
    with open_regular(path) as file:
        return VideoReader(file, **{**LIMITS, **limits})


def read(path: Path, **limits) -> tuple[list, Finding]:
    with opened(path, **limits) as reader:
        return list(reader), reader.finding


def error(path: Path, **limits) -> InputError:
    with pytest.raises(InputError) as caught:
        read(path, **limits)
    return caught.value


def test_frames_are_the_encoded_ones_in_order(tmp_path: Path) -> None:
    """Lossless, so to the last bit but for the conversion of colours."""
    frames = moving(5)
    found, finding = read(encode(tmp_path / "a.mkv", frames, "ffv1", "bgr0"))
    assert (finding.status, finding.decoded, finding.failed) == ("ok", 5, 0)
    assert [f.index for f in found] == list(range(5))
    for frame, expected in zip(found, frames, strict=True):
        np.testing.assert_array_equal(frame.image, expected)
        assert frame.image.flags.c_contiguous
    assert [f.time for f in found] == pytest.approx([k / RATE for k in range(5)], abs=6e-4)


def test_a_variable_rate_keeps_its_time_stamps(tmp_path: Path) -> None:
    times = [0, 10, 250, 300, 1300]
    found, finding = read(encode(tmp_path / "a.mp4", moving(5), times=times, options={"bf": "0"}))
    assert [1000 * f.time for f in found] == pytest.approx(times, abs=0.1)
    assert finding.status == "ok" and not finding.warnings


def test_a_quarter_turn_is_applied(tmp_path: Path) -> None:
    """What is stored lies on its side; what is seen stands."""
    stored = np.ascontiguousarray(np.rot90(face()))
    path = turn_mp4(encode(tmp_path / "a.mp4", [stored] * 2, options={"qp": "0"}))
    found, finding = read(path)
    assert found[0].image.shape == face().shape
    assert np.abs(found[0].image.astype(int) - face()).mean() < 3
    assert finding.video["rotation"] == -90 and not finding.warnings


@pytest.mark.parametrize(
    ("codec", "pixel_format"),
    [("ffv1", "yuv420p"), ("mjpeg", "yuvj420p"), ("ffv1", "yuv422p10le"), ("ffv1", "yuv444p")],
)
def test_colors_and_ranges(tmp_path: Path, codec: str, pixel_format: str) -> None:
    """Limited or full range, 8 or 10 bits: always the same grey."""
    image = np.full((64, 64, 3), 200, np.uint8)
    image[:, 32:] = 20
    (frame, _), _ = read(encode(tmp_path / "a.mkv", [image] * 2, codec, pixel_format))
    assert np.abs(frame.image.astype(int) - image).max() <= 3


def test_high_definition_colors(tmp_path: Path) -> None:
    """BT.709 where the file says so."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[...] = (200, 60, 40)
    (frame, _), _ = read(encode(tmp_path / "a.mkv", [image] * 2, "ffv1", "yuv444p", colorspace=1))
    assert np.abs(frame.image.astype(int) - image).max() <= 4


def test_a_reader_that_is_left_early_ends_its_process(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", moving(60))
    with opened(path) as reader:
        next(iter(reader))
        process = reader._process
    assert process.poll() is not None


def test_a_decoder_that_dies_is_told(tmp_path: Path) -> None:
    """SIGKILL is what the kernel sends where memory runs out; any other end is a broken file's work."""
    path = encode(tmp_path / "a.mkv", [blank(480, 640)] * 50, "ffv1", "bgr0")
    for sign, status, words in (
        (signal.SIGKILL, "oom", "killed after"),
        (signal.SIGSEGV, "partial", "ended with status -11 after"),
    ):
        with opened(path) as reader:
            frames = iter(reader)
            next(frames)
            os.kill(reader._process.pid, sign)
            count = 1 + sum(1 for _ in frames)
        assert count < 50 and reader.finding.status == status and words in reader.finding.sentence
        assert reader.finding.decoded == count


def test_memory_is_limited(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", [blank(1000, 1000)], "ffv1", "bgr0")
    assert read(path, memory=2 << 30)[1].status == "ok"
    assert error(path, memory=150 << 20).status in ("oom", "undecodable")


def test_time_is_limited(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mkv", [blank(480, 640)] * 50, "ffv1", "bgr0")
    before = error(path, timeout=0.001)
    assert before.status == "timeout" and str(before) == "the time for it was up after 0 frames"
    with opened(path, timeout=2.0) as reader:
        frames = iter(reader)
        next(frames)
        reader._process.wait(60)  # which waits for its reader until its time is up
        rest = len(list(frames))
    assert rest < 49 and reader.finding.status == "timeout"
    assert reader.finding.sentence == f"the time for it was up after {1 + rest} frames"


def test_a_decoder_that_hangs_is_ended(tmp_path: Path) -> None:
    """A stopped process stands for it; one that waits for its reader does not hang."""
    path = encode(tmp_path / "a.mkv", [blank(480, 640)] * 50, "ffv1", "bgr0")
    with opened(path, stall=1.0) as reader:
        frames = iter(reader)
        next(frames)
        time.sleep(1.5)  # the reader's own time
        next(frames)
        os.kill(reader._process.pid, signal.SIGSTOP)
        count = 2 + sum(1 for _ in frames)
    assert count < 50 and reader.finding.status == "timeout"
    assert reader.finding.sentence == f"the decoder gave nothing for 1 s after {count} frames"


@pytest.mark.parametrize(("codec", "bframes"), [("libx264", "2"), ("mpeg4", "2"), ("libx264", "0")])
def test_avi_frames_have_rising_time_stamps(tmp_path: Path, codec: str, bframes: str) -> None:
    """AVI stores no presentation times, and frames that others are predicted from lie before them."""
    frames = moving(12, step=4)
    found, finding = read(encode(tmp_path / "a.avi", frames, codec, options={"bf": bframes, "qp": "4"}))
    assert np.diff([f.time for f in found]) == pytest.approx([1 / RATE] * 11, abs=1e-6)
    assert finding.status == "ok" and not finding.warnings
    for frame, expected in zip(found, frames, strict=True):
        assert np.abs(frame.image.astype(int) - expected).mean() < 8, "and they belong to their pictures"


def test_26_negative_time_stamps_stay_negative(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", moving(30), options={"bf": "0"})
    found, finding = read(remux(source, tmp_path / "a.ts", shift=-0.5, avoid_negative_ts="disabled"))
    assert [f.time for f in found] == pytest.approx([k / RATE - 0.5 for k in range(30)], abs=1e-4)
    assert finding.status == "ok" and not finding.warnings


def test_avi_times_go_on_after_a_packet_that_fails(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", moving(12), "mjpeg", "yuvj420p")
    content = bytearray(path.read_bytes())
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", content)]
    # All of the fifth picture: of a part, the tables of the one before can serve.
    content[starts[4] : starts[5] - 8] = bytes(starts[5] - 8 - starts[4])
    path.write_bytes(content)
    found, finding = read(path)
    assert finding.status == "partial" and (finding.decoded, finding.failed) == (11, 1)
    assert [round(f.time * RATE) for f in found] == [0, 1, 2, 3, *range(5, 12)]


def test_a_codec_that_nobody_knows(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", moving(3), "mpeg4")
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
    assert error(path).status == "undecodable"
    assert str(error(path)) == "there is no decoder for its video"


def test_every_error_of_ffmpeg_is_a_frame_that_failed() -> None:
    """Some are neither OSError nor ValueError, and all end a packet and not the decoder."""
    import av
    from av import error as errors

    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    kinds = {kind for kind in kinds if issubclass(kind, av.FFmpegError) and kind is not errors.MemoryError}
    assert len(kinds) > 20 and any(not issubclass(k, (OSError, ValueError)) for k in kinds)
    for kind in kinds:

        def decode(_, kind=kind):
            raise kind(1, "broken")

        counts = decoder._Counts(stored=True)
        assert list(decoder._pictures(SimpleNamespace(decode=decode), None, counts)) == []
        assert counts.failed == 1, kind

    def empty(_):
        raise errors.MemoryError(12, "Cannot allocate memory")

    with pytest.raises(MemoryError):
        list(decoder._pictures(SimpleNamespace(decode=empty), None, decoder._Counts(stored=True)))


def test_a_removed_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", moving(20))
    with opened(path) as reader:
        path.unlink()
        assert len(list(reader)) == 20 and reader.finding.status == "ok"


def test_large_frames_are_refused_before_decoding(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [face()] * 2)
    assert error(path, max_pixels=240 * 320 - 1).status == "too_large"
    assert "320 x 240 pixels" in str(error(path, max_pixels=240 * 320 - 1))


def test_a_stream_that_grows_beyond_the_limit(tmp_path: Path) -> None:
    """The header is small, a later frame is not."""
    small = encode(tmp_path / "a.ts", [blank(64, 64)] * 3, "mpeg2video")
    large = encode(tmp_path / "b.ts", [blank(640, 640)] * 3, "mpeg2video")
    small.write_bytes(small.read_bytes() + large.read_bytes())
    found, finding = read(small, max_pixels=100 * 100)
    assert {f.image.shape for f in found} == {(64, 64, 3)}
    assert finding.status == "partial" and finding.sentence


def test_names_that_are_not_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff concat:a|b %d\n.mp4"
    encode(tmp_path / "a.mp4", moving(2)).rename(os.fsdecode(path))
    assert read(Path(os.fsdecode(path)))[1].decoded == 2


def test_what_ends_early_is_partial(tmp_path: Path) -> None:
    path = cut(encode(tmp_path / "a.mkv", moving(30), options={"g": "5"}), 0.5)
    found, finding = read(path)
    assert 5 < len(found) < 30 and finding.status == "partial"
    assert "it ends at" in finding.sentence and "of the 1.0" in finding.sentence


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", moving(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"needs PyAV: pip install 'aufast\[video\]'"):
        opened(path)


def test_two_readers_at_once(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", moving(20))
    counts = []
    threads = [threading.Thread(target=lambda: counts.append(read(path)[1].decoded)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [20, 20]
