"""Your own images of which some labels are wrong, from arrays to a saved model and its evolved losses.

    python -m examples.noisy_labels

The images here are scikit-learn's digits; a third of the labels to train on becomes another class. Put yours in.
"""

import numpy as np
from sklearn.datasets import load_digits

from epbt import Config, evolve


def my_images():
    """(images (N, 1, 8, 8) uint8, labels (N,)) to train on, with wrong labels, and clean ones for the test."""
    digits, rng = load_digits(), np.random.default_rng(0)
    images, labels = (digits.images[:, None] * 15).astype(np.uint8), digits.target.copy()
    wrong = rng.permutation(1400)[:467]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def main():
    train, test = my_images()
    shared = dict(model="resnet8", batch_size=64, generations=10, epochs=4, seed=1, overwrite=True)
    alone = evolve(Config(method="baseline", out="runs/noisy-baseline", **shared), train=train, test=test)
    evolved = evolve(Config(population=12, out="runs/noisy-epbt", **shared), train=train, test=test)
    print(f"\nBaseline 1 {alone.summary['test_accuracy']:.1%}, EPBT {evolved.summary['test_accuracy']:.1%}")
    print("its model: runs/noisy-epbt/best.pt; its losses by epoch: runs/noisy-epbt/schedule.json")
    print("theta in the last epoch:", evolved.schedule["epochs"][-1]["theta"])


if __name__ == "__main__":
    main()
