"""Images that a labelling run must survive."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from skimage import data

from tests.label.bad_files import Case, Make, image, link, write
from tests.label.clips import blank, cut, face
from tests.orientations import STORED


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
    *(Case(7, f"EXIF orientation {k}", oriented(k), "ok", rows=1, same=PLAIN) for k in STORED if k != 1),
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
