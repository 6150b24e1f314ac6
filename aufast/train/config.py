"""What a training run is made of, and the recipes by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from aufast.aus import AU_SETS
from aufast.models import AARConfig, MARGLConfig
from aufast.models.aar import VARIANTS


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are moved.

    Args:
        kind: SGD or Adam.
        lr: the learning rate at the start.
        momentum: of SGD.
        nesterov: Nesterov's form of it.
        weight_decay: of both.
        betas: of Adam.
        schedule: "constant"; "step" multiplies the rate every few epochs; "cosine" takes it to 0 by the end.
        step_epochs: epochs between two steps.
        step_factor: of a step.
        warmup: steps over which the rate rises from 0.
    """

    kind: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "step", "cosine"] = "constant"
    step_epochs: int = 2
    step_factor: float = 0.3
    warmup: int = 0

    def __post_init__(self) -> None:
        _at_least("optimizer.step_epochs", self.step_epochs, 1)
        _at_least("optimizer.warmup", self.warmup, 0)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optimizer.lr must be a positive number, got {self.lr}")

    def rate(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The learning rate of `step`, from 0 within a stage of `epochs` with `steps_per_epoch` each."""
        factor = min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "step":
            factor *= self.step_factor ** (step // steps_per_epoch // self.step_epochs)
        elif self.schedule == "cosine":
            factor *= (1 + math.cos(math.pi * step / (steps_per_epoch * epochs))) / 2
        return self.lr * factor


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Args:
        epochs: passes over the training data.
        batch: frames (MARGL) or clips (AAR) that one process sees at once.
        accumulate: such batches whose gradients make one step.
        clip: frames of a clip (AAR).
        optimizer: how weights are moved.
    """

    epochs: int = 12
    batch: int = 32
    accumulate: int = 1
    clip: int = 48
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "clip"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and what is tested.

    Args:
        root: a packed folder, from `aufast data prepare`.
        split: "published" tests one of the parts that papers share (BP4D, DISFA), "subjects" deals subjects
            out into three parts, "groups" takes the data set's own split.
        part: which part is tested, from 1.
        train_group: whose videos are trained on where `split` is "groups".
        test_group: whose videos are tested there.
        validation: what chooses the best checkpoint after each epoch: "none" keeps the last one; "subjects"
            takes `validation_subjects` subjects out of the training data; "test" looks at the test data, as
            is often done, and every report of such a run says so.
        validation_subjects: how many.
        crop: least and greatest side of a training crop in pixels of the packed face.
        loaders: processes that load data; 0 loads in the training process.
    """

    root: str = ""
    split: Literal["published", "subjects", "groups"] = "published"
    part: int = 1
    train_group: str = "train"
    test_group: str = "validation"
    validation: Literal["none", "subjects", "test"] = "none"
    validation_subjects: int = 3
    crop: tuple[int, int] = (184, 200)
    loaders: int = 4

    def __post_init__(self) -> None:
        _at_least("data.loaders", self.loaders, 0)
        _at_least("data.validation_subjects", self.validation_subjects, 1)


@dataclass(frozen=True)
class RunConfig:
    """What both systems' runs share.

    Args:
        data: what is trained on.
        seed: of initial weights, order, crops and mirrors.
        device: "auto" takes a GPU where there is one.
        precision: "float32"; "bfloat16" or "float16" compute under autocast, with weights in float32.
        backend: who computes the operators, as `aufast.use_backend` takes it; empty leaves its choice.
        initial: a folder of `save_pretrained` to start from.
        initial_aus: "same" refuses weights of another AU set; "shared" takes what belongs to AUs of both.
        save_every: steps between two checkpoints within an epoch; 0 saves after epochs only.
        log_every: steps between two lines of metrics.jsonl.
        tensorboard: write TensorBoard's files too.
    """

    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    backend: str = ""
    initial: str = ""
    initial_aus: Literal["same", "shared"] = "same"
    save_every: int = 500
    log_every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _at_least("save_every", self.save_every, 0)
        _at_least("log_every", self.log_every, 1)


@dataclass(frozen=True)
class MARGLRun(RunConfig):
    """A training run of MARGL or one of its variants.

    Args:
        model: what is trained.
        regions: its one stage.
        relation_threshold: of A0, MARGL eq. (3).
        imagenet: a safetensors file with torchvision's ResNet-18 weights to start the backbone from.
    """

    model: MARGLConfig = field(default_factory=MARGLConfig)
    regions: StageConfig = field(default_factory=StageConfig)
    relation_threshold: float = 0.3
    imagenet: str = ""

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages by name, in order."""
        return {"regions": self.regions}


@dataclass(frozen=True)
class AARRun(RunConfig):
    """A training run of AAR or one of its variants.

    Args:
        model: what is trained.
        attention: the first stage, the network that looks at single frames.
        graph: the second, the graph layers over it; variants without a graph have none.
        attention_weight: λa of AAR eq. (6).
        delta: standard deviation of the predefined attention, in cells of its map.
    """

    model: AARConfig = field(default_factory=AARConfig)
    attention: StageConfig = field(default_factory=StageConfig)
    graph: StageConfig = field(default_factory=StageConfig)
    attention_weight: float = 2.0
    delta: float = 3.0

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages by name, in order."""
        stages = {"attention": self.attention}
        if VARIANTS[self.model.variant].graph != "none":
            stages["graph"] = self.graph
        return stages


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _margl(dataset: str, **data: object) -> MARGLRun:
    # MARGL says SGD from 0.01 and nothing else: the rest is AAR's, whose protocol it shares.
    steps = OptimizerConfig(lr=0.01, weight_decay=5e-4, nesterov=True, schedule="step")
    return MARGLRun(
        data=DataConfig(**data),
        model=MARGLConfig(aus=AU_SETS[dataset]),
        regions=StageConfig(epochs=12, batch=32, optimizer=steps),
    )


def _aar(dataset: str, **data: object) -> AARRun:
    # AAR section IV-A. How many clips make a batch is not said.
    steps = OptimizerConfig(lr=0.006, weight_decay=5e-4, nesterov=True, schedule="step")
    adam = OptimizerConfig(kind="adam", lr=0.006)
    return AARRun(
        data=DataConfig(crop=(176, 176), **data),
        model=AARConfig(aus=AU_SETS[dataset]),
        attention=StageConfig(epochs=12, batch=1, optimizer=steps),
        graph=StageConfig(epochs=12, batch=1, optimizer=adam),
    )


def _small_margl() -> MARGLRun:
    """For synthetic faces that were packed at 100 pixels: learns in minutes on two cores."""
    adam = OptimizerConfig(kind="adam", lr=2e-3, schedule="cosine", warmup=20)
    return MARGLRun(
        data=DataConfig(crop=(92, 100), loaders=1),
        model=MARGLConfig(
            image_size=96,
            backbone_width=16,
            roi_sizes=(5, 3, 2),
            crop_size=4,
            squeeze=16,
            regional_channels=16,
            graph_width=16,
        ),
        regions=StageConfig(epochs=6, batch=32, optimizer=adam),
    )


def _small_aar() -> AARRun:
    """The same for AAR."""
    adam = OptimizerConfig(kind="adam", lr=3e-3, schedule="cosine")
    return AARRun(
        data=DataConfig(crop=(96, 96), loaders=1),
        model=AARConfig(image_size=96, width=2, embedding=4),
        attention=StageConfig(epochs=2, batch=32, clip=1, optimizer=adam),
        graph=StageConfig(epochs=1, batch=2, clip=48, optimizer=replace(adam, lr=6e-3)),
    )


_GFT = {"split": "groups", "test_group": "test"}
RECIPES: dict[str, MARGLRun | AARRun] = {
    "margl-bp4d": _margl("bp4d"),
    "margl-disfa": _margl("disfa"),
    "margl-gft": _margl("gft", **_GFT),
    "margl-affwild2": _margl("affwild2", split="groups"),
    "aar-bp4d": _aar("bp4d"),
    "aar-disfa": replace(_aar("disfa"), initial_aus="shared"),
    "aar-gft": _aar("gft", **_GFT),
    "aar-affwild2": _aar("affwild2", split="groups"),
    "margl-synthetic": _small_margl(),
    "aar-synthetic": _small_aar(),
}


def recipe(name: str) -> MARGLRun | AARRun:
    """A training run by its name.

    Args:
        name: of `RECIPES`.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    return RECIPES[name]
