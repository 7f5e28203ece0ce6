"""The examples, run as a reader runs them, in an empty folder."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from torchvision.models import resnet18

from config import Config
from examples import noisy_labels

ROOT = Path(__file__).parents[1]


def run(folder, *command):
    """What a command prints that is carried out in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(text):
    return [float(x) for x in re.findall(r"test accuracy .*?(\d\.\d+)", text)]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_model_and_data_of_ones_own_and_a_loop_of_ones_own_under_the_schedule(tmp_path):
    # The second example carries out the first where that has not been done.
    printed = run(tmp_path, sys.executable, "-m", "examples.replay_schedule")
    summary, schedule = (read(tmp_path / "runs" / "own-model" / name) for name in ("summary.json", "schedule.json"))
    *_, by_hand, loaded, replayed = accuracies(printed)
    assert by_hand == pytest.approx(summary["test_accuracy"], abs=0.003)  # by an image, where the run was on a GPU
    assert loaded == pytest.approx(summary["test_accuracy"], abs=0.006)  # its images are not rounded to bytes
    assert replayed > 0.5
    assert "weight_decay" in summary["best"]["hyperparameters"] and len(schedule["epochs"]) <= 8


MINE = """
import torch
from epbt import Config, evolve
def make_model(num_classes, in_channels):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_channels * 64, num_classes))
if __name__ == "__main__":
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 4
    evolve(Config(population=4, generations=2, epochs=1, workers=2, out="runs/mine"), make_model, images, images)
"""


def test_a_script_outside_the_repository_and_a_replay_of_its_schedule(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    run(tmp_path, sys.executable, "mine.py")
    assert (tmp_path / "runs" / "mine" / "report.html").stat().st_size > 10_000
    run(tmp_path, sys.executable, ROOT / "epbt.py", *"--replay runs/mine --dataset digits --generations 1 --limit 200 "
        "--validation 50 --out runs/replay".split())
    for name, method in (("mine", "epbt"), ("replay", "replay")):
        summary = read(tmp_path / "runs" / name / "summary.json")
        assert (summary["method"], summary["model"]) == (method, "mine:make_model")


def test_wrong_labels_in_small(tmp_path, monkeypatch, capsys):
    small = dict(generations=2, epochs=1, population=4, workers=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(noisy_labels, "Config", lambda **given: Config(**given | small))
    noisy_labels.main()
    summary = read(tmp_path / "runs" / "noisy-epbt" / "summary.json")
    assert f"EPBT {summary['test_accuracy']:.1%}" in capsys.readouterr().out


def test_a_folder_of_images_and_a_model_of_torchvision(tmp_path):
    printed = run(tmp_path, ROOT / "examples" / "image_folder.sh")
    assert len(list((tmp_path / "data" / "digit-pictures").glob("digit ?/*.png"))) == 500
    for name in ("pictures", "pictures-replay"):
        model = resnet18(num_classes=10)
        model.load_state_dict(torch.load(tmp_path / "runs" / name / "best.pt", weights_only=True))
        assert read(tmp_path / "runs" / name / "summary.json")["class_names"] == [f"digit {i}" for i in range(10)]
    assert accuracies(printed)[-1] > 0.3
    tables = (tmp_path / "runs" / "pictures" / "compared" / "README.md").read_text(encoding="utf-8")
    assert "| pictures " in tables and "| pictures-replay " in tables
    shutil.rmtree(tmp_path / "runs")  # 700 MB: pytest keeps its folders


def test_the_notebook(tmp_path, monkeypatch):
    """As a new user runs it, from the folder examples, in small."""
    (tmp_path / "examples").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (size,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    size.source = "size = dict(population=4, generations=2, epochs=1, limit=400)"
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path / "examples"}}).execute()
    shown = {cell.id: cell.outputs for cell in notebook.cells if cell.get("outputs")}
    text = nbformat.writes(notebook)
    summary = read(tmp_path / "runs" / "quickstart" / "summary.json")
    once, twice = re.findall(r"(\d+\.\d+)%", re.search("test accuracy .*?by hand: .*?%", text)[0])
    assert once == twice == f"{summary['test_accuracy']:.2%}"[:-1]
    (page,) = [o.data["text/html"] for outputs in shown.values() for o in outputs if "<iframe" in str(o)]
    assert html.unescape(re.search('srcdoc="(.*?)" style', page, re.S)[1]) == (
        tmp_path / "runs" / "quickstart" / "report.html").read_text(encoding="utf-8")
    assert "'__main__:kappa': " in text and "in this process alone: " in text and "put it into one to use more" in text
    assert not [o for outputs in shown.values() for o in outputs if o.output_type == "error"]
