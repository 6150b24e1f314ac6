"""Image files: every kind that photographs come in, and every kind of damage."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from aufast.faces.images import BACKGROUND, check_image, load_image
from tests.orientations import STORED

PIXELS = np.random.default_rng(0).integers(
    0, 256, (6, 9, 3), dtype=np.uint8
)  # rows and columns differ, no symmetry
SMOOTH = np.linspace(0, 255, 64 * 96 * 3).reshape(64, 96, 3).astype(np.uint8)  # survives JPEG
EXIF_ORIENTATION = 0x0112


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def encoded(pixels: np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG written by hand, for headers that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def assert_refused(path, reason: str, **options) -> None:
    with pytest.raises(ValueError) as caught:
        load_image(path, **options)
    message = str(caught.value)
    assert message.startswith(f"cannot read image {os.fsdecode(path)!r}: ")
    assert reason in message and "\n" not in message


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp", "jp2"])
def test_lossless_formats_are_exact(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    image = load_image(save(tmp_path / f"a.{suffix}", PIXELS, **options))
    np.testing.assert_array_equal(image, PIXELS)
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable


def test_jpeg_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(SMOOTH, "JPEG", quality=100, subsampling=0))
    assert np.abs(load_image(tmp_path / "a.png").astype(int) - SMOOTH).max() <= 3


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = np.ascontiguousarray(STORED[orientation](PIXELS))
    np.testing.assert_array_equal(load_image(save(tmp_path / "a.png", stored, exif=exif)), PIXELS)
    stored = np.ascontiguousarray(STORED[orientation](SMOOTH))
    path = save(tmp_path / "a.jpg", stored, exif=exif, quality=100, subsampling=0)
    assert np.abs(load_image(path).astype(int) - SMOOTH).max() <= 3


def test_exif_orientation_of_16_bit(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    upright = PIXELS[:, :, 0]
    stored = np.ascontiguousarray(np.rot90(upright)).astype(np.uint16) * 257
    image = load_image(save(tmp_path / "a.png", stored, exif=exif))
    np.testing.assert_array_equal(image, np.repeat(upright[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("ink", "color"),
    [((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))],
    ids=["paper", "cyan", "black"],
)
def test_cmyk(tmp_path: Path, ink: tuple, color: tuple) -> None:
    for suffix in ("jpg", "tiff"):
        Image.new("CMYK", (16, 16), ink).save(tmp_path / f"a.{suffix}")
        image = load_image(tmp_path / f"a.{suffix}")
        assert image.shape == (16, 16, 3) and np.abs(image - np.array(color)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = load_image(save(tmp_path / f"a.{suffix}", values))
    expected = np.rint(values * (255 / 65535)).astype(np.uint8)
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, axis=2))


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=">u2")
    Image.frombytes("I;16B", (4, 1), values.tobytes()).save(tmp_path / "a.tiff")
    assert load_image(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 1, 100, 255]


def test_10_bit_pgm(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023))
    assert load_image(tmp_path / "a.pgm")[0, :, 1].tolist() == [0, 128, 255]


def test_16_bit_color_png(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (3, 4, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png(4, 3, 16, 2, rows))
    assert np.abs(load_image(tmp_path / "a.png").astype(float) - values / 257).max() <= 1


def test_palette(tmp_path: Path) -> None:
    colors = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], np.uint8)
    indices = np.random.default_rng(1).integers(0, 3, (6, 9), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colors.tobytes())
    for suffix in ("png", "gif"):
        image.save(tmp_path / f"a.{suffix}")
        np.testing.assert_array_equal(load_image(tmp_path / f"a.{suffix}"), colors[indices])


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for suffix in ("gif", "png", "webp", "tiff"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert (load_image(tmp_path / f"a.{suffix}") == (255, 0, 0)).all()


def test_transparency_shows_the_background(tmp_path: Path) -> None:
    alpha = np.array([[0, 51, 128, 255]], np.uint8)
    color = np.array([200, 100, 0])
    rgba = np.concatenate([np.broadcast_to(color, (1, 4, 3)), alpha[..., None]], axis=2).astype(np.uint8)
    share = alpha[..., None] / 255
    expected = share * color + (1 - share) * BACKGROUND
    assert np.abs(load_image(save(tmp_path / "a.png", rgba)) - expected).max() <= 1
    # Grey with alpha, a palette with a transparent entry, and a colour declared transparent.
    Image.new("LA", (2, 2), (200, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.save(tmp_path / "p.png", transparency=1)
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "key.png", transparency=(9, 8, 7))
    for name in ("la.png", "p.png", "key.png"):
        assert (load_image(tmp_path / name) == BACKGROUND).all()


def test_greyscale_and_1_bit(tmp_path: Path) -> None:
    grey = PIXELS[:, :, 0]
    np.testing.assert_array_equal(load_image(save(tmp_path / "l.png", grey))[..., 2], grey)
    bits = save(tmp_path / "1.png", np.where(grey > 99, 255, 0).astype(np.uint8), "1")
    np.testing.assert_array_equal(load_image(bits)[..., 1], np.where(grey > 99, 255, 0))


def test_1_by_1_and_a_strip(tmp_path: Path) -> None:
    assert load_image(save(tmp_path / "a.png", PIXELS[:1, :1])).shape == (1, 1, 3)
    assert load_image(save(tmp_path / "b.png", np.zeros((10, 30_000, 3), np.uint8))).shape == (10, 30_000, 3)


def test_color_profiles_are_not_applied(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    path = save(tmp_path / "a.png", PIXELS, icc_profile=profile)
    np.testing.assert_array_equal(load_image(path), PIXELS)


@pytest.mark.parametrize(
    "name",
    [b"a b.png", b"a'\"b.png", b"%d%s.png", b"a\nb.png", b"-rf.png", b"\xff\xfe.png", "ä字.png".encode()],
    ids=["space", "quotes", "percent", "newline", "dash", "not-utf8", "unicode"],
)
def test_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    Path(os.fsdecode(name)).write_bytes(encoded(PIXELS, "PNG"))
    for path in (name, os.fsdecode(name), Path(os.fsdecode(name)), os.fsencode(tmp_path) + b"/" + name):
        np.testing.assert_array_equal(load_image(path), PIXELS)
    Path(os.fsdecode(name)).write_bytes(b"")
    assert_refused(name, "the file is empty")
    with pytest.raises(ValueError) as caught:
        load_image(name)
    str(caught.value).encode()  # the message can be printed even where the name cannot


# ---- what is refused -----------------------------------------------------------------------------


def test_empty_and_text(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert_refused(tmp_path / "empty.png", "the file is empty")
    (tmp_path / "text.jpg").write_text("this is not a photograph")
    assert_refused(tmp_path / "text.jpg", "none of the formats AVIF, BMP")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000"])
@pytest.mark.parametrize("part", [0.05, 0.5, 0.9])
def test_truncated(tmp_path: Path, format: str, part: float) -> None:
    data = encoded(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8), format)
    (tmp_path / "a").write_bytes(data[: int(len(data) * part)])
    assert_refused(tmp_path / "a", "")


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_flipped_bytes_are_decoded_or_refused(tmp_path: Path, format: str) -> None:
    """Never a crash, another shape or another kind of exception."""
    data = encoded(SMOOTH, format)
    outcomes = Counter()
    rng = np.random.default_rng(0)
    for position in rng.integers(len(data) // 4, len(data) - 16, 100):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "a").write_bytes(damaged)
        try:
            outcomes["decoded"] += load_image(tmp_path / "a").shape == SMOOTH.shape
        except ValueError as error:
            assert str(error).startswith("cannot read image")
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 100
    assert outcomes["decoded" if format == "JPEG" else "refused"] > 0, outcomes


def test_a_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    """20,000 x 20,000 pixels in 48 KB; the same header without any pixels is refused in the same words."""
    bomb = png(20_000, 20_000, 1, 0, bytes(2501 * 20_000))
    assert len(bomb) < 50_000
    for name, data in (("bomb", bomb), ("header", bomb[:60])):
        (tmp_path / name).write_bytes(data)
        assert_refused(tmp_path / name, "400000000 pixels")


def test_own_pixel_limit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", PIXELS)
    path.write_bytes(path.read_bytes()[:60])  # so that decoding would fail with another message
    assert_refused(path, "its 9 x 6 pixels are more than the limit of 53", max_pixels=53)
    assert_refused(path, "truncated", max_pixels=54)


def test_no_pixels(tmp_path: Path) -> None:
    for width, height in ((0, 5), (5, 0)):
        (tmp_path / "a.png").write_bytes(png(width, height, 8, 2, b""))
        assert_refused(tmp_path / "a.png", "")
        (tmp_path / "a.ppm").write_bytes(b"P6 %d %d 255\n" % (width, height))
        assert_refused(tmp_path / "a.ppm", "")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels_have_no_scale(tmp_path: Path, dtype) -> None:
    assert_refused(save(tmp_path / "a.tiff", np.full((4, 4), 7, dtype)), "no agreed white")


def test_formats_that_run_programs_are_not_opened(tmp_path: Path) -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(program)
    assert_refused(tmp_path / "a.png", "none of the formats")


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        assert_refused(path, "it is not a regular file")
    for path in (tmp_path / "nothing", tmp_path / "broken", tmp_path / "loop", tmp_path / ("a" * 300), ""):
        assert_refused(path, "there is no such file")
    assert_refused("a\0b", "")


def test_no_permission(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", PIXELS)
    load_image(path)
    path.chmod(0)
    # The root user may read everything, so become nobody for a moment.
    for folder in [tmp_path, *tmp_path.parents][:-1]:
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest-", "test_")):
            folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        assert_refused(path, "Permission denied")
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    "path", [None, 3.5, ["a.png"], io.BytesIO(b"")], ids=["None", "float", "list", "file"]
)
def test_not_a_path(path) -> None:
    with pytest.raises(TypeError):
        load_image(path)


# ---- arrays --------------------------------------------------------------------------------------


def test_check_image_makes_contiguous_rgb() -> None:
    for view in (PIXELS[:, ::-1], PIXELS[::2, ::3], np.asfortranarray(PIXELS), PIXELS[..., ::-1]):
        image = check_image(view)
        np.testing.assert_array_equal(image, view)
        assert image.flags.c_contiguous
    assert check_image(PIXELS) is PIXELS  # nothing is copied without need
    np.testing.assert_array_equal(check_image(PIXELS[..., 0]), np.repeat(PIXELS[..., :1], 3, axis=2))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (PIXELS / 255, TypeError, "must be uint8 with values from 0 to 255, got dtype float64"),
        (PIXELS.astype(np.uint16), TypeError, "got dtype uint16"),
        (PIXELS > 9, TypeError, "got dtype bool"),
        (PIXELS.tolist(), TypeError, "NumPy array, got list"),
        ("a.png", TypeError, "NumPy array, got str"),
        (PIXELS.transpose(2, 0, 1), ValueError, r"got \(3, 6, 9\); the channels must come last"),
        (np.zeros((6, 9, 4), np.uint8), ValueError, r"got \(6, 9, 4\)"),
        (np.zeros((2, 6, 9, 3), np.uint8), ValueError, r"got \(2, 6, 9, 3\)"),
        (np.zeros(7, np.uint8), ValueError, r"got \(7,\)"),
        (np.zeros((0, 9, 3), np.uint8), ValueError, r"no pixels, shape \(0, 9, 3\)"),
        (np.zeros((9, 0), np.uint8), ValueError, "no pixels"),
    ],
    ids=["float", "uint16", "bool", "list", "path", "CHW", "RGBA", "batch", "flat", "empty", "empty grey"],
)
def test_check_image_refuses(image, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_image(image)
