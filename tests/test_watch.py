"""What TensorBoard is given, read back with TensorBoard's own reader."""

import importlib.util
import json
from dataclasses import replace
from statistics import median

import pytest

from epbt import Config, evolve, main
from options import ConfigError
from records import RunError, fittest, read_log
from replay import read_schedule
from watch import FITNESS, TEST

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None,
                                       reason="TensorBoard is not installed")


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def points(folder):
    """{tag: [(step, value), ...]}."""
    found = events(folder)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def config(folder, **settings):
    return Config(**{**dict(population=4, generations=3, epochs=2, limit=200, validation=40, workers=1, threads=1,
                            device="cpu", loss_backend="reference", tensorboard=True, out=str(folder)), **settings})


def carry_out(config, stop_after=None):
    """Carries out a run; with stop_after, up to Ctrl-C after so many generations."""
    lines = []

    def report(line):
        lines.append(line)
        if len(lines) == stop_after:
            raise KeyboardInterrupt

    return evolve(config, report=report)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    carry_out(config(folder))
    return folder


@needs_tensorboard
def test_every_generation_is_there_as_the_log_has_it(folder):
    found, log = points(folder), read_log(folder)
    best = [fittest(line["population"]) for line in log]
    fitness = [[m["fitness"] for m in line["population"]] for line in log]
    expected = {
        FITNESS: [m["fitness"] for m in best], TEST: [m["test_accuracy"] for m in best],
        "fitness/median": list(map(median, fitness)), "fitness/worst": list(map(min, fitness)),
        "population/evaluations": [4, 6, 8], "population/epochs_trained": [8, 12, 16], "population/diverged": [0, 0, 0],
        "theta/theta3": [m["hyperparameters"]["theta3"] for m in best],
        "fittest/momentum": [m["hyperparameters"]["momentum"] for m in best],
        "fittest/training_loss": [m["loss"] for m in best],
    }
    for tag, values in expected.items():
        assert found[tag] == [(step, pytest.approx(x)) for step, x in zip((2, 4, 6), values, strict=True)], tag
    assert len(found["fittest/learning_rate"]) == 3
    assert found["fittest/learning_rate"][-1][1] == pytest.approx(read_schedule(folder)["epochs"][-1]["learning_rate"])


@needs_tensorboard
def test_the_settings_are_its_hyperparameters(folder):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    content = events(folder).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["population"].number_value == 4 and settings["dataset"].string_value == "digits"


@needs_tensorboard
@pytest.mark.parametrize("watched_before", [True, False])
def test_a_resumed_run_lacks_no_generation_and_has_none_twice(watched_before, folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        carry_out(config(tmp_path, tensorboard=watched_before), stop_after=2)
    for _ in range(2):  # the second time it is finished
        carry_out(config(tmp_path, resume=True))
        assert points(tmp_path) == points(folder)


@needs_tensorboard
def test_starting_over_removes_the_old_events(tmp_path):
    c = config(tmp_path, generations=1, epochs=1)
    carry_out(c)
    carry_out(replace(c, overwrite=True, tensorboard=False))
    assert list(tmp_path.glob("tensorboard/*")) == []


@needs_tensorboard
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file in its place")
    with pytest.raises(RunError, match="cannot write to .*tensorboard"):
        carry_out(config(tmp_path, generations=1))


def test_without_the_package_one_line_says_how_to_get_it_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        main(["--tensorboard", "--out", str(tmp_path / "run")])
    assert exit.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == "epbt.py: --tensorboard needs TensorBoard: pip install tensorboard\n"
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Config(tensorboard=True).resolved()


def test_the_log_is_the_same_whether_it_is_watched_or_not(tmp_path):
    pytest.importorskip("tensorboard")
    for watch in (True, False):
        carry_out(config(tmp_path / str(watch), tensorboard=watch))
    logs = [(tmp_path / str(watch) / "log.jsonl").read_bytes() for watch in (True, False)]
    assert logs[0] == logs[1] and json.loads(logs[0].splitlines()[-1])["generation"] == 2
