"""The winner's schedule, and a network trained under it."""

import json
import math

import pytest

from config import Config
from epbt import main
from errors import ConfigError, RunError
from records import ancestry, read_config, read_log
from replay import checked_schedule, read_schedule, replay_config
from taylorglo_ext import label_smoothing, losses

ALONE = ("--limit 200 --validation 40 --workers 1 --threads 1 --loss-backend reference "
         "--device cpu").split()


def member(id, parent, fitness, diverged=False):
    return dict(id=id, parent=parent, fitness=fitness, diverged=diverged, generation=0)


def test_ancestry_follows_parents_and_names_an_elite_once():
    elite = member(1, None, 0.7)
    log = [{"population": [member(0, None, 0.1), elite]},
           {"population": [elite, member(2, 1, 0.6)]},
           {"population": [elite, member(3, 2, 0.8), member(4, 1, 0.9, diverged=True)]}]
    assert [m["id"] for m in ancestry(log)] == [1, 2, 3]  # 4 is fitter, but diverged


@pytest.fixture(scope="module")
def finished(run_epbt):
    return run_epbt("--epochs", "2", "--average-weights", "1.5")


@pytest.fixture
def edited(finished, tmp_path):
    """Writes the schedule with other values, and returns its path."""
    def write(**values):
        path = tmp_path / "schedule.json"
        path.write_text(json.dumps(read_schedule(finished) | values), encoding="utf-8")
        return path
    return write


def test_a_schedule_has_what_the_winner_was_trained_with_epoch_by_epoch(finished):
    line, found = ancestry(read_log(finished)), read_schedule(finished)
    assert len(found["epochs"]) == 2 * len(line)
    assert (found["side"], found["average_epochs"], found["plain_loss"]) == (8, 3, "cross-entropy")
    for i, ancestor in enumerate(line):
        h = ancestor["hyperparameters"]
        for e, epoch in enumerate(found["epochs"][2 * i: 2 * i + 2], 2 * ancestor["generation"]):
            passed = sum(e >= milestone for milestone in (2, 4, 5))  # 30, 60, 80% of 6
            rate = 0.1 * h["lr_scale"] / h["lr_decay"] ** passed
            assert epoch["learning_rate"] == pytest.approx(rate)
            assert epoch["momentum"] == h["momentum"]
            assert epoch["theta"] == [h[f"theta{j}"] for j in range(8)]


def test_a_replay_trains_one_network_under_the_stretched_schedule(finished, tmp_path):
    epochs = read_schedule(finished)["epochs"]
    n = 2 * len(epochs)
    main([*ALONE, "--replay", str(finished), "--generations", str(n), "--out", str(tmp_path)])
    assert len(log := read_log(tmp_path)) == n
    for g, line in enumerate(log):
        (network,) = line["population"]
        assert network["parent"] == (g - 1 if g else None)
        applied, then = network["applied"], epochs[g // 2]
        assert applied["learning_rate"] == pytest.approx([then["learning_rate"]])
        assert all(applied[name] == then[name] for name in ("theta", "momentum", "weight_decay"))


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_replay_averages_over_the_same_epochs_in_generations_of_any_length(
        epochs, finished, tmp_path):
    main([*ALONE, "--replay", str(finished), f"--epochs={epochs}", "--out", str(tmp_path)])
    config, found = read_config(tmp_path), read_schedule(finished)
    assert config["average_weights"] * epochs == found["average_epochs"] == 3
    assert config["generations"] == math.ceil(len(found["epochs"]) / epochs)


def test_a_schedule_brings_its_settings_and_a_cutout_keeps_its_share(edited, finished, pretend):
    shared = dict(dataset="fashion", model="resnet20", batch_size=64, add_cross_entropy=True,
                  image_size=16, augmentation="flip")
    config = Config(**replay_config(edited(**shared)))
    assert {name: getattr(config, name) for name in shared} == shared
    assert (config.epochs, config.milestones, config.average_weights) == (1, (), 3)
    assert config.loss == "taylorglo" and config.trains_on_all
    assert checked_schedule(config) != checked_schedule(Config(**replay_config(finished)))
    epoch = read_schedule(finished)["epochs"][0] | {"theta": None}
    plain = dict(plain_loss="label-smoothing", epochs=[epoch])
    assert Config(**replay_config(edited(**plain))).plain_loss == "label-smoothing"
    assert losses(read_schedule(edited(**plain))) == [label_smoothing]
    for augmentation, cutout in (("cutout=8", 4), ("none", 0)):  # of 8 pixels
        path = edited(side=32, epochs=[epoch | {"cutout": 16}], augmentation=augmentation)
        (line,) = pretend(Config(**replay_config(path))).log
        assert line["population"][0]["hyperparameters"]["cutout"] == cutout


def refused(capsys, *options):
    with pytest.raises(SystemExit):
        main([*map(str, options)])
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("options, words", [
    ("--learning-rate 0.01 --weight-decay 0.1", ["--learning-rate is", "--weight-decay is"]),
    ("--loss cross-entropy --add-cross-entropy", ["--loss is", "--add-cross-entropy is"]),
    ("--average-weights 3 --epochs 2", ["--average-weights is"]),
    ("--epochs 0", ["--epochs must be"]),
    ("--method pbt", ["--method replay and --replay go together"]),
])
def test_what_a_schedule_decides_is_no_option_of_its_replay(options, words, finished, capsys):
    lines = refused(capsys, *ALONE, "--replay", finished, *options.split())
    assert len(lines) == len(words)
    for line, start in zip(lines, words, strict=True):
        assert line.startswith(f"epbt.py: {start}")


def test_a_replay_refuses_a_config_that_is_not_the_schedules(edited, tmp_path, capsys):
    epoch = dict(learning_rate=0.1, momentum=0.9, weight_decay=0, cutout=0, theta=None)
    path = edited(epochs=[epoch])
    other = Config(**replay_config(path) | dict(dataset="digits", learning_rate=0.2))
    with pytest.raises(ConfigError, match="--learning-rate is decided by .*: 0.1, not 0.2"):
        checked_schedule(other)
    main([*ALONE, "--replay", str(path), "--out", str(tmp_path / "run")])
    edited(epochs=[epoch | {"momentum": 0.8}])
    assert "schedule is" in refused(capsys, "--resume", "--out", tmp_path / "run")[-1]


@pytest.mark.parametrize("content", [
    "", "{}", "[]", '{"epochs": []}', '{"epochs": [{"learning_rate": 1}]}',
    *(dict(epochs=[epoch]) for epoch in (
        dict(learning_rate=-1), dict(learning_rate=float("nan")), dict(learning_rate="1"),
        dict(momentum=2), dict(theta=[1]))),
    dict(model=5), dict(dataset=None), dict(batch_size="8"), dict(side=0), dict(average_epochs=-1),
    dict(plain_loss="smooth"),
])
def test_what_is_not_a_schedule_is_refused_in_one_line(content, edited, finished):
    if isinstance(content, str):
        (path := edited()).write_text(content, encoding="utf-8")
    else:
        good = read_schedule(finished)["epochs"][0]
        path = edited(**content | {"epochs": [good | e for e in content.get("epochs", [{}])]})
    with pytest.raises(RunError, match="is not the schedule of a finished run"):
        read_schedule(path)
