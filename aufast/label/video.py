"""Frames of a video file, decoded by a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import math
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from aufast.data.frames import VIDEO_FORMATS
from aufast.label.config import InputError

_DECODER = Path(__file__).with_name("decoder.py")
_PIPE = 1 << 20  # bytes; the usual 64 KiB make both sides wait for each other many times a frame
_KILLED = -9
_LONGEST = 3600.0  # seconds of one sleep; the system has a limit to them


@dataclass(frozen=True, eq=False)
class Frame:
    """A decoded picture.

    Attributes:
        index: counts decoded frames from 0.
        time: the presentation time stamp in seconds; None where the file has none.
        image: uint8 (H, W, 3) RGB, upright.
    """

    index: int
    time: float | None
    image: np.ndarray


@dataclass
class Finding:
    """What the decoder says at the end of a video.

    Attributes:
        status: "ok", or why frames are missing.
        sentence: what is missing.
        expected: frames that the file announces; None where it does not.
        decoded, failed: frames sent, and packets that could not be decoded.
        warnings: sentences about what is odd but loses nothing.
        video: codec, container, time base and rotation.
        seconds: spent decoding, without waiting for the reader.
    """

    status: str = "ok"
    sentence: str = ""
    expected: int | None = None
    decoded: int = 0
    failed: int = 0
    warnings: list[str] = field(default_factory=list)
    video: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class VideoReader:
    """Iterates over the frames of a video file; `finding` is complete afterwards.

    The decoder is handed the open file, so that any name can be used and none is taken for an address.
    Nothing that it sends is unpickled.

    Args:
        file: as `open_regular` gives it; may be closed once the reader is made.
        max_pixels: a frame may have.
        memory: bytes the decoder may take.
        timeout: seconds until the decoder is ended; 0 is never.
        stall: seconds that the reader waits for one frame before it ends the decoder.

    Raises:
        ImportError: PyAV is not installed.
        InputError: the file holds no frame that can be decoded. Once frames were given, what goes wrong is
            told by `finding`.
    """

    def __init__(self, file: IO[bytes], *, max_pixels: int, memory: int, stall: float, timeout: float = 0.0):
        self.finding = Finding()
        self._expired = ""  # why the decoder was ended
        if importlib.util.find_spec("av") is None:
            raise ImportError("reading videos needs PyAV: pip install 'aufast[video]'")
        options = {
            "path": sys.path,
            "formats": VIDEO_FORMATS,
            "max_pixels": max_pixels,
            "memory": memory,
        }
        command = [sys.executable, "-I", str(_DECODER), json.dumps(options)]
        self._process = subprocess.Popen(
            command,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        with contextlib.suppress(OSError, AttributeError):  # an optimisation that not every system has
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)
        self._timeout, self._stall = timeout, stall
        self._started = self._asked = time.monotonic()  # `_asked` is None while nobody waits for a frame
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="decoder's time", daemon=True)
        self._watcher.start()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        count = 0
        while (header := self._header()) is not None and header["kind"] == "frame":
            image = np.empty((header["height"], header["width"], 3), np.uint8)
            if not _fill(self._process.stdout, image):
                header = None
                break
            self._asked = None
            yield Frame(count, header["time"], image)
            count += 1
        self.finding = self._ending(header, count)
        if not count:
            raise InputError(self.finding.status, self.finding.sentence)

    def close(self) -> None:
        """End the decoder, whatever it is doing."""
        self._closed.set()
        self._process.kill()
        self._process.stdout.close()
        self._process.wait()
        self._watcher.join()

    def _watch(self) -> None:
        """End the decoder when its time is up, or when somebody has waited too long for a frame."""
        rest = 0.0
        while not self._closed.wait(min(rest, _LONGEST)):
            asked, now = self._asked, time.monotonic()
            rests = {
                "the time for it was up": self._started + (self._timeout or math.inf) - now,
                f"the decoder gave nothing for {self._stall:g} s": (asked or now) + self._stall - now,
            }
            why, rest = min(rests.items(), key=lambda item: item[1])
            if rest <= 0:
                self._expired = why
                self._process.kill()
                return

    def _header(self) -> dict[str, Any] | None:
        self._asked = time.monotonic()
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def _ending(self, header: dict[str, Any] | None, count: int) -> Finding:
        if header is None:
            return Finding(*self._death(count), decoded=count)
        messages = header.pop("messages", [])
        header.pop("kind")
        finding = Finding(**{"decoded": count, **header})
        if messages and finding.status == "ok":
            finding.status = "partial"
            finding.sentence = "the decoder met errors: " + "; ".join(messages)
        elif messages:
            finding.warnings.append("the decoder's messages: " + "; ".join(messages))
        return finding

    def _death(self, count: int) -> tuple[str, str]:
        code = self._process.wait()
        after = f"after {count} frames"
        if self._expired:
            return "timeout", f"{self._expired} {after}"
        if code == _KILLED:
            return "oom", f"the decoder was killed {after}, for want of memory perhaps"
        return "partial" if count else "undecodable", f"the decoder ended with status {code} {after}"


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Open a regular file for reading; a pipe or a device is refused and not waited for.

    Raises:
        InputError: it is none, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise InputError("undecodable", "there is no such file") from error
    except (OSError, ValueError) as error:
        raise InputError("undecodable", getattr(error, "strerror", None) or str(error)) from error
    file = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise InputError("undecodable", "it is not a regular file")
    if not os.fstat(descriptor).st_size:
        file.close()
        raise InputError("undecodable", "the file is empty")
    return file


def _fill(pipe: IO[bytes], image: np.ndarray) -> bool:
    """Read exactly an image; False where the pipe ends before."""
    left = memoryview(image).cast("B")
    while left:
        count = pipe.readinto(left)
        if not count:
            return False
        left = left[count:]
    return True
