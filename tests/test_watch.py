"""What TensorBoard is given, read back with TensorBoard's own reader."""

import json

import pytest

from figures import applied
from records import RunError, fittest, read_log
from tables import Run
from tests.run_folders import THETA, evolved, write
from watch import FITNESS, TEST, watched

pytest.importorskip("tensorboard")
LOG = evolved(0.5, 0.7, 0.8)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def points(folder):
    """{tag: [(step, value), ...]}."""
    found = events(folder)
    return {tag: [(e.step, pytest.approx(e.value)) for e in found.Scalars(tag)]
            for tag in found.Tags()["scalars"]}


def run(folder, first=0):
    """Writes the generations from `first` on into the log, one by one, as training does."""
    for g, population in list(enumerate(LOG))[first:]:
        with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"generation": g, "population": population}) + "\n")
        yield g, population


@pytest.mark.parametrize("done", [0, 2, 3])
def test_every_generation_is_there_once_as_the_log_has_it(done, tmp_path):
    folder = write(tmp_path / "e-1", LOG[:done], generations=3, population=4)
    list(watched((), folder))  # an earlier part of the run
    assert [g for g, _ in watched(run(folder, done), folder)] == list(range(3))[done:]
    expected = {
        FITNESS: [0.5, 0.7, 0.8], TEST: [0.5, 0.7, 0.8], "fitness/median": [0.485, 0.595, 0.745],
        "fitness/worst": [0.47, 0.49, 0.69], "population/evaluations": [4, 6, 8],
        "population/diverged": [0, 0, 0], "fittest/training_loss": [1, 1, 1],
        "theta/theta5": [10, 14, 16], "theta/theta1": [THETA[1]] * 3,
        "fittest/learning_rate": [0.2, 4.2, 6.2], "fittest/momentum": [0.5, 0.54, 0.56]}
    found = points(folder)
    for tag, values in expected.items():
        assert found[tag] == list(zip((2, 4, 6), values, strict=True)), tag


def test_a_generation_can_be_seen_at_once_and_the_settings_are_its_hyperparameters(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    folder = write(tmp_path / "e-1", [], generations=3, population=4)
    generations = watched(run(folder), folder)
    next(generations)
    assert len(points(folder)[FITNESS]) == 1
    content = events(folder).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["population"].number_value == 4
    assert settings["dataset"].string_value == "digits"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    folder = write(tmp_path / "e-1", LOG)
    (folder / "tensorboard").write_text("a file in its place")
    with pytest.raises(RunError, match="cannot write to .*tensorboard"):
        list(watched((), folder))


def test_a_real_run_is_watched_and_its_schedule_is_what_is_drawn(run_epbt):
    folder = run_epbt("--tensorboard")
    log, found = read_log(folder), points(folder)
    best = [fittest(line["population"]) for line in log]
    assert found[FITNESS] == list(zip((1, 2, 3), (m["fitness"] for m in best), strict=True))
    rates = [m["applied"]["learning_rate"][-1] for m in best]
    assert found["fittest/learning_rate"] == list(zip((1, 2, 3), rates, strict=True))
    assert list(applied(Run(folder), "learning_rate")) == rates
