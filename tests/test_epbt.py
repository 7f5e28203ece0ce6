"""Algorithm 1 as shipped, on pretended and on real networks, and the command line."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from config import PROTOCOLS
from data import Augmentation, DataError, load_data, normalize
from epbt import Config, checked_space, evolve, formula, main
from evolution import MOMENTUM, SEARCH_SPACE, Variable, best_first, novelty_elites, pulse
from models import make_model
from options import ConfigError
from records import RunError, read_log
from taylorglo_ext.reference import reference_loss
from tests.test_published import write_cifar10, write_svhn

ROOT = Path(__file__).parents[1]


def config(**settings):
    return Config(**{"population": 8, "generations": 21, **settings}).resolved()


def by_chance(chance):
    return lambda m: np.random.default_rng(m.id).random() < chance


# The numbers of the paper.


def test_the_protocol_of_cifar10_is_that_of_sec_4_1():
    c = Config(dataset="cifar10").resolved()
    assert (c.model, c.population, c.elites, c.novelty_candidates) == ("resnet32", 40, 20, 30)
    assert (c.generations, c.epochs, c.generations * c.epochs) == (25, 8, 200)
    assert [m * 200 for m in c.milestones] == pytest.approx([60, 120, 160])
    assert (c.batch_size, c.learning_rate, c.lr_decay, c.momentum) == (128, 0.1, 5, 0.9)
    assert (c.tournament, c.crossover, c.behaviour_images, c.pulsation_period) == (2, 0.5, 400, 5)


def test_the_protocol_of_svhn_is_that_of_sec_4_2():
    c = Config(dataset="svhn").resolved()
    assert (c.model, c.population, c.generations, c.epochs, c.lr_decay) == ("resnet32", 40, 40, 1, 10)
    assert [m * 40 for m in c.milestones] == pytest.approx([20, 30])


def test_520_losses_are_tried_in_4160_epochs(pretend):
    c = Config(dataset="cifar10").resolved()
    result = pretend(c)
    assert [len(individuals) for individuals, *_ in result.calls] == [40] + 24 * [20]
    assert sum(len(individuals) for individuals, *_ in result.calls) * c.epochs == 4160
    assert len({tuple(m.hyperparameters.values()) for m in result.everyone.values()}) == 520 == c.evaluations()
    assert list(result.everyone) == list(range(520))


# The rules of Algorithm 1, on any log.


def check(log, population, elites):
    """That every generation follows from the one before."""
    for g, (before, after) in enumerate(zip([{"population": []}, *log], log, strict=False)):
        known = {m["id"]: m for m in before["population"]}
        alive = [m for m in known.values() if not m["diverged"]]
        members = after["population"]
        assert after["generation"] == g and len(members) == population
        assert [m["id"] for m in members] == sorted({m["id"] for m in members})

        kept, born = ([m for m in members if m["elite"] is kept] for kept in (True, False))
        assert len(kept) == min(elites, len(alive))
        assert [{**m, "elite": known[m["id"]]["elite"]} for m in kept] == [known[m["id"]] for m in kept]
        assert not any(m["diverged"] for m in kept)
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


@pytest.mark.parametrize("novelty", ["pulsation", "one-in-p", "always", "off"])
@pytest.mark.parametrize("diverges", [0.0, 0.4, 0.9])
def test_every_generation_follows_from_the_one_before(novelty, diverges, pretend):
    check(pretend(config(novelty=novelty), by_chance(diverges)).log, 8, 4)


def test_a_generation_that_diverged_altogether_starts_over(pretend):
    result = pretend(config(generations=3), diverges=lambda m: m.generation == 0)
    check(result.log, 8, 4)
    assert [(len(new), teacher is None, alpha) for new, teacher, alpha in result.calls] == [
        (8, True, 0), (8, True, 0), (4, False, 0.8)]
    first, second = ([m["hyperparameters"] for m in line["population"]] for line in result.log[:2])
    assert not any(h in first for h in second)


def test_the_only_survivor_is_everyones_parent_teacher_and_elite(pretend):
    log = pretend(config(generations=3), diverges=lambda m: m.id != 5).log
    for line in log[1:]:
        assert [m["id"] for m in line["population"] if m["elite"]] == [5]
        assert {(m["parent"], m["teacher"]) for m in line["population"] if not m["elite"]} == {(5, 5)}
        assert {m["mate"] for m in line["population"] if not m["elite"]} <= {5, None}  # a sibling's hyperparameters


def test_elites_are_the_fittest_or_where_novelty_selection_pulses_the_most_novel(pretend):
    c, differ = config(population=12, behaviour_images=50), 0  # all images: no choice of them is left to chance
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


def test_the_teacher_is_the_fittest_of_the_last_generation_and_alpha_rises_to_the_end(pretend):
    result = pretend(config(distillation=0.6))
    assert [alpha for *_, alpha in result.calls] == pytest.approx([0.6 * g / 20 for g in range(21)])
    for line, (_, teacher, _) in zip(result.log, result.calls[1:], strict=False):
        assert teacher.fitness == max(m["fitness"] for m in line["population"])


def test_without_distillation_nobody_teaches(pretend):
    result = pretend(config(distillation=0.0))
    assert all(teacher is None and alpha == 0 for _, teacher, alpha in result.calls)
    assert all(m.teacher is None for m in result.everyone.values())


def test_without_mutation_a_child_has_its_parents_and_its_mates_hyperparameters(pretend):
    everyone = pretend(config(population=40, generations=5, mutation=0.0, reset=0.0)).everyone
    from_parent = []
    for m in everyone.values():
        if m.parent is not None:
            parent, mate = (everyone[m.parent if i is None else i].hyperparameters for i in (m.parent, m.mate))
            assert all(x in (parent[name], mate[name]) for name, x in m.hyperparameters.items())
            from_parent += [x == parent[name] for name, x in m.hyperparameters.items() if parent[name] != mate[name]]
    assert np.mean(from_parent) == pytest.approx(0.5, abs=0.06) and len(from_parent) > 400


def test_without_taylorglo_only_the_schedule_and_momentum_evolve(pretend):
    c = config(loss="cross-entropy", viable_init=True)
    assert {tuple(m.hyperparameters) for m in pretend(c).everyone.values()} == {("lr_scale", "lr_decay", "momentum")}


@pytest.mark.parametrize("method", ["epbt", "pbt", "random"])
def test_a_run_depends_on_its_seed_alone_and_goes_on_as_if_never_stopped(method, pretend):
    whole, again, other = (pretend(config(method=method, seed=seed)) for seed in (1, 1, 2))
    assert whole.log == again.log != other.log
    stopped = pretend(config(method=method, seed=1))
    stopped.log = stopped.log[:8]
    assert pretend(config(method=method, seed=1), after=stopped).log == whole.log


# A real run.


@pytest.fixture(scope="module")
def folder(run_epbt):
    return run_epbt("--generations", "4", "--pulsation-period", "1")


def test_a_real_log_follows_the_rules_and_holds_what_it_should(folder):
    log = read_log(folder)
    check(log, 4, 2)
    for m in (m for line in log for m in line["population"]):
        assert m.keys() == {"id", "generation", "parent", "mate", "teacher", "elite", "hyperparameters", "fitness",
                            "test_accuracy", "loss", "diverged"}
        assert 0 <= m["fitness"] <= 1 and 0 < m["test_accuracy"] <= 1


def test_the_summary_is_of_the_fittest_of_the_last_generation(folder):
    summary = json.loads((folder / "summary.json").read_text())
    best = max(read_log(folder)[-1]["population"], key=lambda m: (m["fitness"], -m["id"]))
    assert {**best, **summary["best"]} == best
    assert (summary["fitness"], summary["test_accuracy"]) == (best["fitness"], best["test_accuracy"])
    assert summary["evaluations"] == summary["epochs_trained"] == 4 + 3 * 2


def test_best_pt_is_the_network_whose_accuracy_was_logged(folder):
    model = make_model("resnet8", 10, 1, seed=0)
    model.load_state_dict(torch.load(folder / "best.pt", weights_only=True))
    data = load_data("digits", validation=60, enlarge=1, limit=300)
    predicted = model.eval()(normalize(data.test.images, data.mean, data.std)).argmax(1)
    accuracy = (predicted == data.test.labels).float().mean().item()
    assert accuracy == pytest.approx(json.loads((folder / "summary.json").read_text())["test_accuracy"], abs=0.003)


def test_any_number_of_workers_writes_the_same_bytes(folder, run_epbt):
    two = run_epbt("--generations", "4", "--pulsation-period", "1", "--workers", "2")
    assert (two / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()
    assert (two / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()


def test_output_that_is_no_terminal_gets_every_line_and_no_progress_bar(run_epbt, capsys):
    folder = run_epbt()
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out
    lines = out.splitlines()
    for g, (line, text) in enumerate(zip(read_log(folder), lines, strict=False)):
        fitness = sorted(m["fitness"] for m in line["population"])
        for part in (f"generation   {g + 1}/3", f"best fitness {fitness[-1]:.4f}",
                     f"median fitness {(fitness[1] + fitness[2]) / 2:.4f}", f"losses tried {4 + 2 * g:4}", "diverged 0"):
            assert part in text
    best = json.loads((folder / "summary.json").read_text())["best"]
    ending = "\n".join(lines[3:])
    for part in (f"best individual {best['id']}", f"momentum {best['hyperparameters']['momentum']:.4g}",
                 formula([best["hyperparameters"][f"theta{i}"] for i in range(8)]), "8 evaluations, 8 epochs", str(folder)):
        assert part in ending


def test_the_formula_that_is_printed_is_the_loss():
    theta = [0.5, -1.5, 2.0, -3.0, 4.5, -0.25, 7.0, 9.0]  # all terms exact in three digits
    logits = torch.tensor([[0.2, -0.4, 1.0]], dtype=torch.float64)
    text = formula(theta)
    inside = re.fullmatch(r"L = -1/n sum \[(.*)\]", text)[1]
    code = re.sub(r"([0-9)]) ?\(", r"\1*(", inside).replace("^", "**")
    y = logits.softmax(1)[0].tolist()
    value = -(eval(code, {"x": 0, "y": y[0]}) + eval(code, {"x": 1, "y": y[1]}) + eval(code, {"x": 0, "y": y[2]})) / 3
    expected = reference_loss(logits, torch.tensor([1]), torch.tensor(theta, dtype=torch.float64)).item()
    assert value == pytest.approx(expected, rel=1e-9)


# What the user gets wrong.


def refused(capsys, arguments):
    """The one line on which the command line ends, with exit code 2."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == ""
    assert err.startswith("epbt.py: ") and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("arguments, words", [
    ("--dataset cifar100", "'cifar100' 'cifar10' digits fashion svhn folder"),
    ("--model resnet31", "--model 'resnet31' 'resnet32' wrn-16-8 torchvision:NAME"),
    ("--model torchvision:resnet19", "--model 'resnet19' 'resnet18'"),
    ("--model nowhere:factory", "--model nowhere"),
    ("--method pbbt", "--method 'pbbt' 'pbt' epbt baseline"),
    ("--method replay", "--method --replay folder"),
    ("--method pbt --replay schedule.json", "--replay without --method pbt"),
    ("--replay custom.json", "custom.json evolve() --dataset"),
    ("--theta-range 1e300", "--theta-range at most 1000000"),
    ("--threads 100000", "--threads at most 1024"),
    ("--novelty puls", "--novelty 'puls' pulsation one-in-p always off"),
    ("--loss mse", "--loss 'mse' taylorglo cross-entropy"),
    ("--loss-backend cuda", "--loss-backend 'cuda' auto fused reference"),
    ("--device tpu", "--device 'tpu' auto cpu cuda"),
    pytest.param("--device cuda", "--device cuda GPU cpu", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
    ("--populaton 8", "--populaton --population"),
    ("--population", "--population expected"),
    ("eight", "eight"),
    ("--population 0", "--population 1 0"),
    ("--population 2.5", "--population whole 2.5"),
    ("--population eight", "--population whole 'eight'"),
    ("--population 1", "--population 2 epbt 1"),
    ("--population 8 --elites 8", "--elites --population 8"),
    ("--population 8 --elites 0", "--elites 1 0"),
    ("--population 8 --elites 4 --novelty-candidates 3", "--novelty-candidates --elites 4 --population 8 3"),
    ("--population 8 --elites 4 --novelty-candidates 9", "--novelty-candidates 9"),
    ("--generations 0", "--generations 1 0"),
    ("--epochs -1", "--epochs 1 -1"),
    ("--batch-size 0", "--batch-size 1 0"),
    ("--learning-rate -0.1", "--learning-rate above 0 -0.1"),
    ("--learning-rate 0", "--learning-rate above 0"),
    ("--learning-rate inf", "--learning-rate number inf"),
    ("--lr-decay 0", "--lr-decay above 0"),
    ("--momentum 1.5", "--momentum 0 1 1.5"),
    ("--weight-decay -1", "--weight-decay 0 -1"),
    ("--milestones 0.5 80", "--milestones 0 1 80"),
    ("--mutation nan", "--mutation number nan"),
    ("--reset 1.01", "--reset 0 1 1.01"),
    ("--crossover -0.5", "--crossover 0 1 -0.5"),
    ("--distillation 2", "--distillation 0 1 2"),
    ("--tournament 0", "--tournament 1 0"),
    ("--pulsation-period 0", "--pulsation-period 1 0"),
    ("--behaviour-images 0", "--behaviour-images 1 0"),
    ("--validation 0", "--validation 1 0"),
    ("--limit 300 --validation 300", "--validation 300 290"),
    ("--limit 5000", "--limit 5000 1437"),
    ("--enlarge 0", "--enlarge 1 0"),
    ("--enlarge 1000000000", "--enlarge at most 1000"),
    ("--image-size 1000000", "--image-size at most 2048"),
    ("--seed -1", "--seed 0 -1"),
    ("--workers 0", "--workers 1 0"),
    ("--learning-rate 1" + 400 * "0", "--learning-rate must be a number"),
    ("--method pbt --population 3", "--population at least 4 not 3"),
    ("--out=", "--out must not be empty"),
    ("--threads 0", "--threads 1 0"),
    ("--resume --overwrite", "--resume --overwrite"),
    ("--dataset svhn --data-root nowhere", "SVHN nowhere --download"),
    ("--dataset fashion --data-root broken", "train-images-idx3-ubyte"),
    ("--dataset empty", "empty"),
    ("--dataset childless", "childless dogs"),
    ("--dataset damaged", "damaged a.png"),
    ("--dataset file", "'file' folder"),
    ("--out file", "file"),
    ("--dataset damaged --out damaged/run", "--out damaged/run --dataset within"),
    ("--dataset .", "--out runs/epbt-"),
    ("--resume --out nowhere", "nowhere"),
])
def test_a_mistake_costs_one_line_that_says_what_is_accepted(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "childless/cats", "childless/dogs", "damaged/cats", "damaged/dogs", "broken"):
        Path(folder).mkdir(parents=True)
    for path in ("childless/cats/a.png", "damaged/cats/a.png", "damaged/dogs/b.png"):
        Image.new("RGB", (8, 8)).save(path)
    Path("damaged/cats/a.png").write_bytes(Path("damaged/cats/a.png").read_bytes()[:45])
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            Path(f"broken/{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    Path("file").write_text("")
    epoch = dict(learning_rate=0.1, momentum=0.9, weight_decay=0, cutout=0, theta=None)
    for name, dataset in (("schedule", "digits"), ("custom", "custom")):
        Path(f"{name}.json").write_text(json.dumps(dict(dataset=dataset, model="resnet8", batch_size=8, epochs=[epoch])))
    line = refused(capsys, ["--loss-backend", "reference", "--workers", "1", *arguments.split()])
    assert [word for word in words.split() if word not in line] == []


def test_a_folder_that_holds_a_run_is_not_written_over(run_epbt, capsys, folder):
    before = (folder / "log.jsonl").read_bytes()
    capsys.readouterr()
    line = refused(capsys, ["--out", str(folder), "--loss-backend", "reference"])
    assert "--resume" in line and "--overwrite" in line and str(folder) in line
    assert (folder / "log.jsonl").read_bytes() == before


def test_a_resumed_run_is_judged_by_its_own_settings_not_by_the_defaults(run_epbt):
    folder = run_epbt("--population", "16", "--elites", "14", "--generations", "1", "--model", "tests.soak:network")
    log = (folder / "log.jsonl").read_bytes()
    main(["--resume", "--elites", "14", "--out", str(folder), "--device", "cpu"])  # of the digits' 12 it would be too many
    assert (folder / "log.jsonl").read_bytes() == log


def test_a_number_in_place_of_a_tuple_is_told():
    with pytest.raises(ConfigError, match="--milestones must be a tuple or list of numbers, not 0.5"):
        Config(milestones=0.5).resolved()


def test_several_mistakes_are_told_at_once(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--reset", "2", "--tournament", "0"])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2
    assert ["--tournament" in lines[0], "--reset" in lines[1], len(lines)] == [True, True, 2]


def python(*arguments, cwd=ROOT, input=None):
    """A program, from outside of pytest."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          input=input, capture_output=True, text=True)


def test_from_the_shell_a_mistake_is_one_line_and_exit_code_2():
    shell = python("epbt.py", "--population", "4", "--elites", "4")
    assert (shell.returncode, shell.stdout) == (2, "")
    assert re.fullmatch(r"epbt\.py: --elites .*--population .*4\n", shell.stderr)


def test_a_plan_tells_the_cost_without_the_data(capsys):
    main(["--dataset", "cifar10", "--data-root", "nowhere", "--plan"])
    out = capsys.readouterr().out
    assert [number for number in ("520", "4160", "resnet32", "cifar10") if number not in out] == []


def test_help_tells_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert [f.name for f in fields(Config) if not re.search(rf"--{f.name.replace('_', '-')}[\s,]", text)] == []
    words = " ".join(text.split())
    assert "{pulsation,one-in-p,always,off}" in words and "(default pulsation)" in words
    assert ("svhn: --model resnet32 --population 40 --generations 40 --epochs 1 --batch-size 128 --milestones 0.5 0.75 "
            "--lr-decay 10.0 --validation 30000 --enlarge 1") in words


# Configurations.


def test_a_resolved_config_is_complete_and_resolves_to_itself():
    c = Config(dataset="cifar10").resolved()
    open_ends = {f.name for f in fields(c) if getattr(c, f.name) is None}
    assert open_ends <= {"replay", "validation", "enlarge", "limit", "data_root", "ray_address"}
    assert c.resolved() == c


def test_the_presets_fill_in_what_is_not_given():
    paper, best = Config(dataset="cifar10").resolved(), Config(dataset="cifar10", preset="best").resolved()
    assert (paper.elites, paper.distillation, paper.theta_range) == (20, 0.8, 10.0)
    assert (best.elites, best.distillation, best.theta_range) == (10, 0.0, 1.0)
    assert best.average_weights and best.add_cross_entropy and best.evolve_cutout
    assert [v.name for v in best.search_space()] == [v.name for v in SEARCH_SPACE] + ["cutout"]
    assert [(v.low, v.high) for v in best.search_space()[8:]] == [(1, 10), (1, 10), (0.8, 0.97), (0, 16)]
    assert best.milestones == () and paper.milestones == (0.3, 0.6, 0.8)
    assert {(v.low, v.high) for v in best.search_space()[:8]} == {(-1.0, 1.0)}
    assert paper.search_space() == SEARCH_SPACE
    own = Config(dataset="cifar10", preset="best", elites=20, distillation=0.4, theta_range=10.0).resolved()
    assert (own.elites, own.distillation, own.theta_range) == (20, 0.4, 10.0) and own.average_weights
    less = Config(dataset="cifar10", preset="best", average_weights=False, high_rates=False, milestones=(0.5,)).resolved()
    assert not less.average_weights and less.add_cross_entropy and less.milestones == (0.5,)
    assert [v for v in less.search_space() if v.name == "momentum"] == [v for v in SEARCH_SPACE if v.name == "momentum"]
    assert not (paper.average_weights or paper.add_cross_entropy or paper.evolve_cutout or paper.high_rates)


@pytest.mark.parametrize("population, elites, candidates", [(2, 1, 1), (3, 1, 1), (5, 2, 3), (5, 4, 5), (40, 20, 30)])
def test_any_elite_count_below_the_population_is_accepted(population, elites, candidates, pretend):
    c = config(population=population, elites=elites, novelty="always")
    assert c.novelty_candidates == candidates
    check(pretend(c).log, population, elites)


def test_a_search_space_of_ones_own_is_evolved(tmp_path):
    c = Config(population=2, generations=2, epochs=1, limit=300, validation=60, workers=1, loss_backend="reference",
               loss="cross-entropy", device="cpu", out=str(tmp_path))
    space = (Variable("weight_decay", 1e-5, 1e-2, log=True), Variable("cutout", 0, 4))
    evolve(c, space=space, report=lambda line: None)
    for m in read_log(tmp_path)[-1]["population"]:
        assert m["hyperparameters"].keys() == {"weight_decay", "cutout"}
        assert 1e-5 <= m["hyperparameters"]["weight_decay"] <= 1e-2 and 0 <= m["hyperparameters"]["cutout"] <= 4


def make_one(num_classes, in_channels):
    return make_model("resnet8", num_classes, in_channels, seed=0)


HIDDEN = 8


def make_small(num_classes, in_channels):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, HIDDEN), torch.nn.ReLU(),
                               torch.nn.Linear(HIDDEN, num_classes))


IMAGES = torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 4


@pytest.mark.parametrize("model, train, test, message", [
    (make_one(4, 1), IMAGES, IMAGES, "make_model must be a function or class .* not an object of the class ResNet"),
    ("resnet8", IMAGES, IMAGES, "make_model must be .* not an object of the class str"),
    (lambda num_classes, in_channels: make_one(num_classes, in_channels), IMAGES, IMAGES, "not .*<lambda>"),
    (torch.nn.Linear, IMAGES, IMAGES, "--model: model .*:Linear: it must be callable as factory"),
    (make_one, IMAGES, None, "the test data are NoneType"),
    (make_one, None, IMAGES, "the training data are NoneType"),
    (None, None, None, "the data of this run were given to evolve\\(\\): go on from Python"),
])
def test_a_call_of_evolve_that_cannot_work_is_refused_in_one_line(model, train, test, message, tmp_path):
    c = Config(dataset="custom", loss_backend="reference", workers=1, device="cpu", out=str(tmp_path / "run"))
    with pytest.raises((ConfigError, DataError), match=message) as error:
        evolve(c, model, train, test)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_the_images_is_refused_before_the_run_begins(capsys, tmp_path):
    line = refused(capsys, f"--model torchvision:vit_b_16 --loss-backend reference --out {tmp_path / 'run'}".split())
    assert "--model: model torchvision:vit_b_16: it cannot be trained on batches of 128 images of 1 x 8 x 8" in line
    assert not (tmp_path / "run").exists()


def test_a_model_of_a_script_without_a_file_needs_workers_1():
    script = ("import torch, epbt\n"
              "def make(num_classes, in_channels): pass\n"
              "try: epbt.evolve(epbt.Config(workers=2, device='cpu'), make)\n"
              "except epbt.ConfigError as error: print(error)\n")
    done = python("-", input=script)
    assert "workers=1" in done.stdout and done.stdout.count("\n") == 1, done.stderr


def test_a_program_from_standard_input_has_workers_too(tmp_path):
    options = f"--population 2 --generations 1 --epochs 1 --limit 300 --workers 2 --device cpu --out {tmp_path / 'run'}"
    script = f"import epbt\nepbt.main({options.split()})"
    done = python("-", input=script)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_data_of_ones_own_may_be_augmented(tmp_path):
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 4
    c = Config(population=4, generations=2, epochs=1, preset="best", loss_backend="reference", workers=1, threads=1,
               device="cpu", out=str(tmp_path / "run"))
    outcome = evolve(c, make_small, images, images, augmentation=Augmentation(flip=True, shift=1, cutout=4))
    assert outcome.data.train.images.shape[2:] == (10, 10)
    assert outcome.data.augmentation == Augmentation(flip=True, shift=1, cutout=4)
    assert c.resolved().search_space(outcome.data.augmentation)[-1] == Variable("cutout", 0, 4)  # though without a data set
    log = read_log(tmp_path / "run")
    assert all(0 <= m["hyperparameters"]["cutout"] <= 4 for line in log for m in line["population"])
    with pytest.raises(RunError, match="augmentation is"):
        evolve(replace(c, resume=True), make_small, images, images, augmentation=Augmentation(flip=True, shift=1, cutout=3))
    with pytest.raises(ConfigError, match="augmentation is for data that are given"):
        evolve(replace(c, dataset="digits"), augmentation=Augmentation(flip=True))


def test_a_model_that_was_changed_since_is_told_when_its_run_goes_on(tmp_path, monkeypatch):
    c = Config(population=4, generations=2, epochs=1, loss_backend="reference", workers=1, threads=1, device="cpu",
               limit=200, validation=40, out=str(tmp_path / "run"))
    evolve(c, make_small)
    monkeypatch.setitem(globals(), "HIDDEN", 12)
    with pytest.raises(RunError, match="the weights in the run's folder have .* bytes, and the model has .*: it has been"):
        evolve(replace(c, resume=True), make_small)


def test_a_model_of_a_script_that_no_worker_can_import(tmp_path):
    script = tmp_path / "train.v2.py"
    script.write_text("import epbt\n"
                      "def make(num_classes, in_channels): pass\n"
                      "if __name__ == '__main__': epbt.evolve(epbt.Config(device='cpu'), make)\n")
    done = python(script, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == ("errors.ConfigError: make_model is in train.v2.py, which cannot be imported: "
                                            "there must be no dot before .py")


def test_a_script_that_calls_evolve_while_workers_import_it_is_told_what_to_do(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text("import epbt\nepbt.evolve(epbt.Config(workers=2, device='cpu', loss_backend='reference'))\n")
    done = python(script, cwd=tmp_path)
    *_, last = done.stderr.splitlines()
    assert last == ("errors.RunError: worker processes import the script that calls evolve(): the call must stand under "
                    'if __name__ == "__main__":')
    assert done.stderr.count("Traceback") == 1  # the script's own


def test_a_run_in_which_every_network_diverged_says_so(run_epbt, capsys):
    run_epbt("--learning-rate", "1e30", "--generations", "1")
    assert "every network diverged" in capsys.readouterr().out


def test_weight_decay_is_evolved_with_one_line_more(run_epbt, monkeypatch):
    monkeypatch.setattr("evolution.MOMENTUM", (*MOMENTUM, Variable("weight_decay", 1e-5, 1e-2, log=True)))
    folder = run_epbt("--generations", "4")
    born = [[m["hyperparameters"]["weight_decay"] for m in line["population"] if m["generation"] == line["generation"]]
            for line in read_log(folder)]
    everyone = sum(born, [])
    assert all(1e-5 <= x <= 1e-2 for x in everyone)
    assert len(set(born[0])) == 4 and max(born[0]) / min(born[0]) > 2  # spread over its logarithm
    assert all(set(new) - set(sum(born[:g], [])) for g, new in enumerate(born))  # each generation finds new ones
    schedule = json.loads((folder / "schedule.json").read_text())
    assert {epoch["weight_decay"] for epoch in schedule["epochs"]} <= set(everyone)
    best = json.loads((folder / "summary.json").read_text())["best"]["hyperparameters"]["weight_decay"]
    assert schedule["epochs"][-1]["weight_decay"] == best
    assert "weight decay" in (folder / "schedule.svg").read_text()
    assert f"<td>weight decay</td><td>{best:.4g}</td>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("space, message", [
    ((Variable("wieght_decay", 0, 1),), "'wieght_decay', did you mean 'weight_decay'"),
    ((*SEARCH_SPACE, Variable("momentum", 0, 1)), "momentum is twice"),
    (SEARCH_SPACE[1:], "7 of the eight thetas"),
    ((Variable("momentum", 0.5, 3),), "momentum cannot be 0.5 to 3; it must stay from 0 on, .* and momentum at most 1"),
    ((Variable("momentum", 0.5, 0.9, clip=False),), "momentum cannot be 0.5 to 0.9 without clip"),
    ((Variable("cutout", -1, 3),), "cutout cannot be -1 to 3; it must stay from 0 on"),
    ((Variable("lr_decay", 0, 3),), "lr_decay cannot be 0 to 3"),
    ((Variable("lr_scale", 0.1, np.inf),), "with Python's finite numbers"),
    ((Variable(3, 0.1, 1),), "must be a tuple of evolution.Variable"),
    ((Variable("momentum", np.float32(0.5), 1),), "with Python's finite numbers, not Variable"),
    (("momentum",), "must be a tuple of evolution.Variable"),
])
def test_a_search_space_that_training_cannot_apply_is_refused(space, message):
    with pytest.raises(ConfigError, match=message):
        checked_space(v for v in space)
    with pytest.raises(ConfigError, match=message):
        checked_space(space)


def test_a_space_of_one_variable_may_stand_alone():
    assert checked_space(SEARCH_SPACE[-1]) == SEARCH_SPACE[-1:]


def test_baseline_1_is_one_network_and_uses_every_core():
    c = Config(method="baseline", dataset="cifar10", device="cpu").resolved()
    assert (c.population, c.workers, c.search_space()) == (1, 1, ())
    data = SimpleNamespace(augmentation=Augmentation(cutout=16))
    assert c.fixed(data) == dict(lr_scale=1, lr_decay=5, momentum=0.9, weight_decay=0, cutout=16)


# The paper's data sets, on small files in their published formats.


@pytest.mark.parametrize("name, write", [("cifar10", write_cifar10), ("svhn", write_svhn)])
def test_the_papers_protocols_run_for_two_generations(name, write, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", monkeypatch)
    for method in ("baseline", "pbt", "epbt"):
        main(["--method", method, "--dataset", name, "--data-root", str(tmp_path / "data"), "--model", "resnet8",
              "--population", "4", "--generations", "2", "--validation", "20", "--workers", "1", "--threads", "1",
              "--out", str(tmp_path / method)])
        summary = json.loads((tmp_path / method / "summary.json").read_text())
        assert summary["epochs_trained"] == {"baseline": 2, "pbt": 8, "epbt": 6}[method] * PROTOCOLS[name]["epochs"]
        assert len(read_log(tmp_path / method)) == 2
