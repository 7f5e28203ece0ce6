"""The README's list of what the paper leaves open points at the lines that it speaks of."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINKS = {(name, int(line)) for name, line in re.findall(r"\]\(([\w/.]+)#L(\d+)\)", README)}


def lines(name):
    return (ROOT / name).read_text().splitlines()


def test_every_choice_that_the_code_marks_is_linked():
    marks = {(path.name, i) for path in ROOT.glob("*.py") for i, line in enumerate(lines(path.name), 1)
             if "paper: unspecified" in line}
    assert len(marks) > 10
    assert marks <= LINKS


def test_links_to_lines_lead_to_code_and_links_to_files_lead_somewhere():
    for name, line in LINKS:
        assert lines(name)[line - 1].strip()
    files = {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target}
    assert {target for target in files if not (ROOT / target).exists()} == set()
