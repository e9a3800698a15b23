"""Whole trainings through the command line, very small: resuming, signals, logs, files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import settings
import train
from runtime import hardware
from training import backbone, report
from vit import VisionTransformer

REPO = Path(__file__).parent.parent
TINY = (
    "--preset vits16 --arch vit_nano --patch_size 16 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --eval_size 32 --eval_crop 1 --out_dim 31 --head_hidden_dim 29 "
    "--head_bottleneck_dim 7 --batch_size_per_gpu 4 --epochs 3 --warmup_epochs 1 "
    "--warmup_teacher_temp_epochs 0 --num_workers 0 --in_memory false --device cpu "
    "--precision fp32 --knn_every 1 --saveckp_freq 2 --init_std 0.06"
).split()


def write_photos(folder: Path) -> Path:
    """24 images in two classes that differ in brightness, and 3 to evaluate on, which a run draws
    at its end.
    """
    rng = np.random.default_rng(0)
    for i in range(27):
        path = (
            folder
            / ("train" if i < 24 else "val")
            / ("dark" if i % 2 else "bright")
            / f"{i:02d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (40, 50, 3)) + (0 if i % 2 else 150)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def run(photos: Path, output: Path, *flags: str) -> dict:
    """Train in this process and return the checkpoint."""
    train.main([*TINY, "--data_path", str(photos), "--output_dir", str(output), *flags])
    return torch.load(output / "checkpoint.pth", weights_only=True)


def log_file(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def log_of(output: Path) -> list[dict]:
    records = log_file(output)
    for record in records:
        record.pop(
            "images_per_s", None
        )  # the clock is the one thing that differs between equal runs
    return records


def equal(a, b) -> bool:
    """Whether two nested values hold the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


STATE = ("student", "teacher", "dino_loss", "optimizer", "epoch", "images_done", "metrics")


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    return output, run(photos, output)


def test_a_run_leaves_its_log_figures_and_checkpoints(uninterrupted):
    output, checkpoint = uninterrupted
    assert set(os.listdir(output)) == {
        ".lock",
        "checkpoint.pth",
        "checkpoint0002.pth",
        "log.txt",
        "curves.png",
        "attention.png",
    }
    baselines, *epochs = log_of(output)
    assert baselines.keys() == {"epoch", "knn_untrained", "knn_pixels"} and baselines["epoch"] == -1
    assert [record["epoch"] for record in epochs] == [0, 1, 2]
    for record in epochs:
        assert {
            "train_loss",
            "train_lr",
            "train_wd",
            "train_entropy",
            "train_kl",
            "teacher_temp",
            "teacher_momentum",
            "knn_teacher",
            "knn_student",
        } < record.keys()
        assert record["train_entropy"] + record["train_kl"] == pytest.approx(
            record["train_loss"], abs=1e-5
        )
    args = checkpoint["args"]
    assert (checkpoint["epoch"], args["arch"], args["patch_size"]) == (3, "vit_nano", 16)


@pytest.mark.usefixtures("no_report")
def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_another(
    uninterrupted, photos, tmp_path
):
    _, checkpoint = uninterrupted
    again = run(photos, tmp_path / "again", "--num_workers", "2")
    assert all(equal(again[name], checkpoint[name]) for name in STATE), (
        "workers must not change the result"
    )
    other = run(photos, tmp_path / "other", "--seed", "1", "--epochs", "1")
    assert not equal(other["student"], checkpoint["student"])


class Stop(Exception):
    pass


