"""What a run reports: log.txt, curves.png, attention.png, and a last paragraph (Fig. 1, 4, 6, 7).

Shapes: B images, S pixels, h heads, r x c patches.
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would change the plots of a notebook
from torch import Tensor, nn

from attention import attention_scores, cls_attention, keep_mass, overlay, to_pixels
from data import Images
from features import EvaluationView
from runtime.commandline import InputError, write_whole
from runtime.hardware import World
from settings import Settings
from training.run_state import FIX, RunState


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
        "images_per_s": round(run.images / run.seconds, 1),
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
        from training.not_finite import first_bad_tensor  # here: a sound run needs it never

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
    from training.collapse import verdict  # here: few runs need its words

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


def draw_curves(history: list[dict], out_dim: int) -> Figure:
    """Draw loss = entropy + KL, k-NN over its baselines, and the schedules."""
    baselines, *epochs = history
    figure = Figure(figsize=(15, 4), layout="constrained")
    losses, knn, schedules = figure.subplots(1, 3)
    draw_losses(losses, epochs, out_dim)
    draw_knn(knn, baselines, epochs)
    draw_schedules(schedules, epochs)
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend()
    return figure


def plot(axes: Axes, records: list[dict], key: str, label: str) -> None:
    """Draw a key of log.txt against the epochs that have it."""
    points = [(record["epoch"] + 1, record[key]) for record in records if key in record]
    if points:
        at, values = zip(*points, strict=True)
        axes.plot(at, values, marker=".", label=label)


def draw_losses(axes: Axes, epochs: list[dict], out_dim: int) -> None:
    """Draw the loss and its two parts (Eq. 5), under ln K."""
    plot(axes, epochs, "train_loss", "loss")
    plot(axes, epochs, "train_entropy", "teacher's entropy")
    plot(axes, epochs, "train_kl", "KL")
    axes.set(title="loss", ylim=(0, None))
    if "train_kl" in epochs[-1]:
        log_k = math.log(out_dim)
        axes.axhline(log_k, color="grey", linestyle=":", label=f"ln K = {log_k:.3f}")
        axes.set(title="loss = entropy + KL", ylabel="nats")


def draw_knn(axes: Axes, baselines: dict, epochs: list[dict]) -> None:
    """Draw k-NN top-1 of teacher and student, from the untrained network on."""
    for network in ("teacher", "student"):
        key = f"knn_{network}"
        records = epochs
        if "knn_untrained" in baselines:
            records = [{"epoch": -1, key: baselines["knn_untrained"]}, *epochs]
        plot(axes, records, key, f"k-NN, {network}")
    if "knn_pixels" in baselines:
        axes.axhline(baselines["knn_pixels"], color="grey", linestyle=":", label="raw pixels")
    axes.set(title="k-NN top-1", ylabel="%")


def draw_schedules(axes: Axes, epochs: list[dict]) -> None:
    """Draw each schedule, divided by its largest value."""
    at = [record["epoch"] + 1 for record in epochs]
    for key in ("train_lr", "train_wd", "teacher_momentum", "teacher_temp"):
        values = np.array([record[key] for record in epochs])
        name = key.replace("train_", "")
        label = f"{name}: {values[0]:.4g} to {values[-1]:.4g}"
        axes.plot(at, values / max(values.max(), 1e-12), marker=".", label=label)
    axes.set(title="schedules, each over its largest value")


def unnormalised(views: Tensor, view: EvaluationView) -> Tensor:
    """Return images to draw: (..., 3, S, S) as a network reads it -> (..., S, S, 3) in 0 ... 1."""
    return (views.cpu() * view.std + view.mean).clamp(0, 1).movedim(-3, -1)


def draw_attention(
    views: Tensor,
    view: EvaluationView,
    attention: Tensor,
    untrained: Tensor,
    patch_size: int,
    mass: float = 0.6,
    start: str = "untrained",
) -> Figure:
    """Draw a column an image: the image, its attention untrained and trained, and the mask.

    The attention is the mean over the heads; the mask keeps `mass` of the trained one.
    views (B, 3, S, S); attention and untrained (B, h, r, c).
    """
    trained = attention.mean(dim=1)
    images = unnormalised(views, view)
    masks = [to_pixels(keep_mass(one, mass), patch_size) for one in trained]
    rows = {
        "image": images,
        start: untrained.mean(dim=1),
        "trained": trained,
        f"{mass:.0%} of it": [overlay(*pair) for pair in zip(images, masks, strict=True)],
    }
    size = (1.2 * len(views), 1.2 * len(rows))
    figure = Figure(size, dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), len(views), squeeze=False)
    for line_of_axes, (title, panels) in zip(grid, rows.items(), strict=True):
        line_of_axes[0].set_ylabel(title)
        for axes, panel in zip(line_of_axes, panels, strict=True):
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
    figure = draw_curves(run.history, settings.out_dim)
    write_whole(output / "curves.png", figure.savefig)
    baselines, last = run.history[0], run.history[-1]

    text = [f"After epoch {run.epoch} the loss is {last['train_loss']:.3f}."]
    if "train_kl" in last:
        log_k = math.log(settings.out_dim)
        text = [f"{text[0].removesuffix('.')} nats; ln K = {log_k:.3f}."]
    if "knn_teacher" in last and "knn_untrained" in baselines:
        teacher, before = last["knn_teacher"], baselines["knn_untrained"]
        pixels = baselines["knn_pixels"]
        text.append(
            f"k-NN top-1: {teacher:.1f} % with the teacher's features, {before:.1f} % with the "
            f"same network {start_of(settings)}, {pixels:.1f} % with raw pixels."
        )
        if teacher <= max(before, pixels) and teacher < 100:
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
        text.append(collapse(last, settings.out_dim) or healthy)
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
    n = min(len(images), 10)
    if images.masks is not None:
        n = min(len(images), 1000)
    images = images.subset(torch.linspace(0, len(images) - 1, n).long())
    view = EvaluationView(settings.eval_size, settings.eval_crop, settings.mean, settings.std)
    views = torch.stack([view(images[index][0]) for index in range(n)])

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
