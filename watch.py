"""A run in TensorBoard: `python epbt.py --tensorboard`, then `tensorboard --logdir runs`."""

import shutil
from itertools import chain
from pathlib import Path
from statistics import median

from records import fittest, one_line, read_config, read_log

FITNESS, TEST = "fitness/best", "fittest/test_accuracy_for_comparison_only"


def watched(generations, folder):
    """The same generations. As each passes, what log.jsonl says of it is written into the folder's
    tensorboard/; what the log of a resumed run has already is written anew."""
    from torch.utils.tensorboard import SummaryWriter  # here: it is optional and takes its time
    from torch.utils.tensorboard.summary import hparams

    path, config, written = Path(folder) / "tensorboard", read_config(folder), 0
    with one_line(f"write to {path}"):
        shutil.rmtree(path, ignore_errors=True)
        writer = SummaryWriter(path, purge_step=0)  # a reader forgets what it has
        settings = {name: value if isinstance(value, int | float | str) else str(value)
                    for name, value in config.items()}
        for summary in hparams(settings, {FITNESS: 0, TEST: 0}):
            writer.file_writer.add_summary(summary)
    for generation in chain([None], generations):
        log = read_log(folder)
        with one_line(f"write to {path}"):
            for line in log[written:]:
                for name, value in scalars(line["population"]).items():  # steps: epochs of training
                    writer.add_scalar(name, value, (line["generation"] + 1) * config["epochs"])
            writer.flush()
        written = len(log)
        if generation is not None:
            yield generation
    writer.close()


def scalars(population):
    """{tag: value} of a line of the log."""
    best, fitness = fittest(population), [m["fitness"] for m in population]
    values = {FITNESS: best["fitness"], "fitness/median": median(fitness),
              "fitness/worst": min(fitness), TEST: best["test_accuracy"],
              "population/diverged": sum(m["diverged"] for m in population),
              "population/evaluations": 1 + max(m["id"] for m in population)}
    applied = best["applied"] | {"training_loss": best["loss"]} | best.get("scores", {})
    values |= {f"theta/theta{i}": x for i, x in enumerate(applied.pop("theta") or ())}
    applied["learning_rate"] = (applied["learning_rate"] or [None])[-1]  # of its last epoch
    return values | {f"fittest/{name}": x for name, x in applied.items() if x is not None}
