"""Models optimized for inference: the same predictions, kept through saving, loading and exporting."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from aufast import optimize_for_inference
from aufast.models import inference, load_model
from aufast.models.inference import FusedConv, pooled
from aufast.ops.conv3x3 import fused_conv3x3
from tests.models.examples import AAR_NAMES, EACH, inputs, randomize, small

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def settled(name, **options):
    """A model whose running statistics are those of inputs like the ones that `inputs` gives."""
    torch.manual_seed(0)
    model = small(name, **options)
    with torch.no_grad():
        for _ in range(20):
            model(*inputs(model, batch=4))
    return model.eval()


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_predictions_are_the_models(name):
    model = small(name).double().eval()
    randomize(model)
    batch = inputs(model, steps=5, dtype=torch.float64)
    torch.testing.assert_close(optimize_for_inference(model)(*batch), model(*batch))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("aar", {"attention_position": "after_activation"}),
        ("aar", {"last_norm": True, "branch_activation": "gelu"}),
        ("aa", {"branch_norm": False}),
        ("margl", {"regional_norm": False, "regional_activation": "tanh", "graph_normalization": "row"}),
        ("aroi", {"crop_from": "backbone"}),
    ],
    ids=["attention-last", "last-norm", "no-norm", "regional", "crop-from"],
)
@torch.no_grad()
def test_every_option_is_the_models(name, options):
    model = small(name, **options).double().eval()
    randomize(model)
    batch = inputs(model, dtype=torch.float64)
    torch.testing.assert_close(optimize_for_inference(model)(*batch), model(*batch))


@pytest.mark.parametrize(
    ("name", "options", "batch"),
    [
        ("margl", {"backbone_width": 16, "squeeze": 16, "regional_channels": 16, "crop_size": 6}, 4),
        ("aar", {"width": 16}, 2),
    ],
    ids=["margl", "aar"],
)
@torch.no_grad()
def test_convolutions_by_minimal_filtering_give_the_same(name, options, batch, monkeypatch):
    model = small(name, **options).double().eval()
    randomize(model)
    images = inputs(model, batch, dtype=torch.float64)
    served = []

    def counted(x, weight, bias, shortcut=None, *, relu):
        served.append(shortcut is not None)
        return fused_conv3x3(x, weight, bias, shortcut, relu=relu)

    monkeypatch.setattr(inference, "fused_conv3x3", counted)
    torch.testing.assert_close(optimize_for_inference(model)(*images), model(*images))
    assert served.count(False) > 2
    assert served.count(True) > 2 or name == "aar"  # a residual block's second one adds the shortcut


@pytest.mark.parametrize("name", ["margl", "aar"])
@torch.no_grad()
def test_prepacked_convolutions_give_the_same(name):
    model = settled(name)
    batch = inputs(model, batch=1, steps=1)
    fast = optimize_for_inference(model)
    torch.testing.assert_close(
        fast(*batch).logits if name == "aar" else fast(*batch).global_logits,
        model(*batch).logits if name == "aar" else model(*batch).global_logits,
        rtol=1e-4,
        atol=1e-5,
    )
    # Packed for one image, and read again with others.
    batch = inputs(model, batch=3)
    torch.testing.assert_close(fast(*batch).probabilities, model(*batch).probabilities, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_bfloat16_stays_near(name):
    model = settled(name)
    batch = inputs(model)
    found = optimize_for_inference(model, torch.bfloat16)(*batch)
    assert found.probabilities.dtype == torch.float32
    near = 0.01 if name in AAR_NAMES else 0.03  # MARGL takes the largest of four
    assert (found.probabilities - model(*batch).probabilities).abs().max() < near


@DTYPES
@pytest.mark.parametrize("name", ["margl", "aar", "aa-gsp"])
@torch.no_grad()
def test_it_is_saved_and_loaded(name, dtype, tmp_path):
    fast = optimize_for_inference(settled(name), dtype)
    batch = inputs(fast)
    expected = fast(*batch)
    fast.save_pretrained(tmp_path)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for found in (load_model(tmp_path), copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert found.inference_dtype == dtype
        torch.testing.assert_close(found(*batch), expected)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("margl", torch.float32),
        ("aar", torch.bfloat16),
        pytest.param("margl", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("aar", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.no_grad()
def test_it_exports(name, dtype, tmp_path):
    fast = optimize_for_inference(settled(name), dtype)
    batch = inputs(fast)
    program = torch.export.export(fast, batch)
    kinds = {str(node.target) for node in program.graph.nodes}
    assert any("aufast" in kind for kind in kinds)
    assert not any("mkldnn" in kind for kind in kinds)
    torch.export.save(program, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(*batch)
    # bfloat16 rounds differently where convolution and ReLU are one.
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(found.probabilities, fast(*batch).probabilities, **close)


@torch.no_grad()
def test_loaded_weights_are_packed_anew():
    first, second = settled("aar"), settled("aar")
    randomize(second)
    fast, other = optimize_for_inference(first), optimize_for_inference(second)
    batch = inputs(first)
    fast(*batch)
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(*batch), other(*batch))


@torch.no_grad()
def test_a_new_relation_graph_is_used():
    model = settled("margl").double()
    fast = optimize_for_inference(model)
    batch = inputs(model, dtype=torch.float64)
    before = fast(*batch).levels
    adjacency = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1]])
    model.set_adjacency(adjacency)
    fast.set_adjacency(adjacency)
    torch.testing.assert_close(fast(*batch), model(*batch))
    assert not torch.allclose(fast(*batch).levels, before)


def test_gradients_of_the_input_are_right():
    conv = FusedConv(torch.nn.Conv2d(3, 4, 3, padding=1), relu=True, dtype=torch.float32)
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1).relu()
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (conv(x), expected)))


def test_the_original_still_trains():
    model = small("aar")
    fast = optimize_for_inference(model)
    assert model.training
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    model(*inputs(model)).logits.sum().backward()


def test_auto_takes_what_the_machine_has(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("aufast.models.inference.computes_bfloat16", lambda device, has=has: has)
        assert optimize_for_inference(small("aa"), "auto").inference_dtype == dtype


def test_misuse_is_named():
    fast = optimize_for_inference(small("aa"))
    with pytest.raises(ValueError, match="optimized already"):
        optimize_for_inference(fast)
    with pytest.raises(RuntimeError, match="aa: this model is optimized for inference; train the original"):
        fast.train()
    with pytest.raises(ValueError, match="aa: this model is optimized for inference; ask the original"):
        fast.reference()
    with pytest.raises(TypeError, match="model must be an AAR or MARGL, got Linear"):
        optimize_for_inference(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="dtype must be None, 'auto' or .*, got torch.float16"):
        optimize_for_inference(small("aa"), torch.float16)
    with pytest.raises(TypeError, match="clips must be .*, got torch.float64|model's dtype torch.float32"):
        fast(torch.zeros(1, 1, 3, 32, 32, dtype=torch.float64))


@DTYPES
@pytest.mark.parametrize("name", ["margl", "aar"])
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)], ids=str)
@torch.no_grad()
def test_an_image_that_is_not_finite_has_no_probability(name, value, dtype):
    """Its own only: the others' are what they are without it."""
    model = optimize_for_inference(settled(name), dtype)
    images, *rest = inputs(model, batch=3)
    expected = model(images, *rest).probabilities
    images = images.clone()
    images[1, ..., 0, 0] = value
    found = model(images, *rest).probabilities
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


def test_a_weight_that_is_not_finite_is_refused():
    model = small("margl")
    model.backbone.layer2[0].conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"backbone\.layer2\.0\.conv1\.weight of the model is not finite"):
        optimize_for_inference(model)


@pytest.mark.parametrize("name", ["margl", "aar"])
@torch.inference_mode()
def test_made_and_called_under_inference_mode(name):
    model = small(name)
    fast = optimize_for_inference(model)
    batch = inputs(fast)
    torch.testing.assert_close(
        fast(*batch).probabilities, model.eval()(*batch).probabilities, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_without_indices_is_the_max_pool(dtype):
    x = torch.randn(2, 5, 8, 6).relu().to(dtype, memory_format=torch.channels_last)
    x[0, 0, :4] = 0
    x[1, 2, 3, 3] = torch.inf
    found = pooled(x)
    assert torch.equal(found, torch.nn.functional.max_pool2d(x, 3, 2, 1))
    assert found.is_contiguous(memory_format=torch.channels_last)
