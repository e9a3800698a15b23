"""What a run reports: log.txt, curves.png, attention.png, and a last paragraph (Fig. 1, 4, 6, 7).

Shapes: B images, S pixels, h heads, r x c patches.
"""

import gc
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would change the plots of a notebook
from torch import Tensor, nn

from attention import attention_scores, cls_attention, keep_mass, overlay, to_pixels
from data import Images, evenly_spaced
from features import EvaluationView
from runtime.commandline import InputError, write_whole
from runtime.hardware import World
from settings import Settings
from training.collapse import verdict
from training.not_finite import first_bad_tensor
from training.run_state import FIX, RunState
from training.scalars import write_scalars


def epoch_record(run: RunState, now) -> dict:
    """Return the epoch's line of log.txt: the release's keys, and ours.

    now: the schedules of its last step. All values are means over the steps. Entropy and KL are
    also given as curves, of the means over up to 20 parts of the epoch.
    """
    loss, entropy, kl = run.metrics.mean(dim=0).tolist()
    record = {
        "epoch": run.epoch,
        "train_loss": loss,
        "train_lr": now.lr,
        "train_wd": now.weight_decay,
        "teacher_temp": now.teacher_temp,
        "teacher_momentum": now.teacher_momentum,
        "images_per_s": round(run.images_done / run.seconds, 1),
    }
    if run.dino_loss.has_entropy:
        parts = run.metrics.tensor_split(min(20, len(run.metrics)))
        means = torch.stack([part.mean(dim=0) for part in parts])
        record["train_entropy"] = entropy
        record["train_kl"] = kl
        record["entropy_curve"] = means[:, 1].tolist()
        record["kl_curve"] = means[:, 2].tolist()
    return record


def require_finite(
    metrics: Tensor,
    own: Tensor,
    epoch: int,
    last_step: int,
    micro_batches: list[list[Tensor]],
    student: nn.Module,
) -> None:
    """Raise InputError at the first step whose loss or gradient is NaN or infinite.

    metrics (steps, 4): loss, entropy, KL, gradient norm; means over the processes.
    own: those of this process. last_step: the number of the last of these steps, from 1.
    micro_batches: the crops of the last step. Only its tensors are still there to be searched.
    """
    finite = metrics.isfinite().all(dim=1)
    if finite.all():
        return
    first = finite.int().argmin().item()
    step = last_step - len(metrics) + 1 + first

    if own[first].isfinite().all():
        bad = "in another process, which names it"
    elif step < last_step:
        bad = "not known, since later steps took its place (--log_every 1 finds it)"
    else:
        bad = first_bad_tensor(own[first].tolist(), micro_batches, student)

    loss, norm = metrics[first, 0].item(), metrics[first, 3].item()
    what = f"a gradient's norm is {norm}"
    if not math.isfinite(loss):
        what = f"the loss is {loss}"
    raise InputError(f"{what} at epoch {epoch}, step {step}, first bad: {bad}: {FIX}")


def line(record: dict, epochs: int, out_dim: int) -> str:
    """Return an epoch's record as a line to print, and a loud second one after a collapse."""
    text = f"epoch {record['epoch'] + 1}/{epochs}: loss {record['train_loss']:.3f}"
    if "train_kl" in record:
        text += f" = entropy {record['train_entropy']:.3f} + KL {record['train_kl']:.3f}"
    text += f", {record['images_per_s']:.0f} images/s"
    if "knn_teacher" in record:
        text += f"; k-NN teacher {record['knn_teacher']:.1f} %"
        text += f", student {record['knn_student']:.1f} %"
    verdict = collapse(record, out_dim)
    if verdict:
        text += f"\n{verdict}"
    return text


def collapse(record: dict, out_dim: int) -> str:
    """Return a loud line if the teacher collapsed in this epoch, else "" (Fig. 7).

    It is judged by the epoch's parts, since a mean hides a swing.
    """
    if "train_kl" not in record:
        return ""
    entropies = record.get("entropy_curve", [record["train_entropy"]])
    kls = record.get("kl_curve", [record["train_kl"]])
    log_k = math.log(out_dim)
    kinds = [kind_of_collapse(*part, log_k) for part in zip(entropies, kls, strict=True)]
    if not any(kinds):
        return ""
    return verdict(kinds, entropies, kls, log_k)


