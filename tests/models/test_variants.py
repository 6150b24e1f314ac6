"""Every one of the fourteen models: shapes, gradients, overfitting, batches, precision and compilation."""

from __future__ import annotations

import pytest
import torch

from aufast.models import AAR, MARGL, create_model
from tests.models.examples import AUS, EACH, NAMES, inputs, loss, randomize, small

LEVELS = {"resnet18": 0, "roi": 1, "aroi": 1, "aroi-intra": 1, "maroi": 3, "maroi-intra": 3, "margl": 3}
WITHOUT_ATTENTION = ("b-net", "bw-net")


def check_shapes(model, found, batch, steps):
    m, size = len(model.config.aus), model.config.image_size
    if isinstance(model, MARGL):
        levels = LEVELS[model.name]
        assert found.probabilities.shape == found.global_.shape == found.global_logits.shape == (batch, m)
        assert found.levels.shape == found.level_logits.shape == (levels, batch, m)
        assert [boxes.shape for boxes in found.rois] == [(batch, 2 * m, 4)] * levels
    else:
        for field in ("probabilities", "frame_probabilities", "logits", "frame_logits"):
            assert getattr(found, field).shape == (batch, steps, m)
        if model.name in WITHOUT_ATTENTION:
            assert found.attention is None
        else:
            assert model.attention_size == size // 4
            assert found.attention.shape == (batch, steps, m, size // 4, size // 4)
        if model.name == "aar":
            assert [h.shape for h in found.state] == [(batch, m, 12 * model.config.width)] * 2
        else:
            assert found.state is None
    assert ((found.probabilities >= 0) & (found.probabilities <= 1)).all()


def run_both_ways(model, batch, steps):
    found = model(*inputs(model, batch, steps))
    check_shapes(model, found, batch, steps)
    loss(model, found, torch.randint(2, found.probabilities.shape)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # A convolution's bias before batch normalisation has no effect; everything else must learn.
    still = [name for name, p in model.named_parameters() if p.grad.abs().max() == 0]
    assert all(name.endswith("bias") for name in still), still


@pytest.mark.parametrize("name", EACH)
def test_forward_and_backward(name):
    run_both_ways(small(name), batch=2, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_at_the_papers_sizes(name):
    run_both_ways(create_model(name), batch=2, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_when_overfitting_one_batch(name):
    model = small(name)
    batch = inputs(model, batch=4, steps=2)
    labels = torch.randint(2, model(*batch).probabilities.shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(model, model(*batch), labels)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("name", EACH)
def test_a_batch_is_its_members(name):
    model = small(name).double().eval()
    randomize(model)
    batch = inputs(model, batch=3, steps=4, dtype=torch.float64)
    together = model(*batch)
    for index in range(3):
        alone = model(*(tensor[index : index + 1] for tensor in batch))
        torch.testing.assert_close(alone.probabilities[0], together.probabilities[index])
        if isinstance(model, MARGL):
            torch.testing.assert_close(alone.levels[:, 0], together.levels[:, index])
        elif together.attention is not None:
            torch.testing.assert_close(alone.attention[0], together.attention[index])


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_does_not_change_the_model(name):
    model = small(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(*inputs(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name):
    model = small(name).eval()
    check_shapes(model, model(*inputs(model, batch=0, steps=2)), batch=0, steps=2)


@pytest.mark.parametrize("name", EACH)
def test_float64_agrees_with_float32(name):
    model = small(name).eval()
    randomize(model)
    batch = inputs(model)
    expected = model(*batch).probabilities
    found = model.double()(*(tensor.double() for tensor in batch)).probabilities
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EACH)
def test_bfloat16_autocast_stays_near_float32(name):
    model = small(name).eval()
    batch = inputs(model)
    with torch.no_grad():
        expected = model(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(*batch)
    assert found.probabilities.dtype == torch.float32
    assert (found.probabilities - expected.probabilities).abs().max() < 0.02
    if isinstance(model, MARGL):
        assert all(torch.equal(a, b) for a, b in zip(found.rois, expected.rois, strict=True))


@pytest.mark.parametrize("name", EACH)
def test_trains_in_bfloat16_autocast(name):
    model = small(name)
    batch = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*batch)
    loss(model, found, torch.ones(found.probabilities.shape)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["margl", "aar"])
def test_channels_last_gives_the_same_numbers(name):
    model = small(name).eval()
    batch = inputs(model)
    expected = model(*batch).probabilities
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(*batch).probabilities, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["margl", "aar"])
def test_compiles_whole_with_the_same_numbers(name):
    model = small(name).double().eval()
    randomize(model)
    batch = inputs(model, dtype=torch.float64)
    with torch.no_grad():
        expected = model(*batch)
        found = torch.compile(model, fullgraph=True)(*batch)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["margl", "aar"])
def test_trains_compiled_whole_with_the_same_numbers(name, backend):
    model = small(name).double()
    batch = inputs(model, dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def step(run):
        model.load_state_dict(state)
        model.zero_grad()
        found = run(*batch)
        loss(model, found, torch.ones(found.probabilities.shape)).backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
        return found, gradients, {key: value.clone() for key, value in model.state_dict().items()}

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for found, expected in zip(step(compiled), step(model), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_one_au_is_enough(name):
    model = small(name, aus=AUS[:1])
    check_shapes(model, model(*inputs(model)), batch=2, steps=3)


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_follow_the_seed(name):
    torch.manual_seed(7)
    first = small(name).state_dict()
    torch.manual_seed(7)
    second = small(name).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_bw_net_and_b_net_are_the_same_network():
    assert small("b-net").state_dict().keys() == small("bw-net").state_dict().keys()


def test_default_models_are_the_papers():
    assert MARGL().name == "margl"
    assert AAR().name == "aar"
