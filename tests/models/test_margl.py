"""MARGL: boxes, regional networks, relation graph, heads and bad input, each against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from aufast.aus import AU_SETS
from aufast.models import MARGL, MARGLConfig, relation_adjacency
from aufast.models.margl import RegionalNetworks
from aufast.ops.conv3x3 import serves
from tests.models.examples import AUS, inputs, randomize, small


def test_initial_boxes_are_the_papers_squares_around_the_centres():
    model = MARGL(MARGLConfig(), device="meta")
    centers = torch.zeros(1, 2, 12, 2)
    centers[0, 0, 3] = torch.tensor([47.5, 95.5])
    centers[0, 1, 3] = torch.tensor([143.5, 79.5])
    boxes = model.initial_rois(centers)
    expected = {0: [1, 7, 11, 17], 1: [0.5, 3.5, 5.5, 8.5], 2: [0.5, 2, 2.5, 4]}
    assert model.level_sizes == (24, 12, 6)
    for level, box in expected.items():
        assert boxes[level].shape == (1, 24, 4)
        assert boxes[level][0, 3].tolist() == box
    assert boxes[0][0, 12 + 3].tolist() == [13, 5, 23, 15]


def test_untrained_boxes_are_the_initial_ones():
    model = small("margl")
    images, centers = inputs(model)
    found = model(images, centers)
    for boxes, initial in zip(found.rois, model.initial_rois(centers), strict=True):
        assert torch.equal(boxes, initial)


def test_fixed_boxes_stay_and_adaptive_ones_move():
    for name, moves in (("roi", False), ("aroi", True)):
        model = small(name)
        randomize(model)
        images, centers = inputs(model)
        assert torch.equal(model(images, centers).rois[0], model.initial_rois(centers)[0]) != moves


def test_single_level_is_a_choice():
    centers = torch.full((1, 2, 3, 2), 31.5)  # the middle of 64 pixels
    sides = {"layer2": 8, "layer3": 4, "layer4": 2}
    for level, side in sides.items():
        model = small("aroi", single_level=level)
        assert model.level_sizes == (side,)
        box = model.initial_rois(centers)[0][0, 0]
        assert ((box[:2] + box[2:]) / 2).tolist() == [side / 2] * 2
        assert model(torch.zeros(1, 3, 64, 64), centers).levels.shape == (1, 1, 3)


def test_regional_networks_are_independent():
    networks = RegionalNetworks(3, 5, 4, True, "relu", {"dtype": torch.float64})
    crops = torch.randn(2, 3, 5, 6, 6, dtype=torch.float64)
    randomize(networks)
    networks.eval()
    for roi in range(3):
        own = slice(4 * roi, 4 * (roi + 1))
        alone = nn.Sequential(
            nn.Conv2d(5, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        ).double()
        with torch.no_grad():
            for mine, theirs in ((0, "conv1"), (3, "conv2")):
                alone[mine].weight.copy_(getattr(networks, theirs).weight[own])
            for mine, theirs in ((1, "bn1"), (4, "bn2")):
                for key in ("weight", "bias", "running_mean", "running_var"):
                    getattr(alone[mine], key).copy_(getattr(getattr(networks, theirs), key)[own])
        expected = alone.eval()(crops[:, roi]).mean((2, 3))
        torch.testing.assert_close(networks(crops)[:, roi], expected)


@pytest.mark.parametrize("channels", [16, 3], ids=["conv3x3", "plain"])
def test_regional_networks_have_all_their_gradients(channels):
    networks = RegionalNetworks(2, channels, channels, True, "tanh", {"dtype": torch.float64}).eval()
    crops = torch.randn(9, 2, channels, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = (networks.conv1.weight, networks.conv2.weight)
    assert serves(crops, weights[0]) == (channels == 16)

    def run(crops, first, second):
        swapped = {"conv1.weight": first, "conv2.weight": second}
        return torch.func.functional_call(networks, swapped, crops)

    inputs = (crops, *weights)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_a_gradient_comes_in_its_weights_own_layout():
    model = small("margl")
    model(*inputs(model)).level_logits.sum().backward()
    for part, layout in (
        (model.backbone.layer2[0].conv1, torch.channels_last),
        (model.levels[0].regional.conv1, torch.contiguous_format),
    ):
        assert part.weight.is_contiguous(memory_format=layout)
        assert part.weight.grad.stride() == part.weight.stride()


A0 = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(("name", "inter"), [("margl", 1), ("maroi-intra", 0)])
def test_multi_level_graph_is_equation_4(name, inter):
    model = small(name)
    model.set_adjacency(A0)
    eye = inter * np.eye(3)
    A = np.block([[A0.numpy() if row == column else eye for column in range(3)] for row in range(3)])
    degree = np.diag(A.sum(1) ** -0.5)
    np.testing.assert_allclose(model.normalized_adjacency(), degree @ A @ degree, rtol=1e-6)
    rows = small(name, graph_normalization="row")
    rows.set_adjacency(A0)
    np.testing.assert_allclose(rows.normalized_adjacency(), A / A.sum(1, keepdims=True), rtol=1e-6)


def test_relations_and_heads_are_the_papers_formulas():
    model = small("margl").double()
    model.set_adjacency(A0)
    randomize(model)
    nodes = torch.randn(2, 2, 3, 3, 8, dtype=torch.float64)  # (B, half, level, AU, c)
    A = model.normalized_adjacency()
    W = model.graph.weights[0]
    halves = [(A @ nodes[:, half].flatten(1, 2) @ W[half]).relu() for half in (0, 1)]  # eq. (5)
    face = (halves[0] + halves[1]) / 2
    for level in range(3):
        head = model.levels[level].head
        for au in range(3):
            expected = face[:, 3 * level + au] @ head.weight[au] + head.bias[au]
            torch.testing.assert_close(model._relate(nodes)[level, :, au], expected)


def test_probability_is_the_largest_of_four():
    model = small("margl")
    found = model(*inputs(model))
    expected = np.maximum(found.global_.detach().numpy(), found.levels.detach().numpy().max(0))
    np.testing.assert_array_equal(found.probabilities.detach(), expected)
    assert torch.equal(found.level_logits.sigmoid(), found.levels)
    assert torch.equal(found.global_logits.sigmoid(), found.global_)


def test_resnet18_needs_no_centres():
    model = small("resnet18")
    found = model(torch.randn(2, 3, 64, 64))
    assert torch.equal(found.probabilities, found.global_)
    assert found.rois == ()


@pytest.mark.parametrize(
    "options",
    [
        {"head": "joint"},
        {"crop_from": "backbone"},
        {"regional_norm": False},
        {"graph_layers": 2, "graph_activation": "leaky_relu"},
        {"scale_weight_std": 0.1, "scale_bias": 0.9},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_decision_can_be_changed(options):
    model = small("margl", **options)
    found = model(*inputs(model))
    found.level_logits.sum().backward()
    assert found.levels.shape == (3, 2, 3)
    assert all(p.grad is not None for p in model.levels.parameters())


def conditional(labels, mask, threshold):
    """Equation (3), one pair after the other."""
    m = labels.shape[1]
    A = np.zeros((m, m))
    for i in range(m):
        for j in range(m):
            frames = mask[:, i] & mask[:, j] & (labels[:, j] == 1)
            A[i, j] = frames.any() and (labels[frames, i] == 1).mean() >= threshold
    return A


@pytest.mark.parametrize("masked", [False, True], ids=["all-coded", "masked"])
def test_relation_adjacency_is_equation_3(masked):
    rng = np.random.default_rng(0)
    for threshold in (0.3, 0.5, 0.6):
        labels = (rng.random((40, 5)) < rng.uniform(0.2, 0.8, 5)).astype(int)
        mask = rng.random((40, 5)) < 0.6 if masked else np.ones((40, 5), bool)
        labels[~mask] = 9
        found = relation_adjacency(
            torch.tensor(labels), torch.tensor(mask), aus=AU_SETS["bp4d"][:5], threshold=threshold
        )
        np.testing.assert_array_equal(found, conditional(labels, mask, threshold))
        assert (found.diagonal() == 1).all()


def test_a_probability_of_exactly_the_threshold_is_an_edge():
    labels = torch.zeros(20, 2, dtype=torch.int64)
    labels[:10, 0] = 1
    labels[:3, 1] = 1
    assert relation_adjacency(labels, aus=(1, 2), threshold=0.3)[1, 0] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: relation_adjacency(torch.tensor([[1, 0], [1, 0]]), aus=(1, 4)),
            "AU 4 never occurs",
        ),
        (lambda: relation_adjacency(torch.tensor([[1, 9]]), aus=(1, 4)), "labels has the value 9 for AU 4"),
        (
            lambda: relation_adjacency(torch.ones(3), aus=(1,)),
            r"labels must be a tensor \(n, 1\), got \(3,\)",
        ),
        (lambda: relation_adjacency([[1]], aus=(1,)), r"labels must be a tensor \(n, 1\), got list"),
        (
            lambda: relation_adjacency(torch.ones(3, 2), aus=(1,)),
            r"labels has shape \(3, 2\), expected \(3, 1\)",
        ),
        (
            lambda: relation_adjacency(torch.ones(3, 1), torch.ones(3, 1), aus=(1,)),
            "mask must be a bool tensor",
        ),
        (lambda: relation_adjacency(torch.ones(3, 1), aus=(1,), threshold=30), "threshold must be in"),
        (lambda: small("margl").set_adjacency(torch.eye(4)), r"must be \(3, 3\), got \(4, 4\)"),
        (lambda: small("margl").set_adjacency(-torch.eye(3)), "at least 0"),
        (
            lambda: small("margl").set_adjacency(torch.diag(torch.tensor([1.0, 0, 1]))),
            "empty row for AU 4",
        ),
        (lambda: small("maroi").set_adjacency(torch.eye(3)), "no relation graph"),
    ],
    ids=[
        "never",
        "code-9",
        "rank",
        "list",
        "columns",
        "mask",
        "threshold",
        "size",
        "negative",
        "empty-row",
        "no-graph",
    ],
)
def test_bad_relations_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


IMAGES, CENTERS = torch.zeros(2, 3, 64, 64), torch.zeros(2, 2, len(AUS), 2)


@pytest.mark.parametrize(
    ("images", "centers", "error", "message"),
    [
        (
            IMAGES[..., :60],
            CENTERS,
            ValueError,
            r"images must be .* \(B, 3, 64, 64\), got shape \(2, 3, 64, 60\)",
        ),
        (IMAGES[0], CENTERS, ValueError, r"images must be .* got shape \(3, 64, 64\)"),
        (IMAGES[:, :1], CENTERS, ValueError, r"got shape \(2, 1, 64, 64\)"),
        (IMAGES.byte(), CENTERS, TypeError, "got torch.uint8; scale pixel values"),
        (IMAGES.double(), CENTERS, TypeError, "model's dtype torch.float32, got torch.float64"),
        (IMAGES.numpy(), CENTERS, TypeError, "got ndarray"),
        (IMAGES.to("meta"), CENTERS, ValueError, "model's device cpu, got meta"),
        (IMAGES, None, TypeError, r"centers must be .* \(2, 2, 3, 2\), got NoneType"),
        (IMAGES, CENTERS[:1], ValueError, r"centers must be .* got shape \(1, 2, 3, 2\)"),
        (IMAGES, CENTERS[:, :, :2], ValueError, r"got shape \(2, 2, 2, 2\)"),
        (IMAGES, CENTERS.long(), TypeError, "centers must be .* got torch.int64"),
        (IMAGES, CENTERS.to("meta"), ValueError, "centers are on meta, but images on cpu"),
    ],
    ids=[
        "size",
        "rank",
        "channels",
        "uint8",
        "dtype",
        "numpy",
        "device",
        "no-centers",
        "batch",
        "aus",
        "int-centers",
        "centers-device",
    ],
)
def test_bad_input_is_named(images, centers, error, message):
    with pytest.raises(error, match=f"^margl: .*{message}"):
        small("margl")(images, centers)
