"""The genetic operators against results worked out by hand from the paper and the design."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch

from errors import ConfigError
from evolution import (
    SEARCH_SPACE,
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


def theta_columns(h):
    return h[:, [i for i, v in enumerate(SEARCH_SPACE) if v.name.startswith("theta")]]


def is_uniform(u):
    """Whether the empirical distribution of u keeps within 2 / sqrt(n) of U(0, 1): Kolmogorov-Smirnov, p < 0.001."""
    u = np.sort(u)
    return np.abs(u - np.linspace(0, 1, len(u))).max() < 2 / np.sqrt(len(u))


def thermometer(*levels, length=16):
    """Behaviour vectors whose first `level` bits are set: the Hamming distance of two is the difference of levels."""
    return np.arange(length) < np.array(levels)[:, None]


def test_streams_of_equal_purpose_seed_and_key_are_equal_and_all_others_differ():
    keys = [(), (0,), (1,), (5,), (1, 5), (5, 1), (1, 1), (2, 300)]
    draws = {(purpose, seed, key): random_stream(purpose, seed, *key).integers(2**63)
             for purpose in STREAMS for seed in (0, 1, 2, 2**32 - 1) for key in keys if key}
    assert len(set(draws.values())) == len(draws)
    for (purpose, seed, key), first in draws.items():
        assert random_stream(purpose, seed, *key).integers(2**63) == first


def test_variables_start_uniform_within_their_ranges_and_independent_of_each_other():
    assert [v.name for v in SEARCH_SPACE] == [*(f"theta{i}" for i in range(8)), "lr_scale", "lr_decay", "momentum"]
    assert all((v.low, v.high, v.log) == (-10, 10, False) for v in SEARCH_SPACE[:8])
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
    np.testing.assert_array_equal(as_array(SEARCH_SPACE, [dict(reversed(d.items())) for d in dicts]), h)
    assert as_dicts((), initialize((), 3, rng())) == [{}, {}, {}] and as_array((), [{}] * 3).shape == (3, 0)


@pytest.mark.parametrize("low, high, log", [
    (1, 1, False), (2, 1, False), (0, 1, True), (-1, 1, True), (0.1, np.inf, False), (np.nan, 1, False)])
def test_a_range_that_holds_nothing_is_refused(low, high, log):
    with pytest.raises(ValueError, match="variable x: "):
        Variable("x", low, high, log=log)


@pytest.mark.parametrize("space, words", [
    ((Variable("wieght_decay", 0, 1),), "'wieght_decay', did you mean 'weight_decay'"),
    ((*SEARCH_SPACE, Variable("momentum", 0, 1)), "^momentum is twice among the evolved variables$"),
    (SEARCH_SPACE[1:], "all of the eight thetas, or none"),
    ((Variable("momentum", 0.5, 3),), "momentum must stay from 0 to 1, with clip"),
    ((Variable("momentum", 0.5, 0.9, clip=False),), "momentum must stay from 0 to 1, with clip"),
    ((Variable("cutout", -1, 3),), "cutout must stay from 0, with clip"),
    ((Variable("lr_decay", 0, 3),), "lr_decay must stay above 0"),
    ((Variable(3, 0.1, 1),), "no hyperparameter is called 3"),
    (("momentum",), "must be a tuple of evolution.Variable"), (5, "must be a tuple of evolution.Variable"),
])
def test_a_search_space_that_training_cannot_apply_is_refused(space, words):
    with pytest.raises(ConfigError, match=words):
        checked_space(space, NAMES)
    assert checked_space(SEARCH_SPACE[-1], NAMES) == SEARCH_SPACE[-1:]  # one may stand alone


@pytest.mark.parametrize("t, chances", [
    (1, [1 / 5, 1 / 5, 1 / 5, 1 / 5, 1 / 5]),
    (2, [4 / 10, 3 / 10, 2 / 10, 1 / 10, 0]),  # of the 10 pairs, the one of rank r is the fitter in 4 - r
    (3, [6 / 10, 3 / 10, 1 / 10, 0, 0]),  # of the 10 triples, in C(4 - r, 2)
    (5, [1, 0, 0, 0, 0]),
    (9, [1, 0, 0, 0, 0]),  # more than there are: all
])
@pytest.mark.parametrize("fitness, by_rank", [
    ([0.3, 0.9, 0.1, 0.7, 0.5], [1, 3, 4, 0, 2]),
    ([0.5, 0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3, 4]),  # ties go to the older
    ([0.2, 0.8, 0.2, 0.8, 0.2], [1, 3, 0, 2, 4]),
])
def test_the_chance_to_win_a_tournament_follows_from_the_rank(t, chances, fitness, by_rank):
    winners = tournament(np.array(fitness), 5000, t, rng())
    frequency = np.bincount(winners, minlength=5) / 5000
    np.testing.assert_allclose(frequency[by_rank], chances, atol=2 * CLOSE)
    assert all(frequency[by_rank[i]] == 0 for i, chance in enumerate(chances) if chance == 0)


def test_tournaments_are_independent_and_as_many_as_asked_for():
    wins = tournament(np.array([0.0, 1.0, 2.0]), MANY, 2, rng()) == 2  # with probability 2/3
    assert np.mean(wins[1:] & wins[:-1]) == pytest.approx(4 / 9, abs=CLOSE)
    assert tournament(np.array([0.5]), 3, 2, rng()).tolist() == [0, 0, 0]


def test_mutation_multiplies_each_variable_by_gaussian_noise_of_its_own():
    h = np.tile([-8.0, 2.0, 0.5], (MANY, 1))
    space = tuple(Variable(name, -10, 10, clip=False) for name in "abc")
    noise = (mutate(h, space, 0.1, 0.0, rng()) / h - 1) / 0.1
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(3), atol=0.04)
    assert np.mean(np.abs(noise) < 1) == pytest.approx(0.683, abs=0.01)  # as of a normal distribution


def test_only_variables_with_clip_keep_within_their_range():
    space = (Variable("free", -10, 10, clip=False), Variable("clipped", 1, 10))
    mutated = mutate(np.tile([10.0, 10.0], (1000, 1)), space, 0.1, 0.0, rng())
    assert np.mean(mutated[:, 0] > 10) == pytest.approx(0.5, abs=0.06)
    assert np.mean(mutated[:, 1] == 10) == pytest.approx(0.5, abs=0.06) and mutated[:, 1].max() == 10
    assert mutate(np.array([[-10.0, 1.0]] * 1000), space, 0.1, 0.0, rng()).min(axis=0)[1] == 1
    assert [v.name for v in SEARCH_SPACE if v.clip] == ["lr_scale", "lr_decay", "momentum"]


def test_a_reset_is_a_fresh_uniform_draw_of_each_variable_independently():
    space = (Variable("a", -10, 10, clip=False), Variable("b", 2, 3))
    old = np.tile([0.0, 2.5], (MANY, 1))
    mutated = mutate(old, space, 0.0, 0.3, rng())
    changed = mutated != old
    np.testing.assert_allclose(changed.mean(axis=0), 0.3, atol=CLOSE)
    assert np.mean(changed.all(axis=1)) == pytest.approx(0.09, abs=CLOSE)
    for column, v in enumerate(space):
        assert is_uniform((mutated[changed[:, column], column] - v.low) / (v.high - v.low))


def test_mutation_without_noise_or_reset_changes_nothing_and_with_certain_reset_everything():
    h = initialize(SEARCH_SPACE, 100, rng())
    h[:, 3] = 0
    before, noisy = h.copy(), mutate(h, SEARCH_SPACE, 0.1, 0.0, rng(1))
    np.testing.assert_array_equal(np.sign(noisy), np.sign(h))  # without reset a sign and a 0 are for ever
    assert (noisy[:, [0, 8]] != h[:, [0, 8]]).all()
    np.testing.assert_array_equal(mutate(h, SEARCH_SPACE, 0.0, 0.0, rng(1)), before)
    assert (mutate(h, SEARCH_SPACE, 0.1, 1.0, rng(1)) != before).all()
    np.testing.assert_array_equal(h, before)  # pure


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
    assert (children[taken] == np.broadcast_to(mates[:, None], h.shape)[taken]).all()  # all from the one mate


def test_the_fittest_come_best_first_and_ties_go_to_the_older():
    assert best_first([0.2, 0.9, 0.2, 0.9, 0.5], 4).tolist() == [1, 3, 4, 0]
    assert best_first([0.2, 0.9], 5).tolist() == [1, 0]


def test_eq_1_on_four_vectors():
    behaviour = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    scores, distance = novelty_scores(behaviour)
    r3 = np.sqrt(3)  # b_1 and b_2 differ in three places
    np.testing.assert_allclose(distance, [[0, 1, 2, 0], [1, 0, r3, 1], [2, r3, 0, 2], [0, 1, 2, 0]])
    np.testing.assert_allclose(scores, [3, 2 + r3, 4 + r3, 3])
    assert scores[0] == scores[3]  # to the last bit: equal behaviour is equal novelty


# Six candidates by descending fitness, and an unfit, most novel one that is none. B and C behave alike, A and E too.
#     levels  A 4   B 0   C 0   D 16   E 4   F 13
#     S_A = S_E = 2 + 2 + sqrt(12) + 0 + 3         = 10.46
#     S_B = S_C = 2 + 0 + 4 + 2 + sqrt(13)         = 11.61
#     S_D = sqrt(12) + 4 + 4 + sqrt(12) + sqrt(3)  = 16.66
#     S_F = 3 + sqrt(13) + sqrt(13) + sqrt(3) + 3  = 14.94
# A, the fittest, is in. The rest by novelty: D F B C E.
LEVELS = {"A": 4, "B": 0, "C": 0, "D": 16, "E": 4, "F": 13, "unfit": 40}
FITNESS = {"A": 0.9, "B": 0.8, "C": 0.7, "D": 0.6, "E": 0.5, "F": 0.4, "unfit": 0.3}


@pytest.mark.parametrize("m, k, elites", [
    # Keep D F B. C comes: it is where B is, and goes. E comes: D and F, at sqrt(3), are the closest pair; F goes.
    (6, 4, "ADBE"),
    # Keep D F. B comes: D-F is closest, F goes. C comes on top of B and goes. E comes: B-E, at 2, is closest; E goes.
    (6, 3, "ADB"),
    # Keep D; each newcomer is the later of the only pair.
    (6, 2, "AD"),
    (6, 1, "A"),
    # Keep D F B C; E comes: B and C are one, C goes.
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


def test_of_equally_close_pairs_the_last_ranked_goes():
    # 1 and 2 behave alike, 3 and 4 too. S_1 to S_4 are sqrt(8) + 0 + 4 + 4 + sqrt(8) = 13.66, S_5 = 4 sqrt(8) = 11.31.
    behaviour, fitness = thermometer(8, 0, 0, 16, 16, 8), np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    # Keep 1 2 3 4. 5 comes: 1-2 and 3-4 are both at 0; 4 goes.
    assert novelty_elites(fitness, behaviour, 5, 6).tolist() == [0, 1, 2, 3, 5]
    # Keep 1 2 3. 4 comes: likewise. 5 comes: 1-2 is the closest pair; 2 goes.
    assert novelty_elites(fitness, behaviour, 4, 6).tolist() == [0, 1, 3, 5]


def test_more_candidates_than_there_are_are_all_and_twins_are_told_apart_by_age_alone():
    assert novelty_elites(np.array([0.1, 0.3, 0.2]), thermometer(0, 4, 16), 2, 9).tolist() == [1, 2]
    fitness, behaviour = np.full(4, 0.5), thermometer(4, 0, 0, 0)
    assert novelty_elites(fitness, behaviour, 2, 4).tolist() == [0, 1]
    assert novelty_elites(fitness[::-1], behaviour[::-1], 2, 4).tolist() == [0, 3]  # 0: oldest, 3: most novel


def test_novelty_selection_does_not_depend_on_the_order_of_the_population():
    for seed in range(200):
        r = rng(seed)
        behaviour, fitness = r.random((9, 4)) < 0.5, r.permutation(9) / 9  # few bits: many equal distances
        shuffled = r.permutation(9)
        for k, m in ((2, 3), (4, 6), (5, 9)):
            chosen = novelty_elites(fitness, behaviour, k, m)
            again = shuffled[novelty_elites(fitness[shuffled], behaviour[shuffled], k, m)]
            assert again.tolist() == chosen.tolist()
            assert chosen[0] == fitness.argmax() and len(set(chosen)) == k
            assert set(chosen) <= set(best_first(fitness, m))


def test_the_cluster_rule_never_lets_the_closest_elites_be_closer_than_plain_novelty_would():
    for seed in range(200):
        r = rng(seed)
        behaviour, fitness = r.random((12, 16)) < r.random((12, 1)), r.permutation(12) / 12
        scores, distance = novelty_scores(behaviour[order := best_first(fitness, 12)])
        plain = order[1 + np.argsort(-scores[1:], kind="stable")[:4]]
        distance = distance[np.ix_(order.argsort(), order.argsort())]
        closest = [min(distance[pair] for pair in combinations(elites, 2))
                   for elites in (plain, novelty_elites(fitness, behaviour, 5, 12)[1:])]
        assert closest[0] <= closest[1]


def test_without_novelty_the_elites_are_the_fittest_and_nothing_is_drawn():
    r = rng()
    fitness, correct = np.array([0.1, 0.4, 0.3, 0.2]), thermometer(0, 4, 4, 16)
    assert select_elites(fitness, correct, k=2, m=3, n=400, novel=False, rng=r).tolist() == [1, 2]
    assert r.random() == rng().random()


def test_with_novelty_the_behaviour_is_that_on_n_images_drawn_anew():
    # 1 differs from 0 on the first five images alone, 2 on the last five: one image tells one of the two from 0.
    fitness, correct = np.array([0.9, 0.8, 0.7]), np.array([[0] * 10, [1] * 5 + [0] * 5, [0] * 5 + [1] * 5], dtype=bool)
    chosen = [select_elites(fitness, correct, k=2, m=3, n=1, novel=True, rng=rng(i))[1] for i in range(1000)]
    assert set(chosen) == {1, 2} and np.mean(chosen) == pytest.approx(1.5, abs=0.06)
    # On all of them both are as novel, S = sqrt(5) + sqrt(10), and the fitter is in; there are no more than all.
    assert {tuple(select_elites(fitness, correct, k=2, m=3, n=n, novel=True, rng=rng(i)))
            for n in (10, 400) for i in range(50)} == {(0, 1)}


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
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    first, again, other = every_operator(1), every_operator(1), every_operator(2)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert all((a != b).any() for a, b in zip(first[:3], other[:3], strict=True))
