"""Every kernel compiles for the GPUs we name, without one: no spills, 64-bit addresses, no float atomics."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from aufast.kernels import graph_conv, graph_gru, region_conv, roi_crop
from triton.runtime.jit import JITFunction

from tests.kernels import compiling
from tests.kernels.compiling import compiled_launches, stack_bytes

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="with TRITON_INTERPRET=1 nothing is compiled"
)
MODULES = (graph_conv, graph_gru, region_conv, roi_crop)
CAPABILITIES = {80: "sm_80", 90: "sm_90a"}


def crop_calls(dtype: torch.dtype) -> None:
    """MARGL's middle level: 24 boxes or affine regions of a 128-channel map, both memory formats."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        features = torch.empty(4, 128, 12, 12, dtype=dtype).contiguous(memory_format=memory_format)
        for rois in (torch.empty(4, 24, 4), torch.empty(4, 24, 2, 3)):
            crops = roi_crop.roi_crop(features, rois, 6, 6, False)
            roi_crop.roi_crop_backward(crops, features, rois, False, 0b11)
    roi_crop.roi_crop_backward(crops, features, rois, True, 0b11)


def conv_calls(dtype: torch.dtype) -> None:
    """AAR's layer (12 nodes, 96 channels) in one launch and in two, and a forecaster's with 170 nodes."""
    Q, W, bias = (torch.empty(shape, dtype=dtype) for shape in ((12, 8), (8, 96, 96), (8, 96)))
    for rows in (48, 12288):
        x = torch.empty(rows, 12, 96, dtype=dtype)
        graph_conv.graph_conv(x, Q, Q, W, bias, 0)
        graph_conv.graph_conv_backward(x, x, Q, Q, W, bias, 0, 0b11111)
    x, E = torch.empty(64, 170, 64, dtype=dtype), torch.empty(170, 8, dtype=dtype)
    pools = torch.empty(8, 2, 64, 64, dtype=dtype), torch.empty(8, 64, dtype=dtype)
    graph_conv.graph_conv(x, E, E, *pools, 1)
    graph_conv.graph_conv_backward(x, x, E, E, *pools, 1, 0b11111)


def gru_calls(dtype: torch.dtype) -> None:
    """AAR's layer, with and without lengths."""
    x = torch.empty(16, 3, 12, 96, dtype=dtype)
    h = torch.empty(16, 12, 96)
    U, W, b = (torch.empty(shape, dtype=dtype) for shape in ((12, 8), (8, 192, 96), (8, 96)))
    for lengths in (None, torch.zeros(16, dtype=torch.int64)):
        parameters = (U, U, W, W, W, h, b, b, b, lengths)
        out, _, saved = graph_gru.graph_gru(x, *parameters, 0, True)
        graph_gru.graph_gru_backward(out, h, x, *parameters, out, saved, 0, 0b1111111111)


