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
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage import data

from aufast.label import FINE, LabelConfig, label_files
from tests.label.clips import blank, cut, damage, encode, face, moving, remux, turn_mp4

Make = Callable[[Path], Any]


class Case(NamedTuple):
    """A file and its fate."""

    number: int
    given: str
    make: Make  # gets the folder, returns the path
    status: str  # one, or several with |
    sentence: str = ""  # a pattern
    rows: int | None = None
    same: str = ""  # the case whose row this one's is
    warning: str = ""
    faces: str = ""  # a digit for every frame: whether it has a face
    times: list[float | None] | None = None  # in seconds


def write(name: str, data: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def image(name: str, pixels: Callable[[], np.ndarray] = face, mode: str | None = None, **options) -> Make:
    def make(folder: Path) -> Path:
        picture = Image.fromarray(pixels())
        (picture.convert(mode) if mode else picture).save(folder / name, **options)
        return folder / name

    return make


def video(name: str, change: Callable[[Path], Path] = lambda path: path, frames=None, **options) -> Make:
    return lambda folder: change(encode(folder / name, frames or moving(10), **options))


def link(name: str, target: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


def png(width: int, height: int, rows: bytes) -> bytes:
    """A 1-bit PNG with any header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


STORED = {  # how an upright picture lies in a file of each EXIF orientation
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def oriented(orientation: int) -> Make:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = lambda: np.ascontiguousarray(STORED[orientation](face()))  # noqa: E731
    return image(f"orientation {orientation}.png", pixels, exif=exif)


def hidden_face() -> np.ndarray:
    return np.dstack([face(), np.zeros(face().shape[:2], np.uint8)])


def sixteen_bits() -> np.ndarray:
    return face()[..., 1].astype(np.uint16) * 257


def smaller(side: int, of: int = 200) -> np.ndarray:
    """The photograph's face, of a square of so many pixels, at another size."""
    top, left = 110 - of // 2, 220 - of // 2
    part = Image.fromarray(data.astronaut()[top : top + of, left : left + of])
    return np.asarray(part.resize((side, side)))


def animation(folder: Path) -> Path:
    frames = [Image.fromarray(picture) for picture in (face(), blank())]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return folder / "moving.gif"


def flipped(folder: Path) -> Path:
    path = image("flipped.jpg")(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    return path


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
NAMES = (b"a b.png", b"a'\"b.png", b"%d%s.png", b"a\nb.png", b"-rf.png", b"\xff\xfe.png")

PLAIN = "the plain photograph"
IMAGES = [
    Case(0, PLAIN, image("plain.png"), "ok", rows=1),
    Case(1, "an empty file", write("empty.jpg", b""), "undecodable", "^the file is empty$"),
    Case(
        2,
        "text with an image's name",
        write("text.jpg", b"no photograph"),
        "undecodable",
        "opened as a video",
    ),
    Case(3, "half a JPEG", lambda f: cut(image("half.jpg")(f), 0.5), "undecodable", "truncated"),
    Case(4, "half a PNG", lambda f: cut(image("half.png")(f), 0.5), "undecodable", "truncated"),
    Case(5, "a flipped byte in a JPEG", flipped, "ok|no_face|undecodable"),
    Case(
        6,
        "20,000 x 20,000 in 48 KB",
        write("bomb.png", png(20_000, 20_000, bytes(2501 * 20_000))),
        "too_large",
        "400000000 pixels",
    ),
    *(Case(7, f"EXIF orientation {k}", oriented(k), "ok", rows=1, same=PLAIN) for k in STORED),
    Case(8, "CMYK", image("cmyk.jpg", mode="CMYK"), "ok", rows=1),
    Case(9, "8-bit greyscale", image("8 bit.png", lambda: face()[..., 1]), "ok", rows=1),
    Case(9, "16-bit greyscale", image("16 bit.png", sixteen_bits), "ok", rows=1, same="8-bit greyscale"),
    Case(10, "a palette", image("palette.png", mode="P"), "ok", rows=1),
    Case(10, "an animation", animation, "ok", rows=1, warning="its first frame is labelled"),
    Case(11, "a transparent face", image("transparent.png", hidden_face), "no_face", rows=1),
    Case(12, "greyscale", image("grey.png", mode="L"), "ok", rows=1),
    Case(12, "1-bit", image("1 bit.png", mode="1"), "ok|no_face", rows=1),
    Case(13, "1 x 1", image("dot.png", lambda: face()[:1, :1]), "no_face", rows=1),
    Case(13, "no pixels", write("zero.png", png(0, 5, b"")), "undecodable"),
    Case(14, "a face in 79 x 79", image("79.png", lambda: smaller(79)), "no_face", rows=1),
    Case(14, "the same in 160 x 160", image("160.png", lambda: smaller(160)), "ok", rows=1),
    Case(14, "79 x 79 full of face", image("close.png", lambda: smaller(79, of=120)), "ok", rows=1),
    Case(15, "a strip of 30,000 x 10", image("strip.png", lambda: blank(10, 30_000)), "no_face", rows=1),
    Case(16, "a colour profile", image("profile.png", icc_profile=PROFILE), "ok", rows=1, same=PLAIN),
    *(
        Case(17, f"the name {n!r}", image(os.fsdecode(n), format="PNG"), "ok", rows=1, same=PLAIN)
        for n in NAMES
    ),
    Case(18, "a pipe", pipe, "undecodable", "not a regular file"),
    Case(18, "a device", lambda _: "/dev/zero", "undecodable", "not a regular file"),
    Case(18, "a broken link", link("broken.png", "nowhere"), "undecodable", "there is no such file"),
    Case(18, "a link to itself", link("loop.png", "loop.png"), "undecodable", "symbolic links"),
    Case(18, "a name that is too long", lambda f: f / ("a" * 300), "undecodable", "name too long"),
]


# ---- videos --------------------------------------------------------------------------------------


def moov_lost(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"moov") - 4])
    return path


def sound(container, stream, seconds: float = 0.2) -> None:
    import av

    samples = av.AudioFrame.from_ndarray(
        np.zeros((1, int(8000 * seconds)), np.float32), format="fltp", layout="mono"
    )
    samples.sample_rate = 8000
    container.mux(stream.encode(samples))
    container.mux(stream.encode(None))


def only_sound(folder: Path) -> Path:
    import av

    with av.open(str(folder / "sound.m4a"), "w", format="mp4") as container:
        sound(container, container.add_stream("aac", rate=8000, layout="mono"))
    return folder / "sound.m4a"


def no_frames(folder: Path) -> Path:
    """A Matroska file that announces a video and ends."""
    path = encode(folder / "no frames.mkv", [face()], "mjpeg", "yuvj420p")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"\x1f\x43\xb6\x75")])  # where the first cluster begins
    return path


