"""A run stopped in mid-epoch and continued: whatever it trains, it ends where an undisturbed one
does. With other settings it goes on too, and a line says what changed.
"""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_runs import REPO, STATE, TINY, equal

import train
from ablations import train as ablations_train
from training import backbone, run_state
from vit import VisionTransformer

IMAGES = 11
STEPS = 2  # an epoch's, of 4 images each


@pytest.fixture(scope="module")
def few_images(tmp_path_factory) -> Path:
    """Images of noise without labels."""
    folder = tmp_path_factory.mktemp("few")
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (32, 37, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(autouse=True)
def quick(no_report, monkeypatch) -> None:
    """A network of few weights, and no figures, which take longer than these trainings."""

    def few_weights(patch_size: int, **sizes) -> VisionTransformer:
        sizes = {"num_heads": 2} | sizes
        return VisionTransformer(patch_size, embed_dim=16, depth=2, **sizes)

    monkeypatch.setitem(backbone.VITS, "vit_nano", few_weights)
    # from its own 65536 the first steps would be skipped, one for each halving
    monkeypatch.setattr(run_state, "GradScaler", partial(torch.amp.GradScaler, init_scale=64.0))


def command(images: Path, output: Path, flags: str) -> list[str]:
    """Return the arguments of a training of two epochs; flags change them."""
    shared = "--saveckp_freq 0 --knn_every 0 --epochs 2 --local_crops_number 1".split()
    places = ["--data_path", str(images), "--output_dir", str(output)]
    return [*TINY, *shared, *places, *flags.split()]


def run(images: Path, output: Path, flags: str) -> dict:
    """Train in this process, and return the checkpoint."""
    ablations_train.main(command(images, output, flags))
    return torch.load(output / "checkpoint.pth", weights_only=True)


def stop_in(step: int, monkeypatch, images: Path, output: Path, flags: str = "") -> dict:
    """Train until a signal comes in this step, counted from 1, and return the checkpoint."""
    honest = train.train_step
    made = []

    def counted(*args):
        made.append(1)
        if len(made) == step:
            signal.raise_signal(signal.SIGTERM)
        return honest(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", counted)
        with pytest.raises(SystemExit) as stopped:
            run(images, output, flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    return torch.load(output / "checkpoint.pth", weights_only=True)


VARIANTS = [
    "--optimizer adamw",
    "--optimizer sgd",
    "--optimizer lars",
    "--loss mse",
    "--loss infonce --local_crops_number 0 --queue_length 11",
    "--centering sinkhorn",
    "--centering batch_softmax",
    "--center_momentum 0",
    "--teacher student",
    "--teacher previous_iteration",
    "--teacher previous_epoch",
    "--predictor true",
    "--use_bn_in_head true",
    "--head_nlayers 1",
    "--head_activation relu",
    "--head_l2_bottleneck false --head_nlayers 0",
    "--norm_last_layer false --freeze_last_layer 0",
    "--loss mse --predictor true --use_bn_in_head true --optimizer lars",
    "--accumulate 2 --batch_size_per_gpu 2",
    "--drop_path_rate 0.5 --num_heads 8",
    "--precision bf16",
    "--precision fp16",
    "--precision fp16 --optimizer sgd --clip_grad 0",
    "--log_every 1 --warmup_teacher_temp_epochs 1 --teacher_temp 0.07",
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_stopped_in_mid_epoch_and_continued_it_ends_bit_for_bit_the_same(
    flags, few_images, tmp_path, monkeypatch
):
    undisturbed = run(few_images, tmp_path / "undisturbed", flags)
    stopped = stop_in(STEPS + 1, monkeypatch, few_images, tmp_path / "stopped", flags)
    assert stopped["epoch"] == 1 and 0 < stopped["images_done"] < IMAGES, "not stopped in mid-epoch"
    assert not equal(stopped["student"], undisturbed["student"])
    continued = run(few_images, tmp_path / "stopped", flags)
    for name in (*STATE, "scaler"):
        assert equal(continued[name], undisturbed[name]), f"{flags}: {name} differs"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--epochs 4", "settings changed since: epochs 4 (before: 2)"),
        ("--lr 0.002", "lr 0.002 (before: 0.0005)"),
        ("--global_crops_scale 0.3 0.9", "global_crops_scale 0.3 0.9 (before: 0.25 1.0)"),
        (
            "--batch_size_per_gpu 2",
            "a step has 2 images, before 4, and the learning rate scales with them: 0.5 times",
        ),
        (
            "--batch_size_per_gpu 6",
            "a step has 6 images, before 4, and the learning rate scales with them: 1.5 times",
        ),
        (
            "--accumulate 2",
            "a step has 8 images, before 4, and the learning rate scales with them: 2 times",
        ),
        ("--precision bf16", "precision bf16 (before: fp32)"),
        ("--precision fp16", "precision fp16 (before: fp32)"),
        ("--num_workers 1", ""),  # changes no result
    ],
)
def test_continued_with_other_settings_it_ends_and_says_in_words_what_changed(
    flags, said, few_images, tmp_path, monkeypatch, capsys
):
    before = stop_in(STEPS + 1, monkeypatch, few_images, tmp_path)
    capsys.readouterr()
    checkpoint = run(few_images, tmp_path, flags)
    assert checkpoint["epoch"] == (4 if "epochs" in flags else 2) and checkpoint["images_done"] == 0
    assert all(value.isfinite().all() for value in checkpoint["student"].values())
    assert not equal(checkpoint["student"], before["student"])
    line = capsys.readouterr().out.split("\n")[0]
    assert line.startswith("continuing") and "in epoch 2, after 4 of its images" in line
    if said:
        assert said in line
    else:
        assert "changed" not in line and "times" not in line


def test_a_run_in_fp16_keeps_the_scale_of_its_loss(few_images, tmp_path, monkeypatch):
    stopped = stop_in(2, monkeypatch, few_images, tmp_path, "--precision fp16")
    assert stopped["scaler"]["scale"] == 64.0
    stopped["scaler"]["scale"] = 32.0
    torch.save(stopped, tmp_path / "checkpoint.pth")
    continued = run(few_images, tmp_path, "--precision fp16")
    assert continued["scaler"]["scale"] == 32.0, "the scale must come from the checkpoint"


def test_a_step_that_overflows_in_fp16_is_said_with_the_new_scale(
    few_images, tmp_path, monkeypatch, capsys
):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**100)
    monkeypatch.setattr(run_state, "GradScaler", scaler)
    checkpoint = run(few_images, tmp_path, "--precision fp16")
    said = [line for line in capsys.readouterr().out.splitlines() if "overflow" in line]
    assert len(said) == 2 * STEPS and checkpoint["scaler"]["scale"] == 2.0 ** (100 - 2 * STEPS)
    assert said[0] == (
        f"a gradient overflowed in fp16: step skipped, loss scaled by {2.0**99:g} now"
    )


def test_steps_in_fp16_without_overflow_say_nothing(few_images, tmp_path, capsys):
    run(few_images, tmp_path, "--precision fp16")
    assert "overflow" not in capsys.readouterr().out


@pytest.mark.slow
def test_continued_by_two_processes_it_ends_and_says_that_the_learning_rate_doubles(
    few_images, tmp_path, monkeypatch
):
    monkeypatch.undo()  # the other processes have the whole network
    stop_in(STEPS + 1, monkeypatch, few_images, tmp_path / "run")
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script += ["-m", "ablations.train"]
    flags = command(few_images, tmp_path / "run", "")
    told = subprocess.run([*script, *flags], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    assert "2 x cpu" in told.stdout and (
        "a step has 8 images, before 4, and the learning rate scales with them: 2 times"
        in told.stdout
    )
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 2
