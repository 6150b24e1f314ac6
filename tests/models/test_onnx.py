"""Both models as ONNX, through the plain definitions, in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import aufast

pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript: install the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: install the extra `onnx`")

pytestmark = pytest.mark.slow


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    if name == "aar":
        return (torch.randn(1, 2, 3, 176, 176),)
    return torch.randn(1, 3, 192, 192), 60 + 60 * torch.rand(1, 2, 12, 2)


@pytest.mark.parametrize("name", ["margl", "aar"])
def test_onnxruntime_gives_the_same_probabilities(name: str, tmp_path: Path) -> None:
    model, inputs = aufast.models.create_model(name).eval(), inputs_of(name)
    with aufast.use_backend("reference"), torch.no_grad():
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    other = tuple(value + 0.1 for value in inputs)  # nothing of the example is baked in
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for given in (inputs, other):
        with torch.no_grad():
            truth = model(*given).probabilities
        fed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
        found = torch.from_numpy(session.run(None, fed)[0])
        assert truth.std() > 0
        assert (found - truth).abs().max() < 1e-4
