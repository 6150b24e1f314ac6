"""The short run of the demo, on sizes that take seconds: tables, curves and pictures of both models."""

from __future__ import annotations

import numpy as np
import pytest

from aufast.data import Recipe
from aufast.models import load_model
from aufast.train.loop import Trainer
from aufast.train.short_run import short_run
from tests.train.runs import MAKERS


def test_it_draws_trains_tests_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="draws pictures")
    from PIL import Image

    from aufast import plot

    runs = tuple(make("", epochs=1) for make in MAKERS.values())
    headings, mark = [], plot.mark_synthetic

    def marked(figure):
        mark(figure)
        headings.append(figure.get_suptitle())

    monkeypatch.setattr(plot, "mark_synthetic", marked)
    said, recipe = [], Recipe(subjects=6, videos=1, frames=24, size=64, seed=3)
    assert short_run(tmp_path, runs=runs, faces=recipe, size=40, workers=1, say=said.append)
    assert sum("SYNTHETIC, part 3" in text for text in said) == 2
    for name in ("margl-rois", "aar-attention", "curves"):
        assert any(f"{name}.png" in text for text in said)
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 10
    assert len(headings) == 3 and all(heading.startswith("SYNTHETIC faces") for heading in headings)
    for name in ("margl", "aar"):
        assert load_model(tmp_path / name / "best").trained_on == ("SYNTHETIC bp4d",)
    monkeypatch.setattr(Trainer, "_step", lambda *a: pytest.fail("nothing is left to train"))
    assert short_run(tmp_path, runs=runs, faces=recipe, size=40, workers=1, say=said.append)
