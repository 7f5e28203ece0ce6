"""The presets and the protocols of Sec. 4, and what a config refuses."""

from dataclasses import fields, replace

import pytest
from small import SEARCH_SPACE

from config import DATA_SETS, PRESETS, Config, check
from epbt import settled
from errors import ConfigError
from evolution import Variable

BOTH = dict(model="resnet32", population=40, k=20, m=30, batch_size=128, learning_rate=0.1,
            momentum=0.9, tournament=2, crossover=0.5, behaviour_images=400, pulsation_period=5,
            theta_range=10, distillation=0.8, preset="paper", known_losses=0, weight_decay=0,
            label_noise=0, average_weights=0, add_cross_entropy=False, high_rates=False,
            evolve_cutout=False)


@pytest.mark.parametrize("dataset, protocol", [
    ("cifar10", dict(generations=25, epochs=8, milestones=(0.3, 0.6, 0.8), lr_decay=5,
                     validation=1250, enlarge=20,  # 1,250 enlarged to 25,000
                     augmentation="flip shift=4 cutout=16")),
    ("svhn", dict(generations=40, epochs=1, milestones=(0.5, 0.75), lr_decay=10,
                  validation=30_000, enlarge=1, augmentation="none")),
])
def test_the_protocols_are_those_of_sec_4(dataset, protocol):
    config, expected = Config(dataset), BOTH | protocol
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.search_space(16) == SEARCH_SPACE


def test_shares_are_rounded_down_as_on_paper():
    config = Config("cifar10", population=100, elites=0.29, novelty_candidates=1.1)
    assert (config.k, config.m) == (29, 31)  # 100 * 0.29 is 28.999999999999996 in Python
    assert Config("cifar10", population=5, elites=0.5).k == 2


