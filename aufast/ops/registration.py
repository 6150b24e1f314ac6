"""How an operator is made known to PyTorch: schema, fallback, fake, and gradients of any order.

Every operator has a forward and a backward schema, defined here in Python. The reference is registered as the
fallback of both, so an operator exists, traces and is right even where nothing compiled was loaded; compiled
libraries override it for their device. First-order gradients go to the backward operator; where the graph of
the gradient itself is wanted (`create_graph=True`), they go through the reference, which has derivatives of
every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from aufast.ops import backends, direct
from aufast.reference.precision import outside_autocast


class _Library(torch.library.Library):
    """A library whose autograd kernels refuse forward-mode tangents, which PyTorch's would silently drop."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            fn = _refusing_tangents(fn)
        super().impl(op_name, fn, dispatch_key, **options)


def has_tangent(*values: Any) -> bool:
    """Whether a tensor among the values is differentiated in forward mode."""
    return forward_ad._current_level >= 0 and any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values
    )


def _refusing_tangents(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def checked(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if has_tangent(*args):
            raise RuntimeError(
                "torch.ops.aufast has no forward-mode derivatives; the functions of aufast.ops have them"
            )
        return kernel(keyset, *args, **kwargs)

    return checked


LIBRARY = _Library("aufast", "DEF")

Reference = Callable[..., tuple[Tensor, ...]]


def needs_mask(flags: Sequence[bool]) -> int:
    """Pack "gradient k is wanted" flags into the `needs` bit mask of a backward operator."""
    return sum(1 << k for k, flag in enumerate(flags) if flag)


def image_format(image: Tensor) -> torch.memory_format:
    """The memory format that an image operator's results take from its input."""
    if image.is_contiguous() or not image.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def vector_jacobian(
    reference: Reference, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: int
) -> list[Tensor | None]:
    """Gradients of `reference(*inputs)` for the wanted inputs, differentiable again where gradients are on.

    Aliases stand in for the inputs, so that an input made from another one does not count twice.
    """
    again = torch.is_grad_enabled()

    def alias(k: int, value: Tensor | None) -> Tensor | None:
        if value is not None and again and value.requires_grad:
            return value.view_as(value)
        return None if value is None else value.detach().requires_grad_(bool(needs >> k & 1))

    with torch.enable_grad(), _recording():
        aliases = [alias(k, value) for k, value in enumerate(inputs)]
        wanted = [k for k, value in enumerate(aliases) if value is not None and needs >> k & 1]
        outputs = reference(*aliases)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        found: Sequence[Tensor] = [torch.zeros_like(aliases[k]) for k in wanted]
        if wanted and pairs:
            targets, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                targets, [aliases[k] for k in wanted], weights, create_graph=again, materialize_grads=True
            )
    results: list[Tensor | None] = [None] * len(inputs)
    for k, gradient in zip(wanted, found, strict=True):
        results[k] = gradient
    return results


@contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record inside an operator's fallback, which runs below the autograd dispatch keys.

    Autocast is off here: a gradient has its operator's precision, not that of the region that asks for it.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutocastCPU", "AutocastCUDA"):
        excluded = excluded.add(getattr(torch._C.DispatchKey, key))
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradMeta", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def register(
    name: str,
    *,
    schema: str,
    backward_schema: str,
    fallback: Callable[..., Any],
    backward_fallback: Callable[..., Any],
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Define `aufast::name` and `aufast::name_backward` with their fallbacks, fakes and autograd formula.

    Both have an overload `triton`, the same in all but who computes. `backward` takes the backward operator
    of its own overload in front of the context.
    """
    backward_name = f"{name}_backward"

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"aufast::{backward_name} has no derivative of its own; "
            "second-order gradients need create_graph=True on the first backward pass"
        )

    def define(qualified: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
        LIBRARY.define(qualified + schema)
        LIBRARY.impl(qualified, torch.no_grad()(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"aufast::{qualified}", fake, lib=LIBRARY)

    on_triton = _triton(name, name, fallback), _triton(name, backward_name, backward_fallback)
    for overload, kernels in (("", (fallback, backward_fallback)), (".triton", on_triton)):
        define(name + overload, schema, kernels[0], fake)
        define(backward_name + overload, backward_schema, kernels[1], backward_fake)
        formula = partial(backward, operator(backward_name, overload[1:]))
        torch.library.register_autograd(
            f"aufast::{name}{overload}", formula, setup_context=setup_context, lib=LIBRARY
        )
        torch.library.register_autograd(f"aufast::{backward_name}{overload}", refuse, lib=LIBRARY)
    direct.define(name, operator(name, ""), operator(backward_name, ""), setup_context, backward)


def operator(name: str, backend: str) -> OpOverload:
    """The overload of `aufast::name` that a backend computes."""
    return getattr(getattr(torch.ops.aufast, name), "triton" if backend == "triton" else "default")


def _triton(module: str, name: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """The launch function `aufast.kernels.module.name`, imported when it is called; fallback for float64."""

    @outside_autocast
    def launch(first: Tensor, *rest: Any) -> Any:
        if first.dtype == torch.float64:
            return fallback(first, *rest)
        same_device(name, (first, *rest))
        devices = backends._devices["triton"]
        if first.device.type not in devices:
            raise ValueError(
                f"aufast::{name}.triton: the tensors are on {first.device}, and its kernel runs on"
                f" {' and '.join(devices)}"
            )
        with torch.cuda.device_of(first):
            return getattr(import_module(f"aufast.kernels.{module}"), name)(first, *rest)

    return launch


def same_device(name: str, arguments: Sequence[Any]) -> None:
    """Refuse a raw operator's tensors of different devices: the dispatcher looks at one of them only.

    Raises:
        ValueError: the argument and both devices.
    """
    first, *rest = arguments
    for k, value in enumerate(rest, start=1):
        if isinstance(value, Tensor) and value.device != first.device:
            names = [argument.name for argument in operator(name, "default")._schema.arguments]
            raise ValueError(
                f"aufast::{name}: {names[k]} is on {value.device}, but {names[0]} is on {first.device}"
            )


def unwanted(like: Tensor) -> Tensor:
    """What a backward operator returns for a gradient nobody asked for."""
    return like.new_empty(0)


def fresh(value: Tensor) -> Tensor:
    """A fallback's result as its fake promises it: contiguous, and never an alias of an input."""
    return value.clone(memory_format=torch.contiguous_format)


def dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A fallback's gradient: empty where nobody asked for it."""
    return unwanted(like) if gradient is None else fresh(gradient)
