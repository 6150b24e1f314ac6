"""The process that decodes one video, so that a broken file ends it and not the program.

`python -I decoder.py OPTIONS` reads the file from standard input and writes to standard output: for each
frame a line of JSON and the frame's RGB bytes; at the end a line that says what was found. It imports nothing
of aufast, so it starts in a fraction of a second. Its parent reads it through `aufast.label.video`.
"""

from __future__ import annotations

import bisect
import errno
import json
import os
import resource
import sys
import time

SLACK = 0.25  # seconds by which a container's stated end may lie after its last packet
UNSHOWN = ("vp8", "vp9", "av1")  # codecs with frames that only serve to predict others
LOGGED = 5  # messages of FFmpeg that are passed on
REORDERED = 17  # frames that a decoder may hold back to show others first, and the one at hand


def main() -> None:
    options = json.loads(sys.argv[1])
    sys.path[:] = options["path"]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_AS, (options["memory"], options["memory"]))
    try:
        end = _decode(out, options)
    except MemoryError:
        end = {"status": "oom", "sentence": "decoding it takes more memory than is allowed"}
    except BrokenPipeError:
        return  # nobody reads any more
    _send(out, {"kind": "end", **end})
    out.flush()


def _send(out, header: dict, data: bytes | memoryview = b"") -> None:
    out.write(json.dumps(header).encode() + b"\n")
    out.write(data)


def _refuse(status: str, sentence: str) -> dict:
    return {"status": status, "sentence": sentence}


def _decode(out, options: dict) -> dict:
    import av

    av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture(local=False) as logs:
        try:
            # By descriptor: any file name can be opened, and none is taken for an address.
            container = av.open(
                "/dev/fd/0",
                options={"protocol_whitelist": "file", "format_whitelist": options["formats"]},
            )
        except _broken() as error:
            return _refuse("undecodable", f"cannot be opened as a video: {_reason(error)}")
        with container:
            stream, warnings = _choose(container)
            if stream is None:
                return _refuse("undecodable", "holds no video")
            end = _frames(out, container, stream, options["max_pixels"])
    end.setdefault("warnings", [])[:0] = warnings
    end["messages"] = list(dict.fromkeys(f"{name}: {' '.join(text.split())}" for _, name, text in logs))[
        :LOGGED
    ]
    return end


def _broken() -> tuple[type[Exception], ...]:
    """What FFmpeg raises over broken files: some of its errors are neither OSError nor ValueError."""
    from av import FFmpegError

    return FFmpegError, OSError, ValueError


def _reason(error: Exception) -> str:
    """FFmpeg's words without PyAV's path and number.

    Raises:
        MemoryError: they say that there is too little memory.
    """
    if getattr(error, "errno", None) == errno.ENOMEM:
        raise MemoryError from error
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _choose(container):
    """The best stream that is no cover picture, and what there is to say about the choice."""
    from av.stream import Disposition

    films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not films:
        return None, []
    best = container.streams.best("video")
    stream = best if best in films else films[0]
    warnings = []
    if len(films) > 1:
        warnings.append(f"holds {len(films)} video streams; the one of index {stream.index} is labelled")
    return stream, warnings


