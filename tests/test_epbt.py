"""Algorithm 1 on pretended and on real networks, and the command line."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import SEARCH_SPACE

import taylorglo_ext
from augmentation import Augmentation
from config import DATA_SETS, Config
from data import load_data, normalize
from epbt import evolve, main, read_data
from errors import ConfigError, DataError, RunError
from evolution import RATES, Variable, best_first, novelty_elites, pulse
from models import make_model
from outcome import finish, formula
from records import RunFolder, load_individual, read_config, read_log
from replay import replay_config
from taylorglo_ext.reference import reference_loss
from tests.conftest import TINY
from tests.run_folders import read_json
from tests.test_published import write_cifar10, write_svhn

ROOT = Path(__file__).parents[1]


def config(**settings):
    return Config("cifar10", **{"population": 8, "generations": 21, **settings})


def follows(log, population, elites):
    """Checks that every generation follows from the one before."""
    for g, (before, after) in enumerate(zip([{"population": []}, *log], log, strict=False)):
        known = {m["id"]: m for m in before["population"]}
        alive = [m for m in known.values() if not m["diverged"]]
        members = after["population"]
        assert after["generation"] == g and len(members) == population
        assert [m["id"] for m in members] == sorted({m["id"] for m in members})
        kept, born = ([m for m in members if m["elite"] is kept] for kept in (True, False))
        assert len(kept) == min(elites, len(alive))
        assert all({**known[m["id"]], "elite": True} == m and not m["diverged"] for m in kept)
        assert all(m["generation"] == g and m["id"] not in known for m in born)
        assert all(m["hyperparameters"].keys() == {v.name for v in SEARCH_SPACE} for m in born)
        if not alive:
            assert all(m["parent"] is m["mate"] is m["teacher"] is None for m in born)
            continue
        best = max(alive, key=lambda m: (m["fitness"], -m["id"]))
        assert best["id"] in {m["id"] for m in kept}
        for m in born:
            assert m["parent"] in known and not known[m["parent"]]["diverged"]
            assert m["mate"] is None or not known[m["mate"]]["diverged"]
            assert m["teacher"] == best["id"]
    return True


def test_the_papers_run_tries_520_losses_and_its_teachers_are_the_fittest(pretend):
    result = pretend(Config("cifar10"))
    assert [len(individuals) for individuals, *_ in result.calls] == [40] + 24 * [20]
    assert len({tuple(m.hyperparameters.values()) for m in result.everyone.values()}) == 520
    assert list(result.everyone) == list(range(520)) and follows(result.log, 40, 20)
    assert [alpha for *_, alpha in result.calls] == pytest.approx([0.8 * g / 24 for g in range(25)])
    for line, (_, teacher, _) in zip(result.log, result.calls[1:], strict=False):
        assert teacher.fitness == max(m["fitness"] for m in line["population"])
    alone = pretend(config(distillation=0.0))
    assert all(teacher is None and alpha == 0 for _, teacher, alpha in alone.calls)
    assert all(m.teacher is None for m in alone.everyone.values())


@pytest.mark.parametrize("settings", [
    *(dict(novelty=novelty) for novelty in ("pulsation", "one-in-p", "always", "off")),
    dict(population=2), dict(population=5, elites=4, tournament=99, known_losses=5)])
@pytest.mark.parametrize("chance", [0.0, 0.4, 0.9])
def test_every_generation_follows_from_the_one_before(settings, chance, pretend):
    c = config(**settings)
    log = pretend(c, diverges=lambda m: np.random.default_rng(m.id).random() < chance).log
    assert follows(log, c.population, c.k)


def test_a_generation_that_diverged_altogether_starts_over(pretend):
    result = pretend(config(generations=3), diverges=lambda m: m.generation == 0)
    assert follows(result.log, 8, 4)
    assert [(len(new), teacher is None, alpha) for new, teacher, alpha in result.calls] == [
        (8, True, 0), (8, True, 0), (4, False, 0.8)]
    first, second = ([m["hyperparameters"] for m in g["population"]] for g in result.log[:2])
    assert not any(h in first for h in second)


def test_the_only_survivor_is_everyones_parent_teacher_and_elite(pretend):
    log = pretend(config(generations=3), diverges=lambda m: m.id != 5).log
    assert follows(log, 8, 4)
    for line in log[1:]:
        (elite,) = [m for m in line["population"] if m["elite"]]
        assert elite["id"] == 5 and {m["mate"] for m in line["population"]} <= {5, None}


def test_elites_are_the_fittest_or_where_novelty_selection_pulses_the_most_novel(pretend):
    c, differ = config(population=12, behaviour_images=50), 0  # all: no choice is left to chance
    result = pretend(c)
    for g in range(1, c.generations):
        before = [result.everyone[m["id"]] for m in result.log[g - 1]["population"]]
        fitness = np.array([m.fitness for m in before])
        novel = novelty_elites(fitness, np.array([m.correct for m in before]), 6, 9)
        expected = novel if pulse(g, 5, "pulsation") else best_first(fitness, 6)
        elites = {m["id"] for m in result.log[g]["population"] if m["elite"]}
        assert elites == {before[i].id for i in expected}
        differ += set(novel) != set(best_first(fitness, 6))
    assert differ > 10  # so that one could not pass for the other


def test_without_mutation_a_child_has_its_parents_and_its_mates_hyperparameters(pretend):
    everyone = pretend(config(population=40, generations=5, mutation=0.0, reset=0.0)).everyone
    from_parent = []
    for m in everyone.values():
        if m.parent is not None:
            parent, mate = (everyone[m.parent if i is None else i].hyperparameters
                            for i in (m.parent, m.mate))
            h = m.hyperparameters.items()
            assert all(x in (parent[name], mate[name]) for name, x in h)
            from_parent += [x == parent[name] for name, x in h if parent[name] != mate[name]]
    assert np.mean(from_parent) == pytest.approx(0.5, abs=0.06) and len(from_parent) > 400


def test_known_losses_are_the_first_individuals_with_the_schedule_of_baseline_1(pretend):
    plain, found = (pretend(config(known_losses=n)).log[0]["population"] for n in (0, 2))
    known = [0, 1, 0, 0, 0, 10, -10, 0, 1, 5, 0.9]
    assert [list(m["hyperparameters"].values()) for m in found[:2]] == [known, known]
    assert found[2:] == plain[2:]
    (schedule, *_) = pretend(config(known_losses=1, loss="cross-entropy")).log[0]["population"]
    assert schedule["hyperparameters"] == {"lr_scale": 1, "lr_decay": 5, "momentum": 0.9}


@pytest.mark.parametrize("method", ["epbt", "pbt", "random"])
def test_a_run_depends_on_its_seed_alone_and_goes_on_as_if_never_stopped(method, pretend):
    whole, again, other = (pretend(config(method=method, seed=seed)) for seed in (1, 1, 2))
    assert whole.log == again.log != other.log
    for closed in (1, 8, 20):
        stopped = pretend(config(method=method, seed=1))
        stopped.log = stopped.log[:closed]
        assert pretend(config(method=method, seed=1), after=stopped).log == whole.log


def test_a_real_run_follows_the_rules_and_delivers_and_prints_what_was_measured(run_epbt):
    """And two workers write the same bytes."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        folder = run_epbt("--generations", "4", "--pulsation-period", "1")
    log, summary = read_log(folder), read_json(folder / "summary.json")
    assert follows(log, 4, 2)
    best = max(log[-1]["population"], key=lambda m: (m["fitness"], -m["id"]))
    assert {**best, **summary["best"]} == best and "delivered_test_accuracy" not in summary
    model = make_model("resnet8", 10, 1, seed=0)
    model.load_state_dict(torch.load(folder / "best.pt", weights_only=True))
    state = load_individual(folder / f"individuals/{best['id']:06d}.safetensors")[1]
    assert all(torch.equal(state[f"model/{name}"], t) for name, t in model.state_dict().items())
    data = load_data("digits", validation=60, limit=300)
    predicted = model.eval()(normalize(data.test.images, data.mean, data.std)).argmax(1)
    accuracy = (predicted == data.test.labels).float().mean().item()
    assert accuracy == pytest.approx(summary["test_accuracy"], abs=0.003)

    # A terminal that is none gets every line and no progress bar.
    assert err.getvalue() == "" and "\r" not in (out := out.getvalue())
    assert out.startswith("epbt, preset known, of resnet8 on digits: 10 evaluations of 1 epochs, ")
    lines = [line for line in out.splitlines() if line.startswith("generation")]
    for g, (line, text) in enumerate(zip(log, lines, strict=True)):
        fitness = sorted(m["fitness"] for m in line["population"])
        for part in (f"generation   {g + 1}/4", f"best fitness {fitness[-1]:.4f}", "diverged 0",
                     f"median fitness {sum(fitness[1:3]) / 2:.4f}", f"evaluated {4 + 2 * g:4}"):
            assert part in text
    for part in (f"best individual {best['id']}: fitness {best['fitness']:.4f}",
                 f"momentum {best['hyperparameters']['momentum']:.4g}",
                 formula(best["applied"]["theta"]), "10 evaluations, 10 epochs trained",
                 f"report.html are in {folder}"):
        assert part in out

    two = run_epbt("--generations", "4", "--pulsation-period", "1", "--workers", "2")
    for name in ("log.jsonl", "summary.json", "schedule.json"):
        assert (two / name).read_bytes() == (folder / name).read_bytes()


