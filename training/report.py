"""What a run shows: log.txt, curves.png, attention.png, and a last paragraph in plain words (Fig. 1, 4, 6 and 7).

Shapes: B images, S pixels, h heads, r x c patches.
"""
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from attention import attention_scores, cls_attention, keep_mass, to_pixels
from data import Images
from features import EvaluationView
from runtime.commandline import write_whole
from runtime.hardware import World
from settings import Settings
from training.run_state import RunState
from visualize_attention import overlay


def write_log(path: Path, history: list[dict]) -> None:
    """log.txt: one JSON object an epoch, the release's keys and ours; before the first, the baselines as epoch -1."""
    write_whole(path, lambda part: part.write_text("".join(json.dumps(record) + "\n" for record in history)))


def kept_name(run: RunState, every: int) -> list[str]:
    """The name of the checkpoint to keep of a run at the end of one of every so many epochs: checkpoint0020.pth."""
    ended = every and run.epoch and not run.images and run.epoch % every == 0
    return [f"checkpoint{run.epoch:04d}.pth"] if ended else []


def line(record: dict, epochs: int, out_dim: int) -> str:
    """An epoch's record as a line for a person, with a loud one below it if the teacher has collapsed."""
    text = f"epoch {record['epoch'] + 1}/{epochs}: loss {record['train_loss']:.3f}"
    if "train_kl" in record:
        text += f" = entropy {record['train_entropy']:.3f} + KL {record['train_kl']:.3f}"
    text += f", {record['images_per_s']:.0f} images/s"
    if "knn_teacher" in record:
        text += f"; k-NN teacher {record['knn_teacher']:.1f} %, student {record['knn_student']:.1f} %"
    warning = collapse(record, out_dim)
    return f"{text}\n{warning}" if warning else text


def collapse(record: dict, out_dim: int) -> str:
    """A loud line if the teacher says the same of every image, else "" (Sec. 5.3, Eq. 5, Fig. 7): KL -> 0 both ways.

    Entropy -> ln K is the uniform output, as without sharpening; entropy -> 0 a one-hot output, as without centering.
    """
    if "train_kl" not in record:
        return ""
    entropy, kl, log_k = record["train_entropy"], record["train_kl"], math.log(out_dim)
    if entropy > (0.95 if kl < 0.01 * log_k else 0.99) * log_k:
        return (f"COLLAPSE, uniform: entropy {entropy:.3f}, as good as ln K = {log_k:.3f}, and KL {kl:.3f}: nothing is "
                "learnt: try a lower --teacher_temp and --warmup_teacher_temp, a lower --lr, a longer "
                "--freeze_last_layer")
    if entropy < 0.03 * log_k and kl < 0.03 * log_k:
        return (f"COLLAPSE, one-hot: entropy near 0 ({entropy:.3f}) and KL too ({kl:.3f}), so every image seems to "
                "get the same prototype: try --center_momentum 0.9, a higher --teacher_temp, a lower --lr")
    return ""


def draw_curves(path: Path, history: list[dict], out_dim: int) -> None:
    """Loss = entropy + KL under ln K; k-NN of teacher and student over the baselines; the schedules."""
    baselines, epochs = history[0], history[1:]
    at = [record["epoch"] + 1 for record in epochs]
    figure, (losses, knn, schedules) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for key, label in (("train_loss", "loss"), ("train_entropy", "teacher's entropy"), ("train_kl", "KL")):
        if all(key in record for record in epochs):
            losses.plot(at, [record[key] for record in epochs], marker=".", label=label)
    losses.set(title="loss", ylim=(0, None))
    if "train_kl" in epochs[-1]:
        losses.axhline(math.log(out_dim), color="grey", linestyle=":", label=f"ln K = {math.log(out_dim):.3f}")
        losses.set(title="loss = entropy + KL", ylabel="nats")
    for key in ("knn_teacher", "knn_student"):
        points = [(record["epoch"] + 1, record[key]) for record in epochs if key in record]
        if "knn_untrained" in baselines:
            points.insert(0, (0, baselines["knn_untrained"]))
        knn.plot(*zip(*points, strict=True) if points else ([], []), marker=".", label=key.replace("knn_", "k-NN, "))
    if "knn_pixels" in baselines:
        knn.axhline(baselines["knn_pixels"], color="grey", linestyle=":", label="raw pixels")
    knn.set(title="k-NN top-1", ylabel="%")
    for key in ("train_lr", "train_wd", "teacher_momentum", "teacher_temp"):
        values = np.array([record[key] for record in epochs])
        schedules.plot(at, values / max(values.max(), 1e-12), marker=".",
                       label=f"{key.replace('train_', '')}: {values[0]:.4g} to {values[-1]:.4g}")
    schedules.set(title="schedules, each over its largest value")
    for axes in (losses, knn, schedules):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    write_whole(path, figure.savefig)
    plt.close(figure)


