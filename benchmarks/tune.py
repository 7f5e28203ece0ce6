"""Times whole runs of Population-Based Training on the digits against Ray Tune's.

``python -m benchmarks.tune`` (requirements-ray.txt) prints a table, and writes
``benchmarks/results/tune-cpu.csv`` and ``.png``: ``python epbt.py --method pbt`` against Ray Tune's
PopulationBasedTraining with the same networks, data, epochs, population and search space, one
thread a trial; once with this project's training code, and once with what one would write in
PyTorch. They take turns, each started as a user does, for generations of three epochs and of one.
``--run ours`` and ``--run plain`` are one run of Ray Tune alone.
"""

import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from baselines import RESET_PROBABILITY, TRUNCATION
from benchmarks.rows import CORES, command_line, print_and_write, record
from benchmarks.throughput import plain_accuracy, plain_epoch, whole
from epbt import read_data
from models import make_model
from records import Individual, load_individual
from training import Task
from workers import ThisProcess

RUN = dict(method="pbt", dataset="digits", device="cpu", model="resnet8", population=8,
           generations=10, seed=1)
RATE = "lr_scale"


class Member(tune.Trainable):
    """One network of the population; a step is a generation."""

    def setup(self, config, run, data):
        self.pool, self.folder = ThisProcess(run, data), tempfile.TemporaryDirectory()
        self.path, self.generation = None, 0

    def step(self):
        individual = Individual(0, self.generation, {RATE: self.config[RATE]})
        parent, self.path = self.path, Path(self.folder.name) / f"{self.generation}.safetensors"
        (individual,) = self.pool.run([Task(individual, self.path, parent)])
        self.generation += 1
        return {"fitness": individual.fitness}

    def save_checkpoint(self, folder):
        shutil.copy(self.path, Path(folder) / "individual.safetensors")

    def load_checkpoint(self, folder):
        self.path = Path(self.folder.name) / "loaded.safetensors"
        shutil.copy(Path(folder) / "individual.safetensors", self.path)
        self.generation = load_individual(self.path)[0].generation + 1

    def reset_config(self, config):
        self.config, self.path, self.generation = config, None, 0
        return True

    def cleanup(self):
        self.pool.close()
        self.folder.cleanup()


class PlainMember(tune.Trainable):
    """The same in plain PyTorch."""

    def setup(self, config, run, data):
        torch.set_num_threads(run.threads)
        self.run, self.data, self.rng = run, data, np.random.default_rng()
        self.reset_config(config)

    def reset_config(self, config):
        seed = int(self.rng.integers(2**63))
        self.model = make_model(self.run.model, self.data.num_classes, self.data.channels, seed)
        self.model.to(memory_format=torch.channels_last)
        rate = self.run.learning_rate * config[RATE]
        self.optimizer = torch.optim.SGD(self.model.parameters(), rate, self.run.momentum)
        return True

    def step(self):
        self.model.train()
        for _ in range(self.run.epochs):
            plain_epoch(self.model, self.optimizer, self.run, self.data, self.rng,
                        lambda images, logits, labels: F.cross_entropy(logits, labels))
        self.model.eval()
        fitness, _ = (plain_accuracy(self.model, self.data, part)
                      for part in (self.data.validation, self.data.test))
        return {"fitness": fitness}

    def save_checkpoint(self, folder):
        state = self.model.state_dict(), self.optimizer.state_dict()
        torch.save(state, Path(folder) / "individual.pt")

    def load_checkpoint(self, folder):
        model, optimizer = torch.load(Path(folder) / "individual.pt")
        rate = self.optimizer.param_groups[0]["lr"]
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.optimizer.param_groups[0]["lr"] = rate  # the perturbed one


def with_tune(member, epochs):
    run = whole(**RUN, epochs=epochs)
    data, (rate,) = read_data(run, None, None), run.search_space()
    assert rate.name == RATE
    path = ":".join([str(Path(__file__).parents[1]), *sys.path[1:]])
    ray.init(include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": path}})
    drawn = {RATE: tune.loguniform(rate.low, rate.high)}
    scheduler = PopulationBasedTraining(
        perturbation_interval=1, quantile_fraction=TRUNCATION,
        resample_probability=RESET_PROBABILITY, hyperparam_mutations=drawn)
    trainable = tune.with_resources(
        tune.with_parameters(member, run=run, data=data), {"cpu": run.threads})
    with tempfile.TemporaryDirectory() as storage:
        results = tune.Tuner(
            trainable, param_space=drawn,
            tune_config=tune.TuneConfig(metric="fitness", mode="max", num_samples=run.population,
                                        scheduler=scheduler, reuse_actors=True),
            run_config=tune.RunConfig(stop={"training_iteration": run.generations},
                                      storage_path=storage, verbose=0)).fit()
    if results.errors:
        raise results.errors[0]
    print(f"best fitness {results.get_best_result().metrics['fitness']:.4f}")


def rows(rounds):
    """Yields the records of whole runs, started in turn."""
    ours = [f"--{name}={value}" for name, value in RUN.items()]
    n = len(read_data(whole(**RUN), None, None).train)
    images = n // 64 * 64 * 80  # of an epoch of all generations
    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "epbt.py --method pbt": ["epbt.py", *ours, "--out", f"{folder}/run", "--overwrite"],
            "Ray Tune, our training": ["-m", "benchmarks.tune", "--run", "ours"],
            "Ray Tune, plain PyTorch": ["-m", "benchmarks.tune", "--run", "plain"],
        }
        for epochs in (3, 1):
            times = {name: [] for name in programs}
            for _, (name, program) in itertools.product(range(rounds), programs.items()):
                start = time.perf_counter()
                subprocess.check_output([sys.executable, *program, "--epochs", str(epochs)])
                times[name].append(time.perf_counter() - start)
            for name, values in times.items():
                name = f"{name}; {epochs} epochs"
                yield record(name, values, images * epochs, RUN["model"], 80, CORES)


def main():
    parser = command_line(__doc__, devices=["cpu"])
    parser.add_argument("--run", choices=("ours", "plain"),
                        help="one run of Ray Tune, with this training")
    parser.add_argument("--epochs", type=int, default=3, help="a generation, of --run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.run:
        with_tune({"ours": Member, "plain": PlainMember}[options.run], options.epochs)
    else:
        print_and_write(rows(options.rounds), "cpu", "tune-cpu", options.out)


if __name__ == "__main__":
    main()
