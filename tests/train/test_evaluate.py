"""Evaluation: every test frame once, folds and their pool, the published rows, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from aufast.data import FOLDS, PackedDataset, fold
from aufast.faces import au_centers
from aufast.models import create_model, load_model, to_input
from aufast.train import F1Frame, ablate, evaluate_runs, published, train
from aufast.train.ablation import structure
from aufast.train.evaluate import score
from aufast.train.processes import Processes
from aufast.train.report import published_tables
from tests.train.runs import AUS, MAKERS

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(packed, tmp_path_factory):
    """A finished run of MARGL for each of two parts."""
    folder = tmp_path_factory.mktemp("runs")
    for part in (1, 3):
        train(MAKERS["margl"](packed, epochs=1, data={"part": part}), folder / str(part))
    return [folder / "1", folder / "3"]


def columns(packed, aus=AUS):
    return torch.tensor([packed.aus.index(au) for au in aus])


@torch.no_grad()
def slow_counts(model, videos, where):
    """Frame by frame, without clips or loaders; AAR video by video."""
    metric = F1Frame(model.config.aus)
    side = model.config.image_size
    for video in videos:
        edge = (video.frames.shape[1] - side) // 2
        images = torch.from_numpy(np.array(video.frames[:, edge : edge + side, edge : edge + side]))
        labels, mask = (torch.from_numpy(a)[:, where] for a in (video.labels, video.mask))
        if model.name in ("margl", "resnet18"):
            points = torch.from_numpy(video.landmarks - edge)
            centers = au_centers(points, model.config.aus, "margl")
            found = [
                model(to_input(images[k : k + 1], model.config), centers[k : k + 1]).probabilities
                for k in range(len(video))
            ]
            metric.update(torch.cat(found), labels, mask)
        else:
            metric.update(model(to_input(images, model.config)[None]).probabilities[0], labels, mask)
    return metric.compute()


@pytest.mark.parametrize("system", MAKERS)
@pytest.mark.parametrize("clip", [5, 48])
def test_every_frame_counts_once(packed, system, clip):
    """AAR carries its state, so any length of clip gives the video's own answers."""
    torch.manual_seed(1)
    data = PackedDataset(packed)
    model = (
        create_model("margl", **_sizes("margl"))
        if system == "margl"
        else create_model("aar", **_sizes("aar"))
    ).eval()
    where = columns(data)
    found = score(model, data.videos, where, ALONE, clip=clip, batch=7).compute()
    expected = slow_counts(model, data.videos, where)
    assert found == expected and sum(found.frames) > 3 * 100
    assert found.frames == tuple(int(sum(v.mask[:, c].sum() for v in data.videos)) for c in where)


def _sizes(system):
    from dataclasses import asdict

    config = asdict(MAKERS[system]("").model)
    config.pop("variant")
    return config


def test_shards_add_up_to_the_whole(packed):
    torch.manual_seed(1)
    data = PackedDataset(packed)
    for system in MAKERS:
        model = create_model(system, **_sizes(system)).eval()
        whole = score(model, data.videos, columns(data), ALONE)
        for world in (2, 5, 8):  # more processes than videos, too
            parts = F1Frame(AUS)
            for rank in range(world):
                process = Processes(rank, world, torch.device("cpu"))
                object.__setattr__(process, "share_buffers", lambda module: None)
                parts.merge(score(model, data.videos, columns(data), process))
            assert parts.compute() == whole.compute()


def test_parts_are_pooled_and_averaged(packed, runs, tmp_path):
    evaluation = evaluate_runs(runs)
    data = PackedDataset(packed)
    metric = F1Frame(AUS)
    for part, run in zip((1, 3), runs, strict=True):
        _, test = fold(data.videos, part, FOLDS["bp4d"])
        result = slow_counts(load_model(run / "best"), test, columns(data))
        assert evaluation.parts[f"part {part}"] == result
        metric._counts += torch.tensor(
            [result.true_positives, result.false_positives, result.false_negatives, result.frames]
        )
    assert evaluation.pooled == metric.compute()
    rows = evaluation.rows()
    assert list(rows) == [
        f"SYNTHETIC, {n}" for n in ("part 1", "part 3", "all parts together", "mean of the parts")
    ]
    means = [rows["SYNTHETIC, part 1"][-1], rows["SYNTHETIC, part 3"][-1]]
    assert rows["SYNTHETIC, mean of the parts"][-1] == pytest.approx(sum(means) / 2)
    evaluation.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["synthetic"] and saved["pooled"]["frames"] == list(evaluation.pooled.frames)
    text = (tmp_path / "evaluation.txt").read_text()
    assert text.startswith("margl on SYNTHETIC faces") and "say nothing about people" in text


