"""Both models end to end: frames, batches, clips, training steps, and their parts, against the plain form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from aufast import optimize_for_inference
from aufast.models import AAR, MARGL, create_model
from aufast.models.layout import separate
from aufast.train import AARWeights, attention_network_loss, margl_loss, occurrence_loss
from benchmarks import memory, peers
from benchmarks.harness import WrongResultError, distance, dtype_name, timed

Inputs = tuple[Tensor, ...]
Work = Callable[[], object]
SECONDS, ROUNDS = 2.0, (5, 200)
NEAR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of a probability, from the plain form in float64
GRADIENTS = 1e-3  # relative RMS from the plain form's


@dataclass(frozen=True)
class Part:
    """What is timed of a model: all of it, or one part whose inputs are ready.

    Attributes:
        operator: "aar" or "margl".
        case: batch and length.
        shape: sizes for people.
        mode: "infer", "train", or the part's name.
        work: model -> the call that is timed.
        dtypes: in which the model is optimized; the plain form stays in float32.
        compiled: whether torch.compile of the plain form is timed too, in the same dtype.
        sizes: batch, and frames of a clip, of a whole model.
    """

    operator: str
    case: str
    shape: str
    mode: str
    work: Callable[[AAR | MARGL], Work]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    compiled: bool = False
    sizes: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Run:
    """One part, dtype and provider: one line of the results."""

    case: Part
    dtype: torch.dtype
    provider: str

    def __str__(self) -> str:
        return (
            f"{self.case.operator}-{self.case.case}-{self.case.mode}-{dtype_name(self.dtype)}-{self.provider}"
        )

    def facts(self) -> dict[str, str | int]:
        """What the table needs beside the time; operations are those of the plain form."""
        part = self.case
        return {
            "operator": part.operator,
            "case": part.case,
            "shape": part.shape,
            "pass": part.mode,
            "dtype": dtype_name(self.dtype),
            "provider": self.provider,
            "flops": flops(part),
            "bytes": 4 * sum(p.numel() for p in plain(part.operator, part.mode).parameters()),
        }


def trained(operator: str) -> AAR | MARGL:
    """The paper's model with weights from a fixed seed and running statistics of the benchmark's inputs."""
    torch.manual_seed(0)
    model = create_model(operator)
    with torch.no_grad():
        for _ in range(3):
            model(*pictures(operator, 4))
    return model


@functools.cache
def plain(operator: str, mode: str) -> AAR | MARGL:
    """The plain form in float32, in the mode that the part needs."""
    return trained(operator).reference().train(mode.startswith("train"))


def pictures(operator: str, batch: int, steps: int = 1) -> Inputs:
    """Images and centres, or clips of `steps` frames."""
    generator = torch.Generator().manual_seed(1)
    if operator == "aar":
        return (torch.randn(batch, steps, 3, 176, 176, generator=generator),)
    return (
        torch.randn(batch, 3, 192, 192, generator=generator),
        torch.rand(batch, 2, 12, 2, generator=generator) * 192,
    )


def whole(batch: int, steps: int, model: AAR | MARGL) -> Work:
    inputs = pictures(model.name, batch, steps)
    return lambda: model(*inputs).probabilities


def stem(model: AAR) -> Work:
    frames = pictures("aar", 1)[0].flatten(0, 1)
    frame = model.frame
    if model.inference_dtype is not None:
        frames = frames.to(frame.dtype, memory_format=torch.channels_last)
        return lambda: frame.region2(frame.region1(frames))
    return lambda: F.max_pool2d(frame.region2(F.max_pool2d(frame.region1(frames), 2)), 2)


def branches(model: AAR) -> Work:
    x = stem(model)()
    return lambda: model.frame.branches(x)[0]


def relations(model: AAR) -> Work:
    features = model.frame(pictures("aar", 1)[0].flatten(0, 1))[0].unflatten(0, (1, 1))
    return lambda: model.head(model._through_time(features, None, None)[0])


def backbone(batch: int, model: MARGL) -> Work:
    images, _ = pictures("margl", batch)
    return lambda: model.backbone(images).logits


def after_backbone(batch: int, model: MARGL) -> Work:
    images, centers = pictures("margl", batch)
    maps = model.backbone(images).levels[1:]
    return lambda: model._relate(model._regions(maps, centers)[0])


def stage1(model: AAR) -> Work:
    frames = pictures("aar", 4)[0].flatten(0, 1)
    labels, targets = torch.ones(4, 12), torch.full((4, 12, 44, 44), 0.1)
    weights = AARWeights.uniform(12)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
    optimizer = torch.optim.SGD(model.frame.parameters(), 0.006, **options)

    def step() -> Tensor:
        _, attention, logits = model.frame(frames)
        return attention_network_loss(logits, attention, targets, labels, weights)

    return training(step, optimizer)


def stage2(model: AAR) -> Work:
    features = torch.randn(8, 48, 12, 96, generator=torch.Generator().manual_seed(1))
    labels, weights = torch.ones(8, 48, 12), AARWeights.uniform(12)
    parameters = [*model.graph.parameters(), *model.head.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.006, fused=True)

    def step() -> Tensor:
        return occurrence_loss(model.head(model._through_time(features, None, None)[0]), labels, weights)

    return training(step, optimizer)


def margl_step(model: MARGL) -> Work:
    inputs = pictures("margl", 8)
    labels, weights = torch.ones(8, 12), torch.ones(12)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=True)

    def step() -> Tensor:
        found = model(*inputs)
        return margl_loss(found.level_logits, found.global_logits, labels, weights)

    return training(step, optimizer)


def training(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Work:
    """A whole step; it returns the gradients it made."""

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return [p.grad for group in optimizer.param_groups for p in group["params"]]

    return step


def infer(operator: str, batch: int, steps: int = 1, compiled: bool = False) -> Part:
    side, name = (
        (176, f"B{batch}" if steps == 1 else f"T{steps}") if operator == "aar" else (192, f"B{batch}")
    )
    shape = f"B={batch} T={steps} 3×{side}²" if operator == "aar" else f"B={batch} 3×{side}²"
    call = functools.partial(whole, batch, steps)
    return Part(operator, name, shape, "infer", call, compiled=compiled, sizes=(batch, steps))


TRAIN = (torch.float32,)
PARTS = [
    infer("aar", 1, compiled=True),
    Part("aar", "B1", "B=1 3×176²", "stem", stem),
    Part("aar", "B1", "B=1 64×44²", "branches", branches),
    Part("aar", "B1", "B=1 12×96", "relations", relations),
    infer("aar", 16),
    infer("aar", 1, 48),
    Part("aar", "stage1", "B=4 3×176²", "train", stage1, TRAIN),
    Part("aar", "stage2", "B=8 T=48 12×96", "train graph", stage2, TRAIN),
    infer("margl", 1, compiled=True),
    Part("margl", "B1", "B=1 3×192²", "backbone", functools.partial(backbone, 1)),
    Part("margl", "B1", "B=1", "after backbone", functools.partial(after_backbone, 1)),
    infer("margl", 16),
    Part("margl", "B16", "B=16", "after backbone", functools.partial(after_backbone, 16)),
    Part("margl", "B8", "B=8 3×192²", "train", margl_step, TRAIN),
]
RUNS = [
    Run(part, dtype, provider)
    for part in PARTS
    for dtype in part.dtypes
    for provider in ("reference", *(("compiled",) if part.compiled else ()), "cpu")
]
MEMORY_RUNS = [run for run in RUNS if run.case.mode == "train"]


@functools.cache
def flops(part: Part) -> int:
    """Operations of the plain form, by PyTorch's own count."""
    call = part.work(plain(part.operator, part.mode))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(part.mode.startswith("train")):
        call()
    return counter.get_total_flops()


