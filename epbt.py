"""Regularized Evolutionary Population-Based Training (Liang et al., GECCO 2021).

    python epbt.py --dataset svhn

A population of networks trains in parallel. Evolution adapts the loss function (TaylorGLO, eight
parameters), learning-rate schedule and momentum of each. The function `epbt` is Algorithm 1.
Defaults depend on --dataset, --preset and --method: --dataset svhn --help shows those of SVHN.
"""

if __name__ == "__main__":  # first, so that the workers' server imports PyTorch meanwhile
    from server import start_early

    start_early()

import gc
import importlib.util
import io
import os
import shlex
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm.auto import tqdm

import taylorglo_ext
from baselines import train_on
from command_line import command_line, folder_name
from config import Config, check
from data import load_data, make_data
from errors import ConfigError
from evolution import (
    as_array,
    as_dicts,
    checked_space,
    crossover,
    initialize,
    known_loss,
    mutate,
    pulse,
    random_stream,
    select_elites,
    tournament,
)
from functions import import_name
from metrics import find_metric, tried_metric
from models import find_factory
from outcome import finish, print_outcome
from records import Individual, RunFolder, begun, fittest, living_fitness
from replay import checked_schedule, replay
from server import start_server
from settings import settings
from stopwatch import Stopwatch, process_age
from training import HYPERPARAMETERS
from trial import tried
from watch import watched
from workers import KNOWN, Processes, ThisProcess, Workers

__all__ = ["Config", "evolve"]


def epbt(config, space, data, workers, run):
    """Algorithm 1. Yields (g, M), the number and population of each generation when it ends.

    space: the evolved variables. workers evaluates individuals, run records them.
    paper: unspecified: generation 0 evaluates the initial individuals, because without a fitness
    nothing can be selected. So P + (n - 1)(P - k) losses are tried, the 520 of Sec. 5.2."""
    M = run.population
    for g in range(run.generations, config.generations):
        rng = random_stream("evolution", config.seed, g)
        alive = [m for m in M if not m.diverged]
        if not alive:
            # Sec. 3.2, Initialization. paper: unspecified: repeated if a whole generation diverged.
            known = {**config.fixed(data.augmentation.cutout), **known_loss(data.num_classes)}
            h = initialize(space, config.population, rng, known, config.known_losses)
            teacher, alpha, elites, N = None, 0.0, [], newborn(M, g, as_dicts(space, h))
        else:
            fitness, k = np.array([m.fitness for m in alive]), min(config.k, len(alive))
            # Step 1: select the parents.
            chosen = tournament(fitness, config.population - k, config.tournament, rng)
            parents = [alive[i] for i in chosen]
            # Step 2a: mutation and crossover of their hyperparameters.
            h = as_array(space, [p.hyperparameters for p in parents])
            h = mutate(h, space, config.mutation, config.reset, rng)
            h, mates = crossover(h, config.crossover, rng)
            # Step 2b: create the children. Each starts from the network of its parent.
            alpha = config.distillation * g / (config.generations - 1)
            teacher = fittest(alive) if alpha else None
            N = newborn(M, g, as_dicts(space, h), parents, mates, teacher)
            # Step 3b, here as it needs M_g alone: preserve its k fittest, or the k most novel of
            # its m fittest.
            novel = pulse(g, config.pulsation_period, config.novelty)
            correct = np.stack([m.correct for m in alive])
            top = select_elites(fitness, correct, k, config.m, config.behaviour_images, novel, rng)
            elites = [alive[i] for i in top]
        # Step 3a: train the children, with the fittest of M_g as teacher (Sec. 3.5); score them.
        N = workers.evaluate(N, teacher, alpha)
        # Step 3c: elites and children are the next population, the oldest first.
        M = sorted(elites, key=lambda m: m.id) + N
        run.record(g, M, elites)
        yield g, M


