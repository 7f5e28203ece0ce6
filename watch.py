"""A run in TensorBoard: `python epbt.py --tensorboard`, then `tensorboard --logdir runs`."""

import shutil
from itertools import chain
from pathlib import Path
from statistics import median

from records import fittest, living_fitness, one_line, read_config, read_log

FITNESS, TEST = "fitness/best", "fittest/test_accuracy_for_comparison_only"


def watched(generations, folder):
    """Yields the same generations. Before each, writes its line of log.jsonl into the folder's
    tensorboard/. For a resumed run, writes the earlier lines again first."""
    from torch.utils.tensorboard import SummaryWriter  # here: optional, and slow to import
    from torch.utils.tensorboard.summary import hparams

    path, config, written = Path(folder) / "tensorboard", read_config(folder), 0
    with one_line(f"write to {path}"):
        shutil.rmtree(path, ignore_errors=True)
        writer = SummaryWriter(path, purge_step=0)  # a TensorBoard that is open drops old points
        settings = {name: value if isinstance(value, int | float | str) else str(value)
                    for name, value in config.items()}
        for summary in hparams(settings, {FITNESS: 0, TEST: 0}):
            writer.file_writer.add_summary(summary)
    for generation in chain([None], generations):
        log = read_log(folder)
        with one_line(f"write to {path}"):
            for line in log[written:]:
                for name, value in scalars(line["population"]).items():  # by epochs of training
                    writer.add_scalar(name, value, (line["generation"] + 1) * config["epochs"])
            writer.flush()
        written = len(log)
        if generation is not None:
            yield generation
    writer.close()


def scalars(population):
    """{tag: value} of a population, given by its records."""
    best, fitness = fittest(population), living_fitness(population)
    values = {FITNESS: best["fitness"], "fitness/median": median(fitness),
              "fitness/worst": min(fitness), TEST: best["test_accuracy"],
              "population/diverged": sum(m["diverged"] for m in population),
              "population/evaluations": 1 + max(m["id"] for m in population)}
    applied = best["applied"] | {"training_loss": best["loss"]} | best.get("scores", {})
    values |= {f"theta/theta{i}": x for i, x in enumerate(applied.pop("theta") or ())}
    applied["learning_rate"] = (applied["learning_rate"] or [None])[-1]  # of the last epoch
    return values | {f"fittest/{name}": x for name, x in applied.items() if x is not None}
