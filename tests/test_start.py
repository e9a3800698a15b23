"""A training from other weights: what --init_from takes, leaves and prints."""

import json
import re
import shutil

import pytest
import torch
from test_runs import TINY, write_photos

import train
from ablations import train as ablations_train
from runtime.commandline import InputError
from runtime.hardware import World
from settings import parse_settings
from training import pretrained
from training.backbone import build_backbone
from training.checkpoint import read_checkpoint
from training.run_state import build_student, start_run
from training.start import load_center, read_start

HERE = World(0, 1, torch.device("cpu"), torch.float32)
FROZEN = ("--lr", "0", "--min_lr", "0", "--epochs", "1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("start") / "photos")


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The checkpoint of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    train.main([*TINY, "--data_path", str(photos), "--output_dir", str(folder), "--epochs", "1"])
    return folder / "checkpoint.pth"


def flags(weights, *more: str) -> list[str]:
    return [*TINY, "--preset", "vits16", "--init_from", str(weights), *more]


def started(weights, *more: str):
    """A fresh run from the weights, and the line that says so."""
    settings = parse_settings(flags(weights, *more))
    run = start_run(settings, HERE)
    return run, load_center(run.student, run.dino_loss, settings)


def test_the_center_comes_with_the_head(trained):
    run, line = started(trained)
    stored = read_checkpoint(trained)
    assert stored["dino_loss"]["center"].abs().sum() > 0
    torch.testing.assert_close(run.dino_loss.center, stored["dino_loss"]["center"])
    assert line.startswith(f"backbone, head and center from {trained} (teacher); fresh: optim")


def test_the_releases_center_comes_too(trained, tmp_path):
    stored = read_checkpoint(trained)
    center = stored["dino_loss"]["center"] + 1
    release = {"teacher": stored["teacher"], "student": stored["student"],
               "dino_loss": {"center": center}}
    torch.save(release, tmp_path / "release.pth")
    run, _ = started(tmp_path / "release.pth")
    torch.testing.assert_close(run.dino_loss.center, center)


def test_init_head_false_leaves_head_and_center_fresh(trained):
    with pytest.raises(InputError, match="--init_head false"):
        build_student(parse_settings(flags(trained, "--out_dim", "13")))
    run, line = started(trained, "--out_dim", "13", "--init_head", "false")
    assert run.dino_loss.center.shape == (1, 13) and not run.dino_loss.center.any()
    assert "backbone from" in line and "fresh: head, center," in line and line.endswith("head")


def test_a_bare_backbone_brings_no_head_and_the_line_says_so(trained, tmp_path):
    teacher = read_checkpoint(trained)["teacher"]
    bare = {name[9:]: value for name, value in teacher.items() if name.startswith("backbone.")}
    torch.save(bare, tmp_path / "bare.pth")
    run, line = started(tmp_path / "bare.pth")
    assert line.startswith("backbone from") and "fresh: head, center" in line
    assert "does not say its heads: taken as 4; --num_heads" in line
    torch.testing.assert_close(run.student.backbone.state_dict(), bare)


def test_another_network_is_answered_with_the_flags_to_pass(trained):
    with pytest.raises(InputError, match="holds another network: pass --arch vit_nano"):
        build_student(parse_settings(flags(trained, "--arch", "vit_tiny")))


def test_the_authors_weights_are_taken_by_name(trained, tmp_path, monkeypatch):
    """A small network stands for the authors' file here."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained.hashlib, "new", lambda *_: FixedHash())
    path = tmp_path / "hub/checkpoints/dino_deitsmall16_pretrain.pth"
    path.parent.mkdir(parents=True)
    teacher = read_checkpoint(trained)["teacher"]
    torch.save({name[9:]: value for name, value in teacher.items() if "backbone." in name}, path)
    _, line = started("dino_vits16")
    assert line.startswith("backbone from dino_vits16") and "heads" not in line


class FixedHash:
    def hexdigest(self) -> str:
        return pretrained.PRETRAINED["dino_vits16"][2]


def test_a_name_that_is_none_is_answered_with_the_names():
    with pytest.raises(InputError, match=r"no checkpoint at 'dino_vits61'.*dino_vits16"):
        build_student(parse_settings(flags("dino_vits61")))


def test_without_a_network_the_hint_names_the_flag_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError, match="pass it as --init_from"):
        build_student(parse_settings(flags("dino_vits16")))


def test_the_student_alone_is_refused_without_a_flag_that_train_lacks(trained, tmp_path):
    stored = read_checkpoint(trained)
    torch.save({"student": stored["student"]}, tmp_path / "student.pth")
    with pytest.raises(InputError, match="has no 'teacher'") as refused:
        build_student(parse_settings(flags(tmp_path / "student.pth")))
    assert "checkpoint_key" not in str(refused.value)


def test_the_report_compares_with_the_weights_before_the_run(trained, photos, tmp_path, capsys):
    output = tmp_path / "run"
    train.main([*flags(trained, *FROZEN), "--data_path", str(photos), "--output_dir", str(output),
                "--knn_every", "1"])
    printed = capsys.readouterr().out
    assert f"backbone, head and center from {trained} (teacher)" in printed
    assert "with the same network before this run" in printed and "untrained" not in printed
    assert "knn_untrained" in json.loads((output / "log.txt").read_text().splitlines()[0])

    # a run that continues takes nothing from there any more
    train.main([*flags(trained, *FROZEN), "--data_path", str(photos), "--output_dir", str(output)])
    assert "head and center from" not in capsys.readouterr().out
    shutil.rmtree(output)


BEGINNINGS = [
    ("", "changed"),
    ("", "gone"),
    ("--init_head false --out_dim 13", "gone"),
    ("--global_crops_size 48", "gone"),  # other positions than the file has
    ("--predictor true --precision bf16 --saveckp_freq 0", "gone"),
    ("--loss infonce --local_crops_number 0 --queue_length 23 --init_head false", "gone"),
]


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(("more", "becomes"), BEGINNINGS)
def test_a_run_continues_without_the_file_that_it_started_from(
    more, becomes, trained, photos, tmp_path, capsys
):
    start = tmp_path / "start.pth"
    shutil.copy(trained, start)
    output = tmp_path / "run"
    command = [*flags(start, *FROZEN), "--data_path", str(photos), "--output_dir", str(output)]
    command += [*more.split(), "--warmup_epochs", "0"]
    ablations_train.main(command)
    begun = read_checkpoint(output / "checkpoint0000.pth")
    assert (begun["epoch"], begun["images_done"]) == (0, 0)
    before = report_of(capsys)

    if becomes == "gone":
        start.unlink()
    else:
        stored = read_checkpoint(start)
        stored["teacher"]["backbone.cls_token"] += 7
        torch.save(stored, start)
    ablations_train.main([*command, "--epochs", "2"])
    assert read_checkpoint(output / "checkpoint.pth")["epoch"] == 2
    assert report_of(capsys) == before
    weights, _ = read_start(ablations_train.parse(command))
    teacher = read_checkpoint(trained)["teacher"]
    for name, value in weights.backbone.items():
        assert torch.equal(value, teacher[f"backbone.{name}"]), f"{name} is not the start's"


def report_of(capsys) -> str:
    """The network's k-NN before the run, as the last paragraph has it."""
    (said,) = re.findall(r"(\S+ % with the same network before this run)", capsys.readouterr().out)
    return said


@pytest.mark.usefixtures("no_report")
def test_a_convnet_continues_without_the_file_that_it_started_from(photos, tmp_path):
    network = "--arch resnet18 --optimizer sgd --knn_every 0".split()
    shared = [*TINY, "--data_path", str(photos), *network]
    start = tmp_path / "start.pth"
    weights = build_backbone("resnet18").state_dict()
    torch.save({"teacher": {f"backbone.{name}": weights[name] for name in weights},
                "args": {"arch": "resnet18"}}, start)
    command = [*shared, *FROZEN, "--output_dir", str(tmp_path / "run"), "--init_from", str(start)]
    train.main(command)
    start.unlink()
    train.main([*command, "--epochs", "2"])
    assert read_checkpoint(tmp_path / "run/checkpoint.pth")["epoch"] == 2


def test_a_fresh_run_takes_no_start_that_another_left_behind(trained, photos, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    stored = read_checkpoint(trained)
    for value in stored["teacher"].values():
        value.zero_()
    torch.save(stored, output / "checkpoint0000.pth")
    run, _ = started(trained, "--output_dir", str(output))
    assert run.student.backbone.cls_token.any()


@pytest.mark.usefixtures("no_report")
def test_the_authors_weights_are_not_downloaded_again(trained, photos, tmp_path, monkeypatch):
    """The run began where there is a network, and continues where there is none."""
    output = tmp_path / "run"
    command = [*flags(trained, *FROZEN), "--data_path", str(photos), "--output_dir", str(output)]
    train.main(command)
    stored = read_checkpoint(output / "checkpoint.pth")
    stored["args"]["init_from"] = "dino_vits16"
    torch.save(stored, output / "checkpoint.pth")
    monkeypatch.setattr(pretrained, "download_pretrained", lambda *_: pytest.fail("downloads"))
    train.main([*command, "--init_from", "dino_vits16", "--epochs", "2"])
    assert read_checkpoint(output / "checkpoint.pth")["epoch"] == 2


def test_a_run_from_fresh_weights_keeps_no_start(trained):
    assert not (trained.parent / "checkpoint0000.pth").exists()


def test_the_authors_names_choose_their_recipe_and_a_folder_that_begins_so_does_not(tmp_path):
    (tmp_path / "a.png").touch()
    for start, preset in [("dino_vits16", "vits16"), ("dino_runs/checkpoint.pth", "photos")]:
        given = ["--data_path", str(tmp_path), "--init_from", start]
        assert parse_settings(given).preset == preset