def test_a_ray_cluster_may_have_more_cores_than_this_machine(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    ray = Config("digits", backend="ray", device="cpu")
    assert settled(ray).workers == 0  # Ray decides
    assert settled(replace(ray, workers=3)).workers == 3


def test_each_gpu_finds_its_number_of_slots_but_for_one_network(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [settled(Config("digits", method=method, device="cuda")).workers
            for method in ("epbt", "baseline")] == [0, 1]


def test_the_baselines_of_sec_4_1_and_the_numbers_of_sec_5_2():
    one, pbt, random, epbt = (Config("cifar10", method=method, **given) for method, given in (
        ("baseline", dict(population=7)), ("pbt", {}), ("random", {}), ("epbt", {})))
    fixed = dict(lr_scale=1, lr_decay=5, momentum=0.9, weight_decay=0, cutout=16)
    assert one.search_space() == () and one.fixed(16) == random.fixed(16) == fixed
    assert pbt.fixed(16) == {**fixed, "lr_decay": 1}  # it evolves the learning rate instead
    assert one.population == 1 and one.trains_on_all
    assert not any(c.trains_on_all for c in (pbt, random, replace(one, early_stopping=True)))
    (scale,) = pbt.search_space(16)
    assert random.search_space() == (scale,) and (scale.name, scale.log) == ("lr_scale", True)
    assert [0.1 * scale.low, 0.1 * scale.high] == pytest.approx([0.0001, 0.1])
    assert {c.plain_loss for c in (one, pbt, random)} == {"cross-entropy"}
    assert epbt.evaluations() == 40 + 24 * 20 == 520 and one.evaluations() == 25
    assert [c.evaluations() * c.epochs for c in (epbt, pbt)] == [4160, 8000]


def test_what_is_given_comes_before_the_preset_the_data_set_and_the_default():
    names = "digits", "fashion", "pictures", "cifar10"
    assert [Config(name).preset for name in names] == ["known", "best", "best", "paper"]
    assert [Config(name).known_losses for name in names] == [2, 0, 0, 0]
    assert Config("digits", preset="paper").known_losses == 0
    for method in ("baseline", "pbt", "random"):  # the data set's preset is EPBT's alone
        assert Config("fashion", method=method).milestones == Config("cifar10").milestones
    best = Config("cifar10", preset="best")
    assert {name: getattr(best, name) for name in PRESETS["best"]} == PRESETS["best"]
    assert best.k == 10 and best.generations == 25
    own = Config("svhn", preset="best", elites=20, milestones=[0.5])
    assert (own.elites, own.milestones, own.distillation, own.epochs) == (20, (0.5,), 0, 1)
    changed = Config("svhn", preset="best", elites=20, milestones=(0.5,), seed=3)
    assert replace(own, seed=3) == changed
    for name in (*DATA_SETS, "a folder"):
        for preset in PRESETS:
            check(Config(name, preset=preset))


def test_the_search_space_of_each_preset():
    best = Config("cifar10", preset="best").search_space(16)
    assert [(v.name, v.low, v.high) for v in best[8:]] == [
        ("lr_scale", 1, 10), ("lr_decay", 1, 10), ("momentum", 0.8, 0.97), ("cutout", 0, 16)]
    assert {(v.low, v.high) for v in best[:8]} == {(-1, 1)}
    assert Config("cifar10", evolve_cutout=True).search_space(0) == SEARCH_SPACE  # there is none
    assert Config("digits", loss="label-smoothing").search_space() == SEARCH_SPACE[8:]
    assert Config("digits", evolve_cutout=True).search_space(3)[-1] == Variable("cutout", 0, 3)


@pytest.mark.parametrize("given, k, m", [
    (dict(population=2), 1, 1), (dict(population=3), 1, 1), (dict(population=5), 2, 3),
    (dict(population=5, elites=4), 4, 5), (dict(population=40, elites=0.25), 10, 15),
    (dict(population=40, elites=10, novelty_candidates=3), 10, 30)])
def test_elites_and_candidates(given, k, m):
    config = Config("digits", **given)
    assert (config.k, config.m) == (k, m)
    check(config)


def test_the_identity_of_a_run_is_what_can_change_its_result():
    free = ("workers backend ray_address no_graphs data_root download out resume overwrite "
            "tensorboard plan").split()
    assert Config().identity().keys() == {f.name for f in fields(Config)} - {*free}


@pytest.mark.parametrize("given, words", [
    (dict(populaton=3), "Config has no field 'populaton', did you mean 'population'"),
    # Values
    *((dict(population=x), f"--population must be a whole number from 1 on, not {x!r}")
      for x in (2.5, True, "8")),
    (dict(seed=2**32), "--seed must be a whole number from 0 on and at most 4294967295, not 42949"),
    *((dict(lr_decay=x), f"--lr-decay must be a number above 0, not {str(x)[:9]}")
      for x in (0, -0.1, float("inf"), 10**400)),
    (dict(mutation=float("nan")), "--mutation must be a number from 0 on, not nan"),
    (dict(milestones=0.5), "--milestones must be a tuple of numbers, not 0.5"),
    (dict(milestones=(0.5, "a")), "--milestones must be a number from 0 on and at most 1, not 'a'"),
    (dict(novelty="puls"), "--novelty must be one of pulsation, one-in-p, always, off, not 'puls', "
                           "did you mean 'pulsation'"),
    (dict(deterministic=1), "--deterministic must be True or False, not 1"),
    (dict(out=None), "--out must be text, not None"),
    (dict(reset=2, tournament=0), "--tournament must .*\n--reset must"),  # all of them
    # Contradictions
    (dict(elites=40), r"--elites must be below --population \(40\), not 40"),
    (dict(elites=2.5), "--elites must be a whole number, or a share below 1, not 2.5"),
    (dict(validation=99.5), "--validation must be a whole number, or a share below 1, not 99.5"),
    (dict(preset="best", method="pbt", population=3), "--population must be at least 4 for --method"
                                                      " pbt, not 3\n--preset best is for"),
    (dict(preset="known", method="baseline"), "--preset known is for --method epbt, not baseline"),
    (dict(known_losses=99), r"--known-losses must be at most --population \(40\), not 99"),
    (dict(early_stopping=True), "--early-stopping is for --method baseline, not epbt"),
    (dict(method="replay"), "--method replay and --replay go together"),
    (dict(replay="x"), "--method replay and --replay go together"),
    (dict(ray_address="x"), "--ray-address needs --backend ray"),
    (dict(resume=True, overwrite=True), "--resume and --overwrite exclude each other"),
])
def test_each_mistake_is_one_line_that_says_what_is_accepted(given, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        check(Config("cifar10", **given))
