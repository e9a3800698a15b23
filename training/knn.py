"""k-NN while a training runs: how good the features are now (Sec. 3.2)."""

import torch
from torch import nn

from data import Images
from features import EvaluationView, Pixels, extract, knn_accuracies
from runtime.hardware import World
from settings import Settings
from training.run_state import RunState


def networks_for_knn(run: RunState, settings: Settings) -> dict[str, nn.Module]:
    """Return the networks to evaluate now, by their key in log.txt; none if they are logged."""
    every = settings.knn_every
    if not every or (run.epoch % every and run.epoch != settings.epochs):
        return {}
    if run.images_done:  # resumed in mid-epoch: the networks of the log's last line are gone
        return {}
    networks = {"knn_teacher": run.teacher.backbone, "knn_student": run.student.backbone}
    if run.epoch == 0:  # the baselines: the teacher has not moved yet
        networks = {"knn_untrained": run.teacher.backbone, "knn_pixels": Pixels()}
    logged = networks.keys() <= run.history[-1].keys()
    return {} if logged else networks


def evaluate(
    run: RunState,
    split: tuple[Images, Images] | None,
    view: EvaluationView,
    num_workers: int,
    settings: Settings,
    world: World,
) -> bool:
    """Add the k-NN accuracies that are due now, in %, to the log; return whether there were any.

    split: train and test images, or None without labels.
    """
    due = networks_for_knn(run, settings) if split else {}
    for name, network in due.items():
        # in every process: each has a part of the images
        with torch.compiler.set_stance("force_eager"):  # other sizes: not worth compiling again
            features = extract(network, split, view, world, num_workers=num_workers)
        top1, _ = knn_accuracies(features, world=world)[20]
        run.history[-1][name] = round(top1, 2)
    return bool(due)
