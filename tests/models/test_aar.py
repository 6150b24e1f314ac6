"""AAR: branches, pooled convolution, streaming, averages and bad input, each against plain formulas."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from aufast import reference
from aufast.models import load_model
from aufast.models.aar import AARConfig, AUBranches, TapSums, pooled_conv
from aufast.models.single import conv_to_one, taps_to_one
from tests.models.examples import AAR_NAMES, inputs, randomize, small


@pytest.mark.parametrize("size", [(5, 7), (2, 2), (1, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_pooled_conv_is_the_mean_of_the_convolution(size, bias):
    conv = nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=bias, dtype=torch.float64)
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = pooled_conv(ours, conv), conv(theirs).mean((2, 3))
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    parameters = list(conv.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, [ours, *parameters], grad),
        torch.autograd.grad(expected, [theirs, *parameters], grad),
    )


def plain_branch(branches, au, x, config):
    """One AU's branch as five convolutions of its own."""
    width = 12 * config.width
    own = slice(au * width, (au + 1) * width)

    def conv(x, name, rows=own):
        layer = getattr(branches, name)
        return nn.functional.conv2d(x, layer.weight[rows], layer.bias[rows], padding=1)

    def norm(x, name):
        layer = getattr(branches, name)
        statistics = (
            value[own] for value in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        return nn.functional.batch_norm(x, *statistics).relu()

    for index in (1, 2, 3):
        x = norm(conv(x, f"conv{index}"), f"bn{index}")
    attention = 1
    if branches.attention is not None:
        attention = conv(x, "attention", slice(au, au + 1)).sigmoid()
    x = conv(x, "conv4")
    if config.attention_position == "before_norm":
        x = norm(attention * x, "bn4")
    else:
        x = attention * norm(x, "bn4")
    x = conv(x, "conv5")
    if config.last_norm:
        x = norm(x, "bn5")
    return x.mean((2, 3)), attention


@pytest.mark.parametrize(
    "options",
    [{}, {"attention_position": "after_activation"}, {"last_norm": True}, {"variant": "b-net"}],
    ids=["default", "attention-last", "last-norm", "b-net"],
)
def test_branches_are_independent(options):
    config = AARConfig(aus=(1, 4, 12), width=2, **options)
    branches = AUBranches(config, {"dtype": torch.float64}).eval()
    randomize(branches)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    features, attention = branches(x)
    for au in range(3):
        expected, expected_map = plain_branch(branches, au, x, config)
        torch.testing.assert_close(features[:, au], expected)
        if config.variant != "b-net":
            torch.testing.assert_close(attention[:, au : au + 1], expected_map)


@pytest.mark.parametrize("cuts", [(1,), (2, 5), (1, 2, 3, 4, 5, 6), (0, 7)], ids=str)
def test_chunks_with_state_equal_the_whole_clip(cuts):
    model = small("aar").double().eval()
    randomize(model)
    (clips,) = inputs(model, steps=7, dtype=torch.float64)
    whole = model(clips)
    state, chunks = None, []
    for start, stop in zip((0, *cuts), (*cuts, 7), strict=True):
        found = model(clips[:, start:stop], state)
        state = found.state
        chunks.append(found.probabilities)
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole.probabilities)
    torch.testing.assert_close(state, whole.state)


def test_time_matters_to_aar_alone():
    for name in AAR_NAMES:
        model = small(name).double().eval()
        randomize(model)
        (clips,) = inputs(model, steps=4, dtype=torch.float64)
        forwards, backwards = model(clips).probabilities, model(clips.flip(1)).probabilities.flip(1)
        assert torch.allclose(forwards, backwards) == (name != "aar"), name


def test_frame_variants_ignore_the_state():
    state = small("aar").eval()(torch.zeros(1, 2, 3, 32, 32)).state
    model = small("aa-gsp").eval()
    assert model(torch.zeros(1, 2, 3, 32, 32), state).state is None


def test_aar_runs_two_graph_grus_on_the_frames_features():
    model = small("aar").double().eval()
    randomize(model)
    (clips,) = inputs(model, dtype=torch.float64)
    x = torch.stack([model.frame(clips[:, t])[0] for t in range(3)], dim=1)
    for layer in model.graph:
        x, _ = reference.graph_gru(x, layer.U, layer.Q, layer.W_z, layer.W_r, layer.W_h)
    expected = (x * model.head.weight).sum(-1) + model.head.bias
    torch.testing.assert_close(model(clips).logits, expected)


