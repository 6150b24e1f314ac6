"""Weights of one AU set in a model of another: what belongs to a common AU is the same function as before."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from aufast.models import create_model, load_model
from aufast.train import train
from aufast.train.transfer import start_from
from tests.models.examples import inputs, randomize, small
from tests.train.runs import MAKERS

OLD, NEW = (1, 2, 4, 6, 12), (9, 12, 4, 25, 1)  # common: 12, 4, 1, in another order
COMMON = [(NEW.index(au), OLD.index(au)) for au in (1, 4, 12)]


def trained(name, **options):
    model = small(name, aus=OLD, **options)
    randomize(model)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["b-net", "aa", "aar"])
def test_common_aus_of_aar_answer_as_before(name):
    source, model = trained(name).double(), small(name, aus=NEW).eval().double()
    lines = start_from(model, source, shared=True)
    assert lines[0].endswith("AU 12, 4, 1") and lines[1] == "fresh: AU 9, 25"
    (clips,) = inputs(source, dtype=torch.float64)
    found, expected = model(clips), source(clips)
    for new, old in COMMON:
        torch.testing.assert_close(found.frame_logits[..., new], expected.frame_logits[..., old])
        if found.attention is not None:
            torch.testing.assert_close(found.attention[:, :, new], expected.attention[:, :, old])
    if name == "aar":
        for new, old in COMMON:
            for key in ("U", "Q"):
                assert torch.equal(getattr(model.graph[0], key)[new], getattr(source.graph[0], key)[old])
        assert torch.equal(model.graph[1].W_h, source.graph[1].W_h)
        assert torch.equal(model.head.weight[4], source.head.weight[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "roi", "maroi"])
def test_common_aus_of_margl_answer_as_before(name):
    source, model = trained(name).double(), small(name, aus=NEW).eval().double()
    start_from(model, source, shared=True)
    images, centers = inputs(source, dtype=torch.float64)
    moved = torch.rand(2, 2, len(NEW), 2, dtype=torch.float64) * 64
    for new, old in COMMON:
        moved[:, :, new] = centers[:, :, old]
    found, expected = model(images, moved), source(images, centers)
    for new, old in COMMON:
        torch.testing.assert_close(found.global_logits[:, new], expected.global_logits[:, old])
        torch.testing.assert_close(found.level_logits[..., new], expected.level_logits[..., old])


@pytest.mark.parametrize("name", ["margl", "aar"])
def test_the_same_aus_take_everything_and_others_keep_their_own(name):
    source = trained(name)
    model = small(name, aus=OLD)
    assert len(start_from(model, source, shared=False)) == 1
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    other = small(name, aus=NEW)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    start_from(other, source, shared=True)
    after = other.state_dict()
    head = "levels.1.head.weight" if name == "margl" else "frame.head.weight"
    for au in (0, 3):  # AU 9 and AU 25 have no weights to take
        assert torch.equal(after[head][au], before[head][au])
    if name == "margl":
        assert torch.equal(after["adjacency"], before["adjacency"]), "A0 comes from the labels"


def test_a_variant_with_more_parts_keeps_what_the_source_has_not():
    lines = start_from(small("aar", aus=OLD), trained("aa"), shared=False)
    assert "fresh, because the initial weights have none" in lines[-1] and "relations.0" in lines[-1]


@pytest.mark.parametrize(
    ("source", "shared", "message"),
    [
        (("aar", {"aus": OLD}), False, r"initial weights are for AUs \(1, .*initial_aus=shared"),
        (("aar", {"aus": (2, 6)}), True, r"of which the model has none"),
        (("margl", {"aus": NEW}), True, "initial weights are of margl, which is no AAR"),
        (("aar", {"aus": NEW, "width": 3}), True, r"frame\.\S+ has shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(source, shared, message):
    name, options = source
    with pytest.raises(ValueError, match=message):
        start_from(small("aar", aus=NEW), small(name, **options), shared)


def test_a_run_starts_from_them_and_says_which(packed, tmp_path, capsys):
    config = MAKERS["aar"](packed, epochs=1, initial=str(tmp_path / "bp4d"), initial_aus="shared")
    sizes = asdict(config.model)
    initial = create_model(sizes.pop("variant"), **{**sizes, "aus": (10, 9)})
    initial.trained_on = ("gft",)
    initial.save_pretrained(tmp_path / "bp4d")
    assert train(config, tmp_path / "run")
    assert "all that belongs to no AU, and AU 10\nfresh: AU 12, 6" in capsys.readouterr().err
    assert train(config, tmp_path / "run", resume=True)
    assert load_model(tmp_path / "run" / "best").trained_on == ("gft", "SYNTHETIC bp4d")
    refused = MAKERS["aar"](packed, epochs=1, initial=str(tmp_path / "bp4d"))
    with pytest.raises(
        ValueError, match=r"initial weights are for AUs \(10, 9\), the model is for \(12, 6, 10\)"
    ):
        train(refused, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
