"""The command line: the demo on a real photograph, and one sentence for each bad input."""

import re

import numpy as np
import pytest

from aufast.cli import main

PICTURES = ("centers", "rois", "attention", "graph")


@pytest.fixture(autouse=True)
def _needs_the_faces_extra():
    for module in ("dlib", "skimage", "matplotlib"):
        pytest.importorskip(module, reason=f"the demo needs {module}")


@pytest.mark.slow
def test_demo_labels_the_photograph(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "pictures")]) == 0
    out = capsys.readouterr().out
    assert out.count("UNTRAINED") == 2
    assert len(re.findall(r"^  \d+ +\S.*0\.\d{3} +0\.\d{3}$", out, re.M)) == 12
    for operator in ("roi_crop", "graph_conv", "graph_gru", "region_conv"):
        line = next(row for row in out.splitlines() if row.strip().startswith(operator))
        assert float(line.split()[-1]) < 1e-4, "fused and reference agree"
    from PIL import Image

    for kind in PICTURES:
        picture = np.asarray(Image.open(tmp_path / "pictures" / f"astronaut-{kind}.png"))
        assert picture.std() > 10, "a picture with something on it"


@pytest.mark.slow
def test_demo_runs_saved_weights(tmp_path, capsys):
    from aufast.models import create_model

    for name in ("margl", "aar"):
        create_model(name).save_pretrained(tmp_path / name)
    assert main(["demo", "--weights", str(tmp_path), "--out", str(tmp_path / "pictures")]) == 0
    assert "UNTRAINED" not in capsys.readouterr().out


def test_an_image_without_a_face_is_named(tmp_path, capsys):
    from PIL import Image

    path = tmp_path / "grey.png"
    Image.new("RGB", (300, 300), (128, 128, 128)).save(path)
    assert main(["demo", str(path), "--out", str(tmp_path / "pictures")]) == 1
    error = capsys.readouterr().err
    assert "grey.png" in error and "face" in error


def test_a_missing_image_is_named(tmp_path, capsys):
    assert main(["demo", str(tmp_path / "nowhere.jpg"), "--out", str(tmp_path)]) == 1
    assert "nowhere.jpg" in capsys.readouterr().err


def test_weights_without_a_model_are_refused(tmp_path, capsys):
    assert main(["demo", "--weights", str(tmp_path), "--out", str(tmp_path / "pictures")]) == 1
    assert "no saved model" in capsys.readouterr().err


def test_backends_lists_each_with_its_state(capsys):
    assert main(["backends"]) == 0
    out = capsys.readouterr().out
    for name in ("reference", "cpu", "cuda", "triton"):
        assert re.search(rf"^{name} +(ready|off): \S", out, re.M)