class _Counts:
    """What was seen of the stream.

    Args:
        stored: the container stores presentation times. AVI does not: what FFmpeg gives for them there goes
            in the order of decoding, so that frames which others are predicted from come too early. Frames
            are given in the order of showing, so each takes the earliest time that is left.
    """

    def __init__(self, stored: bool) -> None:
        self._stored = stored
        self._times: list[float] = []  # of packets whose frames are still to come, sorted; empty if stored
        self.packets = self.decoded = self.failed = self.damaged = 0
        self.untimed = self.backward = self.resized = 0
        self.reached = self.shown = 0.0  # seconds: end of the furthest packet of any stream, and of this one
        self.last: float | None = None
        self.size: tuple[int, int] | None = None

    def packet(self, packet) -> None:
        """Take a packet of the stream, before it is decoded."""
        if packet.size and not packet.is_discard:  # what an edit list cuts out only serves others
            self.packets += 1
            self.shown = max(self.shown, _end(packet))
        if packet.pts is not None and packet.size and not self._stored:
            bisect.insort(self._times, float(packet.pts * packet.time_base))
            del self._times[:-REORDERED]  # a packet without a frame must not hold up the times after it

    def fail(self, packet) -> None:
        """A packet, or None at the end, that cannot be decoded: a frame that failed."""
        self.failed += 1
        when = None if packet is None or packet.pts is None else float(packet.pts * packet.time_base)
        if when in self._times:
            self._times.remove(when)

    def time(self, frame, stream) -> float | None:
        """When a frame is shown, in seconds; frames come in that order."""
        if self._times:
            return self._times.pop(0)
        return None if frame.pts is None else float(frame.pts * (frame.time_base or stream.time_base))

    def frame(self, frame, when: float | None) -> None:
        """Take a frame that is sent."""
        self.damaged += bool(frame.is_corrupt)
        self.untimed += when is None
        self.backward += when is not None and self.last is not None and when <= self.last
        self.last = self.last if when is None else when
        size = (frame.width, frame.height)
        self.resized += self.size not in (None, size)
        self.size = size
        self.decoded += 1


def _frames(out, container, stream, max_pixels: int) -> dict:
    codec = stream.codec_context
    if codec is None:
        return _refuse("undecodable", "there is no decoder for its video")
    width, height = codec.width, codec.height
    if width * height > max_pixels:
        return _refuse("too_large", f"its frames of {width} x {height} pixels are more than {max_pixels}")
    codec.options = {"max_pixels": str(max_pixels)}
    counts = _Counts(stored=container.format.name != "avi")
    broken, started, waiting = None, time.perf_counter(), 0.0
    fps = float(stream.average_rate or stream.guessed_rate or 25)
    # All that can set a container's duration, subtitles that outlast the film too.
    kinds = ("video", "audio", "subtitle", "data")
    packets = container.demux([s for s in container.streams if s.type in kinds])
    info = _facts(stream, container)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except _broken() as error:
            broken = _reason(error)
            break
        counts.reached = max(counts.reached, _end(packet))
        if packet.stream is not stream:
            continue
        counts.packet(packet)
        for frame in _pictures(codec, packet, counts):
            waiting += _emit(out, frame, stream, counts, info)
    if broken is not None:
        for frame in _pictures(codec, None, counts):
            waiting += _emit(out, frame, stream, counts, info)
    if not counts.decoded:
        what = "frames that can be decoded" if counts.failed or broken else "frames"
        return _refuse("undecodable", f"holds no {what}" + (f": {broken}" if broken else ""))
    return _finding(counts, broken, stream, container, info, fps, time.perf_counter() - started - waiting)


def _end(packet) -> float:
    """When what a packet holds is over, in seconds."""
    return 0.0 if packet.pts is None else float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _pictures(codec, packet, counts: _Counts):
    """The frames of a packet, or those held back where it is None; what cannot be decoded is counted."""
    try:
        yield from codec.decode(packet)
    except _broken() as error:
        _reason(error)  # too little memory is no broken packet
        counts.fail(packet)


def _emit(out, frame, stream, counts: _Counts, info: dict) -> float:
    """Send a frame, upright; returns the seconds waited for the reader."""
    import numpy as np

    when = counts.time(frame, stream)
    try:
        image = frame.to_ndarray(format="rgb24")  # (H, W, 3)
    except _broken() as error:
        _reason(error)
        counts.failed += 1
        return 0.0
    counts.frame(frame, when)
    info.setdefault("rotation", int(frame.rotation))
    if frame.rotation % 90 == 0:
        image = np.rot90(image, round(frame.rotation / 90))
    image = np.ascontiguousarray(image)
    height, width = image.shape[:2]
    start = time.perf_counter()
    _send(out, {"kind": "frame", "time": when, "height": height, "width": width}, image.data)
    return time.perf_counter() - start