def region_calls(dtype: torch.dtype) -> None:
    """AAR's first layer on an 8×8 grid, both memory formats, with and without BatchNorm."""
    weight, bias = torch.empty(8, 8, 16, 32, 3, 3, dtype=dtype), torch.empty(8, 8, 16, dtype=dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(2, 32, 176, 176, dtype=dtype).contiguous(memory_format=memory_format)
        for norm in ((None, None), (torch.empty(8, 8, 32, dtype=dtype), torch.empty(8, 8, 32, dtype=dtype))):
            out = region_conv.region_conv(x, weight, bias, *norm)
            region_conv.region_conv_backward(out, x, weight, bias, *norm, 0b11111)


CALLS = {
    "roi_crop": crop_calls,
    "graph_conv": conv_calls,
    "graph_gru": gru_calls,
    "region_conv": region_calls,
}
CASES = [
    pytest.param(name, call, capability, dtype, id=f"{name}-{target}-{str(dtype).split('.')[1]}")
    for name, call in CALLS.items()
    for capability, target in CAPABILITIES.items()
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call", "capability", "dtype"), CASES)
def test_compiles_without_spills(
    name: str, call: Callable[[torch.dtype], None], capability: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    kernels = compiled_launches(capability, lambda: call(dtype))
    for kernel in kernels:
        assert f".target {CAPABILITIES[capability]}" in kernel.asm["ptx"]
        used = stack_bytes(kernel, tmp_path)
        assert used == 0, f"{kernel.metadata.name} keeps {used} bytes a thread in local memory"
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"]), f"{kernel.metadata.name} uses atomics"


def test_a_call_that_launches_nothing_is_no_proof() -> None:
    with pytest.raises(AssertionError, match="nothing was launched"):
        compiled_launches(90, lambda: None)


def test_a_silent_cuobjdump_is_no_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = tmp_path / "cuobjdump"
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    call = lambda: graph_conv.node_product(torch.empty(3, 2, 4), torch.empty(2, 4, 5))  # noqa: E731
    (kernel,) = compiled_launches(90, call)
    stack_bytes(kernel, tmp_path)
    monkeypatch.setattr(compiling, "CUOBJDUMP", silent)
    with pytest.raises(AssertionError, match="cuobjdump does not say what graph_conv_product_kernel uses"):
        stack_bytes(kernel, tmp_path)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_for_tf32(capability: int, tmp_path: Path, tf32: None) -> None:
    """Where PyTorch may use TF32 for float32 products, so may the kernels."""
    for name in ("graph_conv", "graph_gru", "region_conv"):
        kernels = compiled_launches(capability, lambda call=CALLS[name]: call(torch.float32))
        assert any(".tf32" in kernel.asm["ptx"] for kernel in kernels)
        for kernel in kernels:
            used = stack_bytes(kernel, tmp_path)
            assert used == 0, f"{kernel.metadata.name} keeps {used} bytes a thread in local memory"


def sources(ttir: str) -> dict[str, tuple[str, str, list[str]]]:
    """The operation, type and operands that define each value."""
    found = {}
    for line in ttir.splitlines():
        match = re.match(r"\s*(%\S+) = ([a-z_.]+) ?(.*)", line)
        if match:
            value, operation, rest = match.groups()
            found[value] = operation, rest, re.findall(r"%[\w#]+", rest.split(" : ")[0])
    return found


def made_of_sizes(value: str, defined: dict[str, tuple[str, str, list[str]]], arguments: set[str]) -> bool:
    """Whether a value is an argument or a constant, or calculated from such alone: no index is in it."""
    if value in arguments:
        return True
    operation, _, operands = defined.get(value, ("", "", []))
    if operation == "arith.constant":
        return True
    known = operation in ("tt.splat", "tt.broadcast", "arith.addi", "arith.muli")
    return known and all(made_of_sizes(operand, defined, arguments) for operand in operands)


@pytest.mark.parametrize("name", CALLS)
def test_addresses_are_64_bit(name: str) -> None:
    """An offset is int64, or has no index in it; no stride is ever multiplied in int32."""
    kernels = compiled_launches(90, lambda: CALLS[name](torch.float32))
    for ttir in {kernel.metadata.name: kernel.asm["ttir"] for kernel in kernels}.values():
        arguments = set(re.findall(r"(%\w+): ", ttir.split("attributes")[0]))
        defined = sources(ttir)
        for operation, rest, operands in defined.values():
            if operation == "tt.addptr":
                assert re.search(r"xi64>|, i64", rest) or made_of_sizes(operands[1], defined, arguments), rest
            if operation == "arith.muli" and "i32" in rest:
                assert not any("stride" in operand for operand in operands), rest


def test_every_kernel_is_compiled_here() -> None:
    written = {
        value.__name__
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
    }
    launches = compiled_launches(90, lambda: [call(torch.float32) for call in CALLS.values()])
    compiled = {kernel.metadata.name for kernel in launches}
    assert compiled == written
