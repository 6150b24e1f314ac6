"""Models by name, and what a configuration refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from aufast.models import AARConfig, MARGLConfig, create_model, list_models, to_input
from aufast.models.config import build_config
from tests.models.examples import NAMES, small

PAPERS = [
    *("resnet18", "roi", "aroi", "maroi", "aroi-intra", "maroi-intra", "margl"),
    *("b-net", "bw-net", "aa", "aa-gsh", "aa-gsp", "aa-gsp-tavg", "aar"),
]


def test_the_fourteen_names():
    assert list_models() == PAPERS


@pytest.mark.parametrize("name", NAMES)
def test_a_model_knows_its_name(name):
    assert small(name).name == name


@pytest.mark.parametrize("cls", [MARGLConfig, AARConfig])
def test_a_config_survives_json(cls):
    config = cls(aus=(2, 7), image_size=64)
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert build_config(cls, values.pop("variant"), values) == config


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("aaar", {}, "unknown model 'aaar'; did you mean .*aar"),
        ("xyz", {}, "unknown model 'xyz'; known are resnet18"),
        ("margl", {"crop_sise": 4}, "margl: unknown config key 'crop_sise'; did you mean crop_size"),
        ("aar", {"squeeze": 4}, "aar: unknown config key 'squeeze'"),
        ("aar", {"variant": "aa"}, "unknown config key 'variant'"),
        ("aar", {"aus": ()}, r"aus must be a non-empty tuple of AU numbers, got \(\)"),
        ("aar", {"aus": "bp4d"}, "aus must be a non-empty tuple of AU numbers, got 'bp4d'"),
        ("aar", {"aus": (1, 3)}, "aus must hold AU numbers of .*, got 3"),
        ("aar", {"aus": ([1],)}, r"aus must hold AU numbers of .*, got \[1\]"),
        ("margl", {"aus": (1, 2, 1)}, "aus must name each AU once"),
        ("aar", {"image_size": 180}, "image_size must be a multiple of 16, got 180"),
        ("margl", {"image_size": 200}, "image_size must be a multiple of 32, got 200"),
        ("margl", {"image_size": 0}, "image_size must be an integer of at least 1, got 0"),
        ("aar", {"width": "8"}, "width must be an integer of at least 1, got '8'"),
        ("aar", {"width": True}, "width must be an integer of at least 1, got True"),
        ("aar", {"graph_layers": 0}, "graph_layers must be an integer of at least 1, got 0"),
        ("aar", {"last_norm": 1}, "last_norm must be true or false, got 1"),
        (
            "aar",
            {"attention_position": "first"},
            "attention_position must be one of before_norm, after_activation",
        ),
        ("margl", {"head": None}, "head must be one of per-au, joint, got None"),
        ("margl", {"roi_sizes": (10, 5)}, r"roi_sizes must be three positive numbers, got \(10, 5\)"),
        ("margl", {"roi_sizes": (10, 5, 0)}, "roi_sizes must be three positive numbers"),
        ("margl", {"pixel_mean": (0.5, 0.5, float("nan"))}, "pixel_mean must be three finite numbers"),
        ("margl", {"scale_bias": float("inf")}, "scale_bias must be a finite number, got inf"),
        ("margl", {"scale_weight_std": -1}, "scale_weight_std must be a finite number of at least 0, got -1"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_names_and_configs_are_named(name, config, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **config)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_to_input_normalises(kind):
    config = MARGLConfig(image_size=32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = to_input(pixels if kind == "numpy" else torch.from_numpy(pixels), config)
    expected = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_to_input_maps_aars_pixels_to_plus_minus_one():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    found = to_input(pixels, AARConfig(image_size=16))
    assert (found[:, :8] == 1).all()
    assert (found[:, 8:] == -1).all()


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (np.zeros((16, 16, 3)), TypeError, "must be an uint8 array or tensor, got torch.float64"),
        ([[0]], TypeError, "must be an uint8 array or tensor, got list"),
        (np.zeros((3, 16, 16), np.uint8), ValueError, r"shape \(..., 16, 16, 3\), got \(3, 16, 16\)"),
    ],
    ids=["float", "list", "channels-first"],
)
def test_to_input_names_bad_pixels(pixels, error, message):
    with pytest.raises(error, match=message):
        to_input(pixels, AARConfig(image_size=16))
