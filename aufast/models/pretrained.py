"""Model folders: config.json, model.safetensors and the SHA-256 sums of both. Nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from aufast.models.config import build_config

FORMAT_VERSION = 1
CONFIG, WEIGHTS, SUMS = "config.json", "model.safetensors", "SHA256SUMS"

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(nn.Module):
    """A model that can be saved to a folder and loaded from it.

    Attributes:
        config: the frozen dataclass it was built from.
        config_class: that dataclass.
        variants: the model names that the class builds.
    """

    config: Any
    config_class: ClassVar[type]
    variants: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str:
        """The model's name, as `aufast.models.create_model` takes it."""
        return self.config.variant

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and, last, SHA256SUMS.

        Each file appears whole or not at all. A folder whose writing was interrupted does not match its sums
        and is refused when it is loaded.

        Args:
            folder: made where it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(self.config)
        config = {"format_version": FORMAT_VERSION, "model": values.pop("variant"), "config": values}
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        files = {
            CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
            WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        }
        files[SUMS] = "".join(
            f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()
        ).encode()
        for name, data in files.items():
            _write(folder / name, data)

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | os.PathLike[str]) -> Model:
        """Load a model in evaluation mode, in the dtype it was saved in, on the CPU.

        Args:
            folder: written by `save_pretrained`.

        Raises:
            ValueError: a file is missing, cut short or changed, or does not fit the model; it is named.
        """
        folder = Path(folder)
        name, values, tensors = read_folder(folder)
        if name not in cls.variants:
            raise ValueError(
                f"{folder}: holds the model {name!r}, which is no {cls.__name__}; "
                "use aufast.models.load_model"
            )
        return build_model(cls, folder, name, values, tensors)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise ValueError(f"{path}: {reason}")


def _read(path: Path) -> bytes:
    if not path.is_file():
        _refuse(path, "no such file; a model folder holds " + ", ".join((CONFIG, WEIGHTS, SUMS)))
    return path.read_bytes()


def read_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read a model folder and verify its sums before anything in it is looked at.

    Args:
        folder: written by `save_pretrained`.

    Returns:
        The model's name, its config's values, and its tensors.

    Raises:
        ValueError: a file is missing, cut short, changed or of a newer format.
    """
    sums = _read_sums(folder / SUMS)
    files = {name: _read(folder / name) for name in (CONFIG, WEIGHTS)}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != sums[name]:
            _refuse(folder / name, f"cut short or changed: its SHA-256 is not the one in {SUMS}")
    name, values = _parse_config(folder / CONFIG, files[CONFIG])
    try:
        tensors = safetensors.torch.load(files[WEIGHTS])
    except safetensors.SafetensorError as error:
        _refuse(folder / WEIGHTS, f"not a safetensors file: {error}")
    return name, values, tensors


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


def _parse_config(path: Path, data: bytes) -> tuple[str, dict[str, Any]]:
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
    return config["model"], config["config"]


def build_model(
    cls: type[Model], folder: Path, name: str, values: dict[str, Any], tensors: dict[str, Tensor]
) -> Model:
    """Build a model from what `read_folder` found; it is in evaluation mode.

    Raises:
        ValueError: the config has an unknown key or value, or the tensors do not fit it.
    """
    try:
        config = build_config(cls.config_class, name, values)
    except ValueError as error:
        _refuse(folder / CONFIG, str(error))
    with torch.device("meta"):
        model = cls(config)
    _check_tensors(model, folder / WEIGHTS, tensors)
    # Copies, so that no tensor keeps the bytes of the file alive or starts at an odd address.
    model.load_state_dict({key: value.clone() for key, value in tensors.items()}, assign=True)
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
