"""Ray Tune's PopulationBasedTraining on the job of ``python epbt.py --method pbt``, for benchmarks.throughput --tune.

The same networks, data, epochs, population and search space, one thread a trial. The training code is this project's, or
with ``--plain`` what one would write in PyTorch; the rest is Tune's.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import options
import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from baselines import PBT_SPACE, RESET_PROBABILITY, TRUNCATION
from benchmarks.throughput import plain_accuracy, plain_epoch
from data import load_data
from epbt import Config, make_job
from models import make_model
from records import Individual, load_individual
from training import Task, Trainer, prepare

(RATE,) = PBT_SPACE


class Member(tune.Trainable):
    """One network of the population; a step is a generation."""

    def setup(self, config, job):
        self.trainer, self.folder = Trainer(prepare(job)), tempfile.TemporaryDirectory()
        self.path, self.generation = None, 0

    def step(self):
        individual = Individual(0, self.generation, {RATE.name: self.config[RATE.name]})
        parent, self.path = self.path, Path(self.folder.name) / f"{self.generation}.ckpt"
        individual = self.trainer.evaluate(Task(individual, self.path, parent, None, 0.0))
        self.generation += 1
        return {"fitness": individual.fitness}

    def save_checkpoint(self, folder):
        shutil.copy(self.path, Path(folder) / "individual.ckpt")

    def load_checkpoint(self, folder):
        self.path = Path(self.folder.name) / "loaded.ckpt"
        shutil.copy(Path(folder) / "individual.ckpt", self.path)
        self.generation = load_individual(self.path)[0].generation + 1

    def reset_config(self, config):
        self.config, self.path, self.generation = config, None, 0
        return True

    def cleanup(self):
        self.folder.cleanup()


class PlainMember(tune.Trainable):
    """The same in plain PyTorch."""

    def setup(self, config, job):
        torch.set_num_threads(job.threads)
        self.job, self.rng = job, np.random.default_rng()
        self.reset_config(config)

    def reset_config(self, config):
        data = self.job.data
        self.model = make_model(self.job.model, data.num_classes, data.channels, int(self.rng.integers(2**63)))
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.job.learning_rate * config[RATE.name],
                                         momentum=self.job.fixed["momentum"])
        return True

    def step(self):
        self.model.train()
        for _ in range(self.job.epochs):
            plain_epoch(self.model, self.optimizer, self.job, self.rng,
                        lambda images, logits, labels: F.cross_entropy(logits, labels))
        self.model.eval()
        data = self.job.data
        fitness, _ = (plain_accuracy(self.model, data, image_set) for image_set in (data.validation, data.test))
        return {"fitness": fitness}

    def save_checkpoint(self, folder):
        torch.save((self.model.state_dict(), self.optimizer.state_dict()), Path(folder) / "individual.pt")

    def load_checkpoint(self, folder):
        model, optimizer = torch.load(Path(folder) / "individual.pt")
        rate = self.optimizer.param_groups[0]["lr"]
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.optimizer.param_groups[0]["lr"] = rate  # the perturbed one


def main():
    plain = sys.argv[1:2] == ["--plain"]
    config = Config(method="pbt", device="cpu", **options.parse(Config, __doc__, None, sys.argv[1 + plain:])).resolved()
    job = make_job(config, load_data(config.dataset, seed=config.seed))
    ray.init(include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}})
    scheduler = PopulationBasedTraining(
        perturbation_interval=1, quantile_fraction=TRUNCATION, resample_probability=RESET_PROBABILITY,
        hyperparam_mutations={RATE.name: tune.loguniform(RATE.low, RATE.high)})
    with tempfile.TemporaryDirectory() as storage:
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(PlainMember if plain else Member, job=job), {"cpu": config.threads}),
            param_space={RATE.name: tune.loguniform(RATE.low, RATE.high)},
            tune_config=tune.TuneConfig(metric="fitness", mode="max", num_samples=config.population,
                                        scheduler=scheduler, reuse_actors=True),
            run_config=tune.RunConfig(stop={"training_iteration": config.generations}, storage_path=storage, verbose=0),
        ).fit()
    if results.errors:
        raise results.errors[0]
    print(f"best fitness {results.get_best_result().metrics['fitness']:.4f}")


if __name__ == "__main__":
    main()