def run_until(step: int, photos: Path, output: Path, monkeypatch, *flags: str) -> None:
    """Train, and get a signal in this step, counted from 1."""
    real_step, steps = train.train_step, []

    def counted_step(*args):
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return real_step(*args)

    monkeypatch.setattr(train, "train_step", counted_step)
    with pytest.raises(SystemExit) as stopped:
        run(photos, output, *flags)
    assert stopped.value.code == 128 + signal.SIGTERM and len(steps) == step
    monkeypatch.undo()


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("stop_after", [3, 6, 11])
def test_a_run_stopped_anywhere_ends_bit_for_bit_where_an_uninterrupted_one_ends(
    uninterrupted, photos, tmp_path, monkeypatch, stop_after, capsys
):
    """A signal after so many of the 18 steps, six an epoch; then the same command again."""
    run_until(stop_after, photos, tmp_path, monkeypatch)
    place = {3: "1, after 12", 6: "1, after 24", 11: "2, after 20"}[stop_after]
    stopped = f"stopped in epoch {place} of its 24 images: the same command continues there\n"
    assert stopped in capsys.readouterr().out
    output, checkpoint = uninterrupted
    resumed = run(photos, tmp_path)
    assert f"checkpoint.pth in epoch {place} of its images\n" in capsys.readouterr().out
    for name in STATE:
        assert equal(resumed[name], checkpoint[name]), f"{name} differs after resuming"
    assert log_of(tmp_path) == log_of(output)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_run_stopped_and_continued_has_the_weights_of_an_undisturbed_one_with_every_optimizer(
    optimizer, photos, tmp_path, monkeypatch
):
    flags = ("--optimizer", optimizer, "--epochs", "2", "--knn_every", "0")
    undisturbed = run(photos, tmp_path / "undisturbed", *flags)
    run_until(8, photos, tmp_path / "stopped", monkeypatch, *flags)
    continued = run(photos, tmp_path / "stopped", *flags)
    for name in STATE:
        assert equal(continued[name], undisturbed[name]), (
            f"--optimizer {optimizer}: {name} differs after continuing"
        )


def test_a_finished_run_started_again_changes_nothing(uninterrupted, photos, capsys):
    output, checkpoint = uninterrupted
    again = run(photos, output)
    assert all(equal(again[name], checkpoint[name]) for name in STATE)
    assert "checkpoint.pth is finished: more --epochs continue it\n" in capsys.readouterr().out


def test_a_finished_run_is_refused_for_what_it_was_not_trained_with_alone(
    uninterrupted, photos, capsys
):
    output, _ = uninterrupted
    run(photos, output, "--download")
    run(f"{photos.parent}/./{photos.name}/", output)  # the same folder
    assert "settings changed" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(photos, output, "--lr", "0.123", "--download")
    assert (
        "is finished, and was made with another --lr: choose another --output_dir"
        in capsys.readouterr().err
    )


def test_weights_can_start_another_run_with_fresh_schedules(uninterrupted, photos, tmp_path):
    output, checkpoint = uninterrupted
    started = run(
        photos,
        tmp_path,
        "--init_from",
        str(output / "checkpoint.pth"),
        "--lr",
        "0",
        "--min_lr",
        "0",
        "--epochs",
        "1",
    )
    assert started["epoch"] == 1
    assert equal(started["teacher"], checkpoint["teacher"]), (
        "with lr 0 the weights stay those of --init_from"
    )


@pytest.mark.usefixtures("no_report")
def test_a_nan_stops_the_run_names_the_step_and_spares_the_checkpoint(photos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(
            photos,
            tmp_path,
            "--lr",
            "1e18",
            "--clip_grad",
            "0",
            "--warmup_epochs",
            "0",
            "--freeze_last_layer",
            "0",
        )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        stopped.value.code == 2
        and "the loss is nan at epoch 1, step" in error
        and "Traceback" not in error
    )
    kept = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert all(value.isfinite().all() for value in kept["student"].values())


