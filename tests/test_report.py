"""The one-page report of a run, from logs that are written by hand."""

import json
import re
from html.parser import HTMLParser

import pytest
from test_figures import alone, evolved, member, write

from report import duration, report


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    path = report(write(tmp_path / "e", evolved(0.5, 0.7, 0.8), population=4))
    text = path.read_text()
    page = Page(text)
    assert path.name == "report.html" and "Finished: 3 of 3 generations, 6 of 6 epochs." in text
    assert page.count("svg") == 4  # curves, lineage, losses, schedule
    assert page.count("script") == page.count("img") == page.count("link") == 0
    outside = [value for _, attributes in page.tags for name, value in attributes.items()
               if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:"))]
    assert outside == []
    assert "prefers-color-scheme: dark" in text
    assert "<td>learning rate</td><td>0.1</td>" in text and "<td>losses or settings tried</td><td>8</td>" in text


def test_lineage_has_every_individual_and_the_line_of_the_winner(tmp_path):
    text = report(write(tmp_path / "e", evolved(0.5, 0.7, 0.8), population=4)).read_text()
    drawing = text[text.index("<svg class=lineage"):]
    drawing = drawing[:drawing.index("</svg>")]
    assert len(re.findall("<circle", drawing)) == 12
    assert len(re.findall("stroke-dasharray", drawing)) == 4  # two elites twice
    assert "M24 10L56 10L88 10' stroke='#D55E00'" in drawing  # the fittest of each generation is the next one's parent


def test_a_running_run_and_a_single_network(tmp_path):
    text = report(write(tmp_path / "b", alone(0.5, 0.7), method="baseline", generations=5)).read_text()
    assert "Running: 2 of 5 generations, 4 of 10 epochs." in text
    assert Page(text).count("svg") == 1 and "Lineage" not in text


def test_names_are_escaped_and_the_diverged_are_hollow(tmp_path):
    log = [[member(0, 0, 0.5, lr_scale=1.0), member(1, 0, 0.0, diverged=True, lr_scale=2.0)]]
    text = report(write(tmp_path / "r", log, method="random", dataset="a<b>", population=2)).read_text()
    assert "a&lt;b&gt;" in text and "a<b>" not in text
    assert text.count("fill='var(--paper)'") == 1


def test_settings_are_told_with_the_ranges_of_the_evolved_variables(tmp_path):
    folder = write(tmp_path / "e", evolved(0.5, 0.7), population=4)
    config = json.loads((folder / "config.json").read_text())
    config["space"] = [["theta0", -10.0, 10.0, False, False], ["weight_decay", 1e-5, 0.01, True, True]]
    (folder / "config.json").write_text(json.dumps(config))
    text = report(folder).read_text()
    assert "<td>space</td><td>theta0 -10 to 10, weight_decay 1e-05 to 0.01</td>" in text
    assert "<td>batch size</td><td>128</td>" in text


@pytest.mark.parametrize("seconds, words", [(99, "99 seconds"), (100, "2 minutes"), (7200, "2.0 hours")])
def test_a_duration_is_told_in_the_unit_that_fits(seconds, words):
    assert duration(seconds) == words
