"""The layers in other projects' hands: compilers, export, copies, processes, sharing, parametrization."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aufast.nn import AdaptiveGraphGRU, AdaptiveRoi, GraphConv, GraphGRU, RegionLayer, RoiCrop
from tests.groups import group_threads

BOXES = torch.tensor([[[0.5, 1.0, 6.0, 7.0], [1.0, 0.0, 5.0, 3.0]]]).repeat(2, 1, 1)
Make = tuple[Callable[..., nn.Module], Callable[[], tuple[Tensor, ...]]]
LAYERS: dict[str, Make] = {
    "GraphConv": (lambda **o: GraphConv(3, 4, nodes=5, embedding=2, **o), lambda: (torch.randn(2, 5, 3),)),
    "GraphGRU": (lambda **o: GraphGRU(3, 4, nodes=5, embedding=2, **o), lambda: (torch.randn(2, 3, 5, 3),)),
    "AdaptiveGraphGRU": (
        lambda **o: AdaptiveGraphGRU(3, 4, nodes=5, embedding=2, **o),
        lambda: (torch.randn(2, 3, 5, 3),),
    ),
    "RoiCrop": (lambda **o: RoiCrop((2, 3)), lambda: (torch.randn(2, 3, 8, 8), BOXES)),
    "AdaptiveRoi": (lambda **o: AdaptiveRoi(3, 2, 4, (2, 3), **o), lambda: (torch.randn(2, 3, 8, 8), BOXES)),
    "RegionLayer": (lambda **o: RegionLayer(3, 8, **o).eval(), lambda: (torch.randn(2, 3, 16, 16),)),
}
WITH_PARAMETERS = [name for name in LAYERS if name != "RoiCrop"]


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.fixture
def built(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    make, inputs = LAYERS[request.param]
    return make(), inputs()


every = pytest.mark.parametrize("built", LAYERS, indirect=True)
parametrized = pytest.mark.parametrize("built", WITH_PARAMETERS, indirect=True)


@every
def test_autocast_and_bfloat16_stay_near(built) -> None:
    layer, inputs = built
    exact = first(layer(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        near = first(layer(*inputs))
    assert (near.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.slow
@every
def test_compiled_without_a_break(built) -> None:
    layer, inputs = built
    truth = first(layer(*inputs))
    torch._dynamo.reset()
    torch.testing.assert_close(first(torch.compile(layer, fullgraph=True)(*inputs)), truth)


@every
def test_export_round_trip_on_disk(built, tmp_path: Path) -> None:
    layer, inputs = built
    torch.export.save(torch.export.export(layer, inputs), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    torch.testing.assert_close(first(loaded(*inputs)), first(layer(*inputs)))


RUN_PACKAGE = """
import sys, torch, aufast
package, inputs = torch._inductor.aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])
out = package(*inputs)
torch.save(out[0] if isinstance(out, (tuple, list)) else out, sys.argv[3])
"""


@pytest.mark.slow
@every
def test_a_package_ahead_of_time_runs_in_a_fresh_process(built, tmp_path: Path) -> None:
    layer, inputs = built
    package, given, out = (str(tmp_path / name) for name in ("layer.pt2", "inputs.pt", "out.pt"))
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(torch.export.export(layer, inputs), package_path=package)
    torch.save(inputs, given)
    done = subprocess.run(
        [sys.executable, "-c", RUN_PACKAGE, package, given, out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(out), first(layer(*inputs)).detach())


@parametrized
def test_functional_call_and_gradients(built) -> None:
    layer, inputs = built
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    buffers = {name: value.detach() for name, value in layer.named_buffers()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return first(torch.func.functional_call(layer, (values, buffers), inputs)).square().sum()

    found = torch.func.grad(loss)(parameters)
    first(layer(*inputs)).square().sum().backward()
    for name, value in layer.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-5)


@parametrized
def test_copies_are_independent(built) -> None:
    layer, inputs = built
    before = first(layer(*inputs))
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(first(layer(*inputs)), before)
    assert not torch.allclose(first(other(*inputs)), before)


@parametrized
def test_meta_device_then_real(built) -> None:
    layer, inputs = built
    name = type(layer).__name__
    made = LAYERS[name][0](device="meta")
    assert all(value.is_meta for value in made.parameters())
    made = made.to_empty(device="cpu")
    made.reset_parameters()
    assert first(made(*inputs)).isfinite().all()
    made.load_state_dict(layer.state_dict())
    torch.testing.assert_close(first(made(*inputs)), first(layer(*inputs)))
    assert repr(made) == repr(layer)


@parametrized
def test_dtype_argument(built) -> None:
    layer, inputs = built
    made = LAYERS[type(layer).__name__][0](dtype=torch.float64)
    assert {value.dtype for value in made.parameters()} == {torch.float64}
    assert first(made(*(value.double() for value in inputs))).dtype == torch.float64


class Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


@parametrized
def test_parametrized_weights(built) -> None:
    layer, inputs = built
    plain = copy.deepcopy(layer)
    name = max(dict(plain.named_parameters()), key=lambda name: plain.get_parameter(name).numel())
    with torch.no_grad():
        plain.get_parameter(name).div_(2)
    owner, _, own = name.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(owner), own, Halved())
    torch.testing.assert_close(first(layer(*inputs)), first(plain(*inputs)))


@parametrized
def test_shared_weights_gather_both_gradients(built) -> None:
    one, inputs = built
    two = LAYERS[type(one).__name__][0]()
    name, shared = max(one.named_parameters(), key=lambda item: item[1].numel())
    owner, _, own = name.rpartition(".")
    setattr(two.get_submodule(owner), own, shared)
    losses = [first(layer(*inputs)).square().sum() for layer in (one, two)]
    expected = sum(torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in losses)
    sum(losses).backward()
    torch.testing.assert_close(shared.grad, expected)
    both = nn.ModuleList([one, two])
    assert len(list(both.parameters())) == 2 * len(list(one.parameters())) - 1


def in_another_process(layers: dict[str, nn.Module], inputs: dict[str, tuple[Tensor, ...]], results) -> None:
    for name, layer in layers.items():
        results.put((name, first(layer(*inputs[name])).detach().numpy()))


@pytest.mark.slow
def test_the_layers_travel_to_a_spawned_process() -> None:
    layers = {name: make() for name, (make, _) in LAYERS.items()}
    inputs = {name: given() for name, (_, given) in LAYERS.items()}
    context = mp.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=in_another_process, args=(layers, inputs, results))
    process.start()
    found = dict(results.get(timeout=120) for _ in layers)
    process.join()
    for name, layer in layers.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), first(layer(*inputs[name])).detach())


def train_together(rank: int, folder: str) -> None:
    # Wrapping a module imports this; its functions keep a group that is there by then (docs/decisions.md).
    importlib.import_module("torch.distributed.nn.functional")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for name in WITH_PARAMETERS:
        torch.manual_seed(0)
        make, given = LAYERS[name]
        layer, inputs = make(), given()  # two of each input: one for each process
        model = nn.parallel.DistributedDataParallel(layer)
        first(model(*(value[rank::2] for value in inputs))).square().mean().backward()
        assert group_threads()
        if rank == 0:
            alone = copy.deepcopy(layer)
            alone.zero_grad()
            first(alone(*inputs)).square().mean().backward()
            for found, truth in zip(layer.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(found.grad, truth.grad)
    del model
    torch.distributed.destroy_process_group()
    assert not group_threads()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(train_together, (str(tmp_path),), nprocs=2)
