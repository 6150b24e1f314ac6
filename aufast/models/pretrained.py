"""Model folders: config.json, model.safetensors and the SHA-256 sums of both. Nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from aufast.files import write_whole
from aufast.models.config import build_config
from aufast.models.layout import stack_

FORMAT_VERSION = 1
CONFIG, WEIGHTS, SUMS = "config.json", "model.safetensors", "SHA256SUMS"
INFERENCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """A model that can be saved to a folder and loaded from it.

    Attributes:
        config: the frozen dataclass it was built from.
        config_class: that dataclass.
        variants: the model names that the class builds.
        trained_on: the data sets its weights have seen, the first one first; drawn faces say SYNTHETIC.
        inference_dtype: of a model from `aufast.optimize_for_inference`; None for one that can train.
    """

    config: Any
    config_class: ClassVar[type]
    variants: ClassVar[tuple[str, ...]]
    trained_on: tuple[str, ...] = ()
    inference_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The model's name, as `aufast.models.create_model` takes it."""
        return self.config.variant

    def reference(self: Model) -> Model:
        """The same model in its plain form: a module for every patch, AU branch, region and output.

        It has copies of this model's values and computes the same numbers with PyTorch's own operators, the
        way one would write it down from the paper: what tests and benchmarks compare with. Either form loads
        the other's checkpoints where it is this one that loads.

        Returns:
            A model of the same class, in the same mode, dtype and place.
        """
        from aufast.models.plain import plain_form  # which knows the models, as they do not know it

        if self.inference_dtype is not None:
            raise ValueError(f"{self.name}: this model is optimized for inference; ask the original")
        return plain_form(self)

    def train(self: Model, mode: bool = True) -> Model:
        """As `nn.Module.train`; a model optimized for inference has no training mode to enter."""
        if mode and self.inference_dtype is not None:
            raise RuntimeError(f"{self.name}: this model is optimized for inference; train the original")
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        stack_(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and, last, SHA256SUMS.

        Each file appears whole or not at all. A folder whose writing was interrupted does not match its sums
        and is refused when it is loaded.

        Args:
            folder: made where it does not exist.
        """
        import safetensors.torch

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(self.config)
        config = {"format_version": FORMAT_VERSION, "model": values.pop("variant"), "config": values}
        if self.trained_on:
            config["trained_on"] = list(self.trained_on)
        if self.inference_dtype is not None:
            config["optimized"] = next(k for k, v in INFERENCE_DTYPES.items() if v == self.inference_dtype)
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        files = {
            CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
            WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        }
        files[SUMS] = "".join(
            f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()
        ).encode()
        for name, data in files.items():
            write_whole(folder / name, data)

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | os.PathLike[str]) -> Model:
        """Load a model in evaluation mode, in the dtype it was saved in, on the CPU.

        Args:
            folder: written by `save_pretrained`.

        Raises:
            ValueError: a file is missing, cut short or changed, or does not fit the model; it is named.
        """
        folder = Path(folder)
        content = read_folder(folder)
        if content.name not in cls.variants:
            raise ValueError(
                f"{folder}: holds the model {content.name!r}, which is no {cls.__name__}; "
                "use aufast.models.load_model"
            )
        return build_model(cls, folder, content)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise ValueError(f"{path}: {reason}")


def _read(path: Path) -> bytes:
    if not path.is_file():
        _refuse(path, "no such file; a model folder holds " + ", ".join((CONFIG, WEIGHTS, SUMS)))
    return path.read_bytes()


class Content(NamedTuple):
    """What a model folder holds."""

    name: str
    values: dict[str, Any]  # of the config
    inference_dtype: torch.dtype | None
    trained_on: tuple[str, ...]
    tensors: dict[str, Tensor]


def read_folder(folder: Path) -> Content:
    """Read a model folder and verify its sums before anything in it is looked at.

    Args:
        folder: written by `save_pretrained`.

    Raises:
        ValueError: a file is missing, cut short, changed or of a newer format.
    """
    import safetensors.torch

    sums = _read_sums(folder / SUMS)
    files = {name: _read(folder / name) for name in (CONFIG, WEIGHTS)}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != sums[name]:
            _refuse(folder / name, f"cut short or changed: its SHA-256 is not the one in {SUMS}")
    facts = _parse_config(folder / CONFIG, files[CONFIG])
    try:
        tensors = safetensors.torch.load(files[WEIGHTS])
    except safetensors.SafetensorError as error:
        _refuse(folder / WEIGHTS, f"not a safetensors file: {error}")
    return Content(*facts, tensors)


def _read_sums(path: Path) -> dict[str, str]:
    try:
        lines = _read(path).decode().splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except ValueError as error:
        if not path.is_file():
            raise
        _refuse(path, f"must hold lines of a SHA-256 and a file name: {error}")
    for name in (CONFIG, WEIGHTS):
        if name not in sums:
            _refuse(path, f"holds no sum for {name}")
    return sums


def _parse_config(path: Path, data: bytes) -> tuple[str, dict[str, Any], torch.dtype | None, tuple[str, ...]]:
    try:
        config = json.loads(data)
    except ValueError as error:
        _refuse(path, f"not JSON: {error}")
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        _refuse(path, "holds no format_version")
    if version > FORMAT_VERSION:
        _refuse(path, f"written in format {version}, this aufast reads up to {FORMAT_VERSION}; update aufast")
    for key, kind in (("model", str), ("config", dict)):
        if not isinstance(config.get(key), kind):
            _refuse(path, f"holds no {key!r}")
    optimized = config.get("optimized")
    if optimized not in (None, *INFERENCE_DTYPES):
        _refuse(path, f"'optimized' must be one of {', '.join(INFERENCE_DTYPES)}, got {optimized!r}")
    trained_on = config.get("trained_on", [])
    if not isinstance(trained_on, list) or not all(isinstance(name, str) for name in trained_on):
        _refuse(path, f"'trained_on' must be a list of names, got {trained_on!r}")
    return config["model"], config["config"], INFERENCE_DTYPES.get(optimized), tuple(trained_on)


def build_model(cls: type[Model], folder: Path, content: Content) -> Model:
    """Build a model from what `read_folder` found; it is in evaluation mode.

    Raises:
        ValueError: the config has an unknown key or value, or the tensors do not fit it.
    """
    try:
        config = build_config(cls.config_class, content.name, content.values)
    except ValueError as error:
        _refuse(folder / CONFIG, str(error))
    with torch.device("meta"):
        model = cls(config)
        if content.inference_dtype is not None:
            from aufast.models.inference import optimize_for_inference  # which knows the models

            model = optimize_for_inference(model, content.inference_dtype)
    tensors = content.tensors
    stack_(model, tensors)
    _check_tensors(model, folder / WEIGHTS, tensors)
    # Copies, so that no tensor keeps the bytes of the file alive or starts at an odd address; each in the
    # memory format that the model gives it.
    own = model.state_dict()
    copies = {
        key: torch.empty_like(own[key], dtype=value.dtype, device=value.device).copy_(value)
        for key, value in tensors.items()
    }
    model.load_state_dict(copies, assign=True)
    model.trained_on = content.trained_on
    if content.inference_dtype is not None:
        model.to(memory_format=torch.channels_last)
    return model.eval()


def _check_tensors(model: Pretrained, path: Path, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    for key in sorted(tensors):
        if key not in own:
            _refuse(path, f"unknown tensor {key!r}")
    for key, expected in own.items():
        if key not in tensors:
            _refuse(path, f"tensor {key!r} is missing")
        value = tensors[key]
        if value.shape != expected.shape:
            _refuse(
                path,
                f"tensor {key!r} has shape {tuple(value.shape)}, but {CONFIG} with its "
                f"{len(model.config.aus)} AUs needs {tuple(expected.shape)}",
            )
        if value.is_floating_point() != expected.is_floating_point():
            _refuse(path, f"tensor {key!r} must be {expected.dtype}, got {value.dtype}")
        if not value.isfinite().all():
            _refuse(path, f"tensor {key!r} holds values that are not finite")
