"""Compiles csrc/ into a package's folder: `aufast/_cpu.so` and `aufast/_cuda.so`.

    python build_kernels.py FOLDER    where aufast/ops lies; setup.py calls the same

Each device's sources become one plain shared library against LibTorch's stable ABI, loaded by
`torch.ops.load_library`. They hold no Python symbol, so one build serves every Python and every torch from
2.11 on. It needs a C++ compiler (for CUDA also nvcc) and Python's standard library. Torch is never imported
here: its folder holds the headers and libraries, its version.py the rest. What was built, with what, and why
something was not, is printed at the end and kept in `_build.json`, since pip hides the output of a build.

Environment:
    AUFAST_SKIP_EXT=1     compile nothing; the reference computes
    AUFAST_SKIP_CUDA=1    compile no CUDA
    FORCE_CUDA=1          compile CUDA although the torch found has none (as in a container without a GPU)
    TORCH_CUDA_ARCH_LIST  GPU architectures, as "8.0;9.0a+PTX"
    MAX_JOBS              compilations at once; default from the processors and the free memory
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, NVCC_FLAGS   the usual meanings
    DEBUG=1               -O0 -g
    AUFAST_SANITIZE       as "address,undefined": instrument the CPU library (see `make asan`)
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import shlex
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SUFFIXES = {"cpu": ".cpp", "cuda": ".cu"}

TORCH_FLOOR = (2, 11)
TORCH_REQUIREMENT = f"torch>={TORCH_FLOOR[0]}.{TORCH_FLOOR[1]}"
TARGET = f"-DTORCH_TARGET_VERSION=0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"
STANDARD = "-std=c++20"
# PTX of 8.0 runs on every later GPU; 9.0a adds Hopper's own instructions, and its PTX would run nowhere else.
CUDA_ARCHITECTURES = "8.0+PTX;9.0a"
GIB_PER_JOB = 2


def flag(name: str) -> bool:
    return os.environ.get(name, "0").upper() in ("1", "ON", "YES", "TRUE", "Y")


# ----------------------------------------------------------------------------------------------------
# Torch: found, not imported


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None  # the CUDA it was built with

    @property
    def new_enough(self) -> bool:
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        return numbers is not None and tuple(map(int, numbers.groups())) >= TORCH_FLOOR


def site_folders() -> list[str]:
    """The folders this interpreter imports from, also those that a build isolation hides."""
    folders = [
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages([sys.prefix]),
    ]
    config = Path(sys.prefix, "pyvenv.cfg")
    if not config.exists() or re.search(r"include-system-site-packages\s*=\s*true", config.read_text()):
        folders += [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]
    return [*folders, *sys.path]


def find_torch() -> Torch | None:
    """The first torch that is new enough, else the first one, else None."""
    found = None
    for site_folder in site_folders():
        version_file = Path(site_folder, "torch", "version.py")
        if not version_file.is_file():
            continue
        text = version_file.read_text()
        version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
        cuda = re.search(r"^cuda\b.*= '([^']+)'", text, re.MULTILINE)
        torch = Torch(version_file.parent, version[1] if version else "unknown", cuda[1] if cuda else None)
        if torch.new_enough:
            return torch
        found = found or torch
    return found


# ----------------------------------------------------------------------------------------------------
# Tools


class Unavailable(Exception):
    """Why a library cannot be built here, as one sentence for people."""


class BuildError(Exception):
    """A build that was asked for and failed."""


def output(command: list[str], text: str = "") -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


@functools.cache
def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler's command and its name with version. Raises Unavailable."""
    if "CXX" in os.environ:
        candidates = [shlex.split(os.environ["CXX"])]
    else:
        candidates = [["g++"], ["clang++"], ["c++"]]
    for command in candidates:
        about = output([*command, "--version"]) if command else None
        versions = re.findall(r"\d+\.\d+\.\d+", about.splitlines()[0]) if about else []
        if not versions:
            continue
        name = f"{Path(command[-1]).name} {versions[-1]}"
        probe = [*command, STANDARD, "-fsyntax-only", "-x", "c++", "-"]
        if output(probe, "#include <vector>\n#include <bit>\nint main() {}\n") is None:
            raise Unavailable(f"{name} cannot compile C++20 (g++ 11 or later can)")
        return command, name
    tried = " or ".join(shlex.join(command) for command in candidates)
    raise Unavailable(
        f"no C++ compiler was found (tried {tried}); install g++ 11 or later, then aufast again"
    )


