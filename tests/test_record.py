"""The record prints an epoch's numbers, and ends after its limit."""

import json

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from bench import record
from runtime.creatures import make_creatures
from training.checkpoint import load_backbone

TINY = (
    "--preset demo --device cpu --precision fp32 --epochs 1 --batch_size_per_gpu 4 --out_dim 13 "
    "--global_crops_size 24 --local_crops_size 16 --local_crops_number 2 --warmup_epochs 0 "
    "--eval_size 24 --side 29"
).split()


@pytest.fixture
def folder(tmp_path):
    """train/ with 12 and val/ with 4 images, of two classes and of several sizes."""
    for i, image in enumerate(make_creatures(16, side=41).images):
        part = "val" if i >= 12 else "train"
        path = tmp_path / "images" / part / f"class{i % 2}"
        path.mkdir(parents=True, exist_ok=True)
        to_pil_image(image[:, : 30 + i]).save(path / f"{i}.png")
    return tmp_path / "images"


def test_an_epoch_of_the_record_prints_its_rows_and_saves_the_teacher(folder, tmp_path, capsys):
    record.main([*TINY, "--data_path", str(folder), "--output_dir", str(tmp_path / "run")])
    start, epoch, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert start["images"] == 12 and start["test_images"] == 4
    assert start["device"] == "cpu" and start["settings"]["side"] == 29
    assert 0 <= start["knn_untrained"] <= 100 and 0 <= start["knn_pixels"] <= 100
    assert set(epoch) == {
        "epoch", "loss", "entropy", "kl", "gradient_norm", "images_per_s", "seconds",
        "knn_teacher", "knn_student",
    }
    assert epoch["epoch"] == 1
    assert epoch["loss"] == pytest.approx(epoch["entropy"] + epoch["kl"], abs=1e-3)
    backbone, args = load_backbone(end["saved"])
    assert args["arch"] == "vit_nano" and args["eval_size"] == 24
    assert not backbone.training


def test_images_are_kept_as_large_as_the_largest_view():
    """Crops and views of smaller images would be enlarged, and show less than the files do."""
    settings = record.RecordSettings()
    assert settings.side >= settings.global_crops_size
    assert settings.side >= settings.eval_size / settings.eval_crop


def test_the_record_ends_after_its_limit(folder, tmp_path, capsys):
    flags = ["--data_path", str(folder), "--output_dir", str(tmp_path / "run")]
    record.main([*TINY, *flags, "--epochs", "1000", "--limit", "1e-9"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and rows[1]["epoch"] == 1
    assert "knn_teacher" in rows[1], "the last epoch is evaluated"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--limit 0", "--limit 0.0 must be above 0"),
        ("--every 0", "--every 0 must be at least 1"),
        ("--side 0", "--side 0 must be at least 1"),
        ("--accumulate 2", "--accumulate 2 is for train.py"),
        ("--cuda_graph true", "--cuda_graph true needs a GPU"),
        ("--batch_size_per_gpu 13", "--batch_size_per_gpu 13 is more than the 12 images"),
        ("--lr 1e30", "lower --lr"),
    ],
)
def test_a_bad_flag_is_named_in_one_line(folder, tmp_path, flags, said, capsys):
    common = ["--data_path", str(folder), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        record.main([*TINY, *common, *flags.split()])
    written = capsys.readouterr().err
    assert stopped.value.code == 2 and said in written, written
    assert len(written.strip().splitlines()) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_the_record_is_a_cuda_graph_where_it_is_told_to(folder, tmp_path, capsys):
    """Six steps an epoch: four before the recording, two replays."""
    flags = ["--data_path", str(folder), "--output_dir", str(tmp_path / "run")]
    flags += "--device cuda --compile false --batch_size_per_gpu 2 --cuda_graph true".split()
    record.main([*TINY, *flags, "--epochs", "2"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["epoch"] for row in rows[1:3]] == [1, 2]
