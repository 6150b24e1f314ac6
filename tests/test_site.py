"""The site: pages and code host agree on every link, and every dependency has its licence on a page."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
PAGES += sorted(path for path in (ROOT / "docs").rglob("*.md") if "generated" not in path.parts)
CONTENTS = (ROOT / "docs" / "index.md", ROOT / "docs" / "operators" / "index.md")


def links(page: Path) -> list[str]:
    """Where a page leads to inside the repository, anchors cut off."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [link.partition("#")[0] for link in found if not link.startswith(("http", "#"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    missing = [link for link in links(page) if not (page.parent / link).is_file()]
    assert not missing


def test_every_page_is_in_the_contents() -> None:
    listed = {(page.parent / link).resolve() for page in CONTENTS for link in links(page)}
    assert set(PAGES) - listed == {CONTENTS[0]}


def test_every_dependency_has_its_licence_on_the_page() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    names = {re.split(r"[\[><=]", name)[0] for name in re.findall(r'"([^"]+)"', section)} - {"aufast"}
    table = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8").split("| package |")[1]
    cells = {name for row in re.findall(r"^\| ([^|]+) \|", table, re.M) for name in row.split(", ")}
    assert names <= cells, names - cells


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_examples_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("sphinx is not installed: the extra `docs`")
    for builder in ("html", "doctest"):
        command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", builder, "-c", "docs"]
        done = subprocess.run([*command, ".", tmp_path / builder], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "html/index.html").exists()
    assert (tmp_path / "html/docs/generated/api/aufast.ops.html").exists()