def _facts(stream, container) -> dict:
    import av

    rate, base = stream.average_rate, stream.time_base
    return {
        "ffmpeg": getattr(av, "ffmpeg_version_info", None),  # older PyAV does not tell
        "codec": stream.codec_context.name,
        "container": container.format.name,
        "pixel_format": stream.codec_context.pix_fmt,
        "time_base": None if base is None else f"{base.numerator}/{base.denominator}",
        "container_rate": None if rate is None else float(rate),
    }


def _finding(counts: _Counts, broken, stream, container, info: dict, fps: float, seconds: float) -> dict:
    """Whether anything is missing, in sentences."""
    lost, warnings = [], []
    expected, unseen = _expected(counts, stream, fps)
    if broken is not None:
        lost.append(f"reading broke off: {broken}")
    if counts.failed:
        lost.append(f"{counts.failed} packets could not be decoded")
    if counts.damaged:
        lost.append(f"{counts.damaged} frames are damaged")
    if expected is not None and counts.decoded + counts.failed < expected:
        lost.append(f"the file announces {expected} frames and gives {counts.decoded}")
    if (stated := _missed(counts.reached, container, fps)) is not None:
        lost.append(f"it ends at {counts.reached:.2f} s of the {stated:.2f} s that it announces")
    if unseen and container.format.name == "avi":
        warnings.append(f"{unseen} of its {expected + unseen} places are empty: the frame before stays on")
    elif unseen:
        warnings.append(f"its edit list leaves out {unseen} of the {expected + unseen} frames that it holds")
    if (silent := counts.packets - counts.decoded - counts.failed) > 0 and info["codec"] not in UNSHOWN:
        # Two fields of an interlaced picture may come in two packets; but where the size changes, FFmpeg's
        # decoders drop what they hold back.
        (lost if counts.resized else warnings).append(f"{silent} packets give no frame")
    if counts.untimed:
        warnings.append(f"{counts.untimed} frames have no time stamp; their timestamp is left empty")
    if counts.backward:
        warnings.append(f"{counts.backward} time stamps do not lie after the one before")
    if counts.resized:
        warnings.append(f"the size of the frames changes {counts.resized} times")
    if info.get("rotation", 0) % 90:
        warnings.append(f"a rotation by {info['rotation']} degrees is not applied")
    return {
        "status": "partial" if lost else "ok",
        "sentence": "; ".join(lost),
        "expected": expected,
        "decoded": counts.decoded,
        "failed": counts.failed,
        "warnings": warnings,
        "video": info,
        "seconds": seconds,
    }


def _expected(counts: _Counts, stream, fps: float) -> tuple[int | None, int]:
    """How many frames a whole file gives, None where it does not say, and how many it counts beside them.

    An MP4 counts all the frames that it holds, of which its edit list may show some; an AVI counts the places
    of its clock, of which some may be empty. Either says how long it is shown: where that end is reached to
    half a frame, what it counts and does not give was never to be seen.
    """
    if not stream.frames:
        return None, 0
    if stream.duration is None or stream.frames <= counts.packets:
        return stream.frames, 0
    end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    if counts.shown < end - 0.5 / fps:
        return stream.frames, 0
    return counts.packets, stream.frames - counts.packets


def _missed(reached: float, container, fps: float) -> float | None:
    """The end that a container announces and that its packets do not reach; None where they do."""
    if container.duration is None:
        return None
    slack = max(SLACK, 2 / fps)
    start, length = (container.start_time or 0) / 1e6, container.duration / 1e6
    # Some programs write into a Matroska file when it ends, others how long it lasts.
    if "matroska" in container.format.name and abs(reached - length) <= slack:
        return None
    return start + length if reached < start + length - slack else None


if __name__ == "__main__":
    main()