@pytest.mark.parametrize(("name", "layers"), [("aa-gsh", 1), ("aa-gsp", 2)])
def test_spatial_variants_run_their_equation(name, layers):
    model = small(name).double().eval()
    randomize(model)
    (clips,) = inputs(model, dtype=torch.float64)
    x = model.frame(clips.flatten(0, 1))[0]
    assert len(model.graph) == layers
    for layer in model.graph:
        assert (layer.Q is None) == (name == "aa-gsh")
        x = reference.graph_conv(x, layer.U, layer.Q, layer.W)
    expected = (x * model.head.weight).sum(-1) + model.head.bias
    torch.testing.assert_close(model(clips).logits.flatten(0, 1), expected)


def test_temporal_average_is_the_mean_of_the_frames_probabilities():
    model = small("aa-gsp-tavg").eval()
    randomize(model)
    (clips,) = inputs(model)
    found = model(clips)
    expected = found.logits.sigmoid().mean(1)
    for t in range(3):
        torch.testing.assert_close(found.probabilities[:, t], expected)


@pytest.mark.parametrize("name", AAR_NAMES)
def test_clip_without_frames(name):
    model = small(name).eval()
    found = model(torch.zeros(2, 0, 3, 32, 32))
    assert found.probabilities.shape == (2, 0, 3)
    if name == "aar":
        assert all((h == 0).all() for h in found.state)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("aar", {"graph_layers": 3, "graph_bias": True}),
        ("aa-gsp", {"graph_activation": "relu"}),
        ("aa", {"branch_norm": False, "branch_activation": "gelu"}),
    ],
    ids=["layers-bias", "graph-activation", "branch"],
)
def test_every_decision_can_be_changed(name, options):
    model = small(name, **options)
    model(*inputs(model)).logits.sum().backward()
    assert len(model.graph) == {"aar": 3, "aa-gsp": 2, "aa": 0}[name]


def test_frozen_first_stage_gets_no_gradient():
    model = small("aar")
    model.frame.requires_grad_(False).eval()
    model(*inputs(model)).logits.sum().backward()
    assert all(p.grad is None for p in model.frame.parameters())
    assert all(p.grad is not None for p in [*model.graph.parameters(), *model.head.parameters()])


CLIPS = torch.zeros(2, 3, 3, 32, 32)
STATE = (torch.zeros(2, 3, 24),) * 2


@pytest.mark.parametrize(
    ("clips", "state", "error", "message"),
    [
        (CLIPS[0], None, ValueError, r"clips must be .* \(B, T, 3, 32, 32\), got shape \(3, 3, 32, 32\)"),
        (CLIPS[..., :16], None, ValueError, r"got shape \(2, 3, 3, 32, 16\)"),
        (CLIPS.byte(), None, TypeError, "got torch.uint8; scale pixel values"),
        (CLIPS.bfloat16(), None, TypeError, "model's dtype torch.float32, got torch.bfloat16"),
        (CLIPS, STATE[:1], ValueError, "state must be 2 tensors, one a layer, got 1"),
        (CLIPS, STATE[0], ValueError, "state must be 2 tensors, one a layer, got Tensor"),
        (CLIPS[:1], STATE, ValueError, r"state\[0\] must have shape \(1, 3, 24\), got \(2, 3, 24\)"),
    ],
    ids=["rank", "size", "uint8", "dtype", "state-count", "state-tensor", "state-batch"],
)
def test_bad_input_is_named(clips, state, error, message):
    with pytest.raises(error, match=f"^aar: .*{message}"):
        small("aar")(clips, state)