def test_published_rows_stand_below_those_of_their_aus():
    names = {t["source"].split(", ")[-1] for t in published_tables("bp4d", published()["aar-2"]["aus"])}
    assert names == {"Table 2", "Table II"}
    assert [t["source"].split(", ")[-1] for t in published_tables("gft", published()["aar-4"]["aus"])] == [
        "Table IV"
    ]
    assert published_tables("bp4d", AUS) == []


def test_an_unfinished_run_is_refused(packed, tmp_path, monkeypatch):
    from aufast.train.loop import Trainer

    inner = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *a: (*inner(self, *a)[:2], True))
    assert not train(MAKERS["margl"](packed), tmp_path / "run")
    with pytest.raises(ValueError, match="run: the run is not finished; go on with it by --resume"):
        evaluate_runs([tmp_path / "run"])


def test_runs_that_do_not_belong_together_are_refused(packed, runs, tmp_path):
    with pytest.raises(ValueError, match="tests part 1, as another of these runs does"):
        evaluate_runs([runs[0], runs[0]])
    other = MAKERS["margl"](packed, epochs=1, model={"variant": "resnet18"})
    train(other, tmp_path / "other")
    with pytest.raises(ValueError, match="they make no table"):
        evaluate_runs([runs[0], tmp_path / "other"])
    with pytest.raises(ValueError, match="not a training run"):
        evaluate_runs([tmp_path])


def test_a_checkpoint_of_other_aus_is_refused(packed, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run, symlinks=True)
    create_model("margl", aus=(1, 2, 4), image_size=32).save_pretrained((run / "best").resolve())
    with pytest.raises(
        ValueError, match=r"best: the checkpoint is for AUs \(1, 2, 4\), the run for \(12, 6, 10\)"
    ):
        evaluate_runs([run])


