"""Regularized Evolutionary Population-Based Training (Liang, Gonzalez, Shahrzad, Miikkulainen, GECCO 2021).

    python epbt.py --dataset svhn

A population of networks trains in parallel while evolution adapts each one's loss function (TaylorGLO, eight
parameters), learning-rate schedule and momentum. `epbt` below is Algorithm 1; hold the paper beside it.
"""

import argparse
import gc
import importlib.util
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

import taylorglo_ext
from augmentation import Augmentation
from baselines import independent, pbt
from config import Config, check
from data import Data, load_data, make_data
from errors import ConfigError, DataError, RunError, message, nearest
from evolution import (
    Variable,
    as_array,
    as_dicts,
    crossover,
    initialize,
    known_loss,
    mutate,
    pulse,
    random_stream,
    select_elites,
    tournament,
)
from models import factory_name, make_model, model_error
from records import Individual, RunFolder, begun, fittest, load_individual, read_config, write_atomic
from replay import SCHEDULE, replay, replay_config, schedule
from settings import settings
from training import HYPERPARAMETERS, accuracy, model_tensors
from trial import tried
from watch import watched
from workers import Processes, ThisProcess, Workers, start_server


def epbt(config, space, data, workers, run):
    """Algorithm 1. A generator: yields (generation, M) at the end of each generation.

    space: the evolved variables; data: what is learned; workers and run: where individuals are evaluated and recorded.
    paper: unspecified: the initial individuals are evaluated in generation 0, since until then there is no fitness to
    select by; so P + (n - 1)(P - k) losses are tried, the 520 of Sec. 5.2.
    """
    M = run.population
    for g in range(run.generations, config.generations):
        rng = random_stream("evolution", config.seed, g)
        alive = [m for m in M if not m.diverged]
        if not alive:  # Sec. 3.2, Initialization; paper: unspecified: again, should a whole generation have diverged
            known = {**config.fixed(), **known_loss(data.num_classes)}
            h = initialize(space, config.population, rng, data.num_classes if config.viable_init else None, known,
                           config.known_losses)
            elites, N = [], newborn(M, g, as_dicts(space, h))
            teacher, alpha = None, 0.0
        else:
            fitness = np.array([m.fitness for m in alive])
            k = min(config.k, len(alive))
            # Step 1: select the parents.
            parents = [alive[i] for i in tournament(fitness, config.population - k, config.tournament, rng)]
            # Step 2a: mutation and crossover of their hyperparameters.
            h = mutate(as_array(space, [p.hyperparameters for p in parents]), space, config.mutation, config.reset, rng)
            h, mates = crossover(h, config.crossover, rng)
            # Step 2b: the children. Each inherits its parent's weights, BatchNorm statistics and momentum.
            alpha = config.distillation * g / (config.generations - 1)
            teacher = fittest(alive) if alpha else None
            N = newborn(M, g, as_dicts(space, h), parents, mates, teacher)
            # Step 3b: preserve the top k of M_g as they are, or with Novelty Selection the most novel of the top m.
            novel = pulse(g, config.pulsation_period, config.novelty)
            top = select_elites(fitness, np.stack([m.correct for m in alive]), k, config.m,
                                config.behaviour_images, novel, rng)
            elites = [alive[i] for i in top]
        # Step 3a: evaluate the children: train for a generation, distilled from the best of the last (Sec. 3.5).
        N = workers.evaluate(N, teacher, alpha)
        # Step 3c: together they are the next population, the oldest first.
        M = sorted(elites, key=lambda m: m.id) + N
        run.record(g, M, elites)
        yield g, M


def newborn(M, g, hyperparameters, parents=(), mates=(), teacher=None):
    """Unevaluated individuals, numbered on from the population M."""
    first = 1 + max((m.id for m in M), default=-1)
    N = [Individual(first + i, g, h, teacher=teacher and teacher.id) for i, h in enumerate(hyperparameters)]
    for child, parent, mate in zip(N, parents, mates, strict=False):  # none for fresh ones
        child.parent, child.mate = parent.id, None if mate < 0 else parents[mate].id
    return N


METHODS = {"epbt": epbt, "pbt": pbt, "baseline": independent, "random": independent, "replay": replay}


