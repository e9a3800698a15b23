"""The lab's histogram of prototypes: it counts favourites, of a run's own images and center."""

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import train
from classroom import prototypes
from runtime.creatures import make_creatures
from training.checkpoint import read_checkpoint

TINY = (
    "--preset demo --patch_size 16 --global_crops_size 32 --local_crops_size 16 --eval_size 32 "
    "--out_dim 31 --head_hidden_dim 29 --head_bottleneck_dim 7 --batch_size_per_gpu 4 --epochs 1 "
    "--warmup_epochs 0 --device cpu --precision fp32 --num_workers 0 --knn_every 0"
).split()


def test_each_image_counts_once_for_its_largest_probability():
    probs = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.4, 0.3], [0.0, 0.1, 0.9]])
    assert prototypes.favourites(probs).tolist() == [0, 2, 1]


def test_the_line_tells_one_prototype_for_all_from_the_same_answer_for_all():
    one_hot = prototypes.describe("a", torch.eye(5)[[2, 2, 2, 2]])
    assert "1 of 5 prototypes" in one_hot and "4 of 4 images" in one_hot and "1.000" in one_hot
    uniform = prototypes.describe("b", torch.full((4, 5), 0.2))
    assert "probability of 0.200 on average (1/K = 0.200)" in uniform


def test_a_run_is_read_with_its_own_images_and_center(tmp_path, capsys, no_report):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(make_creatures(12, 32, seed=7).images):
        to_pil_image(image).save(photos / f"{number}.png")
    run = tmp_path / "run"
    train.main([*TINY, "--data_path", str(photos), "--output_dir", str(run)])
    checkpoint = read_checkpoint(run / "checkpoint.pth")
    checkpoint["dino_loss"]["center"] = torch.full((1, 31), 100.0)
    checkpoint["dino_loss"]["center"][0, 7] = -100.0  # the logits minus this: all images' choice
    torch.save(checkpoint, run / "checkpoint.pth")
    capsys.readouterr()

    prototypes.main([str(run), "--output", str(tmp_path / "p.png")])
    before, after = [line for line in capsys.readouterr().out.splitlines() if " of 31 " in line]
    assert before.startswith("before the training:") and "of 12 images" in before
    assert after.startswith("run: 1 of 31 prototypes") and "12 of 12 images" in after
    assert (tmp_path / "p.png").exists()


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prototypes.main([str(tmp_path)])
    assert "give the folder of a run" in capsys.readouterr().err


def test_an_ablations_run_is_refused_by_its_name(tmp_path, capsys):
    torch.save({"args": {"teacher": "student"}}, tmp_path / "checkpoint.pth")
    with pytest.raises(SystemExit):
        prototypes.main([str(tmp_path)])
    assert "is a run of ablations.train: give one of train.py" in capsys.readouterr().err
