"""Baseline 1 against a plain PyTorch training loop, and PBT against its rules worked out by hand."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from augmentation import draw_augmentation, make_batch, normalize
from baselines import exploit_and_explore
from config import Config
from data import load_data
from evolution import Variable, random_stream
from models import make_model
from records import read_log

SPACE = (Variable("a", 1e-3, 1.0, log=True), Variable("b", 0.0, 10.0))
# Best to worst: 1 5 3 7 0 4 6 2. Of eight, the quarters are 1 5 and 6 2.
FITNESS = np.array([0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2, 0.6])
H = np.array([[0.1, 1.0], [0.2, 2.0], [0.3, 3.0], [0.4, 4.0], [0.5, 5.0], [0.9, 6.0], [0.7, 7.0], [0.8, 8.0]])


def many(fitness=FITNESS, h=H, n=2000):
    """Sources (n, members) and hyperparameters (n, members, variables) of n repetitions."""
    repetitions = [exploit_and_explore(h, fitness, SPACE, np.random.default_rng(seed)) for seed in range(n)]
    return tuple(map(np.array, zip(*repetitions, strict=True)))


def test_each_of_the_worst_quarter_alone_copies_one_of_the_best_quarter_at_random():
    source, h = many()
    better = [0, 1, 3, 4, 5, 7]
    assert (source[:, better] == better).all() and (h[:, better] == H[better]).all()
    assert set(np.unique(source[:, [2, 6]])) == {1, 5}
    np.testing.assert_allclose((source[:, [2, 6]] == 1).mean(axis=0), 0.5, atol=0.05)
    assert (source[:, 2] == source[:, 6]).mean() == pytest.approx(0.5, abs=0.05)  # independently


def test_what_is_copied_is_multiplied_or_divided_by_exactly_1_2_or_drawn_anew():
    source, h = many()
    old, new = H[source[:, [2, 6]]], h[:, [2, 6]]
    up = new == np.minimum(old * 1.2, [1.0, 10.0])  # 0.9 * 1.2 is clipped to 1
    down, fresh = new == old * (1 / 1.2), ~up & (new != old * (1 / 1.2))
    np.testing.assert_allclose(up.mean(axis=0), 0.375, atol=0.05)  # half of the three quarters that are not reset
    np.testing.assert_allclose(down.mean(axis=0), 0.375, atol=0.05)
    np.testing.assert_allclose(fresh.mean(axis=0), 0.25, atol=0.05)
    assert (up[..., 0] == up[..., 1]).mean() < 0.6  # each variable independently
    logarithm = np.log10(new[..., 0][fresh[..., 0]])  # drawn from U(-3, 0)
    assert logarithm.min() > -3 and logarithm.max() < 0 and logarithm.mean() == pytest.approx(-1.5, abs=0.1)
    assert new.min() >= 0 and (new <= [1.0, 10.0]).all() and (new[..., 0][source[:, [2, 6]] == 5] == 1.0).any()


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


def check_pbt(log, population):
    """Every step of PBT in a log: who went on, who was replaced by whom, and with which learning rate."""
    quarter, replaced = population // 4, 0
    for before, after in zip(log, log[1:], strict=False):
        ranked = sorted(before["population"], key=lambda m: (m["diverged"], -m["fitness"], m["id"]))
        best, worst = ({m["id"]: m for m in part} for part in (ranked[:quarter], ranked[-quarter:]))
        for old, new in zip(before["population"], after["population"], strict=True):
            if old["id"] not in worst:
                assert new["parent"] == old["id"] and new["hyperparameters"] == old["hyperparameters"]
                continue
            replaced += 1
            assert new["parent"] in best
            copied, scale = (m["hyperparameters"]["lr_scale"] for m in (best[new["parent"]], new))
            assert 1e-3 <= scale <= 1 and (scale != copied or scale in (1e-3, 1))  # where it was clipped
    assert replaced == quarter * (len(log) - 1)
    everyone = [m for line in log for m in line["population"]]
    assert [m["id"] for m in everyone] == list(range(len(log) * population))
    assert [m["generation"] for m in everyone] == [g for g in range(len(log)) for _ in range(population)]
    assert all(m["hyperparameters"].keys() == {"lr_scale"} for m in everyone)
    assert all(m["parent"] is None for m in log[0]["population"])


def test_pbt_of_the_papers_size_with_members_that_diverge(pretend):
    config = Config("cifar10", method="pbt")
    result = pretend(config, diverges=lambda m: np.random.default_rng(m.id).random() < 0.2)
    check_pbt(result.log, 40)
    assert sum(len(individuals) for individuals, *_ in result.calls) == 25 * 40 == config.evaluations()
    assert all(teacher is None for _, teacher, _ in result.calls)


def test_pbt_on_real_networks(run_epbt):
    check_pbt(read_log(run_epbt("--method", "pbt", "--population", "5")), 5)


def test_random_networks_keep_their_own_rate_and_weights(pretend):
    log = pretend(Config("cifar10", method="random", population=6, generations=4)).log
    assert len({m["hyperparameters"]["lr_scale"] for m in log[0]["population"]}) == 6
    for before, after in zip(log, log[1:], strict=False):
        for old, new in zip(before["population"], after["population"], strict=True):
            assert new["parent"] == old["id"] and new["hyperparameters"] == old["hyperparameters"]


def test_an_early_stopped_network_trains_on_and_its_best_generation_is_delivered(run_epbt):
    stopped, plain = (run_epbt("--method", "baseline", "--label-noise", "0.4", *options) for options in (
        ("--early-stopping", "--learning-rate", "0.3", "--generations", "6"), ()))
    log, summary = read_log(stopped), json.loads((stopped / "summary.json").read_text())
    fitness = {m["id"]: m["fitness"] for line in log for m in line["population"]}
    first_best = [min(i for i in range(g + 1) if fitness[i] == max(list(fitness.values())[:g + 1])) for g in range(6)]
    for g, line in enumerate(log):
        assert [m["id"] for m in line["population"]] == sorted({first_best[g], g})
        assert [m["id"] for m in line["population"] if m["elite"]] == [first_best[g]]
        assert [m["parent"] for m in line["population"]] == [
            m["id"] - 1 if m["id"] else None for m in line["population"]]
    assert summary["best"]["id"] == first_best[5]
    assert len(json.loads((stopped / "schedule.json").read_text())["epochs"]) == first_best[5] + 1
    digests = [json.loads((folder / "config.json").read_text())["data"] for folder in (stopped, plain)]
    assert digests[0] != digests[1]  # the plain one trains on the validation images as well
    assert all("memorised" in m["scores"] for line in log for m in line["population"])


def test_baseline_1_is_a_plain_training_loop(run_epbt, one_thread):
    folder = run_epbt("--method", "baseline", "--seed", "3", "--batch-size", "128", "--augmentation", "shift=1")
    data = load_data("digits", seed=3, validation=60, limit=300, train_on_all=True, augmentation="shift=1")
    assert len(data.train) == 300
    model = make_model("resnet8", 10, 1, seed=int(random_stream("weights", 3, 0).integers(2**63)))
    model = model.to(memory_format=torch.channels_last)  # another layout would round otherwise
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch, rate in enumerate([0.1, 0.1 / 5, 0.1 / 5**3]):  # milestones at 30, 60 and 80% of three epochs
        optimizer.param_groups[0]["lr"] = rate
        rng = random_stream("training", 3, epoch, epoch)
        rng.integers(2**63)  # the seed of dropout
        order = torch.from_numpy(rng.permutation(300)[:256])  # two batches; 44 images are left over
        draws = torch.from_numpy(draw_augmentation(data.augmentation, 256, 8, 8, rng))
        for index, draw in zip(order.split(128), draws.split(128), strict=True):
            images = make_batch(data.train.images, index, draw, data.augmentation, data.mean, data.std)
            optimizer.zero_grad()
            F.cross_entropy(model(images), data.train.labels[index]).backward()
            optimizer.step()

    trained = torch.load(folder / "best.pt", weights_only=True)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6)
    predicted = model.eval()(normalize(data.test.images, data.mean, data.std)).argmax(1)
    accuracy = (predicted == data.test.labels).float().mean().item()
    assert json.loads((folder / "summary.json").read_text())["test_accuracy"] == pytest.approx(accuracy, abs=0.003)
    everyone = [m for line in read_log(folder) for m in line["population"]]
    assert [(m["id"], m["parent"], m["hyperparameters"]) for m in everyone] == [(0, None, {}), (1, 0, {}), (2, 1, {})]
