"""Writes run folders as epbt.py does, for the tests of the code that reads them; and reads their
JSON files."""

import json

THETA = [0.0, 1.0, 0.0, 0.0, 0.0, 10.0, -10.0, 0.0]  # what training applied


def member(id, generation, accuracy, parent=None, **more):
    """An individual's record. Its applied values depend on its id, so that a figure of other values
    fails its test."""
    applied = {"learning_rate": [0.1 + id, 0.2 + id], "theta": None, "momentum": 0.5 + id / 100,
               "weight_decay": 0.0, "cutout": 0.0, "alpha": 0.0}
    return dict(id=id, generation=generation, hyperparameters={}, parent=parent, mate=None,
                teacher=None, fitness=accuracy, test_accuracy=accuracy, loss=1.0, diverged=False,
                elite=False) | {"applied": applied | more.pop("applied", {})} | more


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def alone(*accuracies, **more):
    """The log of Baseline 1: one network."""
    return [[member(g, g, accuracy, g - 1 if g else None, **more)]
            for g, accuracy in enumerate(accuracies)]


def evolved(*accuracies, **more):
    """A log of EPBT with P = 4 and k = 2. In each generation the first child is the fittest; its
    parent is the first elite."""
    def child(id, generation, accuracy, parent=None):
        h = {f"theta{i}": float(i) for i in range(8)} | {"lr_scale": 1.0 + id, "momentum": 0.5}
        theta = [*THETA[:5], 10.0 + id, -10.0 + 2 * id, 0.0]
        return member(id, generation, accuracy, parent, hyperparameters=h, applied={"theta": theta},
                      **more)

    log = [[child(i, 0, accuracies[0] - i / 100) for i in range(4)]]
    for g, accuracy in enumerate(accuracies[1:], 1):
        elites = sorted(log[-1], key=lambda m: -m["fitness"])[:2]
        log.append([*({**m, "elite": True} for m in elites),
                    child(2 * g + 2, g, accuracy, elites[0]["id"]),
                    child(2 * g + 3, g, accuracy - 0.01, elites[0]["id"])])
    return log


def write(folder, log, **settings):
    """Write the files of a run whose populations are `log`. By default the folder's name ends in
    the seed."""
    settings = {"method": "epbt", "dataset": "digits", "model": "resnet8", "epochs": 2,
                "generations": len(log), "seed": int(folder.name.rsplit("-")[-1]),
                "population": len(log[0]) if log else 0, "label_noise": 0.0, "data": "0" * 16,
                "classes": 10, "space": []} | settings
    folder.mkdir(parents=True)
    lines = [{"generation": g, "population": population} for g, population in enumerate(log)]
    times = [{"generation": g, "seconds": 1800.0, "commit": "abc1234"} for g in range(len(log))]
    files = {"log.jsonl": lines, "timing.jsonl": times, "config.json": [settings]}
    for name, content in files.items():
        text = "".join(json.dumps(line) + "\n" for line in content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
