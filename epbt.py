"""Regularized Evolutionary Population-Based Training (Liang, Gonzalez, Shahrzad, Miikkulainen, GECCO 2021).

    python epbt.py --dataset svhn

A population of networks trains in parallel while evolution adapts each one's loss function (TaylorGLO, eight
parameters), learning-rate schedule and momentum. `epbt` below is Algorithm 1; hold the paper beside it.
"""

import gc
import io
import json
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, fields, replace
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

import taylorglo_ext
from baselines import independent, pbt
from config import SINGLE, parse
from config import Config as Config  # for `from epbt import Config, evolve`
from data import Augmentation, Data, DataError, load_data, make_data
from evolution import (
    Variable,
    as_array,
    as_dicts,
    crossover,
    initialize,
    mutate,
    pulse,
    random_stream,
    select_elites,
    tournament,
)
from models import factory_name
from options import ConfigError, is_number, nearest
from records import (
    Individual,
    RunError,
    RunFolder,
    checkpoints,
    fittest,
    load_individual,
    write_atomic,
)
from replay import SCHEDULE, replay, schedule
from training import HYPERPARAMETERS, Job, load_state, mismatch
from watch import watched
from workers import Workers, make_pool, start_server


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
            h = initialize(space, config.population, rng, data.num_classes if config.viable_init else None)
            elites, N = [], newborn(M, g, as_dicts(space, h))
            teacher, alpha = None, 0.0
        else:
            fitness = np.array([m.fitness for m in alive])
            k = min(config.elites, len(alive))
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
            top = select_elites(fitness, np.stack([m.correct for m in alive]), k, config.novelty_candidates,
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


def evolve(config, make_model=None, train=None, test=None, space=None, augmentation=None, report=None):
    """Carry out a run and return its Outcome: `evolve(Config(dataset="svhn"))`, or with a model and data of your own.

    make_model: called as make_model(num_classes=..., in_channels=...); a function of a module, so that worker
    processes find it. train, test: (images, labels) or map-style Datasets, as data.make_data takes them; augmentation: a
    data.Augmentation of these, None is none.
    space: the evolved variables, as (*config.resolved().search_space(augmentation), Variable("weight_decay", 0, 1e-3)).
    report: called with each line for people, in place of print. Raises ConfigError, DataError, RunError and
    taylorglo_ext.BackendError, whose messages are clear lines."""
    if make_model is not None:
        config = replace(config, model=factory_name(make_model))
    if train is not None or test is not None:
        config = replace(config, dataset="custom")
    config = config.resolved()
    if config.model.startswith("__main__:") and config.slots() != 1:
        raise ConfigError("worker processes cannot find a make_model that is in no file: put it into one, or use workers=1")
    space = checked_space(config.search_space(augmentation) if space is None else space)
    if config.slots() != 1 and config.backend == "processes":
        start_server()  # it has imported PyTorch by the time the data is read
    data = read_data(config, train, test, augmentation)
    if error := mismatch(config.model, data.num_classes, (data.channels, data.height, data.width), config.batch_size):
        raise ConfigError(f"--model: {error}")
    config = replace(config, loss_backend=taylorglo_ext.load(config.loss_backend, config.device))
    job = make_job(config, data)
    identity = config.identity() | {"data": data.digest(), "classes": data.num_classes,
                                    "space": [list(vars(v).values()) for v in space]}
    if augmentation not in (None, Augmentation()):
        identity["augmentation"] = vars(augmentation)
    with (closing(RunFolder(config.out, identity, config.resume, config.overwrite)) as folder,
          tqdm(total=config.evaluations(), initial=folder.evaluated(), unit=" networks", disable=None) as bar,
          closing(make_pool(job, config.slots(), config.backend, config.ray_address)) as pool):
        best, generations = None, METHODS[config.method](config, space, data, Workers(pool, folder, bar), folder)
        for g, population in watched(generations, folder.path) if config.tensorboard else generations:
            with bar.external_write_mode():
                line = progress_line(config, g, population, folder.evaluated())
                report(line) if report else print(line, flush=True)
            if best is not (best := fittest(population)):
                write_best(folder, job, best)
        return finish(config, folder, job)


def make_job(config, data):
    """What all evaluations of a resolved config have in common."""
    own = dict(data=data, fixed=config.fixed(data), average_epochs=config.average_epochs())
    return Job(**own, **{f.name: getattr(config, f.name) for f in fields(Job) if f.name not in own})


def checked_space(space):
    """The same variables; raises ConfigError if training cannot apply one, or has one twice."""
    space = tuple(space) if isinstance(space, Iterable) else (space,)
    for v in space:
        if not isinstance(v, Variable) or not isinstance(v.name, str) or not is_number(v.low) or not is_number(v.high):
            raise ConfigError("space must be a tuple of evolution.Variable, such as Variable(\"momentum\", 0.5, 0.9), with "
                              f"Python's finite numbers, not {v!r}")
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


def read_data(config, train, test, augmentation=None):
    """The data of a run; networks that stand alone train on the validation images as well (Sec. 4.1, Baseline 1)."""
    shared = dict(seed=config.seed, validation=config.validation, train_on_all=config.method in SINGLE,
                  limit=config.limit)
    if train is not None or test is not None:
        return make_data(train, test, enlarge=config.enlarge or 1, augmentation=augmentation, **shared)
    if augmentation is not None:
        raise ConfigError("augmentation is for data that are given to evolve(); named data sets have their own")
    if config.dataset == "custom" and not os.path.isdir(config.dataset):
        raise ConfigError("the data of this run were given to evolve(): go on from Python, with resume=True")
    return load_data(config.dataset, config.data_root, enlarge=config.enlarge, image_size=config.image_size,
                     download=config.download, **shared)


def write_best(folder, job, best):
    """Write best.pt; returns the model."""
    model = load_state(job, load_individual(folder.individual_path(best.id))[1])
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    write_atomic(folder.path / "best.pt", buffer.getbuffer())
    return model


def progress_line(config, g, population, evaluated):
    best, diverged = fittest(population), sum(m.diverged for m in population)
    return (f"generation {g + 1:3}/{config.generations}   best fitness {best.fitness:.4f}   its test accuracy "
            f"{best.test_accuracy:.4f}   median fitness {median(m.fitness for m in population):.4f}   "
            f"{'losses' if 'theta0' in best.hyperparameters else 'networks'} tried {evaluated:4}   diverged {diverged}")


def finish(config, folder, job):
    """Write the schedule, the summary, the report and best.pt, and return the Outcome."""
    best, data = fittest(folder.population), job.data
    plan = schedule(config, job, folder.read_log())
    summary = dict(method=config.method, dataset=config.dataset, model=config.model, seed=config.seed,
                   fitness=best.fitness, test_accuracy=best.test_accuracy, best=best.record(),
                   evaluations=folder.evaluated(), epochs_trained=folder.evaluated() * config.epochs,
                   class_names=data.class_names, pixel_mean=data.mean.tolist(), pixel_std=data.std.tolist())
    for name, content in ((SCHEDULE, plan), ("summary.json", summary)):
        write_atomic(folder.path / name, (json.dumps(content, indent=2) + "\n").encode())
    from report import report  # here, as every worker process imports this module and matplotlib takes its time

    model = write_best(folder, job, best)
    try:
        report(folder.path)
    except RunError as error:  # drawing never costs the result
        print(f"{error}; all else is saved", file=sys.stderr)
    return Outcome(model, data, plan, summary)


def formula(t):
    """Eq. 2 with the eight numbers of theta, x the label and y the softmax."""
    a, b = f"(y {-t[1]:+.3g})", f"(x {-t[0]:+.3g})"
    terms = zip((t[2], t[3] / 2, t[4] / 6, t[5], t[6] / 2, t[7] / 2),
                (a, a + "^2", a + "^3", b + a, b + a + "^2", b + "^2" + a), strict=True)
    return "L = -1/n sum [" + " ".join(f"{c:+.3g} {term}" for c, term in terms) + "]"


def print_outcome(config, outcome):
    summary, best, h = outcome.summary, outcome.summary["best"], outcome.summary["best"]["hyperparameters"]
    on = " (on images it was trained on)" if config.method in SINGLE else ""
    print(f"\nbest individual {best['id']}: fitness {best['fitness']:.4f}{on}, test accuracy {best['test_accuracy']:.4f}")
    if best["diverged"]:
        print("every network diverged: its weights are not finite; a lower --learning-rate may help")
    if h:
        print("hyperparameters: " + ", ".join(f"{name} {value:.4g}" for name, value in h.items()))
    if "theta0" in h:
        print(formula(outcome.schedule["epochs"][-1]["theta"]) + " + cross-entropy" * config.add_cross_entropy)
    print(f"{summary['evaluations']} evaluations, {summary['epochs_trained']} epochs trained")
    print(f"weights, log, schedule, figures and report.html are in {config.out}")


def main(arguments=None):
    """The command line. Exit code 2 and one line a mistake for what the user can mend."""
    out = None
    try:
        config = parse(__doc__, arguments)
        out = config.out
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
        begun = out is not None and checkpoints(out)
        how = f"; go on with: python epbt.py --resume --out {shlex.quote(out)}" if begun else " before the run began"
        print(f"\ninterrupted{how}", file=sys.stderr)
        sys.exit(130)
    print_outcome(config, outcome)


if __name__ == "__main__":
    main()
    gc.freeze()  # or the interpreter's end would look through all of PyTorch for garbage: half a second
