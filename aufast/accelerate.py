"""Finding AGCRN's recurrent cells in somebody's model and letting the fused graph-GRU compute them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from aufast.nn.adaptive import CONCATS, GATES, AdaptiveGraphGRU, adaptive_graph_gru

POOLS = ("weights_pool", "bias_pool")
TOLERANCE = 1e-9  # relative, in float64, of every output and every gradient
NODES_NAMES = ("node_num", "num_nodes", "num_node", "nodes")


class _Accelerated(nn.Module):
    """Stands in a module's place, with its parameters under their names and its other attributes."""

    def __init__(self, original: nn.Module, concat: str, gates: str, backend: str | None):
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.__dict__["original"] = original  # not registered: its parameters are here already
        self.concat, self.gates, self.backend = concat, gates, backend
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.__dict__["original"], name)

    def run(self, cell: nn.Module, x: Tensor, embeddings: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """All steps of one cell: x (B, T, N, c_in), state (B, N, c)."""
        return adaptive_graph_gru(
            x,
            embeddings,
            cell.gate.weights_pool,
            cell.gate.bias_pool,
            cell.update.weights_pool,
            cell.update.bias_pool,
            state.to(x.device),
            concat=self.concat,
            gates=self.gates,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"in place of {type(self.original).__name__}, concat={self.concat}, gates={self.gates}"


class AcceleratedCell(_Accelerated):
    """One step of AGCRN's recurrent unit, called as its cell is."""

    def forward(self, x: Tensor, state: Tensor, node_embeddings: Tensor) -> Tensor:
        """The next state (B, N, c) from x (B, N, c_in), state (B, N, c) and embeddings (N, ce)."""
        out, _ = self.run(self, x.unsqueeze(1), node_embeddings, state)
        return out.squeeze(1)


class AcceleratedEncoder(_Accelerated):
    """A stack of AGCRN's cells over a sequence, called as its encoder is: each layer is one operator call."""

    def forward(self, x: Tensor, init_state: Tensor, node_embeddings: Tensor) -> tuple[Tensor, list[Tensor]]:
        """States (B, T, N, c) of the last layer, and each layer's last state.

        Args:
            x: (B, T, N, c_in).
            init_state: (layers, B, N, c), or one tensor a layer.
            node_embeddings: (N, ce).
        """
        (cells,) = self.children()
        last = []
        for cell, state in zip(cells, init_state, strict=True):
            x, state = self.run(cell, x, node_embeddings, state)
            last.append(state)
        return x, last


@dataclass(frozen=True)
class Replaced:
    """A module that the fused operator computes now.

    Attributes:
        name: in the model, as in `named_modules`.
        kind: "cell" or "encoder".
        type: the class that was there.
        concat, gates: of `AdaptiveGraphGRU`, as found by comparing numbers.
        difference: the largest relative one of an output or a gradient, in float64.
    """

    name: str
    kind: str
    type: str
    concat: str
    gates: str
    difference: float


@dataclass(frozen=True)
class Left:
    """A module that looks like one of AGCRN's and was not touched, and why."""

    name: str
    type: str
    reason: str


@dataclass
class Report:
    """What `accelerate` did."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"replaced {r.name} ({r.kind} {r.type}, {r.concat}, {r.gates} gates): equal to {r.difference:.0e}"
            for r in self.replaced
        ]
        lines += [f"left {item.name} ({item.type}): {item.reason}" for item in self.left]
        return "\n".join(lines) or "nothing in this model looks like AGCRN's cells"


class _Unfit(Exception):
    """Why a module stays as it is, as one clause."""


def accelerate(model: nn.Module, *, backend: str | None = None) -> Report:
    """Let the fused graph-GRU compute the AGCRN cells of a model, in place.

    A cell is a module with two children `gate` and `update`, each holding `weights_pool` (ce, K, c_in + c,
    2c and c) and `bias_pool` (ce, 2c and c) and nothing else, that is called with (x, state,
    node_embeddings). An encoder is a module whose only child is a list of such cells, called with (x,
    initial states, node_embeddings); it is replaced whole, so that graph and weights are made once a
    sequence. Each is run on small random input first, in float64, in training and in evaluation mode: one
    whose outputs or gradients differ from the fused form's is left as it is.

    Parameters stay the same objects under the same names, so optimisers and checkpoints remain valid;
    attributes and methods of a replaced module still answer.

    Args:
        model: changed in place.
        backend: who computes; None takes what `aufast.use_backend` chose.

    Returns:
        What was replaced, and what was left and why; `print` it.
    """
    report = Report()
    if _looks_like(model):
        reason = "it is the model itself, and nothing holds it where another could be put in its place"
        report.left.append(Left("the model", type(model).__name__, reason))
    else:
        _walk(model, "", backend, report, {})
    return report


def _walk(
    parent: nn.Module, prefix: str, backend: str | None, report: Report, met: dict[int, nn.Module | None]
) -> None:
    """Replace children of a module; `met` has what came of modules that were met, which may be shared."""
    for name, child in parent._modules.items():
        if child is None or isinstance(child, (_Accelerated, AdaptiveGraphGRU)):
            continue
        if id(child) not in met:
            kind = _looks_like(child)
            met[id(child)] = kind and _replacement(child, prefix + name, kind, backend, report)
            if met[id(child)] is None and kind != "cell":
                _walk(child, f"{prefix}{name}.", backend, report, met)
        parent._modules[name] = met[id(child)] or child


def _looks_like(module: nn.Module) -> str | None:
    """What a module's children make it look like: a "cell", an "encoder", or None."""
    if all(hasattr(module._modules.get(part), "weights_pool") for part in ("gate", "update")):
        return "cell"
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child)]
    return "encoder" if len(lists) == 1 and all(_looks_like(cell) == "cell" for cell in lists[0]) else None


