"""The examples, run as a reader runs them, in an empty folder."""

import html
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
from tests.run_folders import read_json

ROOT = Path(__file__).parents[1]


def run(folder, *command):
    """What a command prints that is carried out in a folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(text):
    return [float(x) for x in re.findall(r"test accuracy .*?(\d\.\d+)", text)]


def test_own_model_and_data_and_an_own_loop_under_the_schedule(tmp_path):
    # The second example carries out the first where that has not been done.
    printed = run(tmp_path, sys.executable, "-m", "examples.replay_schedule")
    folder = tmp_path / "runs" / "own-model"
    summary, schedule = (read_json(folder / name) for name in ("summary.json", "schedule.json"))
    *_, by_hand, loaded, replayed = accuracies(printed)
    expected = summary["test_accuracy"]
    assert by_hand == pytest.approx(expected, abs=0.003)  # by an image, where the run was on a GPU
    assert loaded == pytest.approx(expected, abs=0.006)  # its images are not rounded to bytes
    assert replayed > 0.5
    assert "weight_decay" in summary["best"]["hyperparameters"] and len(schedule["epochs"]) <= 8


MINE = """
import torch
from epbt import Config, evolve
def make_model(num_classes, in_channels):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_channels * 64, num_classes))
if __name__ == "__main__":
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 4
    config = Config(population=4, generations=2, epochs=1, workers=2, out="runs/mine")
    evolve(config, make_model, images, images)
"""


def test_a_script_outside_the_repository_and_a_replay_of_its_schedule(tmp_path):
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    run(tmp_path, sys.executable, "mine.py")
    assert (tmp_path / "runs" / "mine" / "report.html").stat().st_size > 10_000
    run(tmp_path, sys.executable, ROOT / "epbt.py", *"--replay runs/mine --dataset digits "
        "--generations 1 --limit 200 --validation 50 --out runs/replay".split())
    for name, method in (("mine", "epbt"), ("replay", "replay")):
        summary = read_json(tmp_path / "runs" / name / "summary.json")
        assert (summary["method"], summary["model"]) == (method, "mine:make_model")


def test_wrong_labels_in_small(tmp_path, monkeypatch, capsys):
    small = dict(generations=2, epochs=1, population=4, workers=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(noisy_labels, "Config", lambda **given: Config(**given | small))
    noisy_labels.main()
    summary = read_json(tmp_path / "runs" / "noisy-epbt" / "summary.json")
    assert f"EPBT {summary['test_accuracy']:.1%}" in capsys.readouterr().out


def test_a_folder_of_images_and_a_model_of_torchvision(tmp_path):
    printed = run(tmp_path, ROOT / "examples" / "image_folder.sh")
    assert len(list((tmp_path / "data" / "digit-pictures").glob("digit ?/*.png"))) == 500
    for name in ("pictures", "pictures-replay"):
        folder, model = tmp_path / "runs" / name, resnet18(num_classes=10)
        model.load_state_dict(torch.load(folder / "best.pt", weights_only=True))
        names = read_json(folder / "summary.json")["class_names"]
        assert names == [f"digit {i}" for i in range(10)]
    assert accuracies(printed)[-1] > 0.3
    tables = (tmp_path / "runs/pictures/compared/README.md").read_text(encoding="utf-8")
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
    resources = {"metadata": {"path": tmp_path / "examples"}}
    nbclient.NotebookClient(notebook, resources=resources).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    text, folder = nbformat.writes(notebook), tmp_path / "runs" / "quickstart"
    summary = read_json(folder / "summary.json")
    once, twice = re.findall(r"(\d+\.\d+)%", re.search("test accuracy .*?by hand: .*?%", text)[0])
    assert once == twice == f"{summary['test_accuracy']:.2%}"[:-1]
    (page,) = [o.data["text/html"] for o in outputs if "<iframe" in str(o)]
    page = html.unescape(re.search('srcdoc="(.*?)" style', page, re.S)[1])
    assert page == (folder / "report.html").read_text(encoding="utf-8")
    for part in ("'__main__:kappa': ", "in this process alone: ", "put it into one to use more"):
        assert part in text
    assert not [o for o in outputs if o.output_type == "error"]
