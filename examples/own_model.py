"""EPBT on your own model and data: here a small CNN and scikit-learn's digits.

    python -m examples.own_model

It takes half a minute on two cores. The result is in runs/own-model.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from data import normalize
from epbt import Config, evolve
from evolution import Variable

RUN = "runs/own-model"


class SmallNet(nn.Sequential):
    """Your model. It must be at the top level of a file, where worker processes find it."""

    def __init__(self, num_classes, in_channels):
        super().__init__(
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def digits():
    """(images, labels) for training and for the test.

    Images have the shape (N, channels, height, width), and are uint8 or floats from 0 to 1."""
    found = load_digits()
    images = torch.tensor(found.images / 16).float().unsqueeze(1)
    labels = torch.tensor(found.target)
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = mixed[:1400], mixed[1400:]
    return (images[train], labels[train]), (images[test], labels[test])


def main():
    train, test = digits()
    config = Config(population=8, generations=8, epochs=1, out=RUN, overwrite=True)
    # Evolve weight decay too, beside the loss, the learning rate and the momentum.
    space = (*config.search_space(), Variable("weight_decay", 1e-5, 1e-2, log=True))
    outcome = evolve(config, SmallNet, train, test, space)

    images = outcome.data.test.images  # uint8; outcome.model takes them normalised
    predicted = outcome.model(normalize(images, outcome.data.mean, outcome.data.std)).argmax(dim=1)
    accuracy = (predicted == outcome.data.test.labels).float().mean()
    print(f"test accuracy of the fittest: {accuracy:.4f}")
    print(f"its weight decay: {outcome.summary['best']['hyperparameters']['weight_decay']:.2g}")
    print(f"its weights and schedule: {RUN}/best.pt, {RUN}/schedule.json")


if __name__ == "__main__":  # worker processes import this file
    main()
