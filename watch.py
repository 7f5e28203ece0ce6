"""A run in TensorBoard, during it and afterwards: `python epbt.py --tensorboard`, then `tensorboard --logdir runs`."""

import shutil
from statistics import median

from records import fittest, one_line
from training import learning_rate

FITNESS, TEST = "fitness/best", "fittest/test_accuracy_for_comparison_only"


def watched(generations, config, job, folder):
    """The same generations, each written into the run's folder tensorboard/ as it passes.

    What the log of a resumed run has is written anew, so that no generation is missing and none is there twice."""
    from torch.utils.tensorboard import SummaryWriter  # here, as the package is optional and takes its time
    from torch.utils.tensorboard.summary import hparams

    path = folder.path / "tensorboard"
    with one_line(f"write to {path}"):
        shutil.rmtree(path, ignore_errors=True)
        writer = SummaryWriter(path, purge_step=0)  # a TensorBoard that is looking forgets what it has read
        settings = {name: value if isinstance(value, int | float | str) else str(value)
                    for name, value in config.identity().items()}
        for summary in hparams(settings, {FITNESS: 0, TEST: 0}):
            writer.file_writer.add_summary(summary)
        for line in folder.read_log():
            add(writer, job, line["generation"], line["population"])
    for g, population in generations:
        with one_line(f"write to {path}"):
            add(writer, job, g, [individual.record() for individual in population])
        yield g, population
    writer.close()


def add(writer, job, generation, population):
    """Write a generation, so that it is seen at once; the steps are epochs of training."""
    for name, value in scalars(job, population).items():
        writer.add_scalar(name, value, (generation + 1) * job.epochs)
    writer.flush()


def scalars(job, population):
    """{tag: value} of a population, whose individuals are as they stand in the log."""
    best, fitness = fittest(population), [m["fitness"] for m in population]
    h = {**job.fixed, **best["hyperparameters"]}
    tried = 1 + max(m["id"] for m in population)
    values = {
        FITNESS: best["fitness"], "fitness/median": median(fitness), "fitness/worst": min(fitness),
        TEST: best["test_accuracy"],
        "fittest/training_loss": float("nan") if best["loss"] is None else best["loss"],
        "fittest/learning_rate": learning_rate(h, (best["generation"] + 1) * job.epochs - 1, job),  # of its last epoch
        "population/diverged": sum(m["diverged"] for m in population),
        "population/evaluations": tried, "population/epochs_trained": tried * job.epochs,
    }
    return values | {f"{'theta' if name.startswith('theta') else 'fittest'}/{name}": x for name, x in h.items()}
