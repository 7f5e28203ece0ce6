"""The pages say true things: links lead somewhere, choices name functions, snippets are Python."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for pattern in ("*.md", "docs/*.md", "results/*/README.md", "benchmarks/*.md")
               for page in ROOT.glob(pattern))
CHOICES = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")


def text(page):
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_snippets_are_python(page):
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text(page))
             if "://" not in link}
    assert {link for link in links if link and not (page.parent / link).exists()} == set()
    for snippet in re.findall(r"```python\n(.*?)```", text(page), re.DOTALL):
        ast.parse(snippet)


def test_the_readme_is_short():
    assert len(text(ROOT / "README.md").encode()) <= 9 * 1024


def test_every_choice_that_the_code_marks_is_in_the_list_with_its_function():
    named = [(file, function.strip()) for file, functions in re.findall(
        r"`([\w.]+\.py): ([^`]+)`", CHOICES) for function in functions.split(",")]
    assert len(named) > 15
    for file, function in named:
        for part in function.split("."):
            defined = rf"^\s*((def|class) {part}\b|{part} = )"
            assert re.search(defined, text(ROOT / file), re.MULTILINE), (file, function)
    marked = {path.name for path in ROOT.glob("*.py") if "paper: unspecified" in text(path)}
    assert marked <= {file for file, _ in named}


@pytest.mark.parametrize("arguments, words", [
    ("figure2 --dryrun", "after figure2 only --dry-run is accepted, not --dryrun"),
    ("demo --dry-run twice", "not --dry-run twice"),
    ("figure7", "./run_all.sh figure2"),
])
def test_run_all_does_nothing_for_a_word_that_it_does_not_know(arguments, words):
    done = subprocess.run([ROOT / "run_all.sh", *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stdout + done.stderr
