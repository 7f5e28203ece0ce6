"""Tables and drawings of small logs that are written by hand."""

import csv
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import figures
from errors import RunError
from figures import binary_loss, compare, draw_run, main, zoom
from tables import Run, curve, epochs_to_pass, group, paired, tables
from taylorglo_ext import taylorglo_loss
from tests.run_folders import THETA, alone, evolved, member, write


def cells(text):
    """The cells of all Markdown tables in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line[:1] == "|"]


def printed(folders, *references):
    return tables(group(list(map(Run, folders))), references)


@pytest.fixture
def drawn(monkeypatch):
    """{name: figure} of the figures drawn; they are not saved."""
    found = {}
    monkeypatch.setattr(figures, "save", lambda some, folder, **_: (
        folder.mkdir(parents=True, exist_ok=True), found.update(some)))
    return found


@pytest.fixture
def three_seeds(tmp_path):
    """Baseline 1 ends at 80, 82, 84%; EPBT at 82 (an elite), 84, 87%. Differences 2, 2, 3."""
    folders = []
    for seed, (theirs, ours) in enumerate([(0.80, 0.81), (0.82, 0.84), (0.84, 0.87)]):
        folders += [write(tmp_path / f"plain-{seed}", alone(0.5, 0.6, theirs), method="baseline"),
                    write(tmp_path / f"best-decay-{seed}", evolved(0.5, 0.82, ours))]
    return folders


@pytest.fixture
def noise(tmp_path):
    """Two methods, three seeds each, without and with 40% wrong labels."""
    for share, loss in ((0.0, 0.0), (0.4, 0.2)):
        for seed in range(3):
            more = {"scores": {"memorised": 0.1 + seed / 10}} if share else {}
            write(tmp_path / f"baseline-{share:g}-{seed}", method="baseline", label_noise=share,
                  log=alone(0.5, 0.9 - loss - seed**2 / 100, **more))
            write(tmp_path / f"epbt-{share:g}-{seed}", evolved(0.5, 0.9 + seed / 100, **more),
                  label_noise=share)
    return sorted(tmp_path.iterdir())


def test_nothing_of_training_is_needed():
    program = ("import sys, figures, report; "
               "print({'torch', 'config', 'training', 'data'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout == "set()\n", done.stderr


def test_binary_loss_by_hand_is_the_loss_that_trains():
    # y = 3/4. True class: a = 1/4, b = 0: 1/2 + 1/8 + 1/64. Other class: a = -1/4, b = -1: the same
    # three with their signs, -1/2 + 1/8 - 1/64, then 3/4 - 1/16 - 1. Together -1/16; -1/n of it.
    assert binary_loss([1, 0.5, 2, 4, 6, 3, 2, 8], 0.75) == 1 / 32
    assert binary_loss([0, 0, 0, 0, 0, 1, 0, 0], 0.75) == -0.375  # -1/2 x y
    theta, y = [0.3, -1.2, 2.5, -0.7, 1.9, 3.1, -2.2, 0.4], 0.8
    logits = torch.tensor([[np.log(y / (1 - y)), 0.0]], dtype=torch.float64)
    trained = taylorglo_loss(logits, torch.tensor([0]), torch.tensor(theta, dtype=torch.float64))
    assert binary_loss(theta, y) == pytest.approx(trained.item(), rel=1e-12)


def test_tables_by_hand(three_seeds, tmp_path):
    lines = cells(printed(three_seeds))
    # t = mean / (sd / sqrt n) = (7/3) / (1/3) = 7; with two degrees of freedom, the two-sided
    # p is 1 - t / sqrt(2 + t^2) = 0.0198.
    assert ["best-decay", "84.33 (2.52; 3)", "+2.33, p = 0.020", "16"] in lines
    assert ["plain", "82.00 (2.00; 3)", "-", "6"] in lines
    assert ["to pass", "best-decay, of 6"] in lines and ["plain", "6"] in lines
    # Tests are over the common seeds, and only if the differences differ.
    other = [write(tmp_path / f"other-{seed}", alone(accuracy)) for seed, accuracy in
             ((1, 0.92), (2, 0.94), (3, 0.1))]
    (rows,) = group(list(map(Run, three_seeds + other)))["digits, resnet8"].values()
    assert paired(rows["other"], rows["plain"]) == "+10.00 over 2 seeds"  # twice 10: no variance
    assert paired(rows["plain"], rows["plain"]) == "-"
    assert epochs_to_pass(rows["plain"], rows["other"]) == 6
    lines = cells(printed(three_seeds + other, "best-decay", "plain"))
    assert lines[0][2:] == ["against best-decay", "against plain", "epochs trained"]
    with pytest.raises(RunError, match="no row is called bset, only plain, best-decay, other"):
        printed(three_seeds + other, "bset")


def test_a_fitness_of_ones_own_may_be_any_number(tmp_path, drawn):
    log = evolved(0.5, 0.7)
    for fitness, m in zip((1.5, 2.5, 9.0, 3.5, 150, 250, 350, 450), log[0] + log[1], strict=True):
        m["fitness"] = -fitness if m["id"] % 2 else fitness
    log[1][2]["diverged"] = True
    folder = write(tmp_path / "own-1", log, fitness="mine:metric")
    draw_run(run := Run(folder))
    fitness, accuracy = drawn["curves"].axes
    best, middle = fitness.get_lines()[:2]
    assert run.fitness_text(3.2) == "3.2"
    assert best.get_ydata().tolist() == [max(m["fitness"] for m in log[0]),
                                         max(m["fitness"] for m in log[1] if not m["diverged"])]
    assert fitness.get_ylim()[1] > best.get_ydata().max() and accuracy.get_ylim()[1] <= 101
    living = [m["fitness"] for m in log[1] if not m["diverged"]]
    assert middle.get_ydata()[1] == sorted(living)[1]


def test_a_metric_of_ones_own_is_tabulated_as_it_is(tmp_path):
    for seed in (0, 1):
        folder = write(tmp_path / f"epbt-{seed}", evolved(0.5, 0.75), fitness="mine:metric")
        scores = {"accuracy": 0.75, "mine:metric": -4.3 - seed}
        (folder / "summary.json").write_text(json.dumps({"test_scores": scores}))
    text = printed(sorted(tmp_path.iterdir()))
    assert ["epbt", "-4.80 (0.71; 2)", "12"] in cells(text)
    assert "A function of one's own is not in %." in text


def test_a_replay_that_ends_early_counts_with_its_end(tmp_path):
    short, long = (write(tmp_path / f"replay-{seed}", alone(*log), method="replay")
                   for seed, log in enumerate([(0.5, 0.9), (0.4, 0.6, 0.7, 0.8)]))
    epochs, means, _ = curve([Run(short), Run(long)])
    assert epochs == [2, 4, 6, 8] and means == pytest.approx([45, 75, 80, 85])


@pytest.mark.parametrize("metric", ["accuracy", "f1-macro"])
def test_other_metrics_have_tables_if_a_run_evolved_for_one(metric, tmp_path, drawn):
    """The balanced accuracy is the accuracy here, so it needs no table."""
    for seed in range(2):
        for row, log, f1, more in (("baseline", alone(0.5, 0.8), 0.70, {"method": "baseline"}),
                                   ("epbt", evolved(0.5, 0.75), 0.72, {"fitness": metric})):
            right = log[-1][0]["test_accuracy"] if row == "baseline" else 0.75
            scores = {"accuracy": right, "balanced-accuracy": right, "f1-macro": f1 + seed / 100}
            folder = write(tmp_path / "runs" / f"{row}-{seed}", log, **more)
            (folder / "summary.json").write_text(json.dumps({"test_scores": scores}))
    folders = sorted((tmp_path / "runs").iterdir())
    found = cells(compare(folders, tmp_path / "out"))
    for line in (["method", "f1-macro", "against baseline", "epochs trained"],
                 ["epbt", "72.50 (0.71; 2)", "+2.00", "12"]):
        assert (line in found) == (metric != "accuracy")
    assert not [line for line in found if "balanced-accuracy" in line]
    with open(tmp_path / "out" / "runs.csv") as file:
        scores = [row["test_f1_macro"] for row in csv.DictReader(file)]
    assert scores == ["0.7", "0.71", "0.72", "0.73"]


def test_what_is_tabulated_and_drawn_is_what_the_logs_have(noise, tmp_path, drawn):
    lines = cells(compare(noise, tmp_path / "out"))
    assert lines[0] == ["method", "accuracy", "against baseline", "accuracy, 40% wrong labels",
                        "against baseline", "epochs trained"]
    assert lines[2][:4] == ["baseline", "88.33 (2.08; 3)", "-", "68.33 (2.08; 3)"]
    assert lines[3][0] == "epbt" and lines[3][4].startswith("+22.67, p = 0.0")
    assert drawn.keys() == {"accuracy", "noise", "memorisation", "losses-epbt", "schedule-epbt"}
    baseline, epbt = (bars[0].get_xydata() for bars in drawn["noise"].axes[0].containers)
    assert baseline == pytest.approx(np.array([[0, 265 / 3], [40, 205 / 3]]))
    assert epbt == pytest.approx(np.array([[0, 91], [40, 91]]))
    ax, *more = drawn["memorisation"].axes  # none for clean labels
    assert ax.containers[0][0].get_ydata() == pytest.approx([20, 20]) and not more
    assert ax.get_title() == "digits, resnet8, 40% wrong labels"
    steps = [list(step.get_data().values) for step in drawn["schedule-epbt"].axes[0].patches]
    assert steps == [pytest.approx([0.1, 0.2, 4.1, 4.2]), pytest.approx([0.5, 0.5, 0.54, 0.54])]
    losses = drawn["losses-epbt"].axes  # the ancestry by its applied theta: individuals 0 and 4
    assert [ax.get_title() for ax in losses[:4]] == ["seed 0", "seed 1", "seed 2", "cross-entropy"]
    for line, id in zip(losses[0].lines, (0, 4), strict=True):
        theta, y = [*THETA[:5], 10.0 + id, -10.0 + 2 * id, 0.0], np.array([0.01, 1])
        loss = binary_loss(theta, y)
        assert line.get_ydata()[[0, -1]] == pytest.approx(loss - loss[1])


def test_a_results_folder_is_whole_and_the_same_bytes_each_time(three_seeds, tmp_path):
    out = tmp_path / "results"
    main(["--out", str(out), "--command", "./run_all.sh x", *map(str, three_seeds)])
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(first) == ["README.md", "accuracy.png", "logs.tar.gz", "losses-best-decay.png",
                             "runs.csv", "schedule-best-decay.png"]
    assert first["README.md"].startswith(b"# results\n\nCommand: `./run_all.sh x`. Machine: ")
    assert b"leaves what is above -->\n\nCommits of the runs: abc1234.\n" in first["README.md"]
    (out / "README.md").write_bytes(b"Mine: \xc3\xa4\n" + first["README.md"])
    for path in three_seeds:
        os.utime(path / "log.jsonl", (1, 1))
    main(["--out", str(out), *map(str, three_seeds)])
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "README.md"} == {
        name: data for name, data in first.items() if name != "README.md"}
    assert (out / "README.md").read_bytes() == b"Mine: \xc3\xa4\n" + first["README.md"]
    with tarfile.open(out / "logs.tar.gz") as logs:
        logs.extractall(tmp_path / "again", filter="data")
    assert printed([tmp_path / "again" / path.name for path in three_seeds]) == printed(three_seeds)
    assert np.asarray(Image.open(out / "accuracy.png").convert("L")).std() > 10  # not blank
    with open(out / "runs.csv", encoding="utf-8") as file:
        run = list(csv.DictReader(file))[1]
    assert (run["method"], run["seed"], run["test_accuracy"], run["finished"]) == (
        "best-decay", "0", "0.82", "True")
    assert [run[x] for x in ("tried", "epochs_trained", "full_training")] == ["8", "16", "48"]


@pytest.mark.parametrize("name, settings, words", [
    ("plain-7", {"epochs": 3}, "differ in epochs"),
    ("plain-7", {"weight_decay": 0.1}, "differ in weight_decay"),  # which the others lack
    ("plain-7", {"seed": 0}, None),  # the name does not end in its seed: a row of its own
    ("x/plain-0", {}, "have the same seed"),
    ("plain-7", {"viable_init": False, "threads": 2, "data": "1"}, None),
    ("plain-0.4-7", {"label_noise": 0.4, "epochs": 3}, None),
])
def test_the_runs_of_a_row(name, settings, words, three_seeds, tmp_path, drawn):
    """They may differ in the seed alone."""
    settings = {"method": "baseline", "generations": 3, **settings}
    folders = [*three_seeds, write(tmp_path / name, alone(0.5), **settings)]
    if words is None:
        assert "Not finished, so not in tables and pictures: plain" in compare(folders, tmp_path)
    else:
        with pytest.raises(RunError, match=f"are named as one row, plain, but {words}: "):
            printed(folders)


NAMES = ["a$b", "$x_2$", r"\frac{", "_hidden", "a|b", "%s {0}", "фото", "-", "a\nb", "<b>&amp;",
         60 * "я", os.fsdecode(b"\xff\xfe")]
SHOWN = [*NAMES[:8], r"a\nb", *NAMES[9:11], r"\udcff\udcfe"]


def test_free_text_is_drawn_as_it_is(tmp_path, drawn, capsys):
    folders = [write(tmp_path / f"{name}-1", alone(0.5, 0.6)) for name in NAMES]
    main(["--out", str(tmp_path / NAMES[-1]), *map(str, folders)])
    rows = [line[0] for line in cells(capsys.readouterr().out.replace(r"\|", "¦"))][2:14]
    assert rows == [name.replace("|", "¦") for name in SHOWN]
    assert [text.get_text() for text in drawn["accuracy"].legends[0].get_texts()] == SHOWN
    drawn["accuracy"].savefig(tmp_path / "x.svg")
    drawn.clear()
    names = ["фо то", "фо-то", "ФО-ТО", *(100 * "я" + end for end in "абв")]
    compare([write(tmp_path / f"{name}-1", evolved(0.5)) for name in names], tmp_path / "out")
    assert len(drawn) == 1 + 2 * len(names)  # pictures of rows have names of their own


def test_free_text_may_be_anywhere(tmp_path):
    for name in (NAMES[1], NAMES[-1]):
        log, text = evolved(0.5, 0.6), {"dataset": f"/data/{name}", "model": name}
        folder = write(tmp_path / f"{name}-1", log, **text)
        draw_run(Run(folder))
        main(["--out", str(tmp_path / name), str(folder)])
        assert (folder / "losses.svg").exists() and len(list((tmp_path / name).glob("*.png"))) == 3


@pytest.mark.parametrize("spoil, words", [
    (lambda f: (f / "config.json").unlink(), "holds no run"),
    (lambda f: (f / "config.json").write_text("{"), "damaged"),
    (lambda f: (f / "config.json").write_text("{}"), "damaged"),
    (lambda f: (f / "log.jsonl").write_text("nonsense\n"), "damaged"),
    (lambda f: (f / "log.jsonl").write_text('{"generation": 0, "population": [{}]}\n'), "damaged"),
    (lambda f: (f / "log.jsonl").write_text('{"generation": 0, "population": []}\n'), "damaged"),
    (lambda f: (f / "log.jsonl").write_text(""), "no generation is finished yet"),
])
def test_a_folder_without_a_run_is_one_line(spoil, words, tmp_path, capsys):
    folder = write(tmp_path / "a-1", alone(0.5))
    spoil(folder)
    with pytest.raises(SystemExit) as exit:
        main(["--out", str(tmp_path / "out"), str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and "a-1" in line and words in line


OLD = [[{key: m[key] for key in m.keys() - {"applied"}} for m in line] for line in evolved(0.5)]
PBT = [[member(0, 0, 0.5, hyperparameters={"lr_scale": 1.0}), member(1, 0, 0.4)]]
DIVERGED = [[member(0, 0, 0.0, diverged=True, hyperparameters={"lr_scale": 9.0},
                    applied={"learning_rate": [0.9]})]]  # after one epoch of two


@pytest.mark.parametrize("log, names", [
    (OLD, "curves lineage"), (alone(0.5, 0.6), "curves"), (PBT, "curves lineage schedule"),
    (DIVERGED, "curves schedule"), (evolved(0.5), "curves lineage schedule losses")])
def test_figures_5_and_6_are_drawn_of_what_evolved(log, names, tmp_path, drawn):
    draw_run(Run(write(tmp_path / "a-1", log)))
    assert [*drawn] == names.split()


def test_the_zoom_leaves_out_what_ends_far_below():
    low, high = zoom([np.linspace(0, end, 20) for end in (90, 92, 20)])
    assert 45 < low < 60 and 92 < high < 97
