"""Your own training loop under the losses, learning rates and momenta that a run has evolved.

    python -m examples.replay_schedule        runs examples.own_model first, if that was not done

It needs three files of the run and, of this repository, the package taylorglo_ext. A loop with
augmentation can also use the schedule's cutout, the side of a square in pixels.
"""

import json
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples import own_model
from taylorglo_ext import losses

RUN = Path(own_model.RUN)


def main():
    if not (RUN / "summary.json").exists():
        own_model.main()
    summary = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    schedule = json.loads((RUN / "schedule.json").read_text(encoding="utf-8"))
    module = schedule["model"].partition(":")[0]
    if module != own_model.__name__:  # the run was made by a copy of own_model
        raise SystemExit(f"{RUN} was not made with {own_model.__file__}: import {module}")
    (images, labels), (test_images, test_labels) = own_model.digits()
    mean, std = (torch.tensor(summary[f"pixel_{name}"]).view(-1, 1, 1) / 255
                 for name in ("mean", "std"))
    images, test_images = (images - mean) / std, (test_images - mean) / std

    def accuracy(model):
        return (model.eval()(test_images).argmax(dim=1) == test_labels).float().mean()

    best = own_model.SmallNet(num_classes=10, in_channels=1)
    best.load_state_dict(torch.load(RUN / "best.pt", weights_only=True))
    print(f"the network of the run:    test accuracy {accuracy(best):.4f}")

    torch.manual_seed(0)
    model = own_model.SmallNet(num_classes=10, in_channels=1)
    steps = len(labels) // schedule["batch_size"]
    decay = 1 - 1 / (steps * schedule["average_epochs"]) if schedule["average_epochs"] else 0.0
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    for epoch, loss_function in zip(schedule["epochs"], losses(schedule), strict=True):
        optimizer.param_groups[0].update(lr=epoch["learning_rate"], momentum=epoch["momentum"],
                                         weight_decay=epoch["weight_decay"])
        model.train()
        for batch in torch.randperm(len(labels)).split(schedule["batch_size"])[:steps]:
            loss = loss_function(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
    print(f"a new one by its schedule: test accuracy {accuracy(average):.4f} "
          f"after {len(schedule['epochs'])} epochs")


if __name__ == "__main__":
    main()
