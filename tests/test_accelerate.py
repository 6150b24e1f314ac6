"""`accelerate`: what it replaces computes and trains the same, and a look-alike is left with the reason."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aufast
from aufast.accelerate import AcceleratedCell, AcceleratedEncoder
from aufast.nn import AdaptiveGraphGRU
from tests.agcrn_models import Cell, Conv, Encoder, Forecaster, StateFirst, StepByStep


def outputs_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), model.parameters())]


@pytest.mark.parametrize(
    ("make", "name", "kind"),
    [
        (Forecaster, "encoder", AcceleratedEncoder),
        (lambda: Forecaster(order=3, layers=1), "encoder", AcceleratedEncoder),
        (lambda: StepByStep(Cell(7, 1, 4)), "recurrent", AcceleratedCell),
        (lambda: StepByStep(StateFirst(7, 1, 4)), "recurrent", AcceleratedCell),
    ],
    ids=["encoder", "one-layer-order-3", "cell", "state-first"],
)
def test_outputs_and_gradients_stay(make, name: str, kind: type) -> None:
    model = make().double()
    x = torch.randn(2, 5, 7, 1, dtype=torch.float64)
    names = list(model.state_dict())
    truth = outputs_and_gradients(model, x)
    before = list(model.parameters())
    report = aufast.accelerate(model)
    assert [replaced.name for replaced in report.replaced] == [name] and not report.left, report
    assert isinstance(model.get_submodule(name), kind)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    for found, exact in zip(outputs_and_gradients(model, x), truth, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


def test_ten_training_steps_with_the_optimiser_that_was_there() -> None:
    plain = Forecaster().double()
    fused = deepcopy(plain)
    x, target = torch.randn(3, 4, 7, 1).double(), torch.randn(3, 3, 7).double()
    optimisers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (plain, fused)]
    for step in range(10):
        if step == 3:
            assert aufast.accelerate(fused).replaced
        for model, optimiser in zip((plain, fused), optimisers, strict=True):
            optimiser.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimiser.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-9, atol=1e-10)


def test_attributes_and_methods_still_answer_and_copies_work() -> None:
    model = Forecaster()
    x = torch.randn(2, 3, 7, 1)
    aufast.accelerate(model)
    assert model.encoder.num_layers == 2
    assert model.encoder.init_hidden(5).shape == (2, 5, 7, 4)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        model.encoder.nothing_like_this  # noqa: B018
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copy(x), model(x))
        copy.double()
        assert model.encoder.dcrnn_cells[0].gate.weights_pool.dtype == torch.float32
        assert copy(x.double()).dtype == torch.float64


def test_a_checkpoint_of_the_plain_model_loads() -> None:
    plain, fused = Forecaster(), Forecaster()
    aufast.accelerate(fused)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 7, 1)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-6)


class NoRelu(Conv):
    def forward(self, x: Tensor, E: Tensor) -> Tensor:
        A = torch.softmax(E @ E.T, dim=1)
        theta = torch.einsum("nd,dkio->nkio", E, self.weights_pool)
        mixed = torch.stack([x, A @ x], dim=2)
        return torch.einsum("bnki,nkio->bno", mixed, theta) + E @ self.bias_pool


class AnotherGraph(Cell):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.gate = NoRelu(sizes[1] + sizes[2], 2 * sizes[2], 2, 3)


class Dropped(Cell):
    def forward(self, x: Tensor, state: Tensor, node_embeddings: Tensor) -> Tensor:
        return F.dropout(super().forward(x, state, node_embeddings), 0.5, self.training)


class Detached(Cell):
    def forward(self, x: Tensor, state: Tensor, node_embeddings: Tensor) -> Tensor:
        return super().forward(x, state.detach(), node_embeddings)


class Normed(Cell):
    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(sizes[2])


class WithTime(Cell):
    def forward(self, x: Tensor, state: Tensor, node_embeddings: Tensor, time: Tensor) -> Tensor:
        return super().forward(x, state, node_embeddings * time)


def hooked(*sizes: int) -> Cell:
    cell = Cell(*sizes)
    cell.gate.register_forward_hook(lambda *_: None)
    return cell


def misshapen(*sizes: int) -> Cell:
    cell = Cell(*sizes)
    cell.update = Conv(sizes[1] + sizes[2], sizes[2] + 1, 2, 3)
    return cell


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (AnotherGraph, r"it computes something else: outputs or gradients on random input differ by \d"),
        (Dropped, "it computes something else"),
        (Detached, "it computes something else"),
        (Normed, "Normed also has norm"),
        (WithTime, r"it is called with \(x, state, node_embeddings, time\), not with"),
        (hooked, "gate has hooks"),
        (
            misshapen,
            r"the shapes of the pools, gate \(3, 2, 5, 8\) and update \(3, 2, 5, 5\), are not a cell's",
        ),
    ],
    ids=["graph", "dropout", "detach", "norm", "arguments", "hooks", "shapes"],
)
def test_a_look_alike_is_left_with_the_reason(make, reason: str) -> None:
    model = StepByStep(make(7, 1, 4))
    cell = model.recurrent
    report = aufast.accelerate(model)
    assert not report.replaced
    assert model.recurrent is cell
    (left,) = report.left
    assert left.name == "recurrent"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(left.reason)
    assert str(report).startswith("left recurrent (")


def test_an_encoder_that_does_more_has_its_cells_replaced() -> None:
    class Residual(Encoder):
        def forward(self, x: Tensor, init_state: Tensor, node_embeddings: Tensor):
            out, last = super().forward(x, init_state, node_embeddings)
            return out + x, last

    model = Forecaster()
    model.encoder = Residual(7, 1, 4, 2)
    x = torch.randn(2, 3, 7, 1)
    truth = model(x)
    report = aufast.accelerate(model)
    assert [left.name for left in report.left] == ["encoder"]
    assert [r.name for r in report.replaced] == ["encoder.dcrnn_cells.0", "encoder.dcrnn_cells.1"]
    torch.testing.assert_close(model(x), truth, rtol=1e-5, atol=1e-6)


def test_a_shared_cell_stays_shared() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = StepByStep(Cell(7, 1, 4))
            self.second = StepByStep(self.first.recurrent)

    model = Twice()
    report = aufast.accelerate(model)
    assert [r.name for r in report.replaced] == ["first.recurrent"]
    assert model.first.recurrent is model.second.recurrent


def test_the_random_state_and_the_modes_stay() -> None:
    model = StepByStep(Dropped(7, 1, 4)).eval()
    before = torch.get_rng_state()
    aufast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.recurrent.training


def test_a_model_without_cells_and_one_that_is_a_cell() -> None:
    other = nn.Sequential(nn.Linear(2, 2), AdaptiveGraphGRU(1, 4, 7))
    assert str(aufast.accelerate(other)) == "nothing in this model looks like AGCRN's cells"
    report = aufast.accelerate(Cell(7, 1, 4))
    assert "it is the model itself" in report.left[0].reason


def test_a_second_call_finds_nothing_more() -> None:
    model = Forecaster()
    aufast.accelerate(model)
    encoder = model.encoder
    assert not aufast.accelerate(model).replaced
    assert model.encoder is encoder
