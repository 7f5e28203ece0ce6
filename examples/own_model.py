"""EPBT on a model and data of your own: here a small CNN on the digits of scikit-learn, as tensors.

    python -m examples.own_model        half a minute on two cores; the result is in runs/own-model
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from data import normalize
from epbt import Config, evolve
from evolution import Variable

RUN = "runs/own-model"


class SmallNet(nn.Sequential):
    """Any module or function that is called like this; at the top level of a file, where workers find it."""

    def __init__(self, num_classes, in_channels):
        super().__init__(
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def digits():
    """(images, labels) to train on, and to test on: images are (N, channels, height, width), uint8 or in [0, 1]."""
    found = load_digits()
    images, labels = torch.tensor(found.images / 16).float().unsqueeze(1), torch.tensor(found.target)
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = mixed[:1400], mixed[1400:]
    return (images[train], labels[train]), (images[test], labels[test])


def main():
    train, test = digits()
    config = Config(preset="best", population=8, generations=8, epochs=1, out=RUN, overwrite=True)
    # The loss, the learning rate and the momentum are evolved anyway; one more variable is one more line.
    space = (*config.search_space(), Variable("weight_decay", 1e-5, 1e-2, log=True))
    outcome = evolve(config, SmallNet, train, test, space)

    images = outcome.data.test.images  # uint8; outcome.model takes them normalised
    predicted = outcome.model(normalize(images, outcome.data.mean, outcome.data.std)).argmax(dim=1)
    print(f"test accuracy of the fittest: {(predicted == outcome.data.test.labels).float().mean():.4f}")
    print(f"its weight decay: {outcome.summary['best']['hyperparameters']['weight_decay']:.2g}")
    print(f"its weights and schedule: {RUN}/best.pt, {RUN}/schedule.json")


if __name__ == "__main__":  # worker processes import this file
    main()
