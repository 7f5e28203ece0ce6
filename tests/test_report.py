"""The one-page report of a run, from logs that are written by hand."""

from html.parser import HTMLParser

from figures import figure_lineage
from report import report
from tables import Run
from tests.run_folders import alone, evolved, member, write


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def count(self, *tags):
        return sum(name in tags for name, _ in self.tags)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    path = report(write(tmp_path / "e-1", evolved(0.5, 0.7, 0.8)))
    page = Page(path)
    assert path.name == "report.html"
    assert "Finished: 3 of\n3 generations, 6 of 6 epochs." in page.text
    assert page.count("svg") == 4  # curves, lineage, losses, schedule
    assert page.count("script", "img", "link") == 0
    outside = [value for _, attributes in page.tags for name, value in attributes.items()
               if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:"))]
    assert outside == [] and "prefers-color-scheme: dark" in page.text
    for name, value in (("test accuracy", "80.00%"), ("learning rate, in its last epoch", "6.2"),
                        ("losses or settings tried", "8"), ("momentum", "0.5"), ("space", "-")):
        assert f"<td>{name}</td><td>{value}</td>" in page.text
    # The lineage has every individual and the line of the winner.
    assert page.text.count("<title>individual ") == 12
    title = "<title>individual 4 of generation 1: fitness 70.00%, test accuracy 70.00%<"
    assert title in page.text
    (ax,) = figure_lineage(Run(tmp_path / "e-1")).axes
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert len(dashed) == 4 and len(ax.lines) == 12 + 8 + 1
    assert ax.lines[-1].get_xydata().tolist() == [[0, 0], [1, 0], [2, 0]]


def test_a_running_run_and_a_single_network(tmp_path):
    folder = write(tmp_path / "b-1", alone(0.5, 0.7), method="baseline", generations=5)
    page = Page(report(folder))
    assert "Running: 2 of\n5 generations, 4 of 10 epochs." in page.text
    assert page.count("svg") == 1 and "Lineage" not in page.text


def test_free_text_is_escaped_and_the_diverged_are_white(tmp_path):
    log = [[member(0, 0, 0.5), member(1, 0, 0.0, diverged=True)]]
    space = [["theta0", -10.0, 10.0, False, False], ["weight_decay", 1e-5, 0.01, True, True]]
    folder = write(tmp_path / "$r$<i>-1", log, dataset="a<b>{{ 1 }}\udcff", space=space)
    text = report(folder).read_text(encoding="utf-8")
    assert "$r$&lt;i&gt;, seed 1: a&lt;b&gt;{{ 1 }}\\udcff, resnet8" in text and "a<b>" not in text
    dots = [line for line in figure_lineage(Run(folder)).axes[0].lines if line.get_marker() == "o"]
    assert [line.get_color() == "white" for line in dots] == [False, True]
    assert "<td>space</td><td>theta0 -10 to 10, weight_decay 1e-05 to 0.01</td>" in text