def test_a_delivered_model_that_is_not_the_measured_one_is_told(run_epbt, monkeypatch):
    """On a GPU, where another kernel may round otherwise, only if more than a few images differ."""
    path = run_epbt()
    stored = read_config(path)
    config = Config(**{f.name: stored[f.name] for f in fields(Config) if f.name in stored})
    data = read_data(config, None, None)
    measured = read_json(path / "summary.json")["test_accuracy"]
    with closing(RunFolder(path, stored, resume=True)) as folder:
        for device, off, warned in (("cpu", 0, 0), ("cpu", 1e-4, 1), ("cuda", 1e-3, 0),
                                    ("cuda", 0.01, 1)):
            monkeypatch.setattr("outcome.all_metrics", lambda *_, o=off: {"accuracy": measured + o})
            lines = []
            summary = finish(replace(config, device=device), folder, data, lines.append).summary
            assert [line.startswith("WARNING") for line in lines] == [True] * warned
            assert summary.get("delivered_test_accuracy", measured) == measured + off


def test_a_run_in_which_every_network_diverges_says_so(run_epbt, capsys):
    run_epbt("--learning-rate", "1e30", "--generations", "1")
    assert "every network diverged" in capsys.readouterr().out


def test_the_formula_that_is_printed_is_the_loss():
    theta = [0.5, -1.5, 2.0, -3.0, 4.5, -0.25, 7.0, 9.0]  # all terms exact in three digits
    logits = torch.tensor([[0.2, -0.4, 1.0]], dtype=torch.float64)
    inside = re.fullmatch(r"L = -1/n sum \[(.*)\]", formula(theta))[1]
    code = re.sub(r"([0-9)]) ?\(", r"\1*(", inside).replace("^", "**")
    y = logits.softmax(1)[0].tolist()
    value = -sum(eval(code, {"x": x, "y": y[i]}) for i, x in enumerate((0, 1, 0))) / 3
    expected = reference_loss(logits, torch.tensor([1]), torch.tensor(theta, dtype=torch.float64))
    assert value == pytest.approx(expected.item(), rel=1e-9)