@functools.cache
def find_nvcc() -> tuple[str, str]:
    """nvcc's path and version. Raises Unavailable."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes] or ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for nvcc in candidates:
        version = re.search(r"release ([\d.]+)", output([nvcc, "--version"]) or "")
        if version:
            return nvcc, version[1]
    raise Unavailable(f"nvcc was not found (looked for {' or '.join(candidates)}); set CUDA_HOME")


def architecture_flags() -> list[str]:
    """nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST."""
    flags = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES).replace(";", " ").split():
        parts = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if parts is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST takes entries like 8.0, 9.0a or 9.0+PTX, got {entry!r}")
        arch = parts[1] + parts[2]
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if parts[3]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def job_count() -> int:
    """Compilations at once: MAX_JOBS, else what this process's processors and the free memory allow."""
    if "MAX_JOBS" in os.environ:
        value = os.environ["MAX_JOBS"]
        if not value.isdigit() or int(value) < 1:
            raise BuildError(f"MAX_JOBS must be a positive whole number, got {value!r}")
        return int(value)
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    gib = int(available[1]) // 2**20 if available else GIB_PER_JOB
    return max(1, min(len(os.sched_getaffinity(0)), gib // GIB_PER_JOB))


# ----------------------------------------------------------------------------------------------------
# What to build


class Library(NamedTuple):
    """One shared library: the commands that make it, or why it is not made (`sources` is empty then)."""

    device: str
    reason: str
    sources: tuple[Path, ...] = ()
    compile: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()


def count(sources: tuple[Path, ...]) -> str:
    return f"{len(sources)} source{'' if len(sources) == 1 else 's'}"


def cpu_library(torch: Torch, sources: tuple[Path, ...]) -> Library:
    command, compiler = find_compiler()
    flags = [STANDARD, "-fPIC", "-fvisibility=hidden", TARGET]
    # GCC's own vector headers read a value before setting it, their way to say "any value".
    flags += [
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        "-isystem",
        str(torch.folder / "include"),
    ]
    flags += ["-O0", "-g"] if flag("DEBUG") else ["-O3", "-DNDEBUG"]
    # Nothing is exported, so that no template compiled for one CPU can ever stand in for another library's.
    link_flags = ["-Wl,--version-script=hidden.map", f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]
    sanitizers = os.environ.get("AUFAST_SANITIZE")
    if sanitizers:
        instrument = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer"]
        # What the sanitizers look for does not depend on it, and -O3 takes them much longer to compile.
        flags += [*instrument, "-fno-sanitize-recover=all", "-g", "-O1"]
        link_flags += instrument
    else:
        link_flags += ["-Wl,-z,defs"]  # a symbol that torch does not have fails here, not at import
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link_flags += shlex.split(os.environ.get("LDFLAGS", ""))
    reason = f"{count(sources)} with {compiler}, torch {torch.version} headers"
    if sanitizers:
        reason += f", sanitizers {sanitizers}"
    if flag("DEBUG"):
        reason += ", debug"
    return Library("cpu", reason, sources, (*command, *flags), tuple(command), tuple(link_flags))


def cuda_library(torch: Torch, sources: tuple[Path, ...]) -> Library:
    if flag("AUFAST_SKIP_CUDA"):
        raise Unavailable("AUFAST_SKIP_CUDA is set")
    if torch.cuda is None and not flag("FORCE_CUDA"):
        raise Unavailable(f"torch {torch.version} has no CUDA (FORCE_CUDA=1 builds it all the same)")
    if os.environ.get("AUFAST_SANITIZE"):
        raise Unavailable("AUFAST_SANITIZE instruments the CPU library only")
    compiler, _ = find_compiler()
    nvcc, version = find_nvcc()
    architectures = architecture_flags()
    host = ["-ccbin", compiler[-1]]
    flags = [STANDARD, TARGET, "-DUSE_CUDA", "-isystem", str(torch.folder / "include"), *architectures]
    flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi", "--expt-relaxed-constexpr"]
    flags += ["-O0", "-g", "-G"] if flag("DEBUG") else ["-O3", "-DNDEBUG"]
    flags += shlex.split(os.environ.get("NVCC_FLAGS", ""))
    link_flags = ["-cudart=static", "-Xlinker=--version-script=hidden.map", "-Xlinker=--no-as-needed"]
    link_flags += [f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-L.", "-ltorch_cuda"]
    names = " ".join(sorted({flag.rpartition("=")[2] for flag in architectures}))
    reason = f"{count(sources)} with nvcc {version} for {names}, "
    reason += f"torch {torch.version} headers (its CUDA: {torch.cuda or 'none'})"
    return Library("cuda", reason, sources, (nvcc, *host, *flags), (nvcc, *host), tuple(link_flags))


@functools.cache
def plan() -> tuple[Library, ...]:
    """Every library, to be built or with the reason why not."""
    torch = find_torch()
    libraries = []
    for device, make in (("cpu", cpu_library), ("cuda", cuda_library)):
        sources = tuple(sorted((CSRC / device).glob(f"*{SUFFIXES[device]}")))
        try:
            if flag("AUFAST_SKIP_EXT"):
                raise Unavailable("AUFAST_SKIP_EXT is set")
            if not sys.platform.startswith("linux"):
                raise Unavailable(f"compiled kernels are built on Linux only, this is {platform.system()}")
            if not sources:
                raise Unavailable(f"there are no sources in csrc/{device}")
            if torch is None or not torch.new_enough:
                found = f"torch {torch.version}" if torch else "no torch"
                raise Unavailable(f"compiling needs {TORCH_REQUIREMENT}, found {found}")
            libraries.append(make(torch, sources))
        except Unavailable as reason:
            libraries.append(Library(device, str(reason)))
    return tuple(libraries)


# ----------------------------------------------------------------------------------------------------
# Building it: what is newer than its object, or was made by another command, is compiled again


def is_current(target: Path, command: list[str]) -> bool:
    """Whether this command made the target, and nothing that it read has changed since."""
    made_by, read = target.with_suffix(".command"), target.with_suffix(".d")
    if not (target.exists() and made_by.exists()) or made_by.read_text() != shlex.join(command):
        return False
    if not read.exists():  # a library, linked again whenever an object is new
        return True
    # As make writes them, "target: file file", with a backslash before a space in a name.
    _, _, names = read.read_text().replace("\\\n", " ").partition(": ")
    files = [Path(name.replace("\\ ", " ")) for name in re.split(r"(?<!\\)\s+", names.strip())]
    return all(file.exists() and file.stat().st_mtime_ns < target.stat().st_mtime_ns for file in files)


def run_compiler(target: Path, command: list[str], folder: Path) -> None:
    """Run a command in `folder` that makes the target; what it says is printed in one piece."""
    began = time.time_ns()
    target.with_suffix(".command").unlink(missing_ok=True)  # until it has succeeded
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.stdout:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        raise BuildError(
            "compiling csrc/ failed, the compiler's messages are above; "
            "AUFAST_SKIP_EXT=1 installs aufast without its compiled part"
        )
    os.utime(target, ns=(began, began))  # a source that was changed meanwhile is newer
    target.with_suffix(".command").write_text(shlex.join(command))


def compile_all(libraries: list[Library], folder: Path) -> None:
    """Make `_DEVICE.so` of every library in `folder`, several sources at a time."""
    objects: dict[str, list[Path]] = {}
    waiting = []
    for library in libraries:
        (folder / library.device).mkdir(exist_ok=True)
        objects[library.device] = []
        for source in library.sources:
            target = folder / library.device / f"{source.stem}.o"
            objects[library.device].append(target)
            reads = ["-MD", "-MF", str(target.with_suffix(".d"))]
            command = [*library.compile, *reads, "-c", str(source), "-o", str(target)]
            if not is_current(target, command):
                waiting.append((source, target, command))
    stopped = False

    def compile_one(job: tuple[Path, Path, list[str]]) -> None:
        nonlocal stopped
        if stopped:
            return
        print(f"compile {job[0]}", flush=True)
        try:
            run_compiler(*job[1:], folder)
        except BaseException:
            stopped = True
            raise

    with ThreadPoolExecutor(job_count()) as pool:
        list(pool.map(compile_one, waiting))
    compiled = {target for _, target, _ in waiting}
    for library in libraries:
        target = folder / f"_{library.device}.so"
        inputs = objects[library.device]
        command = [*library.link, "-shared", "-o", str(target), *map(str, inputs), *library.link_flags]
        if compiled.intersection(inputs) or not is_current(target, command):
            print(f"link {target.name}", flush=True)
            run_compiler(target, command, folder)
    if not waiting:
        print("no work to do", flush=True)


def torch_cuda_stand_in(folder: Path) -> None:
    """An empty libtorch_cuda.so: FORCE_CUDA records the name where a CPU torch has no such file."""
    compiler, _ = find_compiler()
    target = folder / "libtorch_cuda.so"
    flags = ["-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull, "-o", str(target)]
    subprocess.run([*compiler, *flags], check=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in this folder; the lock ends with its process, so none is ever stale."""
    import fcntl  # Unix only, as the compiled part is

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_atomically(target: Path, content: bytes) -> None:
    """Put a file in place whole: a process that has the old one loaded keeps the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    with open(handle, "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o644)
    os.replace(temporary, target)


def build(package: Path) -> None:
    """Make every library that can be made here in the package's folder, and say what was made and why."""
    libraries = [library for library in plan() if library.sources]
    if libraries:
        kind = "sanitize" if os.environ.get("AUFAST_SANITIZE") else "debug" if flag("DEBUG") else "release"
        folder = ROOT / "build" / kind
        with locked(folder):
            (folder / "hidden.map").write_text("{ local: *; };\n")
            if any(library.device == "cuda" for library in libraries):
                torch_cuda_stand_in(folder)
            compile_all(libraries, folder)
            for library in libraries:
                name = f"_{library.device}.so"
                write_atomically(package / name, (folder / name).read_bytes())
    for library in plan():
        if not library.sources:  # an older build's library must not be taken for this one's
            (package / f"_{library.device}.so").unlink(missing_ok=True)
    report(package)


def report(package: Path) -> None:
    """Print what was built and why, and keep it for `aufast.backends()`."""
    torch = find_torch()
    try:
        compiler = find_compiler()[1]
    except Unavailable:
        compiler = None
    facts = {"torch": torch and torch.version, "compiler": compiler}
    for library in plan():
        facts[library.device] = {"built": bool(library.sources), "reason": library.reason}
    write_atomically(package / "_build.json", json.dumps(facts, indent=2).encode() + b"\n")
    print("aufast: what was built")
    for library in plan():
        print(f"  {library.device:5}{'built' if library.sources else 'not built'}: {library.reason}")
    if not any(library.sources for library in plan()):
        print("  every operator works through its reference in plain PyTorch, only slower")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        build(Path(arguments[0]))
    except BuildError as error:
        print(f"build_kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
