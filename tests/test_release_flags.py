"""The command lines of the release: each of its flags works, or is answered in words."""

import pytest
import torch
from test_bad_input import error_of

import eval_knn
import train
import visualize_attention
from evals import (
    attention_film,
    copy_detection,
    image_retrieval,
    linear,
    video_segmentation,
)
from settings import parse_settings
from training.backbone import build_backbone

# every flag of main_dino.py that is one here too, with another value than its default
MAIN_DINO = (
    "--arch vit_tiny --patch_size 8 --out_dim 4096 --norm_last_layer false "
    "--momentum_teacher 0.9995 --use_bn_in_head true --warmup_teacher_temp 0.03 "
    "--teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --weight_decay 0.05 "
    "--weight_decay_end 0.5 --clip_grad 0.3 --batch_size_per_gpu 32 --epochs 400 "
    "--freeze_last_layer 3 --lr 0.00075 --warmup_epochs 11 --min_lr 2e-06 --optimizer lars "
    "--drop_path_rate 0.2 --global_crops_scale 0.25 1.0 --local_crops_number 10 "
    "--local_crops_scale 0.05 0.25 --data_path /data/imagenet/train --output_dir /runs/a "
    "--saveckp_freq 10 --seed 1 --num_workers 8"
).split()


def test_each_flag_of_main_dino_means_here_what_it_means_there():
    settings = parse_settings(MAIN_DINO)
    values = {}
    for word in MAIN_DINO:
        if word.startswith("--"):
            name = word.removeprefix("--")
            values[name] = []
        else:
            values[name].append(word)
    for name, words in values.items():
        value = getattr(settings, name)
        found = value if isinstance(value, tuple) else (value,)
        for one, word in zip(found, words, strict=True):
            if isinstance(one, (int, float)) and not isinstance(one, bool):
                assert one == float(word), f"--{name}"
            else:
                assert str(one).lower() == word, f"--{name}"


@pytest.mark.parametrize("flag", ["--local_rank=3", "--local-rank=3", "--local_rank 3"])
def test_the_old_launchers_rank_is_taken_and_changes_nothing(flag, tmp_path, capsys):
    assert parse_settings([*MAIN_DINO, *flag.split()]) == parse_settings(MAIN_DINO)
    weights = ("--pretrained_weights", tmp_path / "x.pth")
    assert "no checkpoint at" in error_of(eval_knn.main, capsys, *weights, *flag.split())


@pytest.mark.parametrize(
    ("old", "new"), [("deit_tiny", "vit_tiny"), ("deit_small", "vit_small"), ("vit_base",) * 2]
)
def test_the_releases_older_names_of_vits(old, new):
    assert parse_settings(["--data_path", "x", "--arch", old]).arch == new


WEIGHTS = "--pretrained_weights x.pth --arch deit_small --patch_size 16 --checkpoint_key teacher"
LOADING = "--num_workers 10 --data_path /data/imagenet"


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (eval_knn.main, f"--batch_size_per_gpu 128 --nb_knn 10 20 --temperature 0.07 "
         f"--dump_features f.pth {LOADING}"),
        (linear.main, f"--n_last_blocks 4 --avgpool_patchtokens false --epochs 100 --lr 0.001 "
         f"--batch_size_per_gpu 128 --output_dir out {LOADING}"),
        (image_retrieval.main, f"--dataset roxford5k --multiscale true --imsize 512 {LOADING}"),
        (copy_detection.main, "--whitening_path w --distractors_path d --imsize 320 "
         f"--batch_size_per_gpu 16 {LOADING}"),
        (video_segmentation.main, "--n_last_frames 7 --size_mask_neighborhood 12 --topk 5 "
         "--output_dir out --data_path davis"),
        (visualize_attention.main, "--image_path a.png --image_size 480 --output_dir out "
         "--threshold 0.6"),
        (attention_film.main, "--input_path clip.mp4 --threshold 0.6 --fps 25"),
    ],
)
def test_a_command_line_of_the_releases_evaluations_is_read_up_to_its_weights(
    main, flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint at 'x.pth'" in error_of(main, capsys, *WEIGHTS.split(), *flags.split())


@pytest.mark.parametrize(
    ("main", "flag", "said"),
    [
        (train.main, "--use_fp16 true", "--precision chooses"),
        (train.main, "--use_fp16=false", "--precision chooses"),
        (train.main, "--dist_url env://", "torchrun says where"),
        (train.main, "--ngpus 8 --nodes 2", "instead of the release's --nodes: torchrun --nnodes"),
        (eval_knn.main, "--use_cuda false", "--device chooses"),
        (eval_knn.main, "--load_features folder", "--dump_features writes"),
        (eval_knn.main, "--dist_url env://", "torchrun says where"),
        (linear.main, "--val_freq 1", "tested ten times"),
        (linear.main, "--num_labels 1000", "the class folders say"),
        (linear.main, "--evaluate", "the heads are trained in one pass"),
        (image_retrieval.main, "--use_cuda true", "--device chooses"),
        (video_segmentation.main, "--bs 6", "frames are read one by one"),
        (attention_film.main, "--video x --video_only", "a folder of frames"),
        (attention_film.main, "--video x --video_format avi", "leave it out"),
        (attention_film.main, "--video x --output_path out", "--output_dir"),
        (attention_film.main, "--video x --resize 512", "--image_size"),
        (
            visualize_attention.main,
            "--pretrained_weights x.pth --image_path a.png --image_size 480 480",
            "--image_size takes one number, the short side",
        ),
    ],
)
def test_another_flag_of_the_release_is_answered_in_one_line_of_words(main, flag, said, capsys):
    assert said in error_of(main, capsys, *flag.split())


def test_a_flag_that_nobody_knows_gets_no_answer(capsys):
    error = error_of(train.main, capsys, "--bogus", "1")
    assert "unrecognized arguments: --bogus 1 (--help lists the flags)" in error


def test_retrievals_dataset_is_a_benchmark_in_the_folder(tmp_path, capsys):
    torch.save(build_backbone("vit_nano", 8, 16).state_dict(), tmp_path / "x.pth")
    flags = ["--pretrained_weights", tmp_path / "x.pth", "--data_path", tmp_path]
    error = error_of(image_retrieval.main, capsys, *flags, "--dataset", "rparis6k")
    assert "holds no gnd_rparis6k.pkl" in error
