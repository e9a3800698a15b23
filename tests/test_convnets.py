"""The convnets that --arch admits: they train, stop, go on, reload and evaluate, also at crops of
32 pixels, of which their last map is one pixel. Others are refused before the first step.
"""

import json
from pathlib import Path

import pytest
import torch
from test_bad_input import error_of
from test_runs import STATE, TINY, equal, run_until, write_photos

import eval_knn
import train
from settings import RESNETS
from training.backbone import build_backbone
from training.checkpoint import load_backbone

CONVNET = (
    "--arch resnet18 --optimizer sgd --global_crops_size 48 --local_crops_size 32 "
    "--local_crops_number 1 --epochs 1 --batch_size_per_gpu 8 --knn_every 0 --saveckp_freq 0 "
    "--eval_size 32 --warmup_epochs 0"
).split()


def command(photos: Path, output: Path) -> list[str]:
    return [*TINY, *CONVNET, "--data_path", str(photos), "--output_dir", str(output)]


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_a_convnet_trains_stops_goes_on_reloads_and_evaluates(tmp_path, monkeypatch, capsys):
    photos = write_photos(tmp_path / "photos")
    monkeypatch.setattr(train.report, "finish", lambda *_: "")
    train.main(command(photos, tmp_path / "undisturbed"))
    undisturbed = torch.load(tmp_path / "undisturbed" / "checkpoint.pth", weights_only=True)

    run_until(2, photos, tmp_path / "stopped", monkeypatch, *CONVNET)
    monkeypatch.setattr(train.report, "finish", lambda *_: "")
    train.main(command(photos, tmp_path / "stopped"))
    path = tmp_path / "stopped" / "checkpoint.pth"
    continued = torch.load(path, weights_only=True)
    for name in STATE:
        assert equal(continued[name], undisturbed[name]), f"{name} differs after continuing"

    _, args = load_backbone(path)
    assert args["arch"] == "resnet18" and args["patch_size"] == 1
    flags = f"--pretrained_weights {path} --data_path {photos} --nb_knn 3 --device cpu"
    flags += f" --num_workers 0 --results {tmp_path / 'results.jsonl'}"
    eval_knn.main(flags.split())
    measured = json.loads((tmp_path / "results.jsonl").read_text())["measured"]
    assert 0 <= measured["resnet18, k = 3, top-1 %"] <= 100


@pytest.mark.parametrize("arch", RESNETS)
def test_each_convnet_is_built_and_reads_images_of_16_pixels_and_more(arch):
    with torch.device("meta"):  # without memory for 60 million weights
        backbone = build_backbone(arch).eval()
        for size in (16, 32, 37, 96):
            assert backbone(torch.empty(2, 3, size, size)).shape == (2, backbone.embed_dim)


@pytest.mark.parametrize("arch", ["resnext50_32x4d", "vgg16", "xcit_small_12_p16", "vit_huge"])
def test_another_arch_is_refused_before_the_first_step(arch, tmp_path, capsys):
    error = error_of(train.main, capsys, "--arch", arch, "--output_dir", tmp_path / "run")
    assert f"--arch {arch} is unknown: choose one of vit_nano, " in error
    assert not (tmp_path / "run").exists()


def test_one_value_a_channel_cannot_be_normalised_and_that_is_said_before_the_first_step(
    tmp_path, capsys
):
    photos = write_photos(tmp_path / "photos")
    flags = [*command(photos, tmp_path / "run"), "--batch_size_per_gpu", "1"]
    assert "--batch_size_per_gpu 1" in error_of(train.main, capsys, *flags)
