"""Compiles, without a GPU, what a launch would run: the driver is a stand-in that knows only its target."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Driver:
    """As much of a driver as compiling asks for; the capability stands for the device, the cache's key."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_launches(capability: int, call: Callable[[], object]) -> list[CompiledKernel]:
    """The kernels that `call` launches, compiled with its very arguments for this capability, and not run."""
    kernels: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    before = driver._active
    driver.set_active(_Driver(capability))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            call()
    finally:
        driver._active = before
    assert kernels, "nothing was launched, so nothing is proved"
    return kernels


def stack_bytes(kernel: CompiledKernel, folder: Path) -> int:
    """Bytes of local memory a thread uses: for spilled registers and arrays that are not in registers."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = subprocess.run(
        [CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", report)
    assert len(sizes) == 2, f"cuobjdump does not say what {kernel.metadata.name} uses: {report!r}"
    return sum(map(int, sizes))
