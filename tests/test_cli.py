"""The command line: the demo on a real photograph, and one sentence for each bad input."""

import re

import numpy as np
import pytest

from aufast import demo
from aufast.cli import main
from aufast.faces import align_face
from aufast.faces.images import FORMATS
from aufast.ops.backends import OPERATORS
from tests.models.examples import small

PICTURES = ("centers", "rois", "attention", "graph")


@pytest.fixture(autouse=True)
def _needs_the_faces_extra():
    for module in ("dlib", "skimage", "matplotlib"):
        pytest.importorskip(module, reason=f"the demo needs {module}")


@pytest.fixture
def astronaut():
    from skimage import data

    return data.astronaut()


@pytest.fixture
def small_demo(monkeypatch):
    """`aufast demo` on models that run in milliseconds, without the timings."""
    monkeypatch.setattr(demo, "create_model", small)
    monkeypatch.setattr(demo, "compare_operators", lambda: None)
    return lambda *arguments: main(["demo", *map(str, arguments)])


def save(path, pixels):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pictures(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_demo_labels_the_photograph(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "pictures")]) == 0
    out, err = capsys.readouterr()
    assert out.count("UNTRAINED") == 2
    assert len(re.findall(r"^  \d+ +\S.*0\.\d{3} +0\.\d{3}$", out, re.M)) == 12
    for operator in OPERATORS:
        line = next(row for row in out.splitlines() if row.strip().startswith(operator))
        assert float(line.split()[-1]) < 1e-4, "fused and reference agree"
        assert f"timing {operator} …" in err
    for step in ("loading the face detector", "astronaut: finding the face", "astronaut: MARGL", "drawing"):
        assert f"{step} …" in err, "what takes long says what it does"
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


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnet18", ["attention", "centers", "graph"]),
        ("b-net", ["centers", "graph", "rois"]),
        *(
            pytest.param(name, ["attention", "centers", "graph", "rois"], marks=pytest.mark.slow)
            for name in ("roi", "aa", "aa-gsp")
        ),
    ],
)
def test_weights_of_any_variant_and_aus_are_drawn(tmp_path, capsys, small_demo, name, kinds):
    small(name, aus=(2, 25)).double().save_pretrained(tmp_path / "weights")
    assert small_demo("--weights", tmp_path / "weights", "--out", tmp_path / "pictures") == 0
    assert pictures(tmp_path / "pictures") == [f"astronaut-{kind}.png" for kind in kinds]
    out = capsys.readouterr().out
    assert out.count("UNTRAINED") == 1 and "lips part" in out and "lip corner puller" in out


def test_of_several_faces_the_largest_is_used_and_that_is_said(tmp_path, caplog, small_demo, astronaut):
    pair = save(tmp_path / "pair.png", np.hstack([astronaut, astronaut]))
    assert small_demo(pair, "--out", tmp_path / "pictures") == 0
    assert caplog.messages == [f"{pair} has 2 faces; the largest is used"]


def test_photographs_of_one_name_keep_their_own_pictures(tmp_path, small_demo, astronaut):
    images = [save(tmp_path / folder / "1.png", astronaut) for folder in ("a", "b")]
    assert small_demo(*images, "--out", tmp_path / "pictures") == 0
    names = [f"{stem}-{kind}.png" for stem in ("1", "1-2") for kind in PICTURES]
    assert pictures(tmp_path / "pictures") == sorted(names)


def test_a_bad_image_is_named_and_the_others_are_labelled(
    tmp_path, capsys, monkeypatch, small_demo, astronaut
):
    """No face, nothing readable, and landmarks that cannot be aligned."""
    face = save(tmp_path / "face.png", astronaut)
    grey = save(tmp_path / "grey.png", np.full((300, 300, 3), 128, np.uint8))
    (tmp_path / "text.png").write_text("no photograph")
    odd = save(tmp_path / "odd.png", astronaut[:, :500])

    def align(image, landmarks):
        if image.shape[1] == 500:
            raise ValueError("landmarks of eyes, nose and mouth all lie on one line")
        return align_face(image, landmarks)

    monkeypatch.setattr(demo, "align_face", align)
    assert small_demo(grey, tmp_path / "text.png", odd, face, "--out", tmp_path / "pictures") == 1
    sentences = [row for row in capsys.readouterr().err.splitlines() if row.startswith("aufast demo: ")]
    assert sentences == [
        f"aufast demo: there is no face in {grey}",
        f"aufast demo: cannot read image '{tmp_path / 'text.png'}': it is in none of the formats "
        + ", ".join(FORMATS),
        f"aufast demo: {odd}: landmarks of eyes, nose and mouth all lie on one line",
    ]
    assert pictures(tmp_path / "pictures") == sorted(f"face-{kind}.png" for kind in PICTURES)


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


def test_data_is_synthesized_checked_and_prepared(tmp_path, capsys):
    root, packed = tmp_path / "synthetic", tmp_path / "packed"
    recipe = ["--subjects", "3", "--videos", "1", "--frames", "3", "--seed", "1"]
    assert main(["data", "synthesize", str(root), *recipe]) == 0
    assert main(["data", "check", str(root)]) == 0
    assert main(["data", "prepare", str(root), str(packed)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("SYNTHETIC") and "9 synthetic frames of 3 videos" in out
    from aufast.data import PackedDataset

    assert sum(len(video) for video in PackedDataset(packed, verify=True).videos) == 9


def test_data_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_plots_of_two_images_of_one_name_are_refused(tmp_path, capsys):
    images = [str(tmp_path / folder / "face.png") for folder in "ab"]
    assert main(["plot", *images, "--model", "nobody", "--out", str(tmp_path / "out")]) != 0
    assert "images of one name would overwrite each other's figures: face" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