@dataclass
class Outcome:
    """What a run leaves, beside the files in its folder."""

    model: torch.nn.Module  # the fittest individual, on the CPU, in evaluation mode; its inputs are normalised images
    data: Data  # as it was split and normalised
    schedule: dict  # the winner's losses, learning rates and momenta by epoch; see replay.py
    summary: dict  # as in summary.json


def evolve(config, make_model=None, train=None, test=None, space=None, augmentation=None, report=print):
    """Carry out a run and return its Outcome: `evolve(Config(dataset="svhn"))`, or with a model and data of your own.

    make_model: called as make_model(num_classes=..., in_channels=...); a function of a module, so that worker
    processes find it. train, test: (images, labels) or map-style Datasets, as data.make_data takes them; augmentation: a
    data.Augmentation of these, None is none.
    space: the evolved variables, as (*config.search_space(), Variable("weight_decay", 0, 1e-3)).
    report: called with each line for people. Raises ConfigError, DataError, RunError and
    taylorglo_ext.BackendError, whose messages are clear lines."""
    begin = time.perf_counter()
    if make_model is not None:
        config = replace(config, model=factory_name(make_model))
    if train is not None:
        config = replace(config, dataset="custom", augmentation=(augmentation or Augmentation()).spec())
    config = settled(config)
    if config.workers != 1 and config.backend == "processes":
        start_server()  # it has imported PyTorch by the time the data is read
    with settings(replace(config, device="cpu")):
        return run(config, train, test, space, report, begin)


def run(config, train, test, space, report, begin):
    """Carry out a run whose config is settled. begin: when it was called, for the time until it trains."""
    data = read_data(config, train, test)
    for line in data.describe():
        report(line)
    space = checked_space(config.search_space(data.augmentation.cutout) if space is None else space)
    config = tried(replace(config, loss_backend=taylorglo_ext.load(config.loss_backend, config.device)), data, report)
    identity = config.identity() | {"data": data.digest(), "classes": data.num_classes,
                                    "space": [list(vars(v).values()) for v in space]}
    with (closing(RunFolder(config.out, identity, config.resume, config.overwrite)) as folder,
          tqdm(total=config.evaluations(), initial=folder.evaluated(), unit=" networks", disable=None) as bar,
          closing(make_pool(config, data)) as pool):
        folder.begin()
        report(f"ready in {time.perf_counter() - begin:.1f} s")
        generations = METHODS[config.method](config, space, data, Workers(pool, folder, bar), folder)
        for g, population in watched(generations, folder) if config.tensorboard else generations:
            with bar.external_write_mode():
                report(progress_line(config, g, population, folder.evaluated()))
        pool.close()  # which frees a GPU's memory
        return finish(config, folder, data, report)


