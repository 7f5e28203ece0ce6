"""The winner's schedule, and a network trained under it."""

import json

import pytest

import epbt
from records import RunError
from replay import ancestry, read_schedule
from taylorglo_ext import label_smoothing, losses

TINY = ["--dataset", "digits", "--limit", "200", "--validation", "40", "--workers", "1", "--loss-backend", "reference",
        "--device", "cpu"]


def member(id, parent, fitness, diverged=False):
    return dict(id=id, parent=parent, fitness=fitness, diverged=diverged, generation=0)


def test_ancestry_follows_parents_and_names_an_elite_once():
    elite = member(1, None, 0.7)
    log = [{"population": [member(0, None, 0.1), elite]},
           {"population": [elite, member(2, 1, 0.6)]},
           {"population": [elite, member(3, 2, 0.8), member(4, 1, 0.9, diverged=True)]}]
    assert [m["id"] for m in ancestry(log)] == [1, 2, 3]  # 4 is fitter, but diverged


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "epbt"
    epbt.main([*TINY, "--population", "4", "--generations", "3", "--epochs", "2", "--out", str(folder)])
    return folder


def test_schedule_has_what_the_winner_was_trained_with_epoch_by_epoch(finished):
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    line, epochs = ancestry(log), read_schedule(finished)["epochs"]
    assert len(epochs) == 2 * len(line)
    for i, ancestor in enumerate(line):
        h = ancestor["hyperparameters"]
        for e, epoch in enumerate(epochs[2 * i: 2 * i + 2]):
            passed = sum(2 * ancestor["generation"] + e >= at for at in (2, 4, 5))  # 30, 60, 80% of 6 epochs
            assert epoch["learning_rate"] == pytest.approx(0.1 * h["lr_scale"] / h["lr_decay"] ** passed)
            assert epoch["momentum"] == h["momentum"]
            assert epoch["theta"] == [h[f"theta{j}"] for j in range(8)]


def test_replay_trains_one_network_under_the_stretched_schedule(finished, tmp_path):
    epochs = read_schedule(finished)["epochs"]
    n = 2 * len(epochs)
    epbt.main([*TINY, "--replay", str(finished), "--generations", str(n), "--out", str(tmp_path / "replay")])
    log = [json.loads(line) for line in (tmp_path / "replay" / "log.jsonl").read_text().splitlines()]
    assert len(log) == n
    for g, line in enumerate(log):
        (network,) = line["population"]
        assert network["parent"] == (g - 1 if g else None)
        assert network["hyperparameters"]["theta5"] == epochs[g // 2]["theta"][5]
        assert 0.1 * network["hyperparameters"]["lr_scale"] == pytest.approx(epochs[g // 2]["learning_rate"])


def test_a_loss_that_had_cross_entropy_added_is_replayed_with_it(finished, tmp_path):
    found = json.loads((finished / "schedule.json").read_text())
    assert found["add_cross_entropy"] is False
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(found | {"add_cross_entropy": True}))
    assert epbt.Config(replay=str(path)).resolved().add_cross_entropy
    assert found["average_epochs"] == 2
    assert epbt.Config(replay=str(path)).resolved().average_epochs() == 2  # though an epoch a generation
    assert epbt.Config(replay=str(path), epochs=3).resolved().average_epochs() == 2
    assert epbt.Config(epochs=3).resolved().average_epochs() == 3
    assert not epbt.Config(replay=str(finished)).resolved().add_cross_entropy


def test_a_schedule_brings_its_data_set_and_a_resumed_replay_notices_another_schedule(finished, tmp_path, capsys):
    path, out = tmp_path / "schedule.json", str(tmp_path / "replay")
    found = json.loads((finished / "schedule.json").read_text()) | {"dataset": "fashion"}
    path.write_text(json.dumps(found))
    assert epbt.Config(replay=str(path)).resolved().dataset == "fashion"
    assert epbt.Config(replay=str(path), dataset="svhn").resolved().dataset == "svhn"
    replay = [*TINY, "--replay", str(path), "--generations", "1", "--out", out]
    epbt.main(replay)
    epbt.main([*replay, "--resume"])
    found["epochs"][0]["momentum"] = 0.123
    path.write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        epbt.main([*replay, "--resume"])
    assert "schedule is" in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    ("--learning-rate 0.01 --weight-decay 0.1", "--replay has --learning-rate, --weight-decay from its schedule"),
    ("--loss cross-entropy", "--replay has --loss from its schedule"),
    ("--normalize-loss", "--replay has --normalize-loss from its schedule"),
    ("--add-cross-entropy", "--replay has --add-cross-entropy from its schedule"),
])
def test_what_a_schedule_decides_is_no_option_of_its_replay(options, words, finished, capsys):
    with pytest.raises(SystemExit):
        epbt.main([*TINY, "--replay", str(finished), *options.split()])
    assert words in capsys.readouterr().err


