"""Tables and drawings of small logs that are written by hand."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import Config
from data import Augmentation
from evolution import SEARCH_SPACE
from figures import (
    LOOKS,
    Row,
    accounting,
    ancestry,
    binary_loss,
    compare,
    draw_run,
    epochs_to_pass,
    evolved_values,
    fittest,
    group,
    load_run,
    looks,
    main,
    paired_t,
    table,
    tables,
    zoom,
)
from records import RunError
from taylorglo_ext import taylorglo_loss

THETA = {f"theta{i}": float(i) for i in range(8)}


def member(id, generation, accuracy, parent=None, test=None, diverged=False, **hyperparameters):
    return dict(id=id, generation=generation, hyperparameters=hyperparameters, parent=parent, mate=None, teacher=None,
                fitness=accuracy, test_accuracy=accuracy if test is None else test, loss=1.0, diverged=diverged,
                elite=False)


def write(folder, log, **settings):
    """The files of a run: log is a list of populations."""
    settings = {"dataset": "digits", "generations": len(log), "epochs": 2, "seed": 1, "device": "cpu", **settings}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(Config(**settings).resolved().identity()))
    lines = [json.dumps({"generation": g, "population": population}) + "\n" for g, population in enumerate(log)]
    (folder / "log.jsonl").write_text("".join(lines))
    (folder / "timing.jsonl").write_text("".join(json.dumps({"generation": g, "seconds": 1800.0}) + "\n"
                                                 for g in range(len(log))))
    return folder


def alone(*accuracies):
    """The log of Baseline 1: one network that goes on."""
    return [[member(g, g, accuracy, parent=g - 1 if g else None)] for g, accuracy in enumerate(accuracies)]


def evolved(*accuracies):
    """A log of EPBT with P = 4 and k = 2: in each generation the first child, of the last one, is the fittest."""
    def h(i):
        return {**THETA, "theta2": float(i), "lr_scale": 1.0 + i, "lr_decay": 2.0, "momentum": 0.5 + i / 100}

    log = [[member(i, 0, accuracies[0] - i / 100, **h(i)) for i in range(4)]]
    for g, accuracy in enumerate(accuracies[1:], 1):
        elites = sorted(log[-1], key=lambda m: -m["fitness"])[:2]
        log.append([*elites, *(member(2 * g + i, g, accuracy - (i - 2) / 100, elites[0]["id"], **h(2 * g + i))
                               for i in (2, 3))])
    return log


def printed(folders):
    """The tables of runs, without the drawings."""
    return "\n".join(tables(problem, rows) for problem, rows in group(list(map(load_run, folders))).items())


def test_the_fittest_is_chosen_by_fitness_alone_and_is_not_diverged():
    population = [member(4, 0, 0.9, test=0.1), member(3, 0, 0.9, test=0.2), member(2, 0, 0.5, test=0.99),
                  member(1, 0, 1.0, diverged=True)]
    assert fittest(population)["id"] == 3


def test_ancestry_names_each_ancestor_once_however_long_it_was_an_elite():
    first, second, third = member(0, 0, 0.5), member(2, 1, 0.6, parent=0), member(5, 3, 0.9, parent=2)
    log = [[first, member(1, 0, 0.4)], [first, second], [first, second], [second, third]]
    assert ancestry([dict(generation=g, population=p) for g, p in enumerate(log)]) == [first, second, third]


def test_binary_loss_by_hand():
    # y = 3/4. True class: a = 1/4, b = 0: 1/2 + 1/8 + 1/64. Other class: a = -1/4, b = -1: the same three with their
    # signs, -1/2 + 1/8 - 1/64, then 3/4 - 1/16 - 1. Together -1/16, and -1/n of it is 1/32.
    assert binary_loss([1, 0.5, 2, 4, 6, 3, 2, 8], 0.75) == 1 / 32
    assert binary_loss([0, 0, 0, 0, 0, 1, 0, 0], 0.75) == -0.375  # -1/2 x y


def test_binary_loss_is_the_loss_that_trains():
    theta, y = [0.3, -1.2, 2.5, -0.7, 1.9, 3.1, -2.2, 0.4], 0.8
    logits = torch.tensor([[math.log(y / (1 - y)), 0.0]], dtype=torch.float64)
    trained = taylorglo_loss(logits, torch.tensor([0]), torch.tensor(theta, dtype=torch.float64))
    assert binary_loss(theta, y) == pytest.approx(trained.item(), rel=1e-12)


def test_paired_t_by_hand():
    mean, t, p = paired_t([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (mean, t) == (2.0, pytest.approx(2 * math.sqrt(3)))
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # Student's distribution with two degrees of freedom
    assert paired_t([2.0, 3.0], [1.0, 2.0]) == (1.0, None, None)


def test_table_is_aligned_markdown():
    assert table(["a", "n"], [["xyz", 1], ["b", 10]]) == "| a   |  n |\n|-----|---:|\n| xyz |  1 |\n| b   | 10 |"


@pytest.fixture
def three_seeds(tmp_path):
    """Baseline 1: 80, 82, 84% in the end; EPBT: 82 (an elite's), 84, 87%. Differences 2, 2, 3."""
    folders = []
    for seed, (theirs, ours) in enumerate([(0.80, 0.81), (0.82, 0.84), (0.84, 0.87)]):
        folders += [write(tmp_path / f"b{seed}", alone(0.5, 0.6, theirs), method="baseline", seed=seed),
                    write(tmp_path / f"e{seed}", evolved(0.5, 0.82, ours), population=4, seed=seed)]
    return folders


def test_tables_by_hand(three_seeds):
    text = printed(three_seeds)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["Baseline 1", "82.00 (2.00)", "3"] in lines
    assert ["EPBT", "84.33 (2.52)", "3"] in lines
    assert ["EPBT - Baseline 1", "+2.33", "3", "+7.00", "0.020"] in lines
    assert ["Baseline 1", "-"] not in lines and ["Baseline 1", "6"] in lines  # Table 2: 82% is not above 82%
    assert ["EPBT", "8", "16", "48", "3.0", "1.5"] in lines  # 4 + 2 + 2 losses of 2 epochs each; of 6 each, in full
    assert "All runs: population 4, generations 3, epochs 2." in text


def test_table_2_wants_the_mean_above_not_level(tmp_path):
    write(tmp_path / "b", alone(0.1, 0.75), method="baseline")
    write(tmp_path / "e", evolved(0.5, 0.75, 0.875), population=4)
    ours, other = (group([load_run(tmp_path / name)])["digits", "resnet8"][0] for name in "eb")
    assert epochs_to_pass(ours, other) == 6
    assert epochs_to_pass(other, ours) is None


def test_the_paper_stands_beside_its_own_experiments_only(tmp_path):
    for seed in (1, 2):
        write(tmp_path / f"p{seed}", evolved(0.5, 0.9), dataset="cifar10", seed=seed)
        write(tmp_path / f"n{seed}", evolved(0.5, 0.8), dataset="cifar10", seed=seed, novelty="off")
    lines = printed([tmp_path / name for name in ("n1", "p1", "n2", "p2")]).splitlines()
    assert lines[6:10] == [
        "| method             | mean (sd), % | n | paper, n = 5 |",
        "|--------------------|-------------:|--:|-------------:|",
        "| EPBT               | 90.00 (0.00) | 2 | 92.79 (0.15) |",
        "| EPBT (novelty off) | 80.00 (0.00) | 2 |            - |"]
    assert "| EPBT (novelty off) - EPBT | -10.00 |     2 | - | - |" in lines


def test_accounting_counts_each_individual_once(tmp_path):
    assert accounting(load_run(write(tmp_path / "e", evolved(0.5, 0.7, 0.8), population=4))) == (8, 16, 48)
    assert accounting(load_run(write(tmp_path / "b", alone(0.5, 0.7, 0.8), method="baseline"))) == (1, 6, 6)


def test_schedule_is_that_of_the_best_and_an_elite_keeps_its_own(tmp_path):
    # Of 4 generations of 2 epochs, decay after 0.5 * 8 = 4. The best of generations 0 and 1 is 0, of 2 and 3 it is 6.
    run = load_run(write(tmp_path / "e", evolved(0.5, 0.4, 0.8, 0.7), population=4, milestones=(0.5,)))
    assert [best["id"] for best in run.best] == [0, 0, 6, 6]
    values = evolved_values(run)
    assert values["momentum"] == [0.5] * 4 + [0.56] * 4
    assert values["learning rate"] == pytest.approx([0.1] * 4 + [0.1 * 7 / 2] * 4)
    assert list(values) == ["learning rate", "momentum"]


@pytest.mark.parametrize("method", ["baseline", "pbt", "random", "epbt"])
def test_what_is_not_evolved_is_as_the_run_has_it(method, tmp_path):
    run = load_run(write(tmp_path / "r", alone(0.5), method=method, population=8))
    fixed = Config(**vars(run.config)).fixed(SimpleNamespace(augmentation=Augmentation()))
    assert run.fixed == {name: fixed[name] for name in run.fixed}


def test_a_run_draws_its_own_figures_in_its_folder(tmp_path):
    paths = draw_run(write(tmp_path / "e", evolved(0.5, 0.7, 0.8), population=4))
    assert [path.name for path in paths] == ["curves.png", "losses.png", "schedule.png"]
    for path in paths:
        image = np.asarray(Image.open(path).convert("L"))
        assert path.stat().st_size < 150_000 and (image < 128).mean() > 0.002 and (image > 250).mean() > 0.5
        assert "<text" in path.with_suffix(".svg").read_text()


def test_baseline_1_evolves_nothing_and_has_its_curves_alone_the_same_each_time(tmp_path):
    folder = write(tmp_path / "b", alone(0.5, 0.7), method="baseline")
    assert draw_run(folder, tmp_path / "x") == [tmp_path / "x" / "curves.png"]
    assert draw_run(folder, tmp_path / "y") == [tmp_path / "y" / "curves.png"]
    for name in ("curves.png", "curves.svg"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_other_evolved_variables_are_drawn_too(tmp_path):
    log = [[member(0, 0, 0.5, weight_decay=1e-4, lr_scale=1.0)]]
    run = load_run(write(tmp_path / "r", log, milestones=(0.9,)))
    assert evolved_values(run) == {"learning rate": [0.1, 0.1], "weight_decay": [1e-4, 1e-4]}


def test_the_zoom_is_on_the_late_part_of_the_curves_that_end_near_the_top():
    def curve(*mean):
        return range(5), np.array(mean, dtype=float), np.ones(5)

    near, nearer, far = curve(10, 20, 30, 70, 90), curve(0, 0, 0, 80, 99), curve(0, 0, 0, 10, 20)
    margin = 0.05 * (100 - 69)
    assert zoom([near, nearer, far]) == pytest.approx((69 - margin, 100 + margin))
    assert zoom([near, far]) == pytest.approx((9 - 0.05 * 82, 91 + 0.05 * 82))  # of two, each may be the one to see


def test_comparison_draws_and_lists_every_run(three_seeds, tmp_path):
    text = compare(three_seeds, tmp_path / "out")
    assert text == printed(three_seeds) == (tmp_path / "out" / "tables.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "accuracy-digits.png", "losses-digits-resnet8-epbt.png", "schedule-digits-resnet8-epbt.png"]
    with open(tmp_path / "out" / "runs.csv") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["seed"], line["test_accuracy"], line["epochs"]) for line in lines] == [
        ("Baseline 1", "0", "0.8", "6"), ("Baseline 1", "1", "0.82", "6"), ("Baseline 1", "2", "0.84", "6"),
        ("EPBT", "0", "0.82", "6"), ("EPBT", "1", "0.84", "6"), ("EPBT", "2", "0.87", "6")]


def test_a_running_run_is_drawn_and_left_out_of_the_tables(three_seeds, tmp_path):
    running = write(tmp_path / "e9", evolved(0.5), population=4, seed=9, generations=3)
    draw_run(running)
    text = printed([*three_seeds, running])
    assert "84.33 (2.52) | 3 |" in text
    assert f"Not finished, so not in the tables: {running} (1 of 3 generations)." in text
    assert "Table 2" not in compare([three_seeds[0], running], tmp_path / "out")  # drawn, as far as it has come


def test_a_run_without_a_generation_is_named(three_seeds, tmp_path):
    begun = write(tmp_path / "begun", [], generations=3)
    assert f"No generation finished yet: {begun}.\n" in compare([*three_seeds, begun], tmp_path / "out")


def test_a_method_has_its_colour_also_where_its_label_tells_settings():
    rows = [Row("EPBT (preset best)", "epbt", []), Row("Baseline 1", "baseline", []), Row("Baseline 1", "baseline", [])]
    assert looks(rows) == {"EPBT (preset best)": LOOKS["EPBT"], "Baseline 1": LOOKS["Baseline 1"]}
    both = looks([*rows, Row("EPBT", "epbt", [])])
    assert both["EPBT"] == LOOKS["EPBT"] != both["EPBT (preset best)"]


def test_a_generation_that_all_diverged_in_is_drawn(tmp_path):
    dead = [member(i, 0, 0.0, diverged=True, lr_scale=1.0, **THETA) for i in range(2)]
    assert len(draw_run(write(tmp_path / "e", [dead, dead], population=2))) == 3


@pytest.mark.parametrize("damage, message", [
    (lambda folder: None, "no generation"),
    (lambda folder: (folder / "log.jsonl").write_text("{]"), "log.jsonl"),
    (lambda folder: (folder / "log.jsonl").write_text('{"generation": 0, "population": [{}]}\n'), "is damaged"),
    (lambda folder: (folder / "log.jsonl").unlink(), "log.jsonl"),
    (lambda folder: (folder / "config.json").write_text("{}"), "no dataset and no epochs"),
    (lambda folder: (folder / "config.json").unlink(), "holds no run"),
    (lambda folder: (folder / "timing.jsonl").write_text("[]\n"), "is damaged"),
], ids=["empty", "broken", "other", "no-log", "no-settings", "no-config", "timing"])
def test_a_folder_that_cannot_be_drawn_is_named_in_one_line(damage, message, tmp_path, capsys):
    folder = write(tmp_path / "broken", [], generations=3)
    damage(folder)
    with pytest.raises(SystemExit) as exit:
        main([str(folder)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and str(folder) in error and message in error


def test_the_same_seed_twice_is_no_repetition(tmp_path):
    for name in "ab":
        write(tmp_path / name, alone(0.5), method="baseline")
    with pytest.raises(RunError, match="same experiment"):
        compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_data_sets_of_one_name_are_told_apart(tmp_path):
    folders = [write(tmp_path / f"{i}", evolved(0.5), population=4, dataset=dataset, seed=seed)
               for i, (dataset, seed) in enumerate([("a/pets", 1), ("a/pets/", 2), ("b/pets", 1), ("digits", 1)])]
    problems = group([load_run(folder) for folder in folders])
    assert [(dataset, len(rows[0].runs)) for (dataset, _), rows in problems.items()] == [
        ("a/pets, ? classes", 2), ("b/pets, ? classes", 1), ("digits", 1)]
    compare(folders, tmp_path / "out")
    names = sorted(path.stem for path in (tmp_path / "out").glob("accuracy-*.png"))
    assert names == ["accuracy-a-pets-classes", "accuracy-b-pets-classes", "accuracy-digits"]


def test_names_of_any_script_and_length_make_files_of_their_own(tmp_path):
    names = ["фото", "рисунки", "фо то", "фо-то", 150 * "я"]
    compare([write(tmp_path / "runs" / f"{i}", evolved(0.5), population=4, dataset=name) for i, name in enumerate(names)],
            tmp_path / "out")
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert len(drawn) == 3 * len(names) and {"accuracy-фото", "accuracy-фо-то", "accuracy-фо-то-2"} <= drawn


def test_labels_say_what_differs_and_only_that(tmp_path):
    log = evolved(0.5)
    write(tmp_path / "plain", log, population=4, limit=100)
    write(tmp_path / "other", log, population=4, limit=100, viable_init=True, milestones=(0.5,))
    write(tmp_path / "baseline", alone(0.5), method="baseline", limit=100)
    runs = [load_run(tmp_path / name) for name in ("other", "plain", "baseline")]
    assert [row.label for row in group(runs)["digits", "resnet8"]] == [
        "Baseline 1", "EPBT", "EPBT (viable init, milestones 0.5)"]


def test_runs_with_another_augmentation_are_told_apart(tmp_path):
    for name, own in (("plain", {}), ("more", {"augmentation": vars(Augmentation(flip=True, cutout=4))})):
        space = Config(preset="best", dataset="custom").resolved().search_space(Augmentation(**own.get("augmentation", {})))
        folder = write(tmp_path / name, evolved(0.5), population=4, dataset="custom", preset="best")
        own["space"] = [list(vars(v).values()) for v in space]
        config = json.loads((folder / "config.json").read_text()) | own
        (folder / "config.json").write_text(json.dumps(config))
    (rows,) = group([load_run(tmp_path / name) for name in ("more", "plain")]).values()
    assert [row.label for row in rows] == ["EPBT", "EPBT (augmentation flip True, shift 0, cutout 4)"]


def test_runs_that_evolve_other_variables_are_told_apart(tmp_path):
    for name, extra in (("plain", []), ("more", [["weight_decay", 1e-5, 0.01, True, True]])):
        folder = write(tmp_path / name, evolved(0.5), population=4)
        config = json.loads((folder / "config.json").read_text())
        config["space"] = [list(vars(v).values()) for v in SEARCH_SPACE] + extra
        (folder / "config.json").write_text(json.dumps(config))
    rows = group([load_run(tmp_path / name) for name in ("more", "plain")])["digits", "resnet8"]
    assert [row.label for row in rows] == [
        "EPBT", "EPBT (evolved theta, lr scale, lr decay, momentum, weight decay 1e-05 to 0.01)"]


def test_a_config_of_an_older_version_is_read(tmp_path):
    folder = write(tmp_path / "r", alone(0.5), method="baseline")
    config = json.loads((folder / "config.json").read_text())
    del config["viable_init"]
    (folder / "config.json").write_text(json.dumps(config | {"gone": 1}))
    assert "Table 1" in printed([folder])
