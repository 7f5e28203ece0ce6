"""A run's outcome: its winner as a network and as a schedule, a summary and a report."""

import html
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data import Data
from errors import message
from models import make_model
from network import Network, load_tensors, model_tensors
from records import fittest, load_individual, write_atomic
from replay import SCHEDULE, schedule
from training import all_metrics


@dataclass
class Outcome:
    """What `evolve` returns."""

    model: torch.nn.Module  # the fittest, on the CPU, in evaluation mode; takes normalised images
    data: Data  # the images as they were split, and their mean and deviation
    schedule: dict  # the winner's losses, learning rates and momenta by epoch: replay.schedule
    summary: dict  # the content of summary.json
    folder: Path  # the run's folder

    def report(self):
        """Show the run's page, report.html, in a notebook; elsewhere say where it is."""
        path, ipython = self.folder / "report.html", sys.modules.get("IPython")
        if not path.exists():
            from report import report as draw

            draw(self.folder)
        if not hasattr(ipython and ipython.get_ipython(), "kernel"):
            return print(f"the run's page is {path}")
        from IPython.display import HTML, display

        page = html.escape(path.read_text(encoding="utf-8"))  # in a frame, with its own styles
        display(HTML(f'<div><iframe srcdoc="{page}" style="width: 100%; height: 60rem; border: 0">'
                     "</iframe></div>"))


def delivered(config, folder, data, best):
    """The individual `best` as a model on the CPU, in evaluation mode."""
    model = make_model(config.model, data.num_classes, data.channels, seed=0)
    state = load_individual(folder.individual_path(best.id))[1]
    network = Network(model, "cpu", "contiguous")
    load_tensors(model_tensors(network.tensors()), model_tensors(state))
    model.eval()
    return model


def finish(config, folder, data, report):
    """Write best.pt, schedule, summary and report, unless they are there; return the Outcome."""
    best = fittest(folder.population)
    model, plan = delivered(config, folder, data, best), schedule(config, data, folder.log)
    n, scores = folder.evaluated(), all_metrics(config, data, model)
    shared = {name: getattr(config, name) for name in ("method", "dataset", "model", "seed")}
    summary = shared | dict(
        fitness=best.fitness, test_accuracy=best.test_accuracy, test_scores=scores,
        best=best.record(), evaluations=n, epochs_trained=n * config.epochs,
        class_names=data.class_names, pixel_mean=data.mean.tolist(), pixel_std=data.std.tolist())
    found = scores["accuracy"]
    if found != best.test_accuracy:
        summary["delivered_test_accuracy"] = found
    # A GPU may compute by other kernels here than in a slot, and tip a few images over.
    exact = config.device == "cpu" or config.deterministic
    if abs(found - best.test_accuracy) > (0 if exact else 0.002):
        report(f"WARNING: the delivered model classifies {found:.4f} of the test images correctly, "
               f"not the {best.test_accuracy:.4f} that was measured after its training")
    outcome = Outcome(model, data, plan, summary, folder.path)
    if folder.finished:
        return outcome
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    write_atomic(folder.path / "best.pt", buffer.getbuffer())
    for name, content in ((SCHEDULE, plan), ("summary.json", summary)):
        write_atomic(folder.path / name, (json.dumps(content, indent=2) + "\n").encode())
    try:
        from report import report as draw  # not at the top: matplotlib takes long to import

        draw(folder.path)
    except Exception as error:  # the result is saved, whatever the drawing raises
        report(f"the figures and report.html could not be drawn: {type(error).__name__}: "
               f"{message(error)}")
    return outcome


def formula(t, add_cross_entropy=False):
    """A loss as text: Eq. 2 with the numbers of theta; x is the label and y the softmax."""
    a, b = f"(y {0 - t[1]:+.3g})", f"(x {0 - t[0]:+.3g})"
    factors = t[2], t[3] / 2, t[4] / 6, t[5], t[6] / 2, t[7] / 2
    terms = zip(factors, (a, a + "^2", a + "^3", b + a, b + a + "^2", b + "^2" + a), strict=True)
    text = "L = -1/n sum [" + " ".join(f"{c:+.3g} {term}" for c, term in terms) + "]"
    return text + " + cross-entropy" * add_cross_entropy


def print_outcome(config, summary):
    best, h = summary["best"], summary["best"]["hyperparameters"]
    on = " (on images it was trained on)" if config.trains_on_all else ""
    print(f"\nbest individual {best['id']}: fitness {best['fitness']:.4f}{on}, "
          f"test accuracy {best['test_accuracy']:.4f}")
    if best["diverged"]:
        print("every network diverged: no weights are finite; a lower --learning-rate may help")
    if h:
        print("hyperparameters: " + ", ".join(f"{name} {x:.4g}" for name, x in h.items()))
    if "theta0" in h:
        print(formula(best["applied"]["theta"], config.add_cross_entropy))
    print(f"{summary['evaluations']} evaluations, {summary['epochs_trained']} epochs trained")
    print(f"weights, log, schedule, figures and report.html are in {config.out}")
