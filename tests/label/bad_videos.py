"""Videos that a labelling run must survive."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.label.bad_files import Case, Make, video
from tests.label.clips import blank, cut, damage, encode, face, moving, remux, turn_mp4


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