def work(run: Run) -> Work:
    """The call that is timed, inputs ready."""
    part = run.case
    train = part.mode.startswith("train")
    if run.provider == "cpu":
        model = trained(part.operator)
        model = model if train else optimize_for_inference(model.eval(), run.dtype)
    else:
        model = plain(part.operator, part.mode)
    if run.provider == "compiled":
        return compiled(model, run)
    with torch.set_grad_enabled(train):
        call = part.work(model)
    return call if train else torch.no_grad()(call)


def compiled(model: AAR | MARGL, run: Run) -> Work:
    """The whole plain form compiled, all of it in the run's dtype."""
    inputs = pictures(run.case.operator, *run.case.sizes)
    if run.dtype != torch.float32:
        model = trained(run.case.operator).reference().eval().to(run.dtype)
        inputs = (inputs[0].to(run.dtype), *inputs[1:])
    function = peers.compiled(model)
    return torch.no_grad()(lambda: function(*inputs).probabilities)


@functools.cache
def truth(part: Part) -> Tensor:
    """Probabilities of the plain form in float64."""
    model = trained(part.operator).reference().eval().double()
    inputs = pictures(part.operator, *part.sizes)
    with torch.no_grad():
        return model(*(value.double() for value in inputs)).probabilities


def check(run: Run) -> None:
    """Compare predictions, or all gradients of a training step, with the plain form's.

    Raises:
        WrongResultError: naming the run and its distance.
    """
    part = run.case
    if part.mode == "infer":
        error, limit = float((work(run)().double() - truth(part)).abs().max()), NEAR[run.dtype]
    elif part.mode.startswith("train") and run.provider == "cpu":
        error, limit = distance(*map(torch.cat, changes(part))), GRADIENTS
    else:
        return
    if not error <= limit:
        raise WrongResultError(f"{run}: is {error:.1e} from the plain form, allowed is {limit:g}; not timed")


def changes(part: Part) -> tuple[list[Tensor], list[Tensor]]:
    """How one training step moves every parameter, of the model and of its plain form."""
    model = trained(part.operator)
    other = model.reference()
    before = other.state_dict(keep_vars=True)
    before = {key: value.detach().clone() for key, value in before.items() if value.requires_grad}
    part.work(model)()
    part.work(other)()
    found = separate(model, model.state_dict())
    moved = [
        [(state[key].double() - value).flatten() for key, value in before.items()]
        for state in (found, other.state_dict())
    ]
    return moved[0], moved[1]


def measure(benchmark, run: Run) -> None:
    """Check a run, then time it."""
    benchmark.group = f"{run.case.operator} {run.case.case} {run.case.mode} {dtype_name(run.dtype)}"
    benchmark.extra_info |= run.facts()
    check(run)
    timed(benchmark, work(run), SECONDS, ROUNDS)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_models(benchmark, run: Run) -> None:
    measure(benchmark, run)


@pytest.mark.parametrize("run", MEMORY_RUNS, ids=str)
def test_training_memory(benchmark, run: Run) -> None:
    memory.measure(benchmark, run, f"{run.case.operator} {run.case.case}", "models")
