"""The README's list of what the paper leaves open points at the lines that it speaks of; its script takes no wrong word."""

import re
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("arguments, words", [
    ("figure2 --dryrun", "after figure2 only --dry-run is accepted, not --dryrun"),
    ("demo --dry-run twice", "not --dry-run twice"),
    ("figure7", "./run_all.sh figure2"),
])
def test_run_all_does_nothing_for_a_word_that_it_does_not_know(arguments, words):
    done = subprocess.run([ROOT / "run_all.sh", *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stdout + done.stderr
