"""The genetic operators against results worked out by hand from the paper and the design."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from small import SEARCH_SPACE

from errors import ConfigError
from evolution import (
    STREAMS,
    Variable,
    as_array,
    as_dicts,
    best_first,
    checked_space,
    crossover,
    initialize,
    mutate,
    novelty_elites,
    novelty_scores,
    pulse,
    random_stream,
    select_elites,
    tournament,
)

MANY = 20_000  # draws; a frequency of p then has a standard deviation of at most 0.0035
CLOSE = 0.016  # more than four of them
NAMES = (*(v.name for v in SEARCH_SPACE), "weight_decay", "cutout")


def rng(seed=0):
    return np.random.default_rng(seed)


def is_uniform(u):
    return kstest(u, "uniform").pvalue > 0.001


def thermometer(*levels, length=16):
    """Behaviour vectors whose first `level` bits are set. The Hamming distance of two vectors is
    the difference of their levels."""
    return np.arange(length) < np.array(levels)[:, None]


def test_streams_of_equal_purpose_seed_and_key_are_equal_and_all_others_differ():
    keys = [(0,), (1,), (5,), (1, 5), (5, 1), (1, 1), (2, 300)]
    first, again = ([random_stream(purpose, seed, *key).integers(2**63) for purpose in STREAMS
                     for seed in (0, 1, 2, 2**32 - 1) for key in keys] for _ in range(2))
    assert first == again and len(set(first)) == len(first)


def test_variables_start_uniform_within_their_ranges_and_independent_of_each_other():
    assert NAMES[:-2] == (*(f"theta{i}" for i in range(8)), "lr_scale", "lr_decay", "momentum")
    assert all((v.low, v.high, v.log) == (-10, 10, False) for v in SEARCH_SPACE[:8])
    assert [v.name for v in SEARCH_SPACE if v.clip] == ["lr_scale", "lr_decay", "momentum"]
    space = (*SEARCH_SPACE, Variable("weight_decay", 1e-3, 1.0, log=True))
    h = initialize(space, MANY, rng())
    for v, x in zip(space, h.T, strict=True):
        assert v.low <= x.min() and x.max() < v.high
        assert is_uniform(1 + np.log10(x) / 3 if v.log else (x - v.low) / (v.high - v.low))
    assert np.abs(np.corrcoef(h.T) - np.eye(len(space))).max() < 0.04


def test_arrays_and_dicts_of_hyperparameters_are_inverses():
    h = initialize(SEARCH_SPACE, 5, rng())
    dicts = as_dicts(SEARCH_SPACE, h)
    assert dicts[2]["momentum"] == h[2, 10] and type(dicts[2]["momentum"]) is float
    turned = [dict(reversed(d.items())) for d in dicts]
    np.testing.assert_array_equal(as_array(SEARCH_SPACE, turned), h)
    assert as_dicts((), initialize((), 3, rng())) == [{}, {}, {}]
    assert as_array((), [{}] * 3).shape == (3, 0)


@pytest.mark.parametrize("low, high, log", [
    (1, 1, False), (2, 1, False), (0, 1, True), (-1, 1, True), (0.1, np.inf, False),
    (np.nan, 1, False)])
def test_a_range_that_holds_nothing_is_refused(low, high, log):
    with pytest.raises(ValueError, match="variable x: "):
        Variable("x", low, high, log=log)


@pytest.mark.parametrize("space, words", [
    ((Variable("wieght_decay", 0, 1),), "'wieght_decay', did you mean 'weight_decay'"),
    ((*SEARCH_SPACE, Variable("momentum", 0, 1)), "^momentum is twice among the evolved variables"),
    (SEARCH_SPACE[1:], "all of the eight thetas, or none"),
    ((Variable("momentum", 0.5, 3),), "momentum must stay from 0 to 1, with clip"),
    ((Variable("momentum", 0.5, 0.9, clip=False),), "momentum must stay from 0 to 1, with clip"),
    ((Variable("cutout", -1, 3),), "cutout must stay from 0, with clip"),
    ((Variable("lr_decay", 0, 3),), "lr_decay must stay above 0"),
    ((Variable(3, 0.1, 1),), "no hyperparameter is called 3"),
    *((space, "must be a tuple of evolution.Variable") for space in (("momentum",), 5)),
])
def test_a_search_space_that_training_cannot_apply_is_refused(space, words):
    with pytest.raises(ConfigError, match=words):
        checked_space(space, NAMES)
    assert checked_space(SEARCH_SPACE[-1], NAMES) == SEARCH_SPACE[-1:]  # one may stand alone


@pytest.mark.parametrize("t, chances", [
    (1, [1 / 5, 1 / 5, 1 / 5, 1 / 5, 1 / 5]),
    (2, [4 / 10, 3 / 10, 2 / 10, 1 / 10, 0]),  # rank r is the fitter in 4 - r of the 10 pairs
    (3, [6 / 10, 3 / 10, 1 / 10, 0, 0]),  # and in C(4 - r, 2) of the 10 triples
    (5, [1, 0, 0, 0, 0]),
    (9, [1, 0, 0, 0, 0]),  # more than there are: all
])
@pytest.mark.parametrize("fitness, by_rank", [
    ([0.3, 0.9, 0.1, 0.7, 0.5], [1, 3, 4, 0, 2]),
    ([0.5, 0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3, 4]),  # ties go to the older
    ([0.2, 0.8, 0.2, 0.8, 0.2], [1, 3, 0, 2, 4]),
])
def test_the_chance_to_win_a_tournament_follows_from_the_rank(t, chances, fitness, by_rank):
    wins = tournament(np.array(fitness), 5000, t, rng())[:, None] == by_rank
    np.testing.assert_allclose(wins.mean(axis=0), chances, atol=2 * CLOSE)
    assert not wins[:, np.equal(chances, 0)].any()
    first = wins[:, 0]  # tournaments are independent: twice in a row has the squared chance
    assert np.mean(first[1:] & first[:-1]) == pytest.approx(chances[0] ** 2, abs=2 * CLOSE)


def test_mutation_multiplies_each_variable_by_gaussian_noise_of_its_own_and_clips_some():
    h = np.tile([-8.0, 2.0, 10.0], (MANY, 1))
    space = [Variable(name, -10, 10, clip=False) for name in "abc"]
    free = mutate(h, space, 0.1, 0.0, rng())
    noise = (free / h - 1) / 0.1
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(3), atol=0.04)
    assert kstest(noise.ravel(), "norm").pvalue > 0.001
    space[1:] = Variable("b", 2, 10), Variable("c", 1, 10)
    clipped = mutate(h, space, 0.1, 0.0, rng())
    np.testing.assert_array_equal(clipped, free.clip([-np.inf, 2, 1], [np.inf, 10, 10]))


def test_a_reset_is_a_fresh_uniform_draw_of_each_variable_independently():
    space = (Variable("a", -10, 10, clip=False), Variable("b", 2, 3))
    old = np.tile([0.0, 2.5], (MANY, 1))
    mutated = mutate(old, space, 0.0, 0.3, rng())
    changed = mutated != old
    np.testing.assert_allclose(changed.mean(axis=0), 0.3, atol=CLOSE)
    assert np.mean(changed.all(axis=1)) == pytest.approx(0.09, abs=CLOSE)
    for column, v in enumerate(space):
        assert is_uniform((mutated[changed[:, column], column] - v.low) / (v.high - v.low))


def test_only_a_reset_changes_a_sign_or_a_zero_and_the_input_stays_as_it_is():
    h = initialize(SEARCH_SPACE, 100, rng())
    h[:, 3] = 0
    before, noisy = h.copy(), mutate(h, SEARCH_SPACE, 0.1, 0.0, rng(1))
    np.testing.assert_array_equal(np.sign(noisy), np.sign(h))
    assert (noisy[:, [0, 8]] != h[:, [0, 8]]).all()
    np.testing.assert_array_equal(mutate(h, SEARCH_SPACE, 0.0, 0.0, rng(1)), before)
    assert (mutate(h, SEARCH_SPACE, 0.1, 1.0, rng(1)) != before).all()
    np.testing.assert_array_equal(h, before)


def members(n, variables=3):
    """h in which every value names its owner."""
    return np.tile(np.arange(float(n))[:, None], (1, variables))


def test_crossover_with_certainty_takes_everything_from_one_other_member_any_as_likely():
    children, mates = crossover(members(3000), 1.0, rng())
    assert (children == mates[:, None]).all() and (mates != np.arange(3000)).all()
    counts = np.zeros((4, 4))
    for seed in range(3000):
        counts[np.arange(4), crossover(members(4), 1.0, rng(seed))[1]] += 1
    np.testing.assert_allclose(counts / 3000, (1 - np.eye(4)) / 3, atol=0.04)


@pytest.mark.parametrize("n, probability", [(5, 0.0), (1, 1.0)])
def test_crossover_that_is_off_or_of_one_member_gives_copies_and_no_mates(n, probability):
    h = members(n)
    children, mates = crossover(h, probability, rng())
    np.testing.assert_array_equal(children, h)
    assert mates.tolist() == [-1] * n and children is not h


def test_uniform_crossover_takes_each_variable_with_probability_one_half():
    h = members(MANY)
    children, mates = crossover(h, 0.5, rng())
    taken = children != h
    np.testing.assert_allclose(taken.mean(axis=0), 0.5, atol=CLOSE)
    assert np.mean(taken.all(axis=1)) == pytest.approx(1 / 8, abs=CLOSE)  # independently
    np.testing.assert_array_equal(mates == -1, ~taken.any(axis=1))
    assert (children == np.where(taken, mates[:, None], h)).all()  # all from the one mate


def test_eq_1_on_four_vectors():
    behaviour = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    scores, distance = novelty_scores(behaviour)
    r3 = np.sqrt(3)  # b_1 and b_2 differ in three places
    np.testing.assert_allclose(distance, [[0, 1, 2, 0], [1, 0, r3, 1], [2, r3, 0, 2], [0, 1, 2, 0]])
    np.testing.assert_allclose(scores, [3, 2 + r3, 4 + r3, 3])
    assert scores[0] == scores[3]  # to the last bit: equal behaviour is equal novelty


# Six candidates by descending fitness, and an unfit, most novel one that is none. B and C behave
# alike, A and E too.
#     levels  A 4   B 0   C 0   D 16   E 4   F 13
#     S_A = S_E = 2 + 2 + sqrt(12) + 0 + 3         = 10.46
#     S_B = S_C = 2 + 0 + 4 + 2 + sqrt(13)         = 11.61
#     S_D = sqrt(12) + 4 + 4 + sqrt(12) + sqrt(3)  = 16.66
#     S_F = 3 + sqrt(13) + sqrt(13) + sqrt(3) + 3  = 14.94
# A, the fittest, is in. The rest by novelty: D F B C E.
LEVELS = {"A": 4, "B": 0, "C": 0, "D": 16, "E": 4, "F": 13, "unfit": 40}
FITNESS = {"A": 0.9, "B": 0.8, "C": 0.7, "D": 0.6, "E": 0.5, "F": 0.4, "unfit": 0.3}


@pytest.mark.parametrize("m, k, elites", [
    # Keep D F B. Add C: it is where B is; drop C. Add E: D-F, at sqrt(3), is the closest; drop F.
    (6, 4, "ADBE"),
    # Keep D F. Add B: D-F is closest; drop F. Add C: it is where B is; drop C. Add E: B-E, at 2, is
    # closest; drop E.
    (6, 3, "ADB"),
    # Keep D; each newcomer is the later of the only pair.
    (6, 2, "AD"),
    (6, 1, "A"),
    # Keep D F B C. Add E: B and C are at one place; drop C.
    (6, 5, "ADFBE"),
    (6, 6, "ADFBCE"),
    # Of A B C, S_B = S_C = 2: the fitter first.
    (3, 3, "ABC"),
    (3, 2, "AB"),
    (1, 1, "A"),
])
@pytest.mark.parametrize("order", ["A B C D E F unfit", "unfit F E D C B A", "D unfit B E A F C"])
def test_novelty_selection_keeps_the_novel_and_skips_the_same_cluster(m, k, elites, order):
    names = order.split()
    behaviour = thermometer(*(LEVELS[name] for name in names), length=40)
    chosen = novelty_elites(np.array([FITNESS[name] for name in names]), behaviour, k, m)
    assert [names[i] for i in chosen] == list(elites)


@pytest.mark.parametrize("fitness, levels, k, m, elites", [
    # 1 and 2 behave alike, 3 and 4 too. S_1 to S_4 are sqrt(8) + 0 + 4 + 4 + sqrt(8) = 13.66, S_5
    # is 4 sqrt(8) = 11.31. Keep 1 2 3 4. Add 5: 1-2 and 3-4 are both at 0; drop 4.
    ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], (8, 0, 0, 16, 16, 8), 5, 6, [0, 1, 2, 3, 5]),
    # Keep 1 2 3. Add 4: likewise. Add 5: 1-2 is the closest pair; drop 2.
    ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], (8, 0, 0, 16, 16, 8), 4, 6, [0, 1, 3, 5]),
    ([0.1, 0.3, 0.2], (0, 4, 16), 2, 9, [1, 2]),  # fewer than m are all
    # Twins: 0 is the oldest; of the others age decides, or novelty.
    ([0.5, 0.5, 0.5, 0.5], (4, 0, 0, 0), 2, 4, [0, 1]),
    ([0.5, 0.5, 0.5, 0.5], (0, 0, 0, 4), 2, 4, [0, 3]),
])
def test_ties_in_novelty_selection_go_by_rank_and_age(fitness, levels, k, m, elites):
    assert novelty_elites(np.array(fitness), thermometer(*levels), k, m).tolist() == elites


@pytest.mark.parametrize("bits", [4, 16])  # of few bits many distances are equal
def test_novelty_selection_of_random_populations(bits):
    for seed in range(100):
        r = rng(seed)
        behaviour, fitness = r.random((12, bits)) < r.random((12, 1)), r.permutation(12) / 12
        shuffled = r.permutation(12)
        for k, m in ((2, 3), (4, 6), (5, 12)):
            candidates, chosen = best_first(fitness, m), novelty_elites(fitness, behaviour, k, m)
            assert chosen[0] == fitness.argmax() and len(set(chosen)) == k
            assert set(chosen) <= set(candidates)
            again = novelty_elites(fitness[shuffled], behaviour[shuffled], k, m)
            assert shuffled[again].tolist() == chosen.tolist()
            # The closest elites are no closer than those of plain novelty.
            scores, _ = novelty_scores(behaviour[candidates])
            plain = candidates[1 + np.argsort(-scores[1:], kind="stable")[:k - 1]]
            closest = [min(((behaviour[a] != behaviour[b]).sum() for a, b in combinations(e, 2)),
                           default=0) for e in (plain, chosen[1:])]
            assert closest[0] <= closest[1]


def test_without_novelty_the_elites_are_the_fittest_and_nothing_is_drawn():
    r, fitness = rng(), np.array([0.2, 0.9, 0.2, 0.9, 0.5])
    for k, elites in ((4, [1, 3, 4, 0]), (9, [1, 3, 4, 0, 2])):  # ties go to the older
        assert select_elites(fitness, None, k, m=5, n=400, novel=False, rng=r).tolist() == elites
    assert r.random() == rng().random()


def test_with_novelty_the_behaviour_is_that_on_n_images_drawn_anew():
    # 1 differs from 0 on the first five images alone, 2 on the last five. So one image tells one of
    # the two from 0.
    correct = np.array([[0] * 10, [1] * 5 + [0] * 5, [0] * 5 + [1] * 5], dtype=bool)

    def elites(n, seed):
        return tuple(select_elites(np.array([0.9, 0.8, 0.7]), correct, 2, 3, n, True, rng(seed)))

    chosen = [elites(1, seed)[1] for seed in range(1000)]
    assert set(chosen) == {1, 2} and np.mean(chosen) == pytest.approx(1.5, abs=0.06)
    # On all images, or more, both are as novel, S = sqrt(5) + sqrt(10), and the fitter is in.
    assert {elites(n, seed) for n in (10, 400) for seed in range(50)} == {(0, 1)}


@pytest.mark.parametrize("reading, period, on", [
    ("pulsation", 5, {5, 6, 7, 8, 9, 15, 16, 17, 18, 19}),  # off for five, on for five
    ("one-in-p", 5, {4, 9, 14, 19}), ("always", 5, set(range(20))), ("off", 5, set()),
    ("pulsation", 1, set(range(1, 20, 2))), ("one-in-p", 1, set(range(20)))])
def test_pulsation_over_twenty_generations(reading, period, on):
    assert {g for g in range(20) if pulse(g, period, reading)} == on


def every_operator(seed):
    r = rng(seed)
    h = initialize(SEARCH_SPACE, 8, r)
    fitness, behaviour = r.random(8), r.random((8, 20)) < 0.5
    parents = h[tournament(fitness, 8, 2, r)]
    children, mates = crossover(mutate(parents, SEARCH_SPACE, 0.1, 0.2, r), 0.5, r)
    return h, parents, children, mates, novelty_elites(fitness, behaviour, 3, 5)


def test_equal_generators_give_equal_results_and_no_global_one_is_touched():
    def state():
        return [random.getstate(), np.random.get_state()[1].tolist(),
                torch.random.get_rng_state().tolist()]

    before = state()
    first, again, other = every_operator(1), every_operator(1), every_operator(2)
    assert before == state()
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert all((a != b).any() for a, b in zip(first[:3], other[:3], strict=True))
