"""The published results: tables and figures are those that the records in the repository give."""

import shlex
import shutil

import pytest
from test_readme import CALLS, README, ROOT

REDRAW = [call for call in CALLS if "--redraw" in call and "JPEG" in call]
TABLES = sorted(ROOT.glob("figures/cifar-10-jpeg*/table_*.md"))


def test_the_readmes_command_redraws_all_tables_and_figures(project):
    for records in ROOT.glob("figures/cifar-10-jpeg*/records"):
        shutil.copytree(records, project.folder / records.relative_to(ROOT))
    for call in REDRAW:
        done = project(*shlex.split(call, comments=True)[1:])
        assert done.returncode == 0, done.stderr
    drawn, kept = ({path.relative_to(root) for path in root.glob("figures/cifar-10-jpeg*/*_*")}
                   for root in (project.folder, ROOT))
    images_needed = {path for path in kept if path.name == "figure_6_techniques.png"}
    assert kept - images_needed <= drawn
    for table in TABLES:
        assert (project.folder / table.relative_to(ROOT)).read_text() == table.read_text()


@pytest.mark.parametrize("table", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_readme_shows_a_table_as_it_was_drawn(table):
    rows = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert [row for row in rows if row not in README.splitlines()] == []