def unnormalised(views: Tensor, view: EvaluationView) -> Tensor:
    """(..., 3, S, S) as a network reads it -> (..., S, S, 3) in 0 ... 1, for drawing."""
    return (views.cpu() * view.std + view.mean).clamp(0, 1).movedim(-3, -1)


def draw_attention(path: Path, views: Tensor, view: EvaluationView, attention: Tensor, untrained: Tensor,
                   patch_size: int, mass: float = 0.6) -> None:
    """One row an image: it, the mean over heads untrained and trained, each head, the mask of the mean's `mass`.

    views (B, 3, S, S), attention and untrained (B, h, r, c).
    """
    heads = attention.shape[1]
    titles = ["image", "untrained", "trained", *(f"head {j}" for j in range(heads)), f"{mass:.0%} of trained"]
    figure, grid = plt.subplots(len(views), len(titles), figsize=(1.4 * len(titles), 1.4 * len(views) + 0.3),
                                layout="constrained", squeeze=False)
    for row, image, trained, before in zip(grid, unnormalised(views, view), attention, untrained, strict=True):
        mask = to_pixels(keep_mass(trained.mean(dim=0), mass), patch_size)
        maps = [before.mean(dim=0), trained.mean(dim=0), *trained]
        for axes, shown in zip(row, [image, *maps, overlay(image, mask)], strict=True):
            axes.imshow(shown.numpy(), interpolation="nearest")
            axes.axis("off")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    write_whole(path, lambda part: figure.savefig(part, dpi=120))
    plt.close(figure)


def finish(output: Path, run: RunState, untrained: nn.Module, images: Images, settings: Settings,
           world: World) -> str:
    """Draw both figures and return the last paragraph."""
    draw_curves(output / "curves.png", run.history, settings.out_dim)
    baselines, last = run.history[0], run.history[-1]
    text = [f"After {run.epoch} epoch(s) the loss is {last['train_loss']:.3f}"
            + (f" nats; ln K = {math.log(settings.out_dim):.3f}." if "train_kl" in last else ".")]
    if "knn_teacher" in last and "knn_untrained" in baselines:
        text.append(f"k-NN top-1: {last['knn_teacher']:.1f} % with the teacher's features, "
                    f"{baselines['knn_untrained']:.1f} % with the same network untrained, "
                    f"{baselines['knn_pixels']:.1f} % with raw pixels.")
        if last["knn_teacher"] < max(baselines["knn_untrained"] + 5, baselines["knn_pixels"]):
            text.append("That is little: a longer run, or --help's advice for small data, may give more.")
    trained = run.teacher.backbone.eval()
    if hasattr(trained, "get_last_selfattention"):
        text += attention_report(output, trained, untrained.eval(), images, settings, world)
    if "train_kl" in last:
        text.append(collapse(last, settings.out_dim) or
                    f"No collapse in the last epoch: its entropy, {last['train_entropy']:.3f}, lies between 0 and "
                    f"ln K, and its KL is {last['train_kl']:.3f}.")
    text.append(f"Everything is in {output}.")
    return "\n" + "\n".join(text)


def attention_report(output: Path, trained: nn.Module, untrained: nn.Module, images: Images, settings: Settings,
                     world: World) -> list[str]:
    """Draw attention.png of ten images from everywhere -> lines with the scores, where object masks are known."""
    n = min(len(images), 1000 if images.masks is not None else 10)
    images = images.subset(torch.linspace(0, len(images) - 1, n).long())
    view = EvaluationView(settings.eval_size, settings.eval_crop, settings.mean, settings.std)
    views = torch.stack([view(images[i][0]) for i in range(n)])
    before, after = (torch.cat([cls_attention(network, some.to(world.device)).cpu() for some in views.split(100)])
                     for network in (untrained, trained))
    draw_attention(output / "attention.png", views[:10], view, after[:10], before[:10], settings.patch_size)
    if images.masks is None:
        return []
    was, now = (attention_scores(maps, images.masks[:n]) for maps in (before, after))
    table = [f"    {name.replace('_', ' ')}, {percent} % of the mass: {was[key]:.1f} -> {now[key]:.1f} %"
             for name in ("best_head", "head_mean") for percent in (60, 80) for key in [f"jaccard_{name}_{percent}"]]
    return [f"[CLS] puts {100 * now['mass_on_object']:.1f} % of its attention on the object, untrained "
            f"{100 * was['mass_on_object']:.1f} % ({now['mass_on_object'] / was['mass_on_object']:.2f} times).",
            "Jaccard of attention's masks with the true masks, untrained -> trained:", *table]
