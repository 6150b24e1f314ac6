"""The plain form, a module for every patch, branch and region, against the models."""

from __future__ import annotations

import pytest
import torch

from aufast.models import AAR, AARConfig, create_model, layers, load_model
from aufast.models.layout import separate
from aufast.ops.conv3x3 import conv3x3
from tests.models.examples import EACH, inputs, loss, randomize, small


def step(model, batch, labels):
    """One training step: what the model returned and every gradient; parameters and statistics change."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    found = model(*batch)
    loss(model, found, labels).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    optimizer.step()
    return found, gradients


def compare_a_step(model, batch):
    """Outputs, gradients, and parameters and running statistics after the step are the plain form's."""
    plain = model.reference()
    labels = torch.randint(0, 2, plain(*batch).probabilities.shape)
    plain = model.reference()  # the running statistics from before that
    found, gradients = step(model, batch, labels)
    expected, plain_gradients = step(plain, batch, labels)
    torch.testing.assert_close(found, expected)
    whole = {key: torch.zeros(()) for key in model.state_dict()} | gradients
    plain_form = separate(model, whole)
    torch.testing.assert_close({key: plain_form[key] for key in plain_gradients}, plain_gradients)
    torch.testing.assert_close(separate(model, model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("name", EACH)
def test_a_training_step_is_the_plain_forms(name):
    model = small(name).double()
    randomize(model)
    compare_a_step(model, inputs(model, dtype=torch.float64))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bias"])
def test_a_step_by_minimal_filtering_is_the_plain_forms(norm, monkeypatch):
    """Wide enough for it: the backbone's convolutions, and those of the regions."""
    model = small(
        "margl", backbone_width=16, squeeze=16, regional_channels=16, crop_size=6, regional_norm=norm
    ).double()
    randomize(model)
    served = []
    monkeypatch.setattr(layers, "conv3x3", lambda x, weight: served.append(x.shape[1]) or conv3x3(x, weight))
    compare_a_step(model, inputs(model, 4, dtype=torch.float64))
    assert served.count(6) == 6  # the regional networks, two in each of three levels
    assert served.count(1) > 2
    assert not any(isinstance(module, layers.Conv3x3) for module in model.reference().modules())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("aar", {"attention_position": "after_activation"}),
        ("aar", {"last_norm": True, "branch_activation": "gelu"}),
        ("aa", {"branch_norm": False}),
        ("margl", {"regional_norm": False, "regional_activation": "tanh", "head": "joint"}),
        ("aroi", {"crop_from": "backbone"}),
    ],
    ids=["attention-last", "last-norm", "no-norm", "regional", "crop-from"],
)
def test_every_option_is_the_plain_forms(name, options):
    model = small(name, **options).double()
    randomize(model)
    compare_a_step(model, inputs(model, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["margl", "aar"])
def test_a_training_step_of_the_papers_size_is_the_plain_forms(name):
    model = create_model(name).double()
    compare_a_step(model, inputs(model, batch=2 if name == "margl" else 1, steps=2, dtype=torch.float64))


@pytest.mark.parametrize("name", EACH)
def test_either_layout_loads(name, tmp_path):
    model, other = small(name), small(name)
    randomize(model)
    plain = model.reference()
    assert any(key not in model.state_dict() for key in plain.state_dict()) == (name != "resnet18")
    other.load_state_dict(plain.state_dict())
    plain.save_pretrained(tmp_path)
    for found in (other, load_model(tmp_path)):
        torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_model_inside_another_loads_either_layout():
    model, other = torch.nn.ModuleDict({"face": small("aar")}), torch.nn.ModuleDict({"face": small("aar")})
    other.load_state_dict(
        {f"face.{key}": value for key, value in model["face"].reference().state_dict().items()}
    )
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_missing_part_is_named():
    model = small("aar")
    state = dict(model.reference().state_dict())
    del state["frame.branches.1.conv2.weight"]
    with pytest.raises(RuntimeError, match="Missing key.*frame.branches.conv2.weight"):
        model.load_state_dict(state)


def test_the_plain_form_has_a_module_for_everything():
    with torch.device("meta"):
        plain = AAR(AARConfig()).reference()
    convs = [part for part in plain.modules() if isinstance(part, torch.nn.Conv2d)]
    assert len(convs) == 2 * (1 + 64 + 16 + 4) + 12 * 6
    assert all(conv.groups == 1 for conv in convs)


def test_it_keeps_mode_and_values_apart():
    model = small("aar").eval()
    plain = model.reference()
    assert not plain.training
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for key, p in model.named_parameters() if key.endswith("weight"))
