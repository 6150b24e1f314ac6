"""Small models in folders, as `aufast label` takes them. UNTRAINED: their numbers mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.models.examples import randomize, small

for module in ("av", "dlib", "PIL", "skimage"):
    pytest.importorskip(module, reason=f"labelling needs {module}")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small models by name, with weights that make every output depend on its input."""
    folders = {}
    for name in ("aar", "margl"):
        torch.manual_seed(1)
        model = small(name)
        randomize(model)
        folders[name] = str(tmp_path_factory.mktemp("models") / name)
        model.eval().save_pretrained(Path(folders[name]))
    return folders


@pytest.fixture(scope="session", autouse=True)
def _landmark_models_stay() -> Iterator[None]:
    """Every run asks for dlib's predictor, 100 MB of a file; it may serve several runs and threads."""
    import dlib

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dlib, "shape_predictor", lru_cache(maxsize=1)(dlib.shape_predictor))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models run on one thread: waiting for a second one costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