def test_a_variable_more_is_evolved_recorded_and_drawn(run_epbt, monkeypatch):
    more = Variable("weight_decay", 1e-5, 1e-2, log=True)
    monkeypatch.setattr("evolution.RATES", (*RATES, more))
    folder = run_epbt("--generations", "4")
    born = [{m["hyperparameters"]["weight_decay"] for m in line["population"]
             if m["generation"] == line["generation"]} for line in read_log(folder)]
    assert all(1e-5 <= x <= 1e-2 for x in set().union(*born)) and max(born[0]) / min(born[0]) > 2
    assert all(new - set().union(*born[:g]) for g, new in enumerate(born))  # new ones each time
    best = read_json(folder / "summary.json")["best"]["hyperparameters"]["weight_decay"]
    assert read_json(folder / "schedule.json")["epochs"][-1]["weight_decay"] == best
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<td>weight decay</td><td>{best:.4g}</td>" in page


@pytest.mark.parametrize("name, write", [("cifar10", write_cifar10), ("svhn", write_svhn)])
def test_the_papers_protocols_run_for_two_generations(name, write, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", monkeypatch)
    main(["--dataset", name, "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "run"),
          *"--model resnet8 --population 4 --generations 2 --validation 20 --workers 1 "
          "--loss-backend reference --device cpu".split()])
    assert read_json(tmp_path / "run" / "summary.json")["epochs_trained"] == 6 * Config(name).epochs
    assert follows(read_log(tmp_path / "run"), 4, 2)


def refused(capsys, *arguments, lines=1):
    """What the command line says on standard error as it ends with exit code 2."""
    with pytest.raises(SystemExit) as error:
        main([*map(str, arguments)])
    err = capsys.readouterr().err
    assert error.value.code == 2 and len(err.splitlines()) == lines
    assert all(line.startswith("epbt.py: ") for line in err.splitlines())
    return err


@pytest.mark.parametrize("arguments, words", [
    # Usage
    ("--populaton 8", "--populaton 8 --population INT"), ("--image_siz 8", "--image_siz"),
    ("--population", "--population Expected"), ("eight", "Unrecognized eight"), ("-x", "-x"),
    ("--population 2.5", "--population '2.5' INT"), ("--seed x", "--seed 'x' INT Everything"),
    ("--milestones 0.5 x", "--milestones 'x' [FLOAT"), ("--population 8 9", "Unrecognized 9"),
    ("--method pbbt", "--method 'pbbt' 'pbt' 'epbt' 'baseline'"),
    ("--resume yes", "Unrecognized yes"),
    # Values; test_config.py has the others.
    ("--learning-rate -0.1", "--learning-rate above 0 -0.1"), ("--learning-rate=-inf", "-inf"),
    ("--crossover -1e-3", "--crossover from 0 on -0.001"),
    ("--learning-rate 1" + 400 * "0", "--learning-rate inf"),
    ("--milestones 0.5 80", "--milestones 80.0"), ("--resume --overwrite", "exclude each other"),
    ("--known-losses 99", "--known-losses at most --population (12) not 99"),
    ("--model resnet31", "--model 'resnet31' 'resnet32' wrn-16-8 torchvision:NAME"),
    ("--model nowhere:factory", "--model nowhere"), ("--fitness f1", "--fitness 'f1' f1-macro"),
    ("--model torchvision:vit_b_16", "--model torchvision:vit_b_16 images of 1 x 8 x 8"),
    pytest.param("--device cuda", "--device cuda GPU cpu", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
    # Data and folders
    ("--dataset cifar100", "'cifar100' 'cifar10' digits fashion fashion-long-tail svhn folder"),
    ("--dataset svhn --data-root nowhere", "SVHN --download nowhere --data-root"),
    ("--dataset empty", "empty"), ("--dataset damaged", "damaged a.png"),
    ("--limit 300 --validation 300", "--validation 290"),
    ("--augmentation flop", "--augmentation flop flip"), ("--out file", "file"),
    ("--dataset damaged --out damaged/run", "--out damaged/run --dataset within"),
    ("--dataset ~nosuchuser/x", "'~nosuchuser/x' accepted"),
    ("--replay ~nosuchuser/x", "~nosuchuser/x No such"),
    ("--dataset " + 300 * "x", "xxx accepted"), ("--resume --out " + 300 * "x", "holds no run"),
    ("--dataset .", "--out runs/epbt-"), ("--resume --out nowhere", "nowhere holds no run"),
    ("--resume --method pbt --seed 3", "runs/pbt-digits-3 holds no run"),
    ("--replay file", "file schedule of a finished run"), ("--replay nowhere", "nowhere No such"),
])
def test_a_mistake_costs_one_line_that_says_what_is_accepted(arguments, words, capsys, tmp_path,
                                                             monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "damaged/cats", "damaged/dogs"):
        Path(folder).mkdir(parents=True)
    for path in ("damaged/cats/a.png", "damaged/dogs/b.png"):
        Image.new("RGB", (8, 8)).save(path)
    os.truncate("damaged/cats/a.png", 45)
    Path("file").touch()
    line = refused(capsys, "--loss-backend", "reference", "--threads", "1", *arguments.split())
    assert [word for word in words.split() if word not in line] == [], line
    assert not list(tmp_path.glob("runs/**/*.json"))


def test_several_mistakes_are_told_at_once(capsys):
    lines = refused(capsys, *"--reset 2 --tournament 0 --workers -1".split(), lines=3).splitlines()
    assert [line.split()[1] for line in lines] == ["--tournament", "--reset", "--workers"]


@pytest.mark.parametrize("arguments, words", [
    ("--dataset cifar10 --data-root nowhere",
     "epbt, preset paper, of resnet32 on cifar10: 520 evaluations of 8 ep"),
    ("--dataset svhn --preset best --high-rates --out= --workers 0",
     "epbt, preset best, of resnet32 on svhn: 1210 "),
    ("--method baseline --population 9 --limit 0",
     "baseline, preset paper, of resnet8 on digits: 15 evaluations"),
])
def test_a_plan_tells_the_cost_without_the_data(arguments, words, capsys):
    main([*arguments.split(), "--plan"])
    assert capsys.readouterr().out.startswith(words)


def test_help_tells_every_option_with_the_numbers_of_the_data_set(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--dataset", "svhn", "--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert end.value.code == 0
    helps = {option.split()[0]: option for option in text.split(" --")[1:]}
    assert helps.keys() >= {f.name.replace("_", "-") for f in fields(Config)}
    for name, value in DATA_SETS["svhn"].items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        assert f"(default: {shown})" in helps[name.replace("_", "-")]


HIDDEN = 8


def make_small(num_classes, in_channels):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, HIDDEN), torch.nn.ReLU(),
        torch.nn.Linear(HIDDEN, num_classes))


IMAGES = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 4
OWN = dict(preset="best", population=4, generations=2, epochs=1, loss_backend="reference",
           workers=1, threads=1, device="cpu")


@pytest.mark.parametrize("model, train, test, words", [
    (make_small(4, 1), IMAGES, IMAGES, "must be a function or class .* an object .* Sequential"),
    ("resnet8", IMAGES, IMAGES, "must be .* not an object of the class str"),
    (lambda num_classes, in_channels: make_small(4, 1), IMAGES, IMAGES, "not .*<lambda>"),
    (torch.nn.Linear, IMAGES, IMAGES, "--model .*:Linear: .* unexpected .* 'num_classes'"),
    (make_small, IMAGES, None, "the test data .*NoneType"),
    (make_small, None, IMAGES, "the training data .*NoneType"),
    (None, None, None, r"no data: name a data set, or give train and test to evolve\(\)"),
])
def test_a_call_of_evolve_that_cannot_work_is_one_line(model, train, test, words, tmp_path):
    with pytest.raises((ConfigError, DataError), match=words) as error:
        evolve(Config(**OWN, out=str(tmp_path / "run")), model, train, test)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_data_of_ones_own_may_be_augmented_and_a_changed_model_is_told(tmp_path, monkeypatch):
    c = Config(**OWN, out=str(tmp_path), augmentation="flip shift=1 cutout=4")
    spelled = replace(c, augmentation=Augmentation(True, shift=1, cutout=4))  # means the same
    outcome = evolve(spelled, make_small, IMAGES, IMAGES)
    (page := tmp_path / "report.html").unlink()  # as if it could not be drawn
    outcome.report()
    assert page.exists()
    data = outcome.data
    assert data.train.images.shape[2:] == (10, 10)
    assert data.augmentation == Augmentation(True, shift=1, cutout=4)
    everyone = [m for line in read_log(tmp_path) for m in line["population"]]
    assert all(0 <= m["hyperparameters"]["cutout"] <= 4 for m in everyone)
    schedule = replay_config(tmp_path)  # a replay augments alike
    replayed = Config(**schedule | OWN | dict(preset="paper", out=str(tmp_path / "replayed")))
    assert evolve(replayed, make_small, IMAGES, IMAGES).data.augmentation == data.augmentation
    again = replace(c, resume=True)
    monkeypatch.setitem(globals(), "HIDDEN", 12)
    for changed, words in (("flip shift=1 cutout=3", "augmentation is"),
                           (c.augmentation, "of another model")):
        with pytest.raises(RunError, match=words):
            evolve(replace(again, augmentation=changed), make_small, IMAGES, IMAGES)


@pytest.mark.parametrize("name, call, last", [
    ("train.v2.py", "if __name__ == '__main__': evolve(Config(device='cpu'), make)",
     "errors.ConfigError: make is in train.v2.py, which cannot be imported: there must be no dot "
     "before .py"),
    ("unguarded.py", "evolve(Config('digits', workers=2, device='cpu', loss_backend='reference'))",
     "errors.RunError: worker processes import the script that calls evolve(): the call must stand "
     'under if __name__ == "__main__":'),
    ("-", "evolve(Config(workers=2, device='cpu'), make)",
     "errors.ConfigError: worker processes need each function in a file, not in a notebook: put it "
     "into one, or use workers=1"),
])
def test_a_script_that_workers_cannot_import_is_told_what_to_do(name, call, last, tmp_path):
    script = f"from epbt import *\ndef make(num_classes, in_channels): pass\n{call}\n"
    (tmp_path / name).write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, name], cwd=tmp_path, input=script, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.stderr.splitlines()[-1] == last
    assert done.stderr.count("Traceback") == 1  # the script's own


