"""What EPBT is compared with (Sec. 4.1), through the same training, workers and records.

Baseline 1 is one network under cross-entropy and a fixed schedule. Baseline 2 is the original PBT
[21], which evolves the learning rate. The third is what the same compute buys without evolution:
independent networks with random learning rates, the fittest chosen in the end.
"""

import numpy as np

from evolution import as_array, as_dicts, best_first, draw, initialize, random_stream
from records import Individual, fittest

TRUNCATION = 0.25  # Sec. 4.1: the top 25% are copied over the bottom 25%
PERTURBATION = 1.2  # Sec. 4.1
RESET_PROBABILITY = 0.25  # paper: unspecified ("a mixture"); 0.25 is Ray Tune's default


def independent(config, space, data, workers, run):
    """Baseline 1 (one network, nothing drawn), or networks with random hyperparameters."""
    if config.early_stopping:
        yield from early_stopped(config, workers, run)
    else:
        def replace(h, fitness, rng):
            return np.arange(len(h)), h
        yield from train_on(config, space, workers, run, replace)


def early_stopped(config, workers, run):
    """Baseline 1 with held-out images. The population is the network as it is now and, before it,
    as it was at the end of its best generation on them, the earlier one of equals."""
    population = run.population
    for g in range(run.generations, config.generations):
        newest = workers.evaluate([Individual(g, g, {}, parent=g - 1 if g else None)])
        best = fittest(population + newest)
        population = ([] if best is newest[0] else [best]) + newest
        run.record(g, population, [best])
        yield g, population


def pbt(config, space, data, workers, run):
    """Baseline 2: after each generation, truncation selection, then perturbation of the copies."""
    def replace(h, fitness, rng):
        return exploit_and_explore(h, fitness, space, rng)
    yield from train_on(config, space, workers, run, replace)


def train_on(config, space, workers, run, replace):
    """Every member trains in every generation, from its own weights or those of another, which
    `replace` names."""
    population = run.population
    for g in range(run.generations, config.generations):
        rng = random_stream("evolution", config.seed, g)
        if g == 0:
            parents, h = [None] * config.population, initialize(space, config.population, rng)
        else:
            fitness = np.array([-np.inf if m.diverged else m.fitness for m in population])
            h = as_array(space, [m.hyperparameters for m in population])
            source, h = replace(h, fitness, rng)
            parents = [population[i].id for i in source]
        first, children = g * config.population, zip(as_dicts(space, h), parents, strict=True)
        population = workers.evaluate([Individual(first + i, g, hyperparameters, parent)
                                       for i, (hyperparameters, parent) in enumerate(children)])
        run.record(g, population)
        yield g, population


def exploit_and_explore(h, fitness, space, rng):
    """PBT's step [21]: each of the worst quarter becomes a copy of a random one of the best
    quarter, and its hyperparameters are multiplied or divided by 1.2 or drawn anew. Diverged
    members have fitness -inf. Returns the source of each member, an index (n,), and the new h."""
    n = len(h)
    quarter = int(n * TRUNCATION)
    order = best_first(fitness, n)
    source, h = np.arange(n), h.copy()
    if quarter == 0:
        return source, h
    best, worst = order[:quarter], order[n - quarter:]
    if np.isfinite(fitness).any():  # never a diverged one while another lives
        best = best[np.isfinite(fitness[best])]
    source[worst] = rng.choice(best, size=quarter)
    factor = np.where(rng.random((quarter, len(space))) < 0.5, PERTURBATION, 1 / PERTURBATION)
    low, high = np.array([[v.low, v.high] for v in space]).reshape(-1, 2).T
    # paper: unspecified: whether they are clipped.
    perturbed = (h[source[worst]] * factor).clip(low, high)
    reset = rng.random(perturbed.shape) < RESET_PROBABILITY
    h[worst] = np.where(reset, draw(space, quarter, rng), perturbed)
    return source, h