def test_a_cutout_keeps_its_share_of_the_image(finished, tmp_path):
    path, found = tmp_path / "schedule.json", json.loads((finished / "schedule.json").read_text())
    assert found["image_size"] == 8 and found["epochs"][0]["cutout"] == 0

    def cutout_of_the_replay(name, schedule):
        path.write_text(json.dumps(schedule | {"epochs": [found["epochs"][0] | {"cutout": 16.0}]}))
        epbt.main([*TINY, "--replay", str(path), "--out", str(tmp_path / name)])
        return json.loads((tmp_path / name / "log.jsonl").read_text())["population"][0]["hyperparameters"]["cutout"]

    assert cutout_of_the_replay("smaller", found | {"image_size": 32}) == 4
    del found["image_size"]  # as older runs have it
    assert cutout_of_the_replay("unknown", found) == 16


def test_a_plain_loss_is_replayed_and_loaded_by_its_name(finished, tmp_path):
    found = json.loads((finished / "schedule.json").read_text())
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(found | {"plain_loss": "label-smoothing"}))
    assert epbt.Config(replay=str(path)).resolved().plain_loss() == "label-smoothing"
    assert epbt.Config(replay=str(finished)).resolved().plain_loss() == "cross-entropy"
    epoch = found["epochs"][0] | {"theta": None}
    assert losses({"plain_loss": "label-smoothing", "epochs": [epoch]}) == [label_smoothing]
    path.write_text(json.dumps(found | {"plain_loss": "smooth"}))
    with pytest.raises(RunError, match="plain_loss is none of cross-entropy"):
        read_schedule(path)


SCHEDULE = ('{"model": "resnet8", "batch_size": 8, "epochs": [{"learning_rate": %s, "momentum": 0, "weight_decay": 0, '
            '"cutout": 0, "theta": %s}]}')


@pytest.mark.parametrize("content", [
    "", "{}", "[]", '{"model": "resnet8", "batch_size": 8, "epochs": []}', '{"epochs": [{"learning_rate": 1}]}',
    SCHEDULE.replace('"epochs"', '"average_epochs": 0, "epochs"') % (1, "null"), SCHEDULE % (1, "[1]"),
    SCHEDULE % (-1, "null"), SCHEDULE % ("NaN", "null"), SCHEDULE % ('"1"', "null"),
    SCHEDULE.replace('"momentum": 0', '"momentum": 2') % (1, "null"), SCHEDULE.replace('"resnet8"', "8") % (1, "null"),
    SCHEDULE.replace('"model"', '"dataset": 5, "model"') % (1, "null"), SCHEDULE.replace("model", "modle") % (1, "null"),
    SCHEDULE.replace('"model"', '"image_size": 0.5, "model"') % (1, "null")])
def test_what_is_not_a_schedule_is_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "schedule.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as exit:
        epbt.main([*TINY, "--replay", str(path)])
    assert exit.value.code == 2
    assert "is not the schedule of a finished run" in capsys.readouterr().err.strip()
