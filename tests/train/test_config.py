"""Recipes say what the papers say, schedules move the rate as written, the command line sets every option."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

import numpy as np
import pytest

from aufast.aus import AU_SETS
from aufast.train import RECIPES, OptimizerConfig, StageConfig, recipe
from aufast.train.batches import Batches
from aufast.train.run import describe, read_config


@pytest.mark.parametrize("dataset", AU_SETS)
def test_recipes_say_what_the_papers_say(dataset):
    """AAR section IV-A; MARGL section 3.1."""
    run = recipe(f"aar-{dataset}")
    assert run.model.aus == AU_SETS[dataset] and run.model.image_size == run.data.crop[0] == 176
    assert (run.attention_weight, run.delta, run.model.embedding, run.attention.clip) == (2, 3, 8, 48)
    first = run.attention.optimizer
    assert (first.kind, first.lr, first.momentum, first.nesterov, first.weight_decay) == (
        "sgd",
        0.006,
        0.9,
        True,
        5e-4,
    )
    assert [round(first.rate(10 * e, 10, 12) / 0.006, 4) for e in range(6)] == [1, 1, 0.3, 0.3, 0.09, 0.09]
    second = run.graph.optimizer
    assert (second.kind, second.lr, second.betas, second.schedule) == (
        "adam",
        0.006,
        (0.9, 0.999),
        "constant",
    )
    assert run.attention.epochs == run.graph.epochs == 12
    run = recipe(f"margl-{dataset}")
    assert run.model.aus == AU_SETS[dataset] and run.model.image_size == 192 and run.relation_threshold == 0.3
    assert (run.regions.optimizer.kind, run.regions.optimizer.lr) == ("sgd", 0.01)
    split = {"gft": ("groups", "test"), "affwild2": ("groups", "validation")}.get(
        dataset, ("published", "validation")
    )
    assert (run.data.split, run.data.test_group) == split


def test_small_recipes_are_of_the_same_models():
    assert (
        recipe("margl-synthetic").model.variant == "margl" and recipe("aar-synthetic").model.variant == "aar"
    )
    with pytest.raises(ValueError, match="unknown recipe 'margl'; known are margl-bp4d, "):
        recipe("margl")


def test_schedules():
    flat = OptimizerConfig(lr=1.0, warmup=3)
    assert [flat.rate(k, 10, 1) for k in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    cosine = OptimizerConfig(lr=2.0, schedule="cosine")
    rates = [cosine.rate(k, 5, 2) for k in range(10)]
    assert rates[0] == 2 and rates[5] == pytest.approx(1) and rates == sorted(rates, reverse=True)
    assert rates[9] < 0.1
    with pytest.raises(ValueError, match="optimizer.lr must be a positive number, got 0"):
        OptimizerConfig(lr=0)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 1, got 0"):
        StageConfig(epochs=0)


@pytest.mark.parametrize("name", RECIPES)
def test_settings_come_back_from_their_file(tmp_path, name):
    import json

    (tmp_path / "config.json").write_text(json.dumps(describe(RECIPES[name])))
    assert read_config(tmp_path) == RECIPES[name]


def test_settings_that_are_damaged_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"format_version": 1, "system": "margl"}')
    with pytest.raises(ValueError, match="config.json: damaged"):
        read_config(tmp_path)


def also():
    parser = argparse.ArgumentParser(prog="aufast train margl", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    parser.add_argument("--out", default="run")
    return parser


def parse(*words, system="margl"):
    pytest.importorskip("jsonargparse", reason="reads the options")
    from aufast.train.options import parse_run

    return parse_run(system, words, also())[0]


def test_the_command_line_changes_a_recipe():
    run = parse(
        "--config", "margl-bp4d", "--data.root", "x", "--regions.optimizer.lr", "0.5", "--data.crop", "[3,4]"
    )
    base = recipe("margl-bp4d")
    stage = replace(base.regions, optimizer=replace(base.regions.optimizer, lr=0.5))
    assert run == replace(base, data=replace(base.data, root="x", crop=(3, 4)), regions=stage)
    assert parse("--config", "aar-disfa", system="aar") == recipe("aar-disfa")


def test_a_file_sets_what_it_names(tmp_path):
    (tmp_path / "mine.yaml").write_text("data:\n  part: 3\nregions:\n  epochs: 7\n  optimizer: {lr: 0.2}\n")
    run = parse("--config", str(tmp_path / "mine.yaml"), "--regions.epochs", "8")
    assert (run.data.part, run.regions.epochs, run.regions.optimizer.lr) == (3, 8, 0.2)
    assert run.model == recipe("margl-bp4d").model


def test_a_file_of_settings_runs_nothing(tmp_path, monkeypatch):
    """Neither a tag that makes an object nor a class whose module would be imported to look at it."""
    (tmp_path / "harm.py").write_text("raise SystemExit('it was imported')\nclass Harm: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for text, message in {
        "data: {class_path: harm.Harm, init_args: {part: 3}}": "a class_path is 'harm.Harm'",
        'data: {"class\\u005fpath": harm.Harm}': "a class_path is 'harm.Harm'",
        "regions: {optimizer: {class_path: harm.Harm}}": "a class_path is 'harm.Harm'",
        'seed: !!python/object/apply:os.system ["exit 3"]': "cannot be read as YAML",
        "seed: [": "cannot be read as YAML",
    }.items():
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            parse("--config", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed:\nlog_every: 3", "seed must be int, got None"),
        ("data: [90, 100]", r"\[90, 100\] is no object of a DataConfig"),
        ("data: {crop: [90]}", "crop"),
        ("data: {crop: }", "crop"),
        ("- seed", "mine.yaml|seed"),
        ("", ""),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, text, message):
    """Found by changed bytes."""
    (tmp_path / "mine.yaml").write_text(text)
    if not text:  # says nothing, and so changes nothing
        assert parse("--config", str(tmp_path / "mine.yaml")) == parse()
        return
    with pytest.raises(ValueError, match=message):
        parse("--config", str(tmp_path / "mine.yaml"))


def test_a_file_that_repeats_itself_ends_in_a_sentence(tmp_path):
    """Nine times nine times … a list: a few hundred bytes that are gigabytes when they are written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 6)]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, "seed: *a5"]))
    with pytest.raises(ValueError) as caught:
        parse("--config", str(tmp_path / "mine.yaml"))
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file, and recipes are margl-bp4d"),
        (["--config", "aar-bp4d"], "aar-bp4d is no recipe of margl"),
        (["--data.rot", "x"], "data.rot"),
        (["--regions.epochs", "many"], "regions.epochs"),
        (["--regions.epochs", "0"], "epochs must be an integer of at least 1, got 0"),
        (["--model.aus", "[3]"], r"aus must hold AU numbers"),
        (["--out", ""], "--out: name the folder"),
    ],
)
def test_options_that_cannot_be_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_batches_hold_every_item_once_and_go_on_anywhere():
    whole = Batches(53, 4, 3, 0, 1, seed=5)
    whole.set_epoch(2, 0)
    order = list(whole)
    assert len(order) == len(whole) == 12 and whole.steps == 4
    assert len({item for batch in order for item in batch}) == 48
    rest = Batches(53, 4, 3, 0, 1, seed=5)
    rest.set_epoch(2, 3)
    assert list(rest) == order[9:] and len(rest) == 3
    rest.set_epoch(1, 3)
    assert list(rest) != order[9:]


def test_processes_share_what_one_accumulates():
    alone = Batches(40, 2, 6, 0, 1, seed=0)
    for world in (2, 3, 6):
        several = [list(Batches(40, 2, 6 // world, rank, world, seed=0)) for rank in range(world)]
        dealt = [batch for together in zip(*several, strict=True) for batch in together]
        assert dealt == list(alone)
    assert sorted(np.ravel(list(alone)).tolist()) != list(range(36)), "in random order"


def test_every_field_of_a_run_is_described():
    described = describe(recipe("aar-bp4d"))
    assert asdict(recipe("aar-bp4d")).keys() | {"format_version", "system"} == described.keys()