def test_without_labels_the_run_says_so_once_and_trains(tmp_path, photos, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in photos.rglob("*.png"):
        (flat / file.name).write_bytes(file.read_bytes())
    run(flat, tmp_path / "run", "--epochs", "1")
    said = capsys.readouterr().out
    assert said.count("no labels") == 1
    assert "an epoch; K = 31, ln K = 3.4340\n" in said
    assert "knn_teacher" not in log_of(tmp_path / "run")[-1]


def test_a_convnet_trains_too(photos, tmp_path):
    checkpoint = run(
        photos / "train", tmp_path, "--arch", "resnet18", "--epochs", "1", "--optimizer", "sgd"
    )
    assert "backbone.layer4.1.conv2.weight" in checkpoint["teacher"]
    assert not (tmp_path / "attention.png").exists()


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_and_the_same_command_goes_on(photos, tmp_path):
    """As torchrun, Slurm and systemd send it: to the loader's workers too, which are groups of
    their own.
    """
    command = [
        sys.executable,
        "train.py",
        *TINY,
        "--data_path",
        str(photos),
        "--output_dir",
        str(tmp_path),
        "--epochs",
        "2000",
        "--saveckp_freq",
        "0",
        "--knn_every",
        "0",
        "--num_workers",
        "1",
    ]
    process = subprocess.Popen(
        command,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "log.txt").exists() or len(log_of(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 128 + signal.SIGTERM and "the same command continues there" in output
    )
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] >= 2 and len(log_of(tmp_path)) == checkpoint["epoch"] + 1


def test_two_trainings_do_not_share_an_output_folder(photos, tmp_path, capsys):
    """The second is told; what the first saves stays its own."""
    command = [
        *TINY,
        "--data_path",
        str(photos),
        "--output_dir",
        str(tmp_path),
        "--epochs",
        "2000",
        "--knn_every",
        "0",
        "--saveckp_freq",
        "0",
    ]
    first = subprocess.Popen(
        [sys.executable, "train.py", *command],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (tmp_path / "checkpoint.pth").exists():
            assert first.poll() is None
            time.sleep(0.2)
        with pytest.raises(SystemExit) as refused:
            train.main(command)
        assert (
            refused.value.code == 2 and "another training is at work in" in capsys.readouterr().err
        )
    finally:
        first.kill()
        first.wait()


@pytest.mark.usefixtures("no_report")
def test_reading_the_metrics_every_few_steps_changes_nothing_but_when_they_are_read(
    photos, uninterrupted, tmp_path, monkeypatch
):
    """The log is the same, and a loss that is not finite keeps its step."""
    run(photos, tmp_path / "rarely", "--log_every", "4")  # of 6 steps an epoch
    for rarely, always in zip(log_of(tmp_path / "rarely"), log_of(uninterrupted[0]), strict=True):
        assert rarely.keys() == always.keys()
        assert all(rarely[key] == pytest.approx(always[key]) for key in always), (
            "each epoch must average the metrics of all its steps"
        )
    steps, honest = iter(range(100)), train.train_step
    monkeypatch.setattr(
        train,
        "train_step",
        lambda *parts: honest(*parts) * (float("nan") if next(steps) == 8 else 1),
    )
    with pytest.raises(SystemExit) as stopped:
        run(photos, tmp_path / "broken", "--log_every", "4")
    assert stopped.value.code == 2
    assert torch.load(tmp_path / "broken" / "checkpoint.pth", weights_only=True)["epoch"] == 1


@pytest.mark.usefixtures("no_report")
def test_images_in_memory_give_the_same_run_after_a_stop_in_mid_epoch(
    photos, tmp_path, monkeypatch
):
    """The crops of a batch are made at once there; each is still a function of its image."""
    in_memory = ("--in_memory", "true")
    straight = run(photos, tmp_path / "straight", *in_memory)
    run_until(8, photos, tmp_path / "stopped", monkeypatch, *in_memory)
    stopped = run(photos, tmp_path / "stopped", *in_memory)
    assert all(equal(stopped[name], straight[name]) for name in STATE)


@pytest.mark.usefixtures("no_report")
def test_a_continued_run_keeps_the_type_that_auto_chose(photos, tmp_path, capsys, monkeypatch):
    """Another machine would choose another one; the settings say nothing of a change."""
    auto = ("--precision", "auto", "--epochs")
    for name in ("bf16", "fp32"):
        chosen = (hardware.DTYPES[name], " (measured)")
        monkeypatch.setattr(hardware, "faster_dtype", lambda width, chosen=chosen: chosen)
        checkpoint = run(photos, tmp_path, *auto, "1" if name == "bf16" else "2")
        assert checkpoint["args"]["precision"] == "bf16"
        printed = capsys.readouterr().out
        assert "1 x cpu, bfloat16" in printed and "precision" not in printed
    assert checkpoint["epoch"] == 2


@pytest.fixture
def small_vit(monkeypatch) -> None:
    """A ViT that is no arch of ours, so that its checkpoint is small enough to be stored."""
    network = lambda patch_size, **sizes: VisionTransformer(
        patch_size, embed_dim=6, depth=1, num_heads=1, **sizes
    )
    monkeypatch.setitem(backbone.VITS, "vit_nano", network)


STORED = REPO / "tests/stored/checkpoint_d805f4a.pth"  # after 8 of 18 steps
OF_STORED = (
    "--patch_size 8 --head_hidden_dim 11 --out_dim 13 --lr 0.02 --momentum_teacher 0.9 "
    "--drop_path_rate 0 --saveckp_freq 0"
).split()


@pytest.mark.parametrize("key", ["pictures", "images"])  # today's is images_done
@pytest.mark.usefixtures("no_report")
def test_a_checkpoint_of_an_older_version_is_continued_to_the_end(
    small_vit, photos, tmp_path, capsys, key
):
    """Commit d805f4a made it, stopped in mid-epoch; a word of its keys has changed since, twice."""
    stored = torch.load(STORED, weights_only=True)
    stored[key] = stored.pop("pictures")
    torch.save(stored, tmp_path / "checkpoint.pth")
    checkpoint = run(photos, tmp_path, *OF_STORED)
    assert "in epoch 2, after 8 of its images" in capsys.readouterr().out
    assert checkpoint["epoch"] == 3 and checkpoint["images_done"] == 0 and key not in checkpoint
    records = log_of(tmp_path)
    assert [record["epoch"] for record in records] == [-1, 0, 1, 2]
    # the first epoch is the file's own, and Adam has made all 18 steps of the whole run
    assert records[1]["train_loss"] == stored["history"][1]["train_loss"]
    steps = {state["step"].item() for state in checkpoint["optimizer"]["state"].values()}
    frozen_first = {12.0, 18.0}  # the last layer has none in the first epoch
    assert steps == frozen_first


def test_a_run_of_another_method_is_not_continued_as_plain_dino(
    small_vit, photos, tmp_path, capsys
):
    """One line names the command that does."""
    for other, flags in (
        ({"loss": "infonce"}, "--loss infonce"),
        ({"teacher": "student"}, "--teacher student"),
        ({"queue_length": 17}, "--queue_length 17"),
        ({"head_l2_bottleneck": False}, "--head_l2_bottleneck false"),
        ({"predictor": True, "loss": "mse"}, "--loss mse --predictor true"),
    ):
        stored = torch.load(STORED, weights_only=True)
        stored["args"] |= other
        torch.save(stored, tmp_path / "checkpoint.pth")
        with pytest.raises(SystemExit):
            run(photos, tmp_path, *OF_STORED)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"made with {flags}: " in error
        assert f"python -m ablations.train {flags} ..." in error


def test_a_stopped_run_has_the_curves_of_its_completed_epochs(photos, tmp_path, monkeypatch):
    """Stopped after 14 of 18 steps, that is, in the third epoch."""
    run_until(14, photos, tmp_path, monkeypatch)
    report.draw_curves(log_of(tmp_path), 31).savefig(tmp_path / "two_epochs.png")
    figures = ("curves.png", "two_epochs.png")
    drawn, expected = (np.array(Image.open(tmp_path / name)) for name in figures)
    assert np.array_equal(drawn, expected), "curves.png must show the two completed epochs"


@pytest.mark.usefixtures("no_report")
def test_a_run_with_a_warm_up_of_half_an_epoch_trains_and_old_whole_numbers_continue(
    photos, tmp_path, monkeypatch, capsys
):
    half = run(photos, tmp_path / "half", "--warmup_epochs", "0.5", "--epochs", "1")
    assert half["args"]["warmup_epochs"] == 0.5
    old = tmp_path / "old"
    run_until(8, photos, old, monkeypatch)
    checkpoint = torch.load(old / "checkpoint.pth", weights_only=True)
    checkpoint["args"] |= {"warmup_epochs": 1, "warmup_teacher_temp_epochs": 0}  # as before
    torch.save(checkpoint, old / "checkpoint.pth")
    capsys.readouterr()
    assert run(photos, old)["epoch"] == 3
    assert "settings changed" not in capsys.readouterr().out


def test_tensorboard_gets_the_numbers_of_the_log(photos, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in ("2", "3"):  # stopped, and continued
        run(photos, tmp_path, "--tensorboard", "--warmup_epochs", "1", "--epochs", epochs)
    events = EventAccumulator(str(tmp_path)).Reload()
    records = log_file(tmp_path)
    names = set()
    for record in records:
        names |= {name for name, value in record.items() if not isinstance(value, list)}
    assert set(events.Tags()["scalars"]) == names - {"epoch"}
    for name in events.Tags()["scalars"]:
        seen = {event.step: event.value for event in events.Scalars(name)}
        logged = {record["epoch"] + 1: record[name] for record in records if name in record}
        assert seen == pytest.approx(logged, rel=1e-5), name


def test_tensorboard_that_is_not_installed_is_named_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, "--tensorboard", "true", "--output_dir", str(tmp_path / "run")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "pip install tensorboard" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()
