"""What the documents say is true of the program."""

import re
from pathlib import Path

import pytest

from harness import cli, matrix

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "harness" / "ARCHITECTURE.md"]


def test_the_matrices_in_the_readme_are_ones(tmp_path: Path) -> None:
    path = tmp_path / "readme.yaml"
    first, ladders, probes = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    path.write_text(ladders)
    plan = matrix.load(path)
    assert (len(plan.cases), len(plan.ladders), len(plan.frontiers)) == (33, 1, 1)
    path.write_text(probes)
    assert {case.kind for case in matrix.load(path).cases} == {"probe"}
    path.write_text(first)
    plan = matrix.load(path)
    assert len(plan.cases) + len(plan.skips) == 3 * 2 * 3 + 1 + 2 + 2
    assert {case.kind for case in plan.cases} == {"train", "serve", "chain"}


@pytest.mark.parametrize("path", sorted((ROOT / "matrices").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_matrix_here_can_be_planned(path: Path) -> None:
    plan = matrix.load(path)
    assert plan.name == path.stem
    assert plan.cases


def test_every_verb_stands_in_the_readme() -> None:
    verbs = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert set(re.findall(r"^harness ([a-z]+) ", README, re.MULTILINE)) == verbs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"(?<![\w/.<>-])(?:matrices|tools|tests|images|reports|harness)/[\w./-]*\w", README))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