def newborn(M, g, hyperparameters, parents=(), mates=(), teacher=None):
    """Individuals that are not evaluated yet. Their ids follow those of the population M."""
    first = 1 + max((m.id for m in M), default=-1)
    N = [Individual(first + i, g, h, teacher=teacher and teacher.id)
         for i, h in enumerate(hyperparameters)]
    for child, parent, mate in zip(N, parents, mates, strict=False):  # initial ones have none
        child.parent, child.mate = parent.id, None if mate < 0 else parents[mate].id
    return N


NO_FILE = "worker processes need each function in a file, not in a notebook: put it into one"
METHODS = dict(epbt=epbt, pbt=train_on, baseline=train_on, random=train_on, replay=replay)


def evolve(config, make_model=None, train=None, test=None, space=None, report=print,
           fitness=None, clock=None):
    """Carry out a run, for example evolve(Config(dataset="svhn")), and return its Outcome.

    make_model: called as make_model(num_classes=..., in_channels=...); None: config.model.
    train, test: (images, labels) or map-style Datasets, see data.make_data; None: config.dataset.
    Their augmentation is the config's, where "auto" is none.
    space: the evolved variables, such as (*config.search_space(), evolution.Variable(...)), with
    the augmentation's cutout in search_space(...) if the preset evolves it.
    report: called with each line for people.
    fitness: called as fitness(logits, labels) with tensors (N, classes) and (N,) of the validation
    images, higher is better; None: config.fitness.
    clock: a Stopwatch that has been running since the program started.
    Functions must be at the top level of a module, where worker processes find them.
    Raises ConfigError, DataError, RunError or taylorglo_ext.BackendError."""
    clock = clock or Stopwatch()
    if make_model is not None:
        name = import_name(make_model, "make_model(num_classes=..., in_channels=...)")
        config = replace(config, model=name)
    if fitness is not None:
        config = replace(config, fitness=import_name(fitness, "fitness(logits, labels)"))
    if train is not None:
        augmentation = str(config.augmentation).replace("auto", "none")  # of an Augmentation too
        config = replace(config, dataset="custom", augmentation=augmentation)
    config = settled(config)
    clock.lap("import")
    if config.workers != 1 and config.backend == "processes" and not in_no_file(config):
        start_server()  # it imports PyTorch while this process reads the data
    backend = taylorglo_ext.load(config.loss_backend, config.device)
    config = replace(config, loss_backend=backend)
    with settings(replace(config, device="cpu")):
        return run(config, train, test, space, report, clock)


def run(config, train, test, space, report, clock):
    """`evolve` with a settled config, under PyTorch's settings."""
    clock.lap("loss")
    data = read_data(config, train, test)
    for line in (cost(config), *data.describe()):
        report(line)
    if in_no_file(config):
        report(f"training in this process alone: {NO_FILE} to use more")
    tried_metric(config.fitness, data)
    space = config.search_space(data.augmentation.cutout) if space is None else space
    space = checked_space(space, HYPERPARAMETERS)
    clock.lap("data")
    config = tried(config, data, report)
    clock.lap("trial")
    identity = config.identity() | {"data": data.digest(), "classes": data.num_classes,
                                    "space": [list(vars(v).values()) for v in space]}
    if config.replay:
        identity["schedule"] = checked_schedule(config)
    with closing(RunFolder(config.out, identity, config.resume, config.overwrite)) as folder:
        if folder.finished:
            report(f"{config.out} is finished: its files stay as they are")
        else:
            done, total = folder.evaluated(), config.evaluations()
            with (tqdm(initial=done, total=total, unit=" networks", disable=None) as bar,
                  closing(make_pool(config, data)) as pool):
                folder.begin()  # clears the old run only now that nothing can stop the new one
                clock.lap("workers")
                report(f"ready in {clock}")
                workers = Workers(pool, folder, bar)
                generations = METHODS[config.method](config, space, data, workers, folder)
                if config.tensorboard:
                    generations = watched(generations, folder.path)
                for g, M in generations:
                    with bar.external_write_mode():
                        report(progress_line(config, g, M, folder.evaluated()))
        return finish(config, folder, data, report)