def test_a_subject_that_was_trained_on_is_refused(packed, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run, symlinks=True)
    about = json.loads((run / "split.json").read_text())
    about["train"].append(about["test"][0])
    (run / "split.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="is in the test data, and the run was trained on it"):
        evaluate_runs([run])


def test_choosing_on_the_test_data_is_said(packed, tmp_path):
    config = MAKERS["aar"](packed, epochs=1, data={"validation": "test"})
    train(config, tmp_path / "run")
    text = evaluate_runs([tmp_path / "run"]).text()
    assert "part 3: the checkpoint was CHOSEN ON THE TEST DATA" in text


@pytest.mark.parametrize("system", MAKERS)
def test_ablation_makes_the_papers_table_and_goes_on(packed, tmp_path, monkeypatch, system):
    baseline = {"margl": "resnet18", "aar": "b-net"}[system]
    config = MAKERS[system](packed, epochs=1)
    text = ablate(config, tmp_path, variants=(baseline, system), parts=(3,), seeds=(0, 1))
    lines = text.splitlines()
    assert lines[0].startswith("SYNTHETIC bp4d") and lines[0].endswith("averaged over 2 seeds")
    saved = json.loads((tmp_path / "ablation.json").read_text())
    for name in (baseline, system):
        (row,) = (line for line in lines if line.startswith(f"SYNTHETIC {name} "))
        means = saved["mean"][name]
        run = tmp_path / name / "part-3-seed-1"
        assert means[1] == evaluate_runs([run]).pooled.mean and len(means) == 2
        assert float(row.split()[-1]) == pytest.approx(sum(means) / 2, abs=0.051)
    assert ("ResNet-18" if system == "margl" else "B-Net") in text.split("published")[1]
    from aufast.train.loop import Trainer

    monkeypatch.setattr(Trainer, "_step", lambda *a: pytest.fail("nothing is left to train"))
    assert ablate(config, tmp_path, variants=(baseline, system), parts=(3,), seeds=(0, 1)) == text


def test_ablation_of_data_with_their_own_split_is_one_part(packed, tmp_path):
    """An AU that nobody coded in the test group has no F1: null in the file, as JSON has no NaN."""
    shutil.copytree(packed, tmp_path / "packed")
    index = json.loads((packed / "index.json").read_text())
    for k, video in enumerate(index["videos"]):
        video["group"] = "test" if k < 2 else "train"
        if k < 2:
            path = tmp_path / "packed" / "videos" / video["name"] / "mask.npy"
            mask = np.load(path)
            mask[:, index["aus"].index(10)] = False
            np.save(path, mask)
    (tmp_path / "packed" / "index.json").write_text(json.dumps(index))
    own = {"split": "groups", "test_group": "test", "part": 1}
    config = MAKERS["margl"](tmp_path / "packed", epochs=1, data=own)
    with pytest.raises(ValueError, match="parts must be one where data.split is groups, got 1, 2"):
        ablate(config, tmp_path / "table", variants=("resnet18",), parts=(1, 2))
    assert ablate(config, tmp_path / "table", variants=("resnet18",))
    assert [run.name for run in (tmp_path / "table" / "resnet18").iterdir()] == ["part-1-seed-0"]
    saved = json.loads((tmp_path / "table" / "ablation.json").read_text(), parse_constant=pytest.fail)
    f1 = dict(zip(saved["aus"], saved["f1"]["resnet18"][0], strict=True))
    assert saved["parts"] == [1] and f1[10] is None and f1[12] is not None


def test_ablation_of_another_system_is_refused(packed, tmp_path):
    with pytest.raises(ValueError, match="variants must be of .*margl, got 'aar'"):
        ablate(MAKERS["margl"](packed), tmp_path, variants=("aar",))


def test_structures_are_those_of_the_papers():
    rows = {line.split()[0]: line.count("x") for line in structure(create_model("margl").variants)[1:]}
    # The ticks of MARGL Table 1; "x" of "resnet18" is none, its name has none.
    assert rows == {
        "resnet18": 0,
        "roi": 1,
        "aroi": 1,
        "maroi": 2,
        "aroi-intra": 2,
        "maroi-intra": 3,
        "margl": 4,
    }
    ticks = {
        line.split()[0]: line.split()[1:].count("x") for line in structure(create_model("aar").variants)[1:]
    }
    assert ticks == {"b-net": 3, "bw-net": 4, "aa": 6, "aa-gsh": 8, "aa-gsp": 8, "aa-gsp-tavg": 9, "aar": 9}


# Printed averages that are not the mean of the printed row, as they stand in the papers.
MISPRINTS = {
    ("aar-2", "DRML"): 47.7,
    ("aar-2", "EAC-Net"): 55.6,
    ("aar-2", "SRERL"): 62.6,
    ("aar-3", "DRML"): 26.1,
    ("aar-3", "EAC-Net"): 48.4,
    ("aar-3", "UGN-B"): 59.4,
    ("aar-3", "Jacob et al."): 61.6,
    ("margl-2", "DRML"): 47.7,
    ("margl-2", "ROI"): 56.3,
    ("margl-3", "DRML"): 26.1,
    ("margl-3", "ROI"): 57.4,
}


def test_published_averages_are_those_of_their_rows():
    """A number misread from the page would show here: all averages but the known misprints fit."""
    found = {}
    for key, table in published().items():
        for name, row in table.get("rows", {}).items() if "aus" in table else ():
            assert len(row) == len(table["aus"]) + 1 and all(0 <= value <= 100 for value in row)
            mean = math.fsum(row[:-1]) / len(table["aus"])
            if abs(mean - row[-1]) > 0.0501:
                found[key, name] = mean
    assert found.keys() == MISPRINTS.keys()
    for key, mean in found.items():
        assert mean == pytest.approx(MISPRINTS[key], abs=0.0501)


def test_published_tables_are_whole():
    tables = published()
    sizes = {key: len(table.get("rows", table.get("average"))) for key, table in tables.items()}
    assert sizes == {
        "margl-1": 7,
        "margl-2": 6,
        "margl-3": 6,
        "aar-2": 17,
        "aar-3": 17,
        "aar-4": 8,
        "aar-5": 5,
        "aar-6": 7,
        "aar-7": 7,
    }
    assert tables["margl-1"]["average"]["MARGL"] == tables["margl-2"]["rows"]["MARGL"][-1] == 66.1
    assert tables["aar-7"]["rows"]["AAR"] == tables["aar-2"]["rows"]["AAR"]
    shared = tables["aar-2"]["rows"].keys() & tables["margl-2"]["rows"].keys()
    assert shared == {"DRML", "DSIN", "SRERL"}
    for name in ("DRML", "DSIN"):
        assert tables["aar-2"]["rows"][name] == tables["margl-2"]["rows"][name]