def settled(config):
    """The config with nothing left at "auto", apart from what the model and the loss decide. Raises ConfigError."""
    check(config)
    if config.single:
        config = replace(config, population=1)
    if error := model_error(config.model):
        raise ConfigError(f"--model: {error}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu")
    for wanted, package, flag in ((config.backend == "ray", "ray", "--backend ray"),
                                  (config.tensorboard, "tensorboard", "--tensorboard")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{flag} needs the package {package}: pip install {package}")
    cores = len(os.sched_getaffinity(0))
    device = config.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    threads = config.threads or (cores if config.population == 1 else 1)
    workers = min(config.workers or (max(1, cores // threads) if device == "cpu" else 0), config.population)
    name = os.path.basename(os.path.normpath(config.dataset))
    out = os.path.expanduser(config.out or os.path.join("runs", f"{config.method}-{name}-{config.seed}"))
    images = Path(config.dataset).expanduser()
    if images.is_dir() and Path(out).resolve().is_relative_to(images.resolve()):
        raise ConfigError(f"--out {out} must not lie within --dataset {images}, where each folder is a class")
    if config.model.startswith("__main__:") and workers != 1:
        raise ConfigError("worker processes cannot find a make_model that is in no file: put it into one, or use workers=1")
    return replace(config, device=device, threads=threads, workers=workers, out=out)


def make_pool(config, data):
    """Where individuals are evaluated."""
    if config.backend == "ray":
        from cluster import RayPool  # here, as Ray is an optional requirement

        return RayPool(config, data)
    if config.device == "cpu" and config.workers == 1:
        return ThisProcess(config, data)
    return Processes(config, data, config.workers)


def checked_space(space):
    """The same variables; raises ConfigError if training cannot apply one, or has one twice."""
    space = tuple(space) if isinstance(space, Iterable) else (space,)
    if wrong := [v for v in space if not isinstance(v, Variable)]:
        raise ConfigError("space must be a tuple of evolution.Variable, such as Variable(\"momentum\", 0.5, 0.9), "
                          f"not {wrong[0]!r}")
    names = [v.name for v in space]
    lines = [f"no hyperparameter is called {name!r}{nearest(name, HYPERPARAMETERS)}; accepted are "
             f"{', '.join(HYPERPARAMETERS)}" for name in names if name not in HYPERPARAMETERS]
    lines += [f"{name} is twice among the evolved variables" for name in sorted(set(names)) if names.count(name) > 1]
    for v in (v for v in space if not v.name.startswith("theta")):
        if v.low < 0 or (v.name == "lr_decay" and v.low == 0) or (v.name == "momentum" and v.high > 1) or not v.clip:
            lines.append(f"{v.name} cannot be {v.low} to {v.high}{'' if v.clip else ' without clip'}; it must stay from 0 "
                         "on, lr_decay above it, and momentum at most 1")
    theta = sum(name.startswith("theta") for name in names)
    if theta not in (0, 8):
        lines.append(f"the evolved variables have {theta} of the eight thetas; they must have all or none")
    if lines:
        raise ConfigError("\n".join(lines))
    return space


def read_data(config, train, test):
    """The data of a run; networks that stand alone train on the validation images as well (Sec. 4.1, Baseline 1)."""
    shared = dict(seed=config.seed, validation=config.validation, enlarge=config.enlarge, limit=config.limit,
                  augmentation=config.augmentation, train_on_all=config.trains_on_all,
                  label_noise=config.label_noise, label_noise_kind=config.label_noise_kind)
    if train is not None or test is not None:
        return make_data(train, test, **shared)
    if config.dataset == "custom":
        raise ConfigError("no data: name a data set, or give train and test to evolve() (with resume=True to go on)")
    return load_data(config.dataset, config.data_root, image_size=config.image_size, download=config.download, **shared)


def delivered(config, folder, data, best):
    """Write best.pt, and return the model that is in it."""
    buffer = io.BytesIO()
    state = model_tensors(load_individual(folder.individual_path(best.id))[1])
    model = make_model(config.model, data.num_classes, data.channels, seed=0)
    trained = {name.removeprefix("model/"): t for name, t in state.items()}
    model.load_state_dict({name: trained.get(name, t) for name, t in model.state_dict().items()})
    torch.save(model.state_dict(), buffer)
    write_atomic(folder.path / "best.pt", buffer.getbuffer())
    model.eval()
    return model


def progress_line(config, g, population, evaluated):
    best, diverged = fittest(population), sum(m.diverged for m in population)
    return (f"generation {g + 1:3}/{config.generations}   best fitness {best.fitness:.4f}   its test accuracy "
            f"{best.test_accuracy:.4f}   median fitness {median(m.fitness for m in population):.4f}   "
            f"{'losses' if 'theta0' in best.hyperparameters else 'networks'} tried {evaluated:4}   diverged {diverged}")


def finish(config, folder, data, report):
    """Write best.pt, the schedule, the summary and the report, and return the Outcome."""
    best = fittest(folder.population)
    model, plan = delivered(config, folder, data, best), schedule(config, data, folder.read_log())
    summary = dict(method=config.method, dataset=config.dataset, model=config.model, seed=config.seed,
                   fitness=best.fitness, test_accuracy=best.test_accuracy, best=best.record(),
                   evaluations=folder.evaluated(), epochs_trained=folder.evaluated() * config.epochs,
                   class_names=data.class_names, pixel_mean=data.mean.tolist(), pixel_std=data.std.tolist())
    found = accuracy(config, data, model)
    if found != best.test_accuracy:
        report(f"WARNING: the model in best.pt classifies {found:.4f} of the test images correctly, and not the "
               f"{best.test_accuracy:.4f} that were measured when it was trained")
        summary["delivered_test_accuracy"] = found
    for name, content in ((SCHEDULE, plan), ("summary.json", summary)):
        write_atomic(folder.path / name, (json.dumps(content, indent=2) + "\n").encode())
    try:
        from report import report as draw  # here, as matplotlib takes its time

        draw(folder.path)
    except Exception as error:  # whatever a drawing library raises: the result is saved
        report(f"the figures and report.html could not be drawn: {type(error).__name__}: {message(error)}")
    return Outcome(model, data, plan, summary)


def formula(t):
    """Eq. 2 with the eight numbers of theta, x the label and y the softmax."""
    a, b = f"(y {-t[1]:+.3g})", f"(x {-t[0]:+.3g})"
    terms = zip((t[2], t[3] / 2, t[4] / 6, t[5], t[6] / 2, t[7] / 2),
                (a, a + "^2", a + "^3", b + a, b + a + "^2", b + "^2" + a), strict=True)
    return "L = -1/n sum [" + " ".join(f"{c:+.3g} {term}" for c, term in terms) + "]"


def print_outcome(config, outcome):
    summary, best, h = outcome.summary, outcome.summary["best"], outcome.summary["best"]["hyperparameters"]
    on = " (on images it was trained on)" if config.trains_on_all else ""
    print(f"\nbest individual {best['id']}: fitness {best['fitness']:.4f}{on}, test accuracy {best['test_accuracy']:.4f}")
    if best["diverged"]:
        print("every network diverged: its weights are not finite; a lower --learning-rate may help")
    if h:
        print("hyperparameters: " + ", ".join(f"{name} {value:.4g}" for name, value in h.items()))
    if "theta0" in h:
        print(formula(best["applied"]["theta"]) + " + cross-entropy" * config.add_cross_entropy)
    print(f"{summary['evaluations']} evaluations, {summary['epochs_trained']} epochs trained")
    print(f"weights, log, schedule, figures and report.html are in {config.out}")


def command_line(arguments):
    """The Config of a command line: its values are changed in the one that it names, a data set's, a run's folder's
    or a schedule's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("dataset", "preset", "replay", "out"):
        first.add_argument(f"--{name}")
    first.add_argument("--resume", action="store_true")
    named, _ = first.parse_known_args(arguments)
    start = {name: value for name, value in vars(named).items() if value}
    if named.replay:
        start = replay_config(named.replay) | start
    start = Config(**{"dataset": "digits"} | start)
    stored = {}
    if named.resume:
        stored = read_config(settled(start).out)
        start = replace(start, **{name: x for name, x in stored.items() if name in Config.__dataclass_fields__})
    config = tyro.cli(Config, default=start, args=arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if changed := [name for name in config.identity() if name in stored and getattr(config, name) != getattr(start, name)]:
        raise RunError(f"--resume goes on with the run in {config.out}, which has --{changed[0].replace('_', '-')} "
                       f"{getattr(start, changed[0])}, not {getattr(config, changed[0])}")
    return config


def main(arguments=None):
    """The command line. Exit code 2 and one line a mistake for what the user can mend."""
    config = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that lacks a letter
    try:
        config = settled(command_line(arguments))
        if config.plan:
            n = config.evaluations()
            print(f"{n} evaluations of {config.epochs} epochs each, {n * config.epochs} in all, "
                  f"of {config.model} on {config.dataset}")
            return
        outcome = evolve(config)
    except (ConfigError, DataError, RunError, taylorglo_ext.BackendError) as error:
        print("\n".join(f"epbt.py: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        how = (f"; go on with: python epbt.py --resume --out {shlex.quote(config.out)}" if config and begun(config.out)
               else " before the run began")
        print(f"\ninterrupted{how}", file=sys.stderr)
        sys.exit(130)
    print_outcome(config, outcome)


if __name__ == "__main__":
    main()
    gc.freeze()  # or the interpreter's end would look through all of PyTorch for garbage: half a second