def kind_of_collapse(entropy: float, kl: float, log_k: float) -> str:
    """Return uniform, one-hot or "".

    The KL is near 0 in both collapses (Sec. 5.3). The entropy is near ln K for the uniform one,
    as without sharpening, and near 0 for the one-hot one, as without centering.
    """
    uniform = 0.99 * log_k
    if kl < 0.01 * log_k:
        uniform = 0.95 * log_k
    if entropy > uniform:
        return "uniform"
    if entropy < 0.03 * log_k and kl < 0.03 * log_k:
        return "one-hot"
    return ""


def draw_epochs(output: Path, history: list[dict], settings: Settings) -> None:
    """Draw curves.png of all epochs, and write the last one's numbers where --tensorboard is."""
    figure = draw_curves(history, settings.out_dim)
    write_whole(output / "curves.png", figure.savefig)
    del figure
    gc.collect()  # its parts refer to one another: many epochs' figures would wait in memory
    if settings.tensorboard:
        write_scalars(output, history)


def draw_curves(history: list[dict], out_dim: int) -> Figure:
    """Draw the loss and its two parts (Eq. 5), k-NN over its baselines, and the schedules."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    losses, knn, schedules = figure.subplots(1, 3)
    for key in ("train_loss", "train_entropy", "train_kl"):
        draw_curve(losses, history, key)
    if "train_kl" in history[-1]:
        losses.axhline(math.log(out_dim), color="grey", linestyle=":", label="ln K")
    for key in ("knn_teacher", "knn_student", "knn_untrained", "knn_pixels"):
        draw_curve(knn, history, key)
    for key in ("train_lr", "train_wd", "teacher_momentum", "teacher_temp"):
        draw_curve(schedules, history, key, normalised=True)

    losses.set(title="loss (DINO: entropy + KL, in nats)", ylim=(0, None))
    knn.set(title="k-NN top-1, %")
    schedules.set(title="schedules, each over its largest value")
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend()
    return figure


def draw_curve(axes: Axes, history: list[dict], key: str, normalised: bool = False) -> None:
    """Draw a key of log.txt against the epochs that have it; a baseline is a line across."""
    records = [record for record in history if key in record]
    if not records:
        return
    at = [record["epoch"] + 1 for record in records]
    values = np.array([record[key] for record in records])
    label = f"{key}: {values[0]:.4g} to {values[-1]:.4g}"
    if normalised:
        values = values / max(values.max(), 1e-12)
    if at == [0]:
        across = [0, len(history) - 1]
        axes.plot(across, values.repeat(2), linestyle=":", label=f"{key}: {values[0]:.4g}")
    else:
        axes.plot(at, values, marker=".", label=label)


def unnormalised(views: Tensor, view: EvaluationView) -> Tensor:
    """Return images to draw: (..., 3, S, S) as a network reads it -> (..., S, S, 3) in 0 ... 1."""
    return (views.cpu() * view.std + view.mean).clamp(0, 1).movedim(-3, -1)


def draw_attention(
    views: Tensor,
    view: EvaluationView,
    attention: Tensor,
    untrained: Tensor,
    patch_size: int,
    start: str = "untrained",
) -> Figure:
    """Draw a column an image: the image, its attention untrained and trained, and the mask.

    The attention is the mean over the heads; the mask keeps 60 % of the trained one (Fig. 4).
    views (B, 3, S, S); attention and untrained (B, h, r, c).
    """
    trained = attention.mean(dim=1)
    images = unnormalised(views, view)
    masks = [to_pixels(keep_mass(one, 0.6), patch_size) for one in trained]
    rows = {
        "image": images,
        start: untrained.mean(dim=1),
        "trained": trained,
        "60% of it": [overlay(*pair) for pair in zip(images, masks)],
    }
    size = (1.2 * len(views), 1.2 * len(rows))
    figure = Figure(size, dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), len(views), squeeze=False)
    for line_of_axes, (title, panels) in zip(grid, rows.items()):
        line_of_axes[0].set_ylabel(title)
        for axes, panel in zip(line_of_axes, panels):
            axes.imshow(panel.numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    return figure


def finish(
    output: Path,
    run: RunState,
    untrained: nn.Module,
    images: Images,
    settings: Settings,
    world: World,
) -> str:
    """Draw both figures and return the last paragraph."""
    draw_epochs(output, run.history, settings)  # again: a run may have been killed before it
    baselines, last = run.history[0], run.history[-1]
    collapsed = collapse(last, settings.out_dim)

    unit = ""
    if "train_kl" in last:
        unit = f" nats; ln K = {math.log(settings.out_dim):.3f}"
    text = [f"After epoch {run.epoch} the loss is {last['train_loss']:.3f}{unit}."]
    if "knn_teacher" in last and "knn_untrained" in baselines:
        teacher, before = last["knn_teacher"], baselines["knn_untrained"]
        pixels = baselines["knn_pixels"]
        text.append(
            f"k-NN top-1: {teacher:.1f} % with the teacher's features, {before:.1f} % with the "
            f"same network {start_of(settings)}, {pixels:.1f} % with raw pixels."
        )
        # after a collapse a longer run would not help
        if teacher <= max(before, pixels) and teacher < 100 and not collapsed:
            text.append(
                "The training has not raised it above both: try a longer run, or --help's advice "
                "for small data."
            )

    trained = run.teacher.backbone.eval()
    if hasattr(trained, "get_last_selfattention"):
        text += attention_report(output, trained, untrained.eval(), images, settings, world)
    if "train_kl" in last:
        healthy = (
            "No collapse at the end of the last epoch; in its mean the entropy is "
            f"{last['train_entropy']:.3f} and the KL {last['train_kl']:.3f}."
        )
        text.append(collapsed or healthy)
    text.append(f"Everything is in {output}.")
    return "\n" + "\n".join(text)


def start_of(settings: Settings) -> str:
    """Return what the network was at the start: --init_from brings trained weights."""
    return "before this run" if settings.init_from else "untrained"


def attention_report(
    output: Path,
    trained: nn.Module,
    untrained: nn.Module,
    images: Images,
    settings: Settings,
    world: World,
) -> list[str]:
    """Draw attention.png of ten images, evenly spaced.

    Return lines with the scores over up to 1000 images, where their objects' masks are known.
    """
    limit = 10
    if images.masks is not None:
        limit = 1000
    images = images.subset(evenly_spaced(len(images), limit))
    view = EvaluationView(settings.eval_size, settings.eval_crop, settings.mean, settings.std)
    views = torch.stack([view(images[index][0]) for index in range(len(images))])

    before = attention_of(untrained, views, world)
    after = attention_of(trained, views, world)
    start = start_of(settings)
    figure = draw_attention(
        views[:10], view, after[:10], before[:10], settings.patch_size, start=start
    )
    write_whole(output / "attention.png", figure.savefig)
    if images.masks is None:
        return []

    was = attention_scores(before, images.masks)
    now = attention_scores(after, images.masks)
    on_object, on_object_before = now["mass_on_object"], was["mass_on_object"]
    text = [
        f"[CLS] puts {100 * on_object:.1f} % of its attention on the object, {start} "
        f"{100 * on_object_before:.1f} % ({on_object / on_object_before:.2f} times).",
        f"Jaccard of attention's masks with the true masks, {start} -> trained:",
    ]
    for name in ("best_head", "head_mean"):
        for percent in (60, 80):
            key = f"jaccard_{name}_{percent}"
            label = f"{name.replace('_', ' ')}, {percent} % of the mass"
            text.append(f"    {label}: {was[key]:.1f} -> {now[key]:.1f} %")
    return text


def attention_of(network: nn.Module, views: Tensor, world: World) -> Tensor:
    """Return the [CLS] token's attention on the CPU: (B, 3, S, S) -> (B, h, r, c)."""
    maps = [cls_attention(network, some.to(world.device)).cpu() for some in views.split(100)]
    return torch.cat(maps)
