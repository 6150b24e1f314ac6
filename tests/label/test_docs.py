"""The commands and the code on the pages about labelling."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from aufast import cli
from aufast.label import STATUSES
from aufast.label.tables import SUFFIXES
from tests.label.clips import encode, moving
from tests.models.examples import small

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "labelling.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"\baufast ((?:label|plot) [^\n`]*--model[^\n`]*)")


@pytest.mark.parametrize("command", sorted(set(COMMAND.findall(PAGE) + COMMAND.findall(README))))
def test_commands_are_understood(command: str) -> None:
    words = shlex.split(command.replace("$SLURM_ARRAY_TASK_ID", "0"))
    assert cli._parser().parse_args(words).model == "runs/aar"


def test_the_page_names_every_status_format_and_option() -> None:
    for status in STATUSES:
        assert f"`{status}`" in PAGE
    for name, suffix in SUFFIXES.items():
        assert f"| `{name}`" in PAGE and f"`{suffix}`" in PAGE
    for option in set(re.findall(r"`(--[\w-]+)", PAGE)):
        assert option in cli._parser()._subparsers._group_actions[0].choices["label"].format_help()


@pytest.mark.slow
def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """On the real photograph and a video made of it; the model is UNTRAINED."""
    pytest.importorskip("plotly", reason="the extra `report` is not installed")
    (command,) = COMMAND.findall(README)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.astronaut()).save("photo.jpg")
    encode(Path("clip.mp4"), moving(12))
    small("aar").save_pretrained("runs/aar")
    assert cli.main(shlex.split(command)) == 0
    assert "2 inputs: 2 ok" in capsys.readouterr().out
    kinds = sorted(path.name.partition(".")[2] for path in Path("labels").iterdir())
    assert kinds == ["csv", "csv", "html", "html", "json", "json", "jsonl", "overlay.mp4", "overlay.png"]