def test_a_patch_of_one_pixel_cannot_train():
    model = small("aar", image_size=16)
    model.eval()(torch.zeros(1, 1, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 2 values per patch and channel, got 1"):
        model.train()(torch.zeros(1, 1, 3, 16, 16))


@pytest.mark.parametrize("name", ["aar", "aa-gsp", "aa-gsp-tavg"])
def test_padded_clips_are_the_clips(name):
    model = small(name).double().eval()
    randomize(model)
    (clips,) = inputs(model, batch=2, steps=5, dtype=torch.float64)
    found = model(clips, lengths=torch.tensor([2, 5]))
    short, whole = model(clips[:1, :2]), model(clips[1:])
    torch.testing.assert_close(found.probabilities[:1, :2], short.probabilities)
    torch.testing.assert_close(found.probabilities[1:], whole.probabilities)
    if name == "aar":
        for state, a, b in zip(found.state, short.state, whole.state, strict=True):
            torch.testing.assert_close(state, torch.cat([a, b]))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1, 2], TypeError, "int64 of shape .2,. on cpu, got list"),
        (torch.ones(2), ValueError, "got torch.float32 of shape .2,. on cpu"),
        (torch.ones(3, dtype=torch.int64), ValueError, "got torch.int64 of shape .3,. on cpu"),
    ],
    ids=["list", "dtype", "shape"],
)
def test_bad_lengths_are_named(lengths, error, message):
    with pytest.raises(
        error, match=f"^aar: lengths must be {message if error is TypeError else '.*' + message}"
    ):
        small("aar")(CLIPS, lengths=lengths)


def kept(model, *arguments):
    """A training step: its gradients, the statistics after it, and the bytes kept for the backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = model(*arguments)
    found.logits.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    return found, gradients, dict(model.state_dict()), sum(storages.values())


def test_gradient_checkpointing_changes_memory_alone():
    plain = small("aar").double()
    randomize(plain)
    sparing = small("aar").double()
    sparing.load_state_dict(plain.state_dict())
    sparing.gradient_checkpointing = True
    batch = inputs(plain, steps=4, dtype=torch.float64)
    *expected, much = kept(plain, *batch)
    *found, little = kept(sparing, *batch)
    torch.testing.assert_close(found, expected)
    assert little < much / 2


TRAIN_A_CLIP = """
import resource, torch
from aufast.models import create_model
found = create_model("aar")(torch.randn(1, 48, 3, 176, 176))
(found.logits.sum() + found.frame_logits.sum() + found.attention.sum()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux alone")
def test_a_clip_of_48_frames_trains_within_24_gb_without_checkpointing():
    run = subprocess.run([sys.executable, "-c", TRAIN_A_CLIP], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 24e9


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_goes_through_the_frame_network(training):
    model = small("aar").double()
    randomize(model)
    model.train(training)
    (clips, *_) = inputs(model, dtype=torch.float64)
    direction, step = torch.randn_like(clips), 1e-7
    with torch.no_grad():
        ahead, behind = (model(clips + sign * step * direction).logits for sign in (1, -1))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(clips, direction)).logits).tangent
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-6)


def test_autocast_trains_near_float32():
    model = small("aar")
    batch = inputs(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    steps = []
    for enabled in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = model(*batch)
        assert found.logits.dtype == torch.float32
        (found.logits.sum() + found.frame_logits.sum()).backward()
        steps.append([found.probabilities.detach(), model.frame.branches.conv2.weight.grad.clone()])
    (exact, gradient), (rounded, rounded_gradient) = steps
    assert (rounded - exact).abs().max() < 0.05
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), rounded_gradient.flatten(), dim=0) > 0.98


def test_the_sums_that_taps_meet_have_derivatives_of_any_order():
    for shape in ((2, 3, 4, 2), (1, 1, 3, 2), (1, 1, 1, 1)):
        pixels = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        ones = torch.ones(shape[3], 1, 3, 3, dtype=torch.float64)
        taps = TapSums.apply(pixels)  # (N, 3, 3, C)
        conv = torch.nn.functional.conv2d(pixels.permute(0, 3, 1, 2), ones, padding=1, groups=shape[3])
        torch.testing.assert_close(taps.sum((1, 2)), conv.sum((2, 3)))
        assert torch.autograd.gradcheck(TapSums.apply, pixels, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(TapSums.apply, pixels)


def test_a_convolution_to_one_channel_is_the_convolution():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    weight, bias = torch.randn(1, 3, 3, 3, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    found = conv_to_one(x, taps_to_one(weight), bias)
    torch.testing.assert_close(found, torch.nn.functional.conv2d(x, weight, bias, padding=1))


def test_loading_keeps_the_branches_memory_format(tmp_path):
    model = small("aa")
    model.save_pretrained(tmp_path)
    for found in (model, load_model(tmp_path)):
        assert found.frame.branches.conv2.weight.is_contiguous(memory_format=torch.channels_last)
