"""Baseline 1 against a plain PyTorch loop, and PBT against its rules worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest

from augmentation import draw_augmentation, make_batch, normalize
from baselines import exploit_and_explore, train_on
from config import Config
from data import load_data
from evolution import Variable, random_stream
from models import make_model
from records import Individual, read_log
from tests.run_folders import read_json

SPACE = (Variable("a", 1e-3, 1.0, log=True), Variable("b", 0.0, 10.0))
# Best to worst: 1 5 3 7 0 4 6 2. Of eight, the quarters are 1 5 and 6 2.
FITNESS = np.array([0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2, 0.6])
H = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.7, 0.8], [1.0, 2, 3, 4, 5, 6, 7, 8]]).T


def many(fitness=FITNESS, h=H, n=2000):
    """Sources (n, members) and hyperparameters (n, members, variables) of n repetitions."""
    repetitions = [exploit_and_explore(h, fitness, SPACE, np.random.default_rng(seed))
                   for seed in range(n)]
    return tuple(map(np.array, zip(*repetitions, strict=True)))


def test_each_of_the_worst_quarter_copies_one_of_the_best_at_random_and_changes_what_it_copied():
    source, h = many()
    better = [0, 1, 3, 4, 5, 7]
    assert (source[:, better] == better).all() and (h[:, better] == H[better]).all()
    assert set(np.unique(source[:, [2, 6]])) == {1, 5}
    np.testing.assert_allclose((source[:, [2, 6]] == 1).mean(axis=0), 0.5, atol=0.05)
    assert (source[:, 2] == source[:, 6]).mean() == pytest.approx(0.5, abs=0.05)  # independently

    old, new = H[source[:, [2, 6]]], h[:, [2, 6]]
    up = new == np.minimum(old * 1.2, [1.0, 10.0])  # 0.9 * 1.2 is clipped to 1
    down, fresh = new == old * (1 / 1.2), ~up & (new != old * (1 / 1.2))
    # A quarter is drawn anew, and half of the others is multiplied.
    for kind, share in ((up, 0.375), (down, 0.375), (fresh, 0.25)):
        np.testing.assert_allclose(kind.mean(axis=0), share, atol=0.05)
    assert (up[..., 0] == up[..., 1]).mean() < 0.6  # each variable independently
    assert kstest(np.log10(new[..., 0][fresh[..., 0]]), "uniform", (-3, 3)).pvalue > 0.001
    assert new.min() >= 0 and (new <= [1.0, 10.0]).all()
    assert (new[..., 0][source[:, [2, 6]] == 5] == 1.0).any()


DEAD = -np.inf


@pytest.mark.parametrize("fitness, sources", [
    # Of those with a fitness of 0 the younger is worse, and whoever diverged is the worst.
    ([0.4, 0.3, DEAD, 0.2, 0.0, 0.5, 0.0, 0.1], [{0}, {1}, {0, 5}, {3}, {4}, {5}, {0, 5}, {7}]),
    ([0.4, 0.3, DEAD, -2.0, -0.1, 0.5, -0.2, 0.1], [{0}, {1}, {0, 5}, {0, 5}, {4}, {5}, {6}, {7}]),
    # Nobody who diverged is copied while another lives; else the run goes on.
    ([DEAD] * 5 + [0.1, DEAD, DEAD], [{0}, {1}, {2}, {3}, {4}, {5}, {5}, {5}]),
    ([DEAD] * 8, [{0}, {1}, {2}, {3}, {4}, {5}, {0, 1}, {0, 1}]),
    ([0.5, 0.9, 0.1], [{0}, {1}, {2}]),  # of less than four there is no quarter
])
def test_who_is_copied_to_whom(fitness, sources):
    source, _ = many(np.array(fitness), H[:len(fitness)], n=50)
    assert [set(column) for column in source.T.tolist()] == sources


def follows(log, population, quarter):
    """Checks every step in a log: who went on, and who was replaced by whom with which rate."""
    for before, after in zip(log, log[1:], strict=False):
        ranked = sorted(before["population"], key=lambda m: (m["diverged"], -m["fitness"], m["id"]))
        best = {m["id"]: m for m in ranked[:quarter]}
        worst = [m["id"] for m in ranked[population - quarter:]]
        for old, new in zip(before["population"], after["population"], strict=True):
            h, scale = new["hyperparameters"], new["hyperparameters"]["lr_scale"]
            if old["id"] not in worst:
                assert new["parent"] == old["id"] and h == old["hyperparameters"]
                continue
            copied = best[new["parent"]]["hyperparameters"]["lr_scale"]
            assert 1e-3 <= scale <= 1 and (scale != copied or scale in (1e-3, 1))  # clipped
    everyone = [m for line in log for m in line["population"]]
    assert [m["id"] for m in everyone] == list(range(len(log) * population))
    assert all(m["generation"] == m["id"] // population for m in everyone)
    assert all(m["hyperparameters"].keys() == {"lr_scale"} for m in everyone)
    assert all(m["parent"] is None for m in everyone[:population])
    assert len({m["hyperparameters"]["lr_scale"] for m in everyone[:population]}) == population
    return True


@pytest.mark.parametrize("method, quarter", [("pbt", 10), ("random", 0)])
def test_a_population_of_the_papers_size_with_members_that_diverge(method, quarter, pretend):
    config = Config("cifar10", method=method)
    result = pretend(config, diverges=lambda m: np.random.default_rng(m.id).random() < 0.2)
    assert follows(result.log, 40, quarter)
    assert len(result.everyone) == 25 * 40 == config.evaluations()
    assert all(teacher is None for _, teacher, _ in result.calls)


def test_pbt_on_real_networks(run_epbt):
    assert follows(read_log(run_epbt("--method", "pbt", "--population", "5")), 5, 1)


def stop_early(fitness, log):
    """Baseline 1 with early stopping, with these fitnesses by generation. It goes on after a log of
    (ids, ids of elites)."""
    everyone = [Individual(i, i, {}, i - 1 if i else None, fitness=f)
                for i, f in enumerate(fitness)]

    def evaluate(individuals):
        (new,) = individuals
        assert new.parent == everyone[new.id].parent
        return [everyone[new.id]]

    population = [everyone[i] for i in log[-1][0]] if log else []
    run = SimpleNamespace(generations=len(log), population=population)
    run.record = lambda g, *members: log.append(tuple([m.id for m in some] for some in members))
    config = Config("digits", method="baseline", early_stopping=True, generations=len(fitness))
    list(train_on(config, (), None, SimpleNamespace(evaluate=evaluate), run))
    return log


def test_an_early_stopped_network_trains_on_and_keeps_its_best_generation_the_earlier_of_equals():
    fitness = [0.2, 0.5, 0.5, 0.4, 0.6, 0.6]
    whole = stop_early(fitness, [])
    assert whole == [
        ([0], [0]), ([1], [1]), ([1, 2], [1]), ([1, 3], [1]), ([4], [4]), ([4, 5], [4])]
    assert stop_early(fitness, whole[:4]) == whole


def test_the_best_generation_of_an_early_stopped_network_is_delivered(run_epbt):
    stopped, plain = (run_epbt("--method", "baseline", "--label-noise", "0.4", *options)
                      for options in (("--early-stopping", "--learning-rate", "0.3"), ()))
    everyone = [m for line in read_log(stopped) for m in line["population"]]
    best = max(everyone, key=lambda m: (m["fitness"], -m["id"]))["id"]
    assert read_json(stopped / "summary.json")["best"]["id"] == best
    assert len(read_json(stopped / "schedule.json")["epochs"]) == best + 1
    assert all("memorised" in m["scores"] for m in everyone)
    # The plain one trains on the validation images too.
    assert read_json(stopped / "config.json")["data"] != read_json(plain / "config.json")["data"]


def test_baseline_1_is_a_plain_training_loop(run_epbt, one_thread):
    folder = run_epbt(*"--method baseline --seed 3 --batch-size 128 --augmentation shift=1".split())
    data = load_data("digits", seed=3, validation=60, limit=300, train_on_all=True,
                     augmentation="shift=1")
    assert len(data.train) == 300
    model = make_model("resnet8", 10, 1, seed=int(random_stream("weights", 3, 0).integers(2**63)))
    model = model.to(memory_format=torch.channels_last)  # another layout would round otherwise
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch, rate in enumerate([0.1, 0.1 / 5, 0.1 / 5**3]):  # milestones at 30, 60 and 80%
        optimizer.param_groups[0]["lr"] = rate
        rng = random_stream("training", 3, epoch, epoch)
        rng.integers(2**63)  # the seed of dropout
        order = torch.from_numpy(rng.permutation(300)[:256])  # two batches; 44 images are left over
        draws = torch.from_numpy(draw_augmentation(data.augmentation, 256, 8, 8, rng))
        for index, draw in zip(order.split(128), draws.split(128), strict=True):
            images = make_batch(data.train.images, index, draw, data.augmentation, data.mean,
                                data.std)
            optimizer.zero_grad()
            F.cross_entropy(model(images), data.train.labels[index]).backward()
            optimizer.step()

    trained = torch.load(folder / "best.pt", weights_only=True)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6)
    predicted = model.eval()(normalize(data.test.images, data.mean, data.std)).argmax(1)
    accuracy = (predicted == data.test.labels).float().mean().item()
    assert read_json(folder / "summary.json")["test_accuracy"] == pytest.approx(accuracy, abs=0.003)
    everyone = [m for line in read_log(folder) for m in line["population"]]
    assert [(m["id"], m["parent"], m["hyperparameters"]) for m in everyone] == [
        (0, None, {}), (1, 0, {}), (2, 1, {})]
