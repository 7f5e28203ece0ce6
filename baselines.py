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


def train_on(config, space, data, workers, run):
    """A generator as `epbt.epbt`, in which every member trains on in every generation. Under PBT
    the worst are replaced first. Early stopping keeps the best generation, the earlier of equals,
    before the network as it is now."""
    population = run.population
    for g in range(run.generations, config.generations):
        rng = random_stream("evolution", config.seed, g)
        members = population[-config.population:]
        if g == 0:
            parents, h = [None] * config.population, initialize(space, config.population, rng)
        else:
            parents = [m.id for m in members]
            h = as_array(space, [m.hyperparameters for m in members])
        if g > 0 and config.method == "pbt":
            fitness = np.array([-np.inf if m.diverged else m.fitness for m in members])
            source, h = exploit_and_explore(h, fitness, space, rng)
            parents = [parents[i] for i in source]
        born = zip(as_dicts(space, h), parents, strict=True)
        newest = workers.evaluate([Individual(g * config.population + i, g, hyperparameters, parent)
                                   for i, (hyperparameters, parent) in enumerate(born)])
        kept = [fittest(population + newest)] if config.early_stopping else []
        population = [m for m in kept if m is not newest[0]] + newest
        run.record(g, population, kept)
        yield g, population


def exploit_and_explore(h, fitness, space, rng):
    """PBT's step [21]: each of the worst quarter becomes a copy of a random one of the best
    quarter, and its hyperparameters are multiplied or divided by 1.2 or drawn anew. Diverged
    members have fitness -inf. Returns the source of each member, an index (n,), and the new h."""
    n = len(h)
    quarter = int(n * TRUNCATION)
    order = best_first(fitness, n)
    source, h = np.arange(n), h.copy()
    if not quarter:
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
