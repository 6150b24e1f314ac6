"""Who computes an operator: the reference, compiled C++ or CUDA, or Triton; and why not the others."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
OPERATORS = ("roi_crop", "graph_conv", "graph_gru", "region_conv")
Limit = Callable[[], str | None]
OLDEST_GPU = (8, 0)  # compute capability
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


@functools.cache
def _too_old(index: int) -> str | None:
    """The reason why no kernel was made for a GPU, or None."""
    if torch.cuda.get_device_capability(index) >= OLDEST_GPU:
        return None
    has, needs = (
        ".".join(map(str, version)) for version in (torch.cuda.get_device_capability(index), OLDEST_GPU)
    )
    name = torch.cuda.get_device_name(index)
    return f"{name} has compute capability {has}, and the kernels need {needs} or newer"


def can_run(backend: str, operator: str, tensor: Tensor, limit: Limit | None = None) -> str | None:
    """The reason why `backend` cannot run `operator` on this tensor, or None where it can.

    Args:
        backend: any but "auto".
        operator: its name in `aufast.ops`.
        tensor: the operator's first argument.
        limit: gives the reason why the compiled CUDA kernel does not take these sizes, or None where it does.
    """
    if backend == "reference":
        return None
    reason = _missing[backend]
    if reason is not None:
        return reason
    if operator not in _kernels[backend]:
        return f"it has no kernel for {operator}"
    if tensor.device.type not in _devices[backend]:
        return f"the input is on {tensor.device}"
    # A compiled program has no time to ask; what it was traced with decides.
    if tensor.device.type == "cuda" and torch.cuda.device_count() and not torch.compiler.is_compiling():
        reason = _too_old(torch.cuda.current_device() if tensor.device.index is None else tensor.device.index)
        if reason is not None:
            return reason
    return limit() if backend == "cuda" and limit is not None else None


def _computes_by_definition(backend: str, operator: str, dtype: torch.dtype) -> bool:
    """Whether this backend has no kernel for the dtype and hands the call to the reference itself."""
    return dtype == torch.float64 and (backend, operator) not in (("cpu", operator), ("cuda", "roi_crop"))


def _automatic(operator: str, tensor: Tensor, limit: Limit | None) -> tuple[str, dict[str, str]]:
    """The first backend that can run, and why those before it were passed over."""
    passed: dict[str, str] = {}
    for name in {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(tensor.device.type, ()):
        reason = can_run(name, operator, tensor, limit)
        if reason is None and _computes_by_definition(name, operator, tensor.dtype):
            reason = "it computes float64 by the definition"
        if reason is None:
            return name, passed
        passed[name] = reason
    return "reference", passed


def choose(operator: str, tensor: Tensor, backend: str | None, limit: Limit | None = None) -> str:
    """Choose who computes `operator` for this input.

    "auto" is silent: the compiled kernel of the tensor's device where there is one that takes this dtype and
    these sizes, on a GPU else the Triton kernel where Triton is installed, else the reference. `explain` says
    what it chose and why.
    Function transforms (`torch.func`) and forward-mode derivatives always take the reference, which they can
    see through.

    Args:
        operator: its name in `aufast.ops`.
        tensor: its first argument.
        backend: what the caller asked for; None for the one of `use_backend`.
        limit: gives the reason why the compiled CUDA kernel does not take these sizes, or None where it does.

    Raises:
        ValueError: `backend` is no backend.
        RuntimeError: an explicitly requested backend cannot run, with the reason.
    """
    requested = _selected if backend is None else backend
    if requested not in NAMES:
        raise ValueError(f"{operator}: backend must be one of {', '.join(NAMES)}, got {requested!r}")
    if requested == "auto":
        chosen, passed = _automatic(operator, tensor, limit)
    else:
        chosen, passed = requested, {}
        reason = can_run(requested, operator, tensor, limit)
        if reason is not None:
            raise RuntimeError(f"{operator}: the {requested!r} backend cannot run here: {reason}")
    seen_through = (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )
    if seen_through:
        chosen = "reference"
    if _explaining:
        raise _Explanation(_in_words(operator, tensor, requested, chosen, passed, seen_through))
    return chosen


_explaining = False


class _Explanation(Exception):
    """Carries the reason out of a call that is explained and not computed."""


def _in_words(
    operator: str, tensor: Tensor, requested: str, chosen: str, passed: dict[str, str], seen_through: bool
) -> str:
    if seen_through:
        why = "function transforms and forward mode see through plain PyTorch only"
    elif requested != "auto":
        why = "asked for"
    elif chosen == "reference":
        why = "no kernel takes this call" if passed else f"there are no kernels for {tensor.device.type}"
    else:
        why = f"the first that can of those for {tensor.device.type}"
    words = f"{operator} of {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}: {chosen}, {why}"
    return "; ".join([words, *(f"not {name}: {reason}" for name, reason in passed.items())])


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say who would compute a call of an operator and why, without computing it.

    Args:
        function: one of `aufast.ops`, or anything that calls one; the first call counts.
        args, kwargs: its arguments, checked as in a call.

    Returns:
        One line: operator, dtype and device, who computes, and why those of higher rank do not.

    Raises:
        TypeError, ValueError, RuntimeError: as the call itself would.
    """
    global _explaining
    _explaining = True
    try:
        function(*args, **kwargs)
    except _Explanation as explanation:
        return str(explanation)
    finally:
        _explaining = False
    raise ValueError("explain: function called no operator of aufast.ops")


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
