"""ResNet-18 against the published parameter list, and against a plain writing of the network."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from aufast.models import ResNet18
from tests.models.examples import small

# The state dict of torchvision's resnet18: every convolution, the batch normalisation after it, and its
# shape. A fully connected layer `fc` follows.
CONVOLUTIONS = [
    ("conv1", "bn1", (64, 3, 7, 7)),
    ("layer1.0.conv1", "layer1.0.bn1", (64, 64, 3, 3)),
    ("layer1.0.conv2", "layer1.0.bn2", (64, 64, 3, 3)),
    ("layer1.1.conv1", "layer1.1.bn1", (64, 64, 3, 3)),
    ("layer1.1.conv2", "layer1.1.bn2", (64, 64, 3, 3)),
    ("layer2.0.conv1", "layer2.0.bn1", (128, 64, 3, 3)),
    ("layer2.0.conv2", "layer2.0.bn2", (128, 128, 3, 3)),
    ("layer2.0.downsample.0", "layer2.0.downsample.1", (128, 64, 1, 1)),
    ("layer2.1.conv1", "layer2.1.bn1", (128, 128, 3, 3)),
    ("layer2.1.conv2", "layer2.1.bn2", (128, 128, 3, 3)),
    ("layer3.0.conv1", "layer3.0.bn1", (256, 128, 3, 3)),
    ("layer3.0.conv2", "layer3.0.bn2", (256, 256, 3, 3)),
    ("layer3.0.downsample.0", "layer3.0.downsample.1", (256, 128, 1, 1)),
    ("layer3.1.conv1", "layer3.1.bn1", (256, 256, 3, 3)),
    ("layer3.1.conv2", "layer3.1.bn2", (256, 256, 3, 3)),
    ("layer4.0.conv1", "layer4.0.bn1", (512, 256, 3, 3)),
    ("layer4.0.conv2", "layer4.0.bn2", (512, 512, 3, 3)),
    ("layer4.0.downsample.0", "layer4.0.downsample.1", (512, 256, 1, 1)),
    ("layer4.1.conv1", "layer4.1.bn1", (512, 512, 3, 3)),
    ("layer4.1.conv2", "layer4.1.bn2", (512, 512, 3, 3)),
]
STATISTICS = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture
def imagenet():
    """Generated weights with the published names and shapes."""
    state = {}
    for conv, norm, shape in CONVOLUTIONS:
        state[f"{conv}.weight"] = torch.randn(shape) * (2 / (shape[0] * shape[2] * shape[3])) ** 0.5
        for name in STATISTICS:
            state[f"{norm}.{name}"] = 0.5 + torch.rand(shape[0])
        state[f"{norm}.num_batches_tracked"] = torch.tensor(5)
    state["fc.weight"] = torch.randn(1000, 512) * 0.01
    state["fc.bias"] = torch.randn(1000)
    return state


def plain_resnet18(state, images):
    """The network of He et al. from a state dict, in evaluation mode."""

    def norm(x, name):
        weight, bias, mean, variance = (state[f"{name}.{key}"] for key in STATISTICS)
        return F.batch_norm(x, mean, variance, weight, bias)

    x = norm(F.conv2d(images, state["conv1.weight"], stride=2, padding=3), "bn1").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    levels = []
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            shortcut = x
            if stride == 2:
                shortcut = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
                shortcut = norm(shortcut, f"{name}.downsample.1")
            x = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            x = F.conv2d(norm(x, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
            x = (norm(x, f"{name}.bn2") + shortcut).relu()
        levels.append(x)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"]), tuple(levels)


def test_names_and_shapes_are_the_published_ones(imagenet):
    own = ResNet18().state_dict()
    assert len(own) == 122
    assert {key: value.shape for key, value in own.items()} == {
        key: value.shape for key, value in imagenet.items()
    }
    assert sum(value.numel() for value in ResNet18(device="meta").parameters()) == 11_689_512


def test_imagenet_weights_load_strictly_and_compute_the_network(imagenet):
    model = ResNet18().eval()
    model.load_state_dict(imagenet, strict=True)
    images = torch.randn(2, 3, 64, 96)
    logits, levels = plain_resnet18(imagenet, images)
    found = model(images)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-4)
    assert [level.shape[1] for level in found.levels] == [64, 128, 256, 512]
    for level, expected in zip(found.levels, levels, strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_levels_at_the_papers_size():
    levels = ResNet18(device="meta")(torch.empty(1, 3, 192, 192, device="meta")).levels
    assert [tuple(level.shape[1:]) for level in levels[1:]] == [(128, 24, 24), (256, 12, 12), (512, 6, 6)]


def test_load_imagenet_keeps_another_classifier(imagenet):
    model = small("margl").backbone
    fc = model.fc.weight.clone()
    model.load_imagenet(imagenet)
    assert torch.equal(model.fc.weight, fc)
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, imagenet[key])


def test_load_imagenet_takes_a_classifier_that_fits(imagenet):
    model = ResNet18()
    model.load_imagenet(imagenet)
    assert torch.equal(model.fc.weight, imagenet["fc.weight"])


def test_load_imagenet_reads_a_safetensors_file(imagenet, tmp_path):
    save_file(imagenet, tmp_path / "resnet18.safetensors")
    model = ResNet18(12)
    model.load_imagenet(tmp_path / "resnet18.safetensors")
    assert torch.equal(model.conv1.weight, imagenet["conv1.weight"])


@pytest.mark.parametrize("damage", ["cut", "pickle", "missing"])
def test_load_imagenet_names_a_file_it_cannot_read(imagenet, tmp_path, damage):
    path = tmp_path / "resnet18.bin"
    if damage == "pickle":
        torch.save(imagenet, path)
    elif damage == "cut":
        save_file(imagenet, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"resnet18\.bin: cannot be read as ImageNet weights"):
        ResNet18(12).load_imagenet(path)


def test_load_imagenet_accepts_files_without_batch_counts_and_classifier(imagenet):
    kept = {k: v for k, v in imagenet.items() if not k.startswith("fc.") and "num_batches" not in k}
    model = ResNet18(12)
    model.load_imagenet(kept)
    assert torch.equal(model.layer4[1].conv2.weight, imagenet["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer3.0.conv2.weight"), "lack 'layer3.0.conv2.weight'"),
        (lambda s: s.update(extra=torch.ones(1)), "unknown parameter 'extra'"),
        (
            lambda s: s.update({"layer1.0.bn1.bias": torch.ones(3)}),
            r"'layer1.0.bn1.bias' must have shape \(64,\), the ImageNet weights have \(3,\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_load_imagenet_is_strict_about_all_else(imagenet, change, message):
    change(imagenet)
    model = ResNet18(12)
    before = model.conv1.weight.clone()
    with pytest.raises(ValueError, match=message):
        model.load_imagenet(imagenet)
    assert torch.equal(model.conv1.weight, before)