def settled(config):
    """The config, checked, with device, threads, workers and out decided. Raises ConfigError,
    RunError."""
    check(config)
    find_factory(config.model)
    find_metric(config.fitness)
    if config.replay:
        checked_schedule(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu")
    for wanted, package in ((config.backend == "ray", "ray"), (config.tensorboard, "tensorboard")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"the package {package} is missing: pip install {package}")
    cores = len(os.sched_getaffinity(0))
    device = config.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    threads = config.threads or (cores if config.population == 1 else 1)
    if config.population == 1 or (device == "cpu" and config.backend == "processes"):
        own = max(1, cores // threads)
    else:
        own = 0  # the GPUs or the cluster decide
    workers, out = min(config.workers or own, config.population), folder_name(config)
    images = Path(os.path.expanduser(config.dataset))
    if os.path.isdir(images) and Path(out).resolve().is_relative_to(images.resolve()):
        raise ConfigError(f"--out {out} must not lie within --dataset {images}, where each folder "
                          "is a class")
    if in_no_file(config):
        if config.backend == "ray" or (device == "cpu" and config.workers > 1):
            raise ConfigError(f"{NO_FILE}, or use workers=1")
        if device == "cpu":
            workers = 1
    return replace(config, device=device, threads=threads, workers=workers, out=out)


def in_no_file(config):
    """Whether a function is in a notebook or in standard input, where no other process finds it."""
    return "__main__" in (config.model.split(":")[0], config.fitness.split(":")[0])


def make_pool(config, data):
    """Where individuals are evaluated."""
    if config.backend == "ray":
        from cluster import RayPool  # not at the top: Ray is optional

        return RayPool(config, data)
    if (config.device == "cpu" and config.workers == 1) or in_no_file(config):
        return ThisProcess(config, data)
    return Processes(config, data, config.workers)


def read_data(c, train, test):
    """The Data of a run with config c."""
    names = "seed", "validation", "enlarge", "limit", "augmentation", "label_noise"
    shared = {name: getattr(c, name) for name in (*names, "label_noise_kind")}
    shared["train_on_all"] = c.trains_on_all
    if train is not None or test is not None:
        return make_data(train, test, **shared)
    if c.dataset == "custom":
        raise ConfigError("no data: name a data set, or give train and test to evolve(); to go on "
                          "with a run, with resume=True")
    return load_data(c.dataset, c.data_root, c.image_size, c.download, **shared)


def cost(config):
    n = config.evaluations()
    return (f"{config.method}, preset {config.preset}, of {config.model} on {config.dataset}: "
            f"{n} evaluations of {config.epochs} epochs, {n * config.epochs} epochs in all")


def progress_line(config, g, M, evaluated):
    best, middle = fittest(M), median(living_fitness(M))
    return (f"generation {g + 1:3}/{config.generations}   best fitness {best.fitness:.4f}   "
            f"its test accuracy {best.test_accuracy:.4f}   median fitness {middle:.4f}   "
            f"evaluated {evaluated:4}   diverged {sum(m.diverged for m in M)}")


def main(arguments=None):
    """The command line. Prints one line for each mistake of the user's; the exit code is then 2."""
    config, clock = None, Stopwatch(process_age() if arguments is None else 0.0)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal lacks
    try:
        config = settled(command_line(arguments, __doc__))
        if config.plan:
            return print(cost(config))
        outcome = evolve(config, clock=clock)
    except KNOWN as error:
        print("\n".join(f"epbt.py: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        how = f"; go on with: python epbt.py --resume --out {shlex.quote(config.out)}" if (
            config and begun(config.out)) else " before the run began"
        print(f"\ninterrupted{how}", file=sys.stderr)
        sys.exit(130)
    print_outcome(config, outcome.summary)


if __name__ == "__main__":
    main()
    gc.freeze()  # saves half a second: Python need not search PyTorch for garbage as it exits
