"""The winner's schedule, a small JSON file, and the training of one new network under it.

The schedule follows the ancestors of the fittest individual (Sec. 5.3). It has a loss, learning
rate and momentum for each epoch in which the individual's weights were trained.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated

from config import Config, NotNegative, Positive, Share, check, flag
from errors import MOST, ConfigError, RunError, message, mistake
from records import Individual, ancestry

SCHEDULE = "schedule.json"
EPOCH = dict(learning_rate=NotNegative, momentum=Share, weight_decay=NotNegative,
             cutout=NotNegative, theta=tuple[Annotated[float, -MOST, MOST], ...])
# A replay takes SHARED from the run's config. The schedule decides DECIDED.
SHARED = ("dataset", "model", "batch_size", "add_cross_entropy", "image_size", "augmentation")
DECIDED = ("learning_rate", "lr_decay", "momentum", "weight_decay", "average_weights", "loss",
           "add_cross_entropy")


def schedule(config, data, log):
    """The winner's schedule, a dict with the fields SHARED of the config and:

    plain_loss: the loss where theta is None; side: the smaller of the images' height and width in
    pixels; average_epochs: over how many the weights are averaged; epochs: a list of dicts with the
    keys of EPOCH, where theta is eight numbers or None."""
    epochs = [{name: ancestor["applied"][name] for name in EPOCH} | {"learning_rate": rate}
              for ancestor in ancestry(log) for rate in ancestor["applied"]["learning_rate"]]
    return {name: getattr(config, name) for name in SHARED} | {
        "plain_loss": config.plain_loss, "side": min(data.height, data.width),
        "average_epochs": config.average_weights * config.epochs, "epochs": epochs}


def read_schedule(path):
    """The schedule in a file or in a run's folder. Raises RunError if it is not one."""
    path = Path(os.path.expanduser(path))
    path = path / SCHEDULE if os.path.isdir(path) else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        values = [("side", Positive, found["side"])]
        for epoch in found["epochs"]:
            plain = epoch | {"theta": tuple(epoch["theta"] or 8 * [0])}
            values += [(name, kind, plain[name]) for name, kind in EPOCH.items()]
            values += [("the number of thetas", Annotated[int, 8, 8], len(plain["theta"]))]
        for name, kind, value in values:
            if line := mistake(kind, value):
                raise ValueError(f"{name} must be {line}")
        check(Config(**replay_fields(found, path) | {"loss": found["plain_loss"]}))
    except OSError as error:
        raise RunError(f"cannot read {path}, the schedule of a finished run: "
                       f"{error.strerror}") from error
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{path} is not the schedule of a finished run ({type(error).__name__}: "
                       f"{message(error)})") from error
    return found


def replay_fields(found, path, epochs=1):
    """The fields of the config that replays a schedule, in generations of so many epochs."""
    evolved = any(epoch["theta"] for epoch in found["epochs"])
    return {name: found[name] for name in SHARED} | dict(
        method="replay", replay=str(path), epochs=epochs, milestones=(),
        generations=-(-len(found["epochs"]) // epochs),
        average_weights=found["average_epochs"] / epochs,
        loss="taylorglo" if evolved else found["plain_loss"])


def replay_config(path, epochs=1):
    """The fields of the config that replays the schedule in a file or in a run's folder, in
    generations of so many epochs."""
    return replay_fields(read_schedule(path), path, epochs)


def checked_schedule(config):
    """A fingerprint of the schedule of a replay. Raises RunError if it cannot be read, ConfigError
    if the config contradicts it."""
    found = read_schedule(config.replay)
    decided = Config(**replay_fields(found, config.replay, config.epochs)
                     | {"dataset": config.dataset})
    lines = [f"{flag(name)} is decided by the schedule of --replay: {right}, not {given}"
             for name in DECIDED
             if (given := getattr(config, name)) != (right := getattr(decided, name))]
    if lines:
        raise ConfigError("\n".join(lines))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def replay(config, space, data, workers, run):
    """Trains one new network under a schedule that is stretched to this run's generations.

    A generator like `epbt.epbt`. A generation has the values that the schedule has at its start.
    Cutouts keep their share of the image's side; there are none if the augmentation has none. There
    is no teacher: the distillation of Eq. 3 is left out, also where the run had it."""
    recorded = read_schedule(config.replay)
    epochs, scale = recorded["epochs"], min(data.height, data.width) / recorded["side"]
    scale = scale if data.augmentation.cutout else 0.0
    for g in range(run.generations, config.generations):
        then = epochs[g * len(epochs) // config.generations]
        h = dict(lr_scale=then["learning_rate"] / config.learning_rate, lr_decay=1.0,
                 momentum=then["momentum"], weight_decay=then["weight_decay"],
                 cutout=then["cutout"] * scale)
        h |= {f"theta{i}": x for i, x in enumerate(then["theta"] or ())}
        population = workers.evaluate([Individual(g, g, h, parent=g - 1 if g else None)])
        run.record(g, population)
        yield g, population
