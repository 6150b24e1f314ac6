"""The training loop of both systems: stages, steps, checkpoints, and what is written down."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import aufast
from aufast.data import ClipDataset, Cropping, FrameDataset, gather_labels
from aufast.data.parallel import Progress
from aufast.files import writing
from aufast.models import AAR, MARGL, load_model
from aufast.train.batches import Batches, make_loader, make_split, to_device
from aufast.train.checkpoint import (
    Link,
    Position,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from aufast.train.config import AARRun, MARGLRun, OptimizerConfig, StageConfig
from aufast.train.evaluate import score
from aufast.train.objectives import (
    AttentionObjective,
    GraphObjective,
    Objective,
    RegionObjective,
    set_relations,
    training_weights,
)
from aufast.train.processes import Processes, join
from aufast.train.run import Log, kept, open_run
from aufast.train.transfer import start_from

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# The scale of float16 starts at 2^16 and halves with each step that is left out: after so many in a row the
# scale is below 1, and it is not for the scale that gradients are no numbers.
SKIPS = 20


def train(config: MARGLRun | AARRun, out: str | os.PathLike[str], *, resume: bool = False) -> bool:
    """Train a model, alone or as one of the processes that `torchrun` started.

    Args:
        config: what is trained, on what, and how.
        out: the run's folder; new, or with `resume` one whose run was stopped.
        resume: go on from the last checkpoint, or from the start where there is none. On a CPU with the same
            number of threads the result is bit for bit that of a run that was never stopped.

    Returns:
        True when the run is finished; False when SIGTERM stopped it, after a checkpoint.

    Raises:
        ValueError: bad data or settings, another process is at work on `out`, or a loss that is not finite:
            then nothing of that step is kept, and the sentence names the frames it saw.
        OSError: `out` cannot be written; the last whole checkpoint is kept.
    """
    out = Path(out)
    processes = join(config.device)
    with contextlib.ExitStack() as stack:
        if config.backend:
            stack.enter_context(aufast.use_backend(config.backend))
        trainer = Trainer(config, out, processes)
        if processes.first:
            with writing(out, "nothing was begun"):
                stack.enter_context(open_run(out, config, trainer.split, resume))
        processes.wait()
        stack.enter_context(trainer.listening())
        finished = trainer.fit()
        processes.wait()  # for the last checkpoint, which one process writes
        return finished


class Trainer:
    """One process's part of a run.

    Args:
        config: what is trained, on what, and how.
        out: the run's folder.
        processes: this one among those that train.
    """

    def __init__(self, config: MARGLRun | AARRun, out: Path, processes: Processes):
        self.config, self.out, self.processes = config, out, processes
        self.split = make_split(config.data, config.model.aus)
        torch.manual_seed(config.seed)
        self.model = self._make_model()
        labels, mask = (values[:, self.split.columns] for values in gather_labels(self.split.train))
        self.weights = training_weights(self.model, labels, mask)
        if isinstance(config, MARGLRun):
            set_relations(self.model, labels, mask, config.relation_threshold)
        self.model.to(processes.device)
        self.position = Position()
        self.stop = False
        self.started = time.monotonic()
        self.skipped = 0  # steps left out by the scaler, in a row
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.precision == "float16")
        self.log: Log | None = None

    def _make_model(self) -> MARGL | AAR:
        config = self.config
        model = MARGL(config.model) if isinstance(config, MARGLRun) else AAR(config.model)
        packed = self.split.packed
        model.trained_on = (f"SYNTHETIC {packed.dataset}" if packed.synthetic else packed.dataset,)
        if (self.out / "last").exists():
            return model  # its weights are in the checkpoint
        if isinstance(config, MARGLRun) and config.imagenet:
            model.backbone.load_imagenet(config.imagenet)
        if config.initial:
            initial = load_model(config.initial)
            lines = start_from(model, initial, config.initial_aus == "shared")
            model.trained_on = (*initial.trained_on, *model.trained_on)
            if self.processes.first:
                sys.stderr.write("\n".join([*lines, ""]))
        return model

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Have SIGTERM end the run after the step that is under way."""

        def ask(number: int, frame: object) -> None:
            self.stop = True

        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's, which belongs to whoever called from another
            return
        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def fit(self) -> bool:
        """Run what is left of the run; True when it is finished."""
        moments: dict[str, Tensor] = {}
        if (self.out / "last").exists():
            model, moments, self.position = load_checkpoint(self.out / "last")
            self.model.load_state_dict(model.state_dict())
            self.model.trained_on = model.trained_on
            self.scaler.load_state_dict(self.position.scaler)
        first = self.processes.first
        with Log(self.out, self.position, self.config.tensorboard, first) as self.log:
            stages = list(self.config.stages.items())
            while not self.position.finished:
                name, stage = stages[self.position.stage]
                if not self._fit_stage(name, stage, moments, last=self.position.stage == len(stages) - 1):
                    return False
                moments = {}
        return True

    # ---- one stage -------------------------------------------------------------------------------

    def _fit_stage(self, name: str, stage: StageConfig, moments: dict[str, Tensor], last: bool) -> bool:
        """Run what is left of a stage; False when the run was stopped."""
        objective = self._objective(name)
        parameters = [p for p in objective.parameters() if p.requires_grad]
        optimizer = make_optimizer(stage.optimizer, parameters)
        restore_optimizer(optimizer, moments)
        dataset = self._dataset(stage)
        group = self.processes
        batches = Batches(
            len(dataset), stage.batch, stage.accumulate, group.rank, group.world, self.config.seed
        )
        loader = make_loader(dataset, batches, self.config.data.loaders, group.device)
        wrapped = objective
        if group.world > 1:
            devices = [group.device] if group.device.type == "cuda" else None
            wrapped = DistributedDataParallel(objective, device_ids=devices)
        earlier = sum(s.epochs for s in list(self.config.stages.values())[: self.position.stage])
        while self.position.epoch < stage.epochs:
            epoch = self.position.epoch
            dataset.set_epoch(earlier + epoch)
            batches.set_epoch(earlier + epoch, self.position.batch)
            objective.train()
            if not self._fit_epoch(name, stage, wrapped, optimizer, loader, batches):
                return False
            links = self._validate(name, epoch)
            position = replace(self.position, epoch=epoch + 1, batch=0)
            if epoch + 1 == stage.epochs:  # the next stage has another optimiser and another best
                position = replace(position, stage=position.stage + 1, epoch=0, best=None, finished=last)
                optimizer = make_optimizer(stage.optimizer, parameters)
            self.position = position
            self._save(optimizer, links)
            if position.epoch == 0:
                return True
        raise AssertionError("a stage ends with its last epoch")

    def _fit_epoch(
        self,
        name: str,
        stage: StageConfig,
        wrapped: Objective | DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader,
        batches: Batches,
    ) -> bool:
        """Run what is left of an epoch; False when the run was stopped."""
        epoch, done = self.position.epoch, self.position.batch
        progress = None
        if self.processes.first:
            progress = Progress(f"{name}, epoch {epoch + 1} of {stage.epochs}, steps", batches.steps, done)
        for step_batches in _grouped(loader, stage.accumulate):
            step = epoch * batches.steps + self.position.batch
            rate = stage.optimizer.rate(step, batches.steps, stage.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, norm, stop = self._step(wrapped, optimizer, step_batches)
            self.position = replace(self.position, batch=self.position.batch + 1, step=self.position.step + 1)
            if self.position.step % self.config.log_every == 0:
                values = {"stage": name, "epoch": epoch + 1, "loss": loss, "gradient_norm": norm, "lr": rate}
                seconds = round(time.monotonic() - self.started, 3)
                self.log.write(self.position.step, {**values, "seconds": seconds})
            if progress is not None:
                progress.update(f", loss {loss:.4f}")
            if self.position.batch == batches.steps:
                break  # the checkpoint of the epoch's end follows
            if stop or self._due():
                self._save(optimizer, ("last",))
            if stop:
                return False
        if progress is not None:
            progress.close()
        return True

    def _step(
        self,
        wrapped: Objective | DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        step_batches: list[dict[str, Tensor]],
    ) -> tuple[float, float, bool]:
        """One step of the optimiser: its loss, the gradient's norm, and whether any process shall stop."""
        group, config = self.processes, self.config
        objective = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
        step_batches = [to_device(batch, group.device) for batch in step_batches]
        own = sum(objective.counts(batch) for batch in step_batches)  # (m + 1,)
        totals = group.sum(torch.cat([own, own.new_tensor([self.stop])]))
        counts, stop = totals[:-1], bool(totals[-1])
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for k, batch in enumerate(step_batches):
            waits = k + 1 < len(step_batches) and wrapped is not objective
            with (
                wrapped.no_sync() if waits else contextlib.nullcontext(),
                torch.autocast(
                    group.device.type,
                    PRECISIONS.get(config.precision, torch.bfloat16),
                    enabled=config.precision in PRECISIONS,
                ),
            ):
                part = wrapped(batch, counts)
                # DDP averages over the processes what has to be summed.
                self.scaler.scale(part * group.world).backward()
            losses.append(part.detach().double())
        loss = float(group.sum(torch.stack(losses).sum()))
        self.scaler.unscale_(optimizer)
        norm = float(
            torch.nn.utils.get_total_norm([p.grad for p in objective.parameters() if p.grad is not None])
        )
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        allowed = SKIPS if self.scaler.is_enabled() else 1
        if not math.isfinite(loss) or self.skipped == allowed:
            raise ValueError(self._complaint(loss, norm, losses, step_batches))
        if not self.skipped:  # asked here: the scaler would have a fused first step leave its moments unset
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss, norm, stop

    def _complaint(
        self, loss: float, norm: float, losses: list[Tensor], step_batches: list[dict[str, Tensor]]
    ) -> str:
        """Where a loss or a gradient ceased to be a number: the frames of the batches it came from."""
        bad = [b for b, part in zip(step_batches, losses, strict=True) if not part.isfinite()] or step_batches
        names = []
        for batch in bad:
            for video, frame in zip(batch["video"].tolist(), batch["frame"].tolist(), strict=True):
                packed = self.split.train[video]
                names.append(f"{packed.name} from frame {int(packed.numbers[frame])}")
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        what += f", in {self.skipped} steps in a row" if self.skipped > 1 else ""
        step = self.position.step + 1
        return (
            f"step {step}: {what}; the step is not taken and {self.out / 'last'} is kept. It saw "
            + "; ".join(names)
        )

    # ---- parts of it -----------------------------------------------------------------------------

    def _objective(self, name: str) -> Objective:
        model, columns, config = self.model, self.split.columns, self.config
        if name == "regions":
            return RegionObjective(model, columns, self.weights)
        if name == "attention":
            return AttentionObjective(model, columns, self.weights, config.attention_weight, config.delta)
        return GraphObjective(model, columns, self.weights)

    def _dataset(self, stage: StageConfig) -> FrameDataset | ClipDataset:
        config, videos = self.config, self.split.train
        cropping = Cropping(config.model.image_size, *config.data.crop)
        if isinstance(config, MARGLRun):
            return FrameDataset(videos, cropping, train=True, seed=config.seed)
        return ClipDataset(videos, cropping, train=True, length=stage.clip, seed=config.seed)

    def _validate(self, name: str, epoch: int) -> tuple[Link, ...]:
        """Score the validation videos; the links that the epoch's checkpoint gets."""
        if not self.split.validation:
            return ("last", "best")
        result = score(
            self.model,
            self.split.validation,
            self.split.columns,
            self.processes,
            loaders=min(self.config.data.loaders, 1),
            frames_only=name == "attention",
        ).compute()
        f1 = {str(au): value for au, value in zip(result.aus, result.f1, strict=True) if value == value}
        values = {"stage": name, "epoch": epoch + 1, "validation_f1": result.mean, "f1": f1}
        self.log.write(self.position.step, values)
        if self.processes.first:
            sys.stderr.write(f"{name}, epoch {epoch + 1}: validation F1 {result.mean:.1f}\n")
        best = self.position.best
        if best is not None and not result.mean > best:
            return ("last",)
        self.position = replace(self.position, best=result.mean)
        return ("last", "best")

    def _due(self) -> bool:
        every = self.config.save_every
        return every > 0 and self.position.step % every == 0

    def _save(self, optimizer: torch.optim.Optimizer, links: tuple[Link, ...]) -> None:
        if not self.processes.first:
            return
        with writing(self.out, kept(self.out)):
            self.position = replace(
                self.position, metrics=self.log.sync(), scaler=self.scaler.state_dict(), links=links
            )
            save_checkpoint(self.out, self.model, optimizer_tensors(optimizer), self.position)


def make_optimizer(config: OptimizerConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """SGD or Adam as configured, over these parameters, each updated in one pass over its memory."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.kind == "adam":
        return torch.optim.Adam(parameters, betas=config.betas, **options)
    return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **options)


def _grouped(loader: DataLoader, count: int) -> Iterator[list[dict[str, Tensor]]]:
    """The loader's batches, those of one step together."""
    group = []
    for batch in loader:
        group.append(batch)
        if len(group) == count:
            yield group
            group = []
