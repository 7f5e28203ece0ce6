"""EPBT on images with wrong labels: from your arrays to a saved model and its evolved losses.

    python -m examples.noisy_labels

The images here are scikit-learn's digits, with a third of the training labels wrong. Replace
`my_images` by your own.
"""

import numpy as np
from sklearn.datasets import load_digits

from epbt import Config, evolve


def my_images():
    """(images, labels) for training, some labels wrong, and for the test.

    Images have the shape (N, 1, 8, 8) and are uint8, labels have the shape (N,)."""
    digits, rng = load_digits(), np.random.default_rng(0)
    images, labels = (digits.images[:, None] * 15).astype(np.uint8), digits.target.copy()
    wrong = rng.permutation(1400)[:467]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def main():
    train, test = my_images()
    shared = dict(model="resnet8", batch_size=64, generations=10, epochs=4, seed=1, overwrite=True)
    baseline = Config(method="baseline", out="runs/noisy-baseline", **shared)
    alone = evolve(baseline, train=train, test=test)
    # On the digits "known" withstands wrong labels better than the default preset, "best".
    epbt = Config(preset="known", population=12, out="runs/noisy-epbt", **shared)
    evolved = evolve(epbt, train=train, test=test)
    print(f"\nBaseline 1 {alone.summary['test_accuracy']:.1%}, "
          f"EPBT {evolved.summary['test_accuracy']:.1%}")
    print("EPBT's model: runs/noisy-epbt/best.pt; its losses: runs/noisy-epbt/schedule.json")
    print("theta in the last epoch:", evolved.schedule["epochs"][-1]["theta"])


if __name__ == "__main__":
    main()