def _replacement(
    module: nn.Module, name: str, kind: str, backend: str | None, report: Report
) -> nn.Module | None:
    """What computes the same as a module, or None; noted in the report with the reason."""
    try:
        _check_structure(module, kind)
        concat, gates, difference = _convention(module, kind)
    except _Unfit as unfit:
        report.left.append(Left(name, type(module).__name__, str(unfit)))
        return None
    report.replaced.append(Replaced(name, kind, type(module).__name__, concat, gates, difference))
    return (AcceleratedCell if kind == "cell" else AcceleratedEncoder)(module, concat, gates, backend)


def _check_structure(module: nn.Module, kind: str) -> None:
    """Raise _Unfit where parameters, children, hooks or arguments are not those of a cell or an encoder."""
    for name, part in module.named_modules():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(part, kept) for kept in hooks):
            raise _Unfit(f"{name or 'it'} has hooks, which would no longer be called")
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) != 3 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        names = ", ".join(p.name for p in parameters)
        raise _Unfit(f"it is called with ({names}), not with (x, state, node_embeddings)")
    if kind == "encoder":
        children = dict(module.named_children())
        _only(module, {name for name, child in children.items() if isinstance(child, nn.ModuleList)}, set())
        (cells,) = children.values()
        for number, cell in enumerate(cells):
            _check_cell(cell, f"cell {number}: ")
    else:
        _check_cell(module, "")


def _check_cell(cell: nn.Module, where: str) -> None:
    _only(cell, {"gate", "update"}, set(), where)
    for part in (cell.gate, cell.update):
        _only(part, set(), set(POOLS), where)
    gate, update = tuple(cell.gate.weights_pool.shape), tuple(cell.update.weights_pool.shape)
    fits = len(gate) == len(update) == 4 and gate == (*update[:3], 2 * update[3]) and update[2] > update[3]
    fits = fits and tuple(cell.gate.bias_pool.shape) == (gate[0], gate[3])
    fits = fits and tuple(cell.update.bias_pool.shape) == (update[0], update[3])
    if not fits:
        raise _Unfit(f"{where}the shapes of the pools, gate {gate} and update {update}, are not a cell's")


def _only(module: nn.Module, children: set[str], parameters: set[str], where: str = "") -> None:
    """Raise _Unfit where a module has other children, parameters or buffers than these."""
    kind = type(module).__name__
    for expected, found in (
        (children, module._modules),
        (parameters, module._parameters),
        (set(), module._buffers),
    ):
        there = {name for name, value in found.items() if value is not None}
        if there - expected:
            raise _Unfit(f"{where}{kind} also has {', '.join(sorted(there - expected))}")
        if expected - there:
            raise _Unfit(f"{where}{kind} has no {', '.join(sorted(expected - there))} of its own")


def _convention(module: nn.Module, kind: str) -> tuple[str, str, float]:
    """The order of rows and the names of gates with which the fused form computes what a module does.

    Raises:
        _Unfit: with none of them, or the module does not run.
    """
    try:
        module = deepcopy(module).double()
    except Exception as error:
        raise _Unfit(f"a copy of it in float64 could not be made: {error}") from None
    arguments = _arguments(module, kind)
    least = float("inf")
    for concat, gates in product(CONCATS, GATES):
        fused = (AcceleratedCell if kind == "cell" else AcceleratedEncoder)(module, concat, gates, None)
        difference = 0.0
        for training in (True, False):
            module.train(training)
            difference = max(difference, _difference(_numbers(module, arguments), _numbers(fused, arguments)))
        least = min(least, difference)
        if difference <= TOLERANCE:
            return concat, gates, difference
    raise _Unfit(f"it computes something else: outputs or gradients on random input differ by {least:.1e}")


def _arguments(module: nn.Module, kind: str) -> tuple[Tensor, ...]:
    """Random input for a module: (x, state, node_embeddings), all of them differentiable."""
    cells = list(next(module.children())) if kind == "encoder" else [module]
    ce, _, rows, hidden = cells[0].update.weights_pool.shape
    sizes = (getattr(module, name, None) for name in NODES_NAMES)
    nodes = next((size for size in sizes if isinstance(size, int) and size > 0), 5)
    state, x = (2, nodes, hidden), (2, nodes, rows - hidden)
    if kind == "encoder":
        state, x = (len(cells), *state), (2, 3, *x[1:])
    device = cells[0].update.weights_pool.device
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for shape in (x, state, (nodes, ce))
    )


def _numbers(module: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """All outputs and the gradients of all arguments and parameters."""
    values = [*arguments, *module.parameters()]
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            found = module(*arguments)
            outputs = list(_tensors(found))
            total = sum(
                (out * torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)).sum() for out in outputs
            )
            wanted = [value for value in values if value.requires_grad]
            gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise _Unfit(f"it does not run on a small input: {type(error).__name__}: {first}") from None
    return [*outputs, *gradients]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _difference(truth: list[Tensor], found: list[Tensor]) -> float:
    """The largest relative difference; infinite where shapes differ or a number is not finite."""
    if [value.shape for value in truth] != [value.shape for value in found]:
        return float("inf")
    worst = 0.0
    for exact, value in zip(truth, found, strict=True):
        distance = float((value - exact).detach().norm() / exact.detach().norm().clamp(min=1e-12))
        worst = max(worst, distance if distance == distance else float("inf"))
    return worst
