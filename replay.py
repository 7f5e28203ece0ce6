"""What a run leaves to a practitioner: its winner's training schedule, as a small JSON file, and how to train by it.

The ancestry of the fittest individual (Sec. 5.3) is a sequence of losses, learning rates and momenta, one for each
epoch that its weights were trained. `replay` trains one new network from scratch under that sequence.
"""

import json
from pathlib import Path

from options import is_number
from records import Individual, RunError, fittest
from taylorglo_ext import PLAIN_LOSSES
from training import learning_rate, scaled_theta

SCHEDULE = "schedule.json"
LATER = ("average_epochs", "image_size")  # whole numbers that older schedules lack
NUMBERS = ("learning_rate", "momentum", "weight_decay", "cutout")  # of an epoch, beside theta


def ancestry(log):
    """Log records from the first ancestor to the fittest of the last generation, each once (Sec. 5.3)."""
    everyone = {member["id"]: member for line in log for member in line["population"]}
    line = [fittest(log[-1]["population"])]
    while line[-1]["parent"] is not None:
        line.append(everyone[line[-1]["parent"]])
    return line[::-1]


def schedule(config, job, log):
    """The winner's schedule: {"dataset", "image_size": the lesser of height and width in pixels, "model",
    "batch_size", "add_cross_entropy": whether it is added to each loss, "plain_loss": the name of the loss where theta
    is None, "average_weights": whether the running mean of the weights is what counts, "average_epochs": over about how
    many, "epochs": [{"learning_rate", "momentum", "weight_decay", "cutout", "theta": eight numbers, or None}, ...]}.
    taylorglo_ext.losses makes losses of it."""
    epochs = []
    for ancestor in ancestry(log):
        h = {**job.fixed, **ancestor["hyperparameters"]}
        theta = [float(x) for x in scaled_theta(h, job.normalize_loss, job.data.num_classes)] if "theta0" in h else None
        epochs += [dict(learning_rate=learning_rate(h, ancestor["generation"] * job.epochs + e, job),
                        momentum=h["momentum"], weight_decay=h["weight_decay"], cutout=h["cutout"], theta=theta)
                   for e in range(job.epochs)]
    return dict(dataset=config.dataset, image_size=min(job.data.height, job.data.width), model=config.model,
                batch_size=config.batch_size, add_cross_entropy=job.add_cross_entropy,
                plain_loss=job.plain_loss, average_weights=job.average_weights,
                average_epochs=job.average_epochs, epochs=epochs)


def read_schedule(path):
    """The schedule in a file, or in the folder of a run. Raises RunError."""
    path = Path(path)
    path = path / SCHEDULE if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
        if not all(isinstance(name, str) for name in (found["model"], found.get("dataset", ""))) or not found["epochs"]:
            raise ValueError("its model, its data set or its epochs are missing")
        for name, value in (("batch_size", found["batch_size"]), *((n, found.get(n, 1)) for n in LATER)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is not a whole number from 1 on")
        if found.get("plain_loss", "cross-entropy") not in PLAIN_LOSSES:
            raise ValueError(f"plain_loss is none of {', '.join(PLAIN_LOSSES)}")
        for epoch in found["epochs"]:
            theta = epoch["theta"]
            numbers = [*(epoch[name] for name in NUMBERS), *(theta or [])]
            if not all(map(is_number, numbers)) or (
                    theta is not None and len(theta) != 8 or min(numbers[:4]) < 0 or epoch["momentum"] > 1):
                raise ValueError("an epoch is not four numbers from 0 on, the momentum up to 1, and eight thetas")
    except OSError as error:
        raise RunError(f"cannot read {path}, the schedule of a finished run: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not the schedule of a finished run ({error!r})") from error
    return found


def replay(config, space, data, workers, run):
    """One new network under a schedule, which is stretched to this run's number of epochs. Each generation, of one epoch if
    --epochs does not say more, is trained as the schedule is at its beginning. Cutouts keep their share of the image."""
    recorded = read_schedule(config.replay)
    epochs, side = recorded["epochs"], min(data.height, data.width)
    scale = side / recorded.get("image_size", side)
    population = run.population
    for g in range(run.generations, config.generations):
        then = epochs[g * len(epochs) // config.generations]
        h = dict(lr_scale=then["learning_rate"] / config.learning_rate, lr_decay=1.0, momentum=then["momentum"],
                 weight_decay=then["weight_decay"], cutout=then["cutout"] * scale)
        if then["theta"]:
            h |= {f"theta{i}": x for i, x in enumerate(then["theta"])}
        population = workers.evaluate([Individual(g, g, h, parent=g - 1 if g else None)])
        run.record(g, population)
        yield g, population