def untimed(path: Path) -> Path:
    """Take the time stamps out of a transport stream's packets."""
    content = bytearray(path.read_bytes())
    for packet in range(0, len(content), 188):
        start = packet + 4 + (1 + content[packet + 4] if content[packet + 3] & 0x20 else 0)
        begins = content[packet + 1] & 0x40 and content[start : start + 3] == b"\0\0\1"
        if begins and 0xE0 <= content[start + 3] < 0xF0:
            length = content[start + 8]
            content[start + 7] &= 0x3F  # neither is there
            content[start + 9 : start + 9 + length] = b"\xff" * length
    path.write_bytes(content)
    return path


def two_sizes(folder: Path) -> Path:
    small = encode(folder / "sizes.ts", moving(5), "mpeg2video")
    large = encode(folder / "large.ts", [face(280, 400)] * 5, "mpeg2video")
    small.write_bytes(small.read_bytes() + large.read_bytes())
    return small  # FFmpeg's MPEG-2 decoder drops the frame that it holds back when the size changes


def twice(folder: Path) -> Path:
    """A recorder that was started anew: its clock begins at zero again."""
    path = encode(folder / "twice.ts", moving(5), "mpeg2video")
    path.write_bytes(2 * path.read_bytes())
    return path


def two_streams(folder: Path) -> Path:
    import av

    with av.open(str(folder / "two.mkv"), "w") as container:
        pictures = (face(), blank(48, 64))
        streams = [container.add_stream("mpeg4", rate=30) for _ in pictures]
        for stream, picture in zip(streams, pictures, strict=True):
            stream.height, stream.width = picture.shape[:2]
            stream.pix_fmt = "yuv420p"
        for stream, picture in zip(streams, pictures, strict=True):
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return folder / "two.mkv"


