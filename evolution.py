"""The genetic operators of EPBT: pure functions on NumPy arrays, random only by `rng`.

The hyperparameters of a population are a float64 array h of shape (individuals, variables), with
the rows in the order of the ids. So "ties go to the lower index" means to the older individual.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from errors import ConfigError, nearest

STREAMS = ("evolution", "training", "weights")


def random_stream(purpose, seed, *key):
    """The random generator for one purpose and key, derived from the run's seed.

    NumPy ignores zeros at the end of a seed, so the purpose comes first and is never 0."""
    return np.random.default_rng((1 + STREAMS.index(purpose), seed, *key))


@dataclass(frozen=True)
class Variable:
    """One evolved hyperparameter and its initial range.

    log: draw the logarithm uniformly, not the value. clip: mutation keeps it within the range."""

    name: str
    low: float
    high: float
    log: bool = False
    clip: bool = True

    def __post_init__(self):
        for end in ("low", "high"):
            object.__setattr__(self, end, float(getattr(self, end)))
        lowest = 0 if self.log else -np.inf
        if not lowest < self.low < self.high < np.inf:
            raise ValueError(f"variable {self.name}: its range, {self.low} to {self.high}, must be "
                             f"finite and not empty, and start above {lowest}")

    def at(self, u):
        """The value a fraction u in [0, 1) of the way through the range."""
        if self.log:
            return self.low * (self.high / self.low) ** u
        return self.low + (self.high - self.low) * u


# Sec. 4.1: theta is drawn from U(-10, 10). paper: unspecified: the ranges of the other three. They
# contain Baseline 1's schedule (scale 1, decay 5 or 10, momentum 0.9), as the paper requires.
RATES = (Variable("lr_scale", 0.1, 10.0), Variable("lr_decay", 1.0, 10.0),
         Variable("momentum", 0.5, 0.99))
# Not in the paper: no learning rate below Baseline 1's first.
HIGH_RATES = (Variable("lr_scale", 1.0, 10.0, log=True), Variable("lr_decay", 1.0, 10.0),
              Variable("momentum", 0.8, 0.97))
# PBT evolves the learning rate. Sec. 4.1: from 0.1 to 0.0001, here a factor of 0.1.
# paper: unspecified: uniform in the logarithm.
RATE = (Variable("lr_scale", 1e-3, 1.0, log=True),)


def search_space(theta_range=10.0, high_rates=False, cutout=0):
    """The variables that EPBT evolves.

    theta_range: initial thetas are between minus this and this; 0 or None: without the loss. Not in
    the paper: cutout, the largest side in pixels of the square that is cut out; 0: not evolved."""
    theta = tuple(Variable(f"theta{i}", -theta_range, theta_range, clip=False)
                  for i in range(8 if theta_range else 0))
    rates = HIGH_RATES if high_rates else RATES
    return theta + rates + ((Variable("cutout", 0, cutout),) if cutout else ())


def checked_space(space, accepted):
    """The variables as a tuple. Raises ConfigError for variables that training cannot apply.

    accepted: the names of all hyperparameters."""
    space = tuple(space) if isinstance(space, Iterable) else (space,)
    if not all(isinstance(v, Variable) for v in space):
        raise ConfigError("space must be a tuple of evolution.Variable, such as "
                          f'Variable("momentum", 0.5, 0.9), not {space!r}')
    names, lines = [v.name for v in space], []
    for v in space:
        above, highest = v.name == "lr_decay", 1 if v.name == "momentum" else np.inf
        if v.name not in accepted:
            lines.append(f"no hyperparameter is called {v.name!r}{nearest(str(v.name), accepted)}; "
                         f"accepted are {', '.join(accepted)}")
        elif names.count(v.name) > 1:
            lines.append(f"{v.name} is twice among the evolved variables")
        elif "theta" not in v.name and not (v.clip and v.low >= 0 and v.high <= highest
                                            and (v.low or not above)):
            lines.append(f"{v.name} must stay {'above' if above else 'from'} 0"
                         f"{' to 1' * (highest == 1)}, with clip: it is {v}")
    if sum("theta" in str(name) for name in names) not in (0, 8):
        lines.append("the evolved variables must have all of the eight thetas, or none")
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return space


def as_array(space, hyperparameters):
    """h of shape (individuals, variables) from one dict an individual."""
    return np.array([[each[v.name] for v in space] for each in hyperparameters], dtype=float)


def as_dicts(space, h):
    """One dict an individual: the inverse of as_array."""
    return [{v.name: float(x) for v, x in zip(space, row, strict=True)} for row in h]


def draw(space, n, rng):
    """n random values of every variable, uniform within its range: h of shape (n, variables)."""
    u = rng.random((n, len(space)))
    return np.array([v.at(column) for v, column in zip(space, u.T, strict=True)]).reshape(-1, n).T


def clipped(h, space):
    """h with each variable that has `clip` moved into its range."""
    bounds = [(v.low, v.high) if v.clip else (-np.inf, np.inf) for v in space]
    return h.clip(*np.array(bounds).reshape(-1, 2).T)


def initialize(space, n, rng, known=(), copies=0):
    """Sec. 3.2, Initialization: h of shape (n, variables), uniform within the ranges.

    Not in the paper: the first `copies` rows get the values of `known`, a dict by name."""
    h = draw(space, n, rng)
    for i, v in enumerate(space):
        if v.name in known:
            h[:copies, i] = known[v.name]
    return clipped(h, space)


def known_loss(classes):
    """theta, as a dict, of a loss that is known to learn: cross-entropy to the second order.

    Let y be the probability of the right class. Around y = 1, the cross-entropy -log y is
    (1 - y) + (1 - y)^2 / 2 + ... In Eq. 2, theta0 = 0 leaves only the right class of the sum, and
    theta1 = 1 expands around y = 1: L = -(1/n) [theta5 (y - 1) + theta6 (y - 1)^2 / 2]. So
    theta5 = n and theta6 = -n. For ten classes that is the edge of the range of Sec. 4.1."""
    return {f"theta{i}": float(x) for i, x in enumerate((0, 1, 0, 0, 0, classes, -classes, 0))}


def tournament(fitness, n, t, rng):
    """Sec. 3.2, Step 1, operator tau: the indices (n,) of the winners of n tournaments.

    The winner is the fittest of t random individuals, or of all if fewer live. It may win again.
    paper: unspecified: the t are drawn without replacement."""
    t = min(t, len(fitness))
    contests = [np.sort(rng.choice(len(fitness), size=t, replace=False)) for _ in range(n)]
    return np.array([c[np.argmax(fitness[c])] for c in contests], dtype=int)


def mutate(h, space, sigma, reset_probability, rng):
    """Sec. 3.2, Step 2, operator gamma: h * (1 + sigma * N(0, 1)), clipped.

    Then each variable, independently, is drawn anew with reset_probability."""
    mutated = clipped(h * (1 + sigma * rng.standard_normal(h.shape)), space)
    reset = rng.random(h.shape) < reset_probability
    return np.where(reset, draw(space, len(h), rng), mutated)


def crossover(h, probability, rng):
    """Sec. 3.2, Step 2, operator xi: with the probability (the paper's 50%), each variable is taken
    from a mate, one other member of the set.

    Returns the children (n, variables) and their mates' indices (n,), -1 where nothing is taken."""
    n = len(h)
    if n < 2:
        return h.copy(), np.full(n, -1)
    mate = (np.arange(n) + rng.integers(1, n, size=n)) % n
    taken = rng.random(h.shape) < probability
    return np.where(taken, h[mate], h), np.where(taken.any(axis=1), mate, -1)


def best_first(fitness, n):
    """Indices of the n fittest, best first; ties go to the lower index."""
    return np.argsort(-np.asarray(fitness), kind="stable")[:n]


def novelty_scores(behaviour):
    """Eq. 1: S_i, the sum of the distances d from behaviour vector b_i to all others.

    behaviour: (m, N) booleans, right or wrong on each of N validation images. Returns the scores
    (m,) and the distances (m, m). paper: unspecified: d is the Euclidean distance, the root of the
    number of images on which two individuals disagree."""
    distance = np.sqrt((behaviour[:, None] != behaviour[None]).sum(axis=2))
    # Equal sets of distances, in any order, must have the same sum to the last bit: sort them.
    return np.sort(distance, axis=1).sum(axis=1), distance


def novelty_elites(fitness, behaviour, k, m):
    """Sec. 2.5 and 3.4: of the m fittest the k most novel, skipping candidates of the same cluster.

    paper: unspecified: the fittest always stays. The others are ranked by S_i (ties: by fitness,
    then age). Keep the first k - 1. Add the remaining candidates one at a time; each time drop the
    lower-ranked of the closest pair; the fittest is in no pair. Returns their indices, the fittest
    first, the others by rank."""
    candidates = best_first(fitness, m)
    scores, distance = novelty_scores(behaviour[candidates])
    ranked = 1 + np.argsort(-scores[1:], kind="stable")  # stable: ties stay in order of fitness
    kept = list(ranked[: k - 1])
    if k > 2:  # else there is no pair, and no newcomer stays
        for newcomer in ranked[k - 1 :]:
            kept.append(newcomer)
            # The closest pair; of equally close ones that with the lowest-ranked member.
            _, lower = min(combinations(range(k), 2),
                           key=lambda pair: (distance[kept[pair[0]], kept[pair[1]]], -pair[1]))
            del kept[lower]
    return candidates[[0, *kept]]


def select_elites(fitness, correct, k, m, n, novel, rng):
    """Alg. 1, step 3b: indices of the k fittest or, if `novel`, of the k most novel of the m
    fittest.

    correct: (individuals, validation images) booleans. Sec. 3.4: n random images make the
    behaviour; paper: unspecified: other ones in each generation."""
    if not novel:
        return best_first(fitness, k)
    images = rng.choice(correct.shape[1], size=min(n, correct.shape[1]), replace=False)
    return novelty_elites(fitness, correct[:, images], k, m)


def pulse(generation, period, reading):
    """Sec. 3.4: whether Novelty Selection is on in this generation, with p = period.

    reading: 'pulsation' (off for p generations, then on for p, as Sec. 2.5 says), 'one-in-p' (on in
    every p-th), 'always' or 'off'."""
    return {
        "pulsation": generation // period % 2 == 1,
        "one-in-p": generation % period == period - 1,
        "always": True,
        "off": False,
    }[reading]