def test_a_loss_that_cannot_be_built_is_tried_and_told_once(tmp_path, monkeypatch):
    def fail(target):
        raise taylorglo_ext.BackendError("no compiler")

    monkeypatch.setattr(taylorglo_ext, "load_library", fail)
    monkeypatch.setattr(taylorglo_ext, "_in_use", {})
    with pytest.warns(UserWarning, match="slower reference loss: no compiler") as told:
        evolve(Config(**OWN | dict(loss_backend="auto"), out=str(tmp_path)), make_small, IMAGES,
               IMAGES)
    assert len(told) == 1


def test_files_in_the_working_directory_do_not_hide_ours(tmp_path):
    for name in ("training", "data", "models"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')")
    options = "--workers 2 --generations 1 --device cpu".split()
    done = subprocess.run([sys.executable, ROOT / "epbt.py", *TINY.split(), *options], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "wrong" not in done.stderr, done.stderr


def test_a_run_is_not_written_over_and_differences_are_named(run_epbt, capsys, monkeypatch):
    options = "--population 16 --elites 14 --generations 1 --model tests.soak:network"
    folder = run_epbt(*options.split())
    out = ["--out", str(folder)]

    def state():
        return {p: (p.read_bytes(), p.stat().st_mtime_ns)
                for p in folder.rglob("*.*[!k]") if p.is_file()}

    before = state()
    capsys.readouterr()
    line = refused(capsys, *out, "--loss-backend", "reference")
    assert "already holds a run" in line and "--resume" in line and "--overwrite" in line
    line = refused(capsys, "--resume", *out, "--epochs", "2", "--preset", "best")
    assert "--preset known, not best, --epochs 1, not 2" in line
    main(["--resume", *out])  # the rest is in the folder; 14 elites exceed the digits' population
    assert f"{folder} is finished: its files stay as they are" in capsys.readouterr().out
    monkeypatch.setattr("epbt.ThisProcess", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # no worker can start
        main(["--overwrite", *out, "--workers", "1", "--limit", "300"])
    assert before == state()


def test_a_run_that_is_stopped_twice_goes_on_to_the_same_bytes(run_epbt, tmp_path):
    options = "--generations 6 --workers 2 --seed 5 --model tests.soak:network".split()
    whole, out = run_epbt(*options), tmp_path / "a run"
    start, go_on = [*TINY.split(), *options, "--out", out], ["--resume", "--out", out]
    for arguments, closed, how in ((start, 1, signal.SIGINT), (go_on, 3, signal.SIGKILL)):
        process = subprocess.Popen(
            [sys.executable, ROOT / "epbt.py", *arguments], text=True, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, start_new_session=True,
            # A shell's background jobs ignore Ctrl-C, and so would this one.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
        while process.poll() is None and not (out.exists() and len(read_log(out)) >= closed):
            time.sleep(0.005)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert err == f"\ninterrupted; go on with: python epbt.py --resume --out '{out}'\n"
        assert not (out / "summary.json").exists()
    main(["--resume", "--out", str(out)])
    for name in ("log.jsonl", "summary.json", "schedule.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