def cover(folder: Path) -> Path:
    """A song whose cover shows a face."""
    import av

    with av.open(str(folder / "song.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width, stream.pix_fmt = 240, 320, "yuvj420p"
        song = container.add_stream("aac", rate=8000, layout="mono")
        stream.disposition = av.stream.Disposition.attached_pic
        container.mux(stream.encode(av.VideoFrame.from_ndarray(face(), format="rgb24")))
        container.mux(stream.encode(None))
        sound(container, song)
    return folder / "song.m4a"


def playlist(folder: Path) -> Path:
    encode(folder / "private.ts", moving(3), "mpeg2video")
    lines = [
        "#EXTM3U",
        "#EXT-X-TARGETDURATION:1",
        "#EXTINF:1,",
        f"file://{folder}/private.ts",
        "#EXT-X-ENDLIST",
    ]
    (folder / "list.m3u8").write_text("\n".join(lines))
    return folder / "list.m3u8"


def disguised(folder: Path) -> Path:
    (folder / "list.mp4").write_bytes(playlist(folder).read_bytes())
    return folder / "list.mp4"


def ten_hours(path: Path) -> Path:
    """Have a Matroska header announce ten hours."""
    content = bytearray(path.read_bytes())
    place = content.index(b"\x44\x89\x88") + 3  # Duration, eight bytes long
    struct.pack_into(">d", content, place, 36_000_000.0)
    path.write_bytes(content)
    return path


def again(name: str, change: Callable[[Path], Path] = lambda path: path, codec="libx264", **options) -> Make:
    """A video of 30 frames whose packets are written anew."""

    def make(folder: Path) -> Path:
        source = folder / f"source of {name}"
        encode(source, moving(30), codec, options={"bf": "0", "g": "10"})
        return change(remux(source, folder / name, **options))

    return make


VARIABLE = [0, 5, 9, 300, 301, 350, 400, 700, 701, 900]  # milliseconds


def without_faces(*at: int) -> list[np.ndarray]:
    return [blank() if k in at else picture for k, picture in enumerate(moving(9))]


VIDEOS = [
    Case(19, "an MP4 whose index is lost", video("lost.mp4", moov_lost), "undecodable", "cannot be opened"),
    Case(
        20,
        "half a Matroska file",
        video("half.mkv", lambda p: cut(p, 0.6), moving(30), options={"g": "5"}),
        "partial",
        "it ends at",
    ),
    Case(
        21,
        "noise in the middle",
        video("noise.mp4", lambda p: damage(p, 0.4, 0.5), moving(30)),
        "partial",
        "errors|decoded|damaged",
    ),
    Case(22, "sound alone", only_sound, "undecodable", "holds no video"),
    Case(23, "no frame", no_frames, "undecodable"),
    Case(24, "one frame", video("one.mp4", frames=moving(1)), "ok", rows=1),
    Case(
        25,
        "a variable rate",
        video("variable.mp4", times=VARIABLE),
        "ok",
        rows=10,
        times=[t / 1000 for t in VARIABLE],
    ),
    Case(
        26,
        "time that jumps back",
        twice,
        "ok",
        rows=10,
        warning="1 time stamps do not lie after the one before",
    ),
    Case(
        26,
        "no time stamps",
        video("untimed.ts", untimed, codec="mpeg2video"),
        "ok",
        rows=10,
        times=[None] * 10,
        warning="10 frames have no time stamp; their timestamp is left empty",
    ),
    Case(
        26,
        "AVI, which stores no time stamps",
        video("reordered.avi", options={"bf": "2"}),
        "ok",
        rows=10,
        times=[(k + 1) / 30 for k in range(10)],  # FFmpeg counts a frame that the decoder holds back
    ),
    Case(
        27,
        "a telephone's rotation",
        video("turned.mp4", turn_mp4, frames=[np.ascontiguousarray(np.rot90(face()))] * 3),
        "ok",
        rows=3,
    ),
    Case(
        28,
        "a size that changes",
        two_sizes,
        "partial",
        "^1 packets give no frame$",
        rows=9,
        warning="the size of the frames changes 1 times",
    ),
    Case(29, "10 bits, 4:2:2", video("ten.mkv", codec="ffv1", pixel_format="yuv422p10le"), "ok", rows=10),
    Case(
        29,
        "interlaced",
        video("interlaced.mpg", codec="mpeg2video", options={"flags": "+ildct+ilme"}),
        "ok",
        rows=10,
    ),
    Case(29, "full range", video("full.avi", codec="mjpeg", pixel_format="yuvj420p"), "ok", rows=10),
    Case(30, "two video streams", two_streams, "ok", rows=3, warning="holds 2 video streams"),
    Case(30, "a cover picture", cover, "undecodable", "holds no video"),
    Case(31, "a playlist", playlist, "undecodable", "cannot be opened"),
    Case(31, "a playlist with a video's name", disguised, "undecodable", "cannot be opened"),
    Case(31, "concat:", lambda f: f"concat:{f}/private.ts|{f}/private.ts", "undecodable", "no such file"),
    Case(31, "http:", lambda _: "http://127.0.0.1:9/a.mp4", "undecodable", "no such file"),
    Case(32, "a header of ten hours", video("long.mkv", ten_hours), "partial", "of the 36000.00 s", rows=10),
    Case(
        32,
        "an edit list that hides the first half",
        again("edited.mp4", shift=-0.5),
        "ok",
        rows=15,
        warning="its edit list leaves out 15 of the 30 frames that it holds",
        times=[k / 30 for k in range(15)],
    ),
    Case(
        32,
        "an edit list, and the file's end is lost",
        again("edited and cut.mp4", lambda p: cut(p, 0.97), shift=-0.5, movflags="faststart"),
        "partial",
        "it ends at|could not be decoded; the file announces 30 frames",  # or within its last packet
    ),
    Case(
        32,
        "a Matroska file that begins late",
        again("late.mkv", shift=20),
        "ok",
        rows=30,
        times=[20 + k / 30 for k in range(30)],
    ),
    Case(
        32,
        "half of one that begins late",
        again("half of late.mkv", lambda p: cut(p, 0.6), shift=20),
        "partial",
        "it ends at",
    ),
    Case(
        32,
        "an AVI with empty places",
        again("empty.avi", codec="mpeg4", without=(5, 6, 7, 15)),
        "ok",
        rows=26,
        warning="4 of its 30 places are empty: the frame before stays on",
        times=[k / 30 for k in range(30) if k not in (5, 6, 7, 15)],
    ),
    Case(
        32,
        "half an AVI with empty places",
        again("half empty.avi", lambda p: cut(p, 0.6), codec="mpeg4", without=(5, 6, 7, 15)),
        "partial",
        "the file announces 30 frames and gives",
    ),
    *(
        Case(
            35, f"no face at the {where}", video(f"{where}.mp4", frames=without_faces(*at)), "ok", faces=seen
        )
        for where, at, seen in (
            ("start", (0, 1, 2), "000111111"),
            ("middle", (4, 5), "111100111"),
            ("end", (7, 8), "111111100"),
        )
    ),
    Case(
        36, "no face", video("none.mp4", frames=[blank()] * 4), "no_face", "no face was found", faces="0000"
    ),
]


# ---- the run -------------------------------------------------------------------------------------


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


# Where the cases are that no file of the tables above stands for.
ELSEWHERE = {
    33: "tests.label.test_run",
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
