"""Who computes an operator: the reference, compiled C++ or CUDA, or Triton; and why not the others."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
OPERATORS = ("roi_crop", "graph_conv", "graph_gru", "region_conv")
_PACKAGE = Path(__file__).resolve().parent.parent


def _load(device: str) -> str | None:
    """Load the compiled library of a device; the reason where that is not possible, else None."""
    library = _PACKAGE / f"_{device}.so"
    if not library.exists():
        report = _PACKAGE / "_build.json"
        built = json.loads(report.read_text()).get(device, {}) if report.exists() else {}
        return f"not built: {built.get('reason', 'the package was not installed with its compiled part')}"
    if device == "cuda" and not torch.cuda.is_available():
        return "built, but this PyTorch sees no CUDA device"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def _compiled(device: str) -> frozenset[str]:
    key = device.upper()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name for name in OPERATORS if has(f"aufast::{name}", key))


def _triton_missing() -> str | None:
    """The reason why no Triton kernel can run here, or None; does not import Triton."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.device_count() == 0 and not _interpreting():
        return "this PyTorch sees no CUDA device (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


# Filled by `load`, once, after the operators are defined; plain values, so that torch.compile can read them.
_missing: dict[str, str | None] = {}
_kernels: dict[str, frozenset[str]] = {"cpu": frozenset(), "cuda": frozenset(), "triton": frozenset()}
_devices: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}
_selected = "auto"


def load() -> None:
    """Load every compiled library that can run here. Called once, when `aufast.ops` is imported."""
    for device in ("cpu", "cuda"):
        _missing[device] = _load(device)
        if _missing[device] is None:
            _kernels[device] = _compiled(device)
    _missing["triton"] = _triton_missing()
    if _missing["triton"] is None:
        _kernels["triton"] = frozenset(OPERATORS)
        if _interpreting():
            _devices["triton"] = ("cuda", "cpu")
    try:
        use_backend(os.environ.get("AUFAST_BACKEND", "auto"))
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"the environment variable AUFAST_BACKEND: {error}") from None


def can_run(backend: str, operator: str, tensor: Tensor) -> str | None:
    """The reason why `backend` cannot run `operator` on this tensor, or None where it can."""
    if backend == "reference":
        return None
    reason = _missing[backend]
    if reason is not None:
        return reason
    if operator not in _kernels[backend]:
        return f"it has no kernel for {operator}"
    if tensor.device.type not in _devices[backend]:
        return f"the input is on {tensor.device}"
    return None


def choose(operator: str, tensor: Tensor, backend: str | None) -> str:
    """Choose who computes `operator` for this input.

    "auto" is silent: the compiled kernel of the tensor's device where there is one, on a GPU else the Triton
    kernel where Triton is installed, else the reference.
    Function transforms (`torch.func`) and forward-mode derivatives always take the reference, which they can
    see through.

    Raises:
        ValueError: `backend` is no backend.
        RuntimeError: an explicitly requested backend cannot run, with the reason.
    """
    requested = _selected if backend is None else backend
    if requested not in NAMES:
        raise ValueError(f"{operator}: backend must be one of {', '.join(NAMES)}, got {requested!r}")
    device = tensor.device.type
    if requested == "auto":
        candidates = (device, "triton") if device == "cuda" else (device,)
        requested = next((name for name in candidates if operator in _kernels.get(name, ())), "reference")
    reason = can_run(requested, operator, tensor)
    if reason is not None:
        raise RuntimeError(f"{operator}: the {requested!r} backend cannot run here: {reason}")
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return "reference"
    return requested


class use_backend:  # used like a function, as torch.no_grad is
    """Choose the backend of every later call: `use_backend("reference")`, or as a context manager.

    Args:
        name: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run at all here, with the reason.
    """

    def __init__(self, name: str):
        global _selected
        if name not in NAMES:
            raise ValueError(f"use_backend: name must be one of {', '.join(NAMES)}, got {name!r}")
        if _missing.get(name) is not None:
            raise RuntimeError(f"use_backend: the {name!r} backend cannot run here: {_missing[name]}")
        self._before = _selected
        _selected = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _selected
        _selected = self._before


def backends() -> dict[str, str]:
    """The state of every backend and its reason, as one line each."""
    states = {"reference": "ready: plain PyTorch, every operator, every device"}
    for name in ("cpu", "cuda", "triton"):
        if _missing[name] is None:
            states[name] = f"ready: {', '.join(op for op in OPERATORS if op in _kernels[name])}"
        else:
            states[name] = f"off: {_missing[name]}"
    return states
