"""The methods that EPBT is compared with (Sec. 4.1).

Baseline 1 is one network, trained with cross-entropy and a fixed schedule. Baseline 2 is the
original PBT [21], which evolves the learning rate. The third shows what the same compute reaches
without evolution, by random search: independent networks, each with a random learning rate that
decays as Baseline 1's; the fittest is delivered.
"""

import numpy as np

from evolution import as_array, as_dicts, best_first, clipped, draw, initialize, random_stream
from records import Individual, fittest

TRUNCATION = 0.25  # Sec. 4.1: the top 25% are copied over the bottom 25%
PERTURBATION = 1.2  # Sec. 4.1
RESET_PROBABILITY = 0.25  # paper: unspecified ("a mixture"); 0.25 is Ray Tune's default


def train_on(config, space, data, workers, run):
    """All three methods, as a generator like `epbt.epbt`. Every member trains on in every
    generation; PBT replaces the worst first. With early stopping, of one network, the population
    is that of the best generation (of equals the earlier) and the latest one."""
    population = run.population
    for g in range(run.generations, config.generations):
        rng = random_stream("evolution", config.seed, g)
        members = population[-config.population:]
        if g == 0:
            parents, h = [None] * config.population, initialize(space, config.population, rng)
        else:
            parents = [m.id for m in members]
            h = as_array(space, [m.hyperparameters for m in members])
            if config.method == "pbt":
                fitness = np.array([-np.inf if m.diverged else m.fitness for m in members])
                source, h = exploit_and_explore(h, fitness, space, rng)
                parents = [parents[i] for i in source]
        born = zip(as_dicts(space, h), parents, strict=True)
        newest = workers.evaluate([Individual(g * config.population + i, g, hyperparameters, parent)
                                   for i, (hyperparameters, parent) in enumerate(born)])
        best = [fittest(population + newest)] if config.early_stopping else []
        population = [m for m in best if m is not newest[0]] + newest
        run.record(g, population, best)
        yield g, population


def exploit_and_explore(h, fitness, space, rng):
    """PBT's step [21]: each of the worst quarter becomes a copy of a random one of the best
    quarter. Its hyperparameters are multiplied or divided by 1.2, or drawn anew.

    Diverged members have fitness -inf. Returns for each member the index of the one that it now
    continues (n,), and the new h."""
    n = len(h)
    quarter = int(n * TRUNCATION)
    order = best_first(fitness, n)
    source, h = np.arange(n), h.copy()
    if not quarter:
        return source, h
    best, worst = order[:quarter], order[n - quarter:]
    if np.isfinite(fitness).any():  # copy no diverged member while another lives
        best = best[np.isfinite(fitness[best])]
    source[worst] = rng.choice(best, size=quarter)
    factor = np.where(rng.random((quarter, len(space))) < 0.5, PERTURBATION, 1 / PERTURBATION)
    perturbed = clipped(h[source[worst]] * factor, space)  # paper: unspecified: whether clipped
    reset = rng.random(perturbed.shape) < RESET_PROBABILITY
    h[worst] = np.where(reset, draw(space, quarter, rng), perturbed)
    return source, h
