"""Fine-tuning with DeiT's recipe (Table 6): labels balanced, mixed and smoothed; training, reading
again.
"""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import error_of

from evals import transfer
from evals.common import balanced_fraction
from evals.transfer import Classifier, augmentation, mixing, paper_number, train_step
from optimizer import make_optimizer
from runtime.hardware import World
from training.backbone import build_backbone
from training.checkpoint import load_backbone

HERE = World(0, 1, torch.device("cpu"), torch.float32)
TINY = (
    "--patch_size 8 --arch vit_nano --eval_size 24 --init_std 0.1 --epochs 3 --warmup_epochs 1 "
    "--lr 0.04 --batch_size 5 --drop_path_rate 0.1 --crop_scale 0.7 --num_workers 0 --device cpu "
    "--precision fp32"
).split()


def write_photos(folder: Path) -> Path:
    """40 images in two classes that differ in brightness."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / ("dark" if i % 2 else "bright") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            (rng.integers(0, 60, (29, 31, 3)) + (0 if i % 2 else 190)).astype(np.uint8)
        ).save(path)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def run(photos: Path, output: Path, *flags: str) -> dict:
    """Train in this process -> the JSON line, with the checkpoint's path under "checkpoint"."""
    transfer.main(
        [
            *TINY,
            "--data_path",
            str(photos),
            "--output_dir",
            str(output),
            "--results",
            str(output / "results.jsonl"),
            *flags,
        ]
    )
    return json.loads((output / "results.jsonl").read_text().splitlines()[-1])


def weights_of(output: Path) -> dict:
    return torch.load(output / "checkpoint.pth", weights_only=True)["student"]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_a_fraction_of_the_labels_is_balanced_and_seeded(fraction):
    """Low-shot: each class gives round(fraction n_c) of its n_c labels, at least one."""
    labels = torch.arange(10).repeat_interleave(
        torch.tensor([3, 7, 13, 29, 31, 37, 41, 43, 100, 200])
    )
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    chosen = balanced_fraction(labels, fraction, seed=0)
    for label in range(10):
        want = max(1, round(fraction * int((labels == label).sum())))
        assert (labels[chosen] == label).sum() == want, f"class {label} must give {want} labels"
    assert torch.equal(chosen, balanced_fraction(labels, fraction, seed=0)), (
        "the same seed, the same images"
    )
    assert not torch.equal(chosen, balanced_fraction(labels, fraction, seed=1)), (
        "another seed, other images"
    )
    assert set(chosen.tolist()) <= set(balanced_fraction(labels, 0.7, seed=0).tolist()), (
        "part of a larger fraction"
    )


def test_mixed_targets_are_fractions_of_the_two_labels():
    """Mixup and cutmix: lambda of one label, 1 - lambda of the other's; rows sum to 1, by one
    lambda a batch.
    """
    images, labels = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    mix, seen = mixing(0.8, 1.0, 7), set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, targets = mix(images, labels)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
        share = targets[0, 0]
        torch.testing.assert_close(
            targets, share * torch.eye(3, 7) + (1 - share) * torch.eye(3, 7).roll(1, 0)
        )
        pasted = (mixed == images) | (
            mixed == images.roll(1, 0)
        )  # cutmix: each pixel is of one of the two
        seen.add(bool(pasted.all()))
    assert seen == {True, False}, "both ways must be taken, each half of the time"


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing_can_be_switched_off(mixup, cutmix):
    images, labels = torch.rand(5, 3, 16, 16), torch.arange(5)
    mixed, targets = mixing(mixup, cutmix, 7)(images, labels)
    assert targets.shape == (5, 7) and targets.sum(dim=1).allclose(torch.ones(5))
    assert torch.equal(mixed, images) == (not mixup and not cutmix)


def small_network(classes: int = 7) -> Classifier:
    torch.manual_seed(0)
    return Classifier(build_backbone("vit_nano", 8, 24, init_std=0.1), classes)


def test_the_loss_is_the_cross_entropy_with_smoothed_targets():
    """-sum_c ((1 - s) t_c + s / C) log p_c, by loops."""
    network, images = small_network(), torch.randn(3, 3, 24, 24)
    targets = torch.rand(3, 7).softmax(dim=1)
    probs = network(images).double().softmax(dim=1)
    smooth = [[0.9 * targets[i, c].item() + 0.1 / 7 for c in range(7)] for i in range(3)]
    by_hand = sum(-smooth[i][c] * probs[i, c].log().item() for i in range(3) for c in range(7)) / 3
    assert all(sum(row) == pytest.approx(1, abs=1e-6) for row in smooth)
    loss = train_step(
        network, make_optimizer("adamw", network), images, targets, 0.0, 0.05, 0.1, HERE
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_all_weights_move_in_one_step():
    """Fine-tuning is of the backbone too, with one learning rate for all layers: AdamW's first step
    is lr each.
    """
    network = small_network()
    before = {name: param.detach().clone() for name, param in network.named_parameters()}
    optimizer = make_optimizer("adamw", network)
    for _ in range(
        2
    ):  # the positions' and the keys' first gradients may be 0 where the classifier starts small
        train_step(
            network, optimizer, torch.randn(5, 3, 24, 24), torch.eye(5, 7), 0.01, 0.0, 0.1, HERE
        )
    still = [name for name, param in network.named_parameters() if torch.equal(param, before[name])]
    assert not still, f"these did not learn: {still}"


def test_augmented_views_have_their_size_and_scale():
    view = augmentation(24, 0.3, 0.25, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    views = torch.stack(
        [view(torch.randint(256, (3, 29, 41), dtype=torch.uint8)) for _ in range(50)]
    )
    assert (
        views.shape == (50, 3, 24, 24) and views.dtype == torch.float32 and views.isfinite().all()
    )


def test_a_separable_set_is_learnt_and_read_by_the_loader_strictly(photos, tmp_path, capsys):
    line = run(photos, tmp_path, "--from_scratch", "--epochs", "6", "--fraction", "0.5", "1")
    assert line["measured"]["from scratch, top-1 %"] == 100, (
        "dark and bright are told apart in six epochs"
    )
    assert (
        "from scratch, 16 labels, top-1 %" in line["measured"]
        and (tmp_path / "0.5" / "checkpoint.pth").exists()
    )
    assert "32 images train, 8 test (every fifth image), 2 classes" in line["data"]
    for key in ("teacher", "student"):
        backbone, args = load_backbone(tmp_path / "checkpoint.pth", key)
        state = {
            name.removeprefix("backbone."): value for name, value in weights_of(tmp_path).items()
        }
        assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
        assert (args["arch"], args["patch_size"], args["eval_size"]) == ("vit_nano", 8, 24)


def test_from_scratch_the_paper_has_a_number_of_imagenet_alone():
    """Table 6's row "supervised" is trained on ImageNet; its other columns are fine-tuned from
    those weights. Of a folder with other classes there is none.
    """
    small = {"arch": "vit_small", "patch_size": 16}
    names = ("imagenet", "cifar10", "food101", "")
    scratch = [paper_number(small, "from scratch", name) for name in names]
    tuned = [paper_number(small, "fine-tuned", name) for name in names]
    assert scratch == [79.9, None, None, None]
    assert tuned == [81.5, 99.0, None, None]
    assert paper_number({"arch": "resnet50", "patch_size": 1}, "fine-tuned", "imagenet") is None


@pytest.mark.parametrize(
    ("start", "std"), [("--from_scratch", 0.02), ("--pretrained_weights x", 2e-4)]
)
def test_a_fine_tuned_classifier_starts_from_smaller_weights(start, std, monkeypatch, tmp_path):
    """The authors' departure from DeiT; from scratch it is DeiT's."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(transfer, "measure_transfer", lambda flags, world: seen.append(flags))
    transfer.main([*start.split(), "--device", "cpu"])
    assert seen[0].classifier_std == std
    network = Classifier(build_backbone("vit_nano", 8, 24), 1009, seen[0].classifier_std)
    assert network.classifier.weight.std().item() == pytest.approx(std, rel=0.05)


def test_the_embedded_images_have_a_recipe_without_mixing_and_others_have_deits(
    monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(transfer, "measure_transfer", lambda flags, world: seen.append(flags))
    transfer.main(["--from_scratch", "--device", "cpu"])
    transfer.main(["--from_scratch", "--data_path", "photos", "--device", "cpu"])
    found = [(one.mixup, one.cutmix, one.erasing, one.batch_size) for one in seen]
    assert found == [(0, 0, 0, 32), (0.8, 1.0, 0.25, 64)]


def test_fine_tuning_starts_from_the_weights_of_any_checkpoint(photos, tmp_path, capsys):
    """At learning rate 1e-12 the backbone stays what it was, whatever grid its positions were
    learnt on.
    """
    backbone = build_backbone("vit_nano", 8, 32, num_heads=2, init_std=0.1)
    torch.save(
        {
            "teacher": {f"backbone.{name}": value for name, value in backbone.state_dict().items()},
            "args": {"num_heads": 2},
        },
        tmp_path / "weights.pth",
    )
    run(
        photos,
        tmp_path,
        "--pretrained_weights",
        str(tmp_path / "weights.pth"),
        "--lr",
        "1e-12",
        "--epochs",
        "1",
        "--patch_size",
        "0",
        "--num_heads",
        "0",
        "--init_std",
        "0",
    )
    assert load_backbone(tmp_path / "checkpoint.pth")[0].blocks[0].attn.num_heads == 2, (
        "no weight's shape tells these"
    )
    tuned = weights_of(tmp_path)
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(tuned[f"backbone.{name}"], value)


def test_weights_that_say_no_size_of_the_view_keep_the_releases_on_few_images_too(photos):
    """A fresh network on few images has the recipe for photographs instead."""
    flags = SimpleNamespace(
        data_path=str(photos), dataset="", eval_size=0, train_size=0,
        arch="", patch_size=0, num_heads=0, init_std=0,
    )
    start = build_backbone("vit_nano", 8, 32), {"arch": "vit_nano", "patch_size": 8}
    tuned = transfer.network_flags(flags, start)
    assert (tuned["eval_size"], tuned["init_std"]) == (224, 0.02)
    fresh = transfer.network_flags(flags, None)
    assert (fresh["arch"], fresh["eval_size"]) == ("vit_nano", 72)


def test_a_convnet_is_trained_too(photos, tmp_path, capsys):
    run(
        photos,
        tmp_path,
        "--from_scratch",
        "--arch",
        "resnet18",
        "--eval_size",
        "32",
        "--epochs",
        "1",
    )
    backbone, args = load_backbone(tmp_path / "checkpoint.pth")
    assert args["arch"] == "resnet18" and backbone.bn1.running_mean.abs().sum() > 0, (
        "its statistics must be kept"
    )


def test_the_same_seed_trains_the_same_network_whatever_the_workers(photos, tmp_path, capsys):
    """Mixing, augmentation and dropped paths are functions of (seed, epoch, image) and (seed,
    step).
    """
    run(photos, tmp_path / "once", "--from_scratch")
    run(photos, tmp_path / "again", "--from_scratch", "--num_workers", "2")
    once, again = weights_of(tmp_path / "once"), weights_of(tmp_path / "again")
    assert all(torch.equal(value, again[name]) for name, value in once.items()), (
        "not bit for bit the same"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--from_scratch --pretrained_weights x.pth", "--from_scratch takes no weights"),
        ("--patch_size 0 --init_std 0", "give the weights"),
        (
            "--pretrained_weights x.pth --init_std 0.07",
            "--init_std is for --from_scratch",
        ),
        (
            "--from_scratch --fraction 0.5 1.5",
            "--fraction [0.5, 1.5] must be above 0 and at most 1",
        ),
        (
            "--from_scratch --warmup_epochs 4",
            "--warmup_epochs 4.0 must be at least 0 and at most --epochs 3",
        ),
        (
            "--from_scratch --train_size 20",
            "--train_size 20 must be a multiple of the patch size 8",
        ),
        ("--from_scratch --arch vit_giant", "--arch vit_giant is unknown"),
        ("--from_scratch --batch_size 1", "--batch_size 1"),
        ("--from_scratch --data_path {photos}/dark", "has no labels"),
        (
            "--from_scratch --dataset stanford_cars --download",
            "--dataset stanford_cars is not under",
        ),
        ("--from_scratch --dataset imagenet", "--dataset imagenet is not under"),
    ],
)
def test_bad_input_is_one_line(photos, tmp_path, capsys, flags, said):
    given = flags.format(photos=photos).split()
    where = [] if "data_path" in flags else ["--data_path", photos]
    assert said in error_of(transfer.main, capsys, *TINY, "--output_dir", tmp_path, *where, *given)


def test_a_checkpoint_is_not_overwritten(photos, tmp_path, capsys):
    torch.save({"student": {}, "teacher": {}, "epoch": 1, "args": {}}, tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    assert "choose another --output_dir" in error_of(
        transfer.main,
        capsys,
        *TINY,
        "--data_path",
        photos,
        "--output_dir",
        tmp_path,
        "--from_scratch",
    )
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def stop_after(epochs: int, monkeypatch) -> None:
    """Ctrl-C comes right after so many epochs are saved."""
    save = transfer.save_training

    def save_and_stop(path, network, optimizer, epoch, *more) -> None:
        save(path, network, optimizer, epoch, *more)
        if epoch == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "save_training", save_and_stop)


def test_a_stopped_training_continues_to_the_same_weights(photos, tmp_path, capsys, monkeypatch):
    """Bit for bit: AdamW's moments, the schedule, mixing, crops and dropped paths go on."""
    fractions = ("--fraction", "0.5", "1")
    whole = run(photos, tmp_path / "whole", "--from_scratch", *fractions)
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        for _ in range(2):  # in the first fraction, and then in the second
            with pytest.raises(SystemExit):
                run(photos, tmp_path / "stopped", "--from_scratch", *fractions)
            patched.undo()
            stop_after(2, patched)
    assert not (tmp_path / "stopped" / "results.jsonl").exists()
    continued = run(photos, tmp_path / "stopped", "--from_scratch", *fractions)
    assert "after 2 of 3 epochs" in capsys.readouterr().out
    assert continued["measured"] == whole["measured"]
    for folder in (".", "0.5"):
        weights = weights_of(tmp_path / "stopped" / folder)
        for name, value in weights_of(tmp_path / "whole" / folder).items():
            assert torch.equal(weights[name], value), f"{name} is not bit for bit the same"


def test_a_stop_before_the_first_epoch_leaves_nothing_in_the_way(
    photos, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(transfer, "cosine", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run(photos, tmp_path, "--from_scratch")
    assert run(photos, tmp_path, "--from_scratch")["measured"]


def test_a_finished_training_is_measured_again_without_a_step(photos, tmp_path, capsys):
    """As after a stop between the last epoch and its numbers; another device may do it."""
    first = run(photos, tmp_path, "--from_scratch", "--epochs", "1")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    again = run(photos, tmp_path, "--from_scratch", "--epochs", "1", "--num_workers", "1")
    assert again["measured"] == first["measured"]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("flag", ["epochs", "lr", "seed", "batch_size", "mixup"])
def test_a_training_is_not_continued_with_other_flags(flag, photos, tmp_path, capsys):
    run(photos, tmp_path, "--from_scratch", "--epochs", "1", "--warmup_epochs", "0")
    capsys.readouterr()
    here = ("--data_path", photos, "--output_dir", tmp_path, "--from_scratch", "--epochs", "1")
    error = error_of(transfer.main, capsys, *TINY, *here, "--warmup_epochs", "0", f"--{flag}", "2")
    assert f"was made with --{flag} " in error and "choose another --output_dir" in error


def test_a_training_continues_however_its_folder_is_written(photos, tmp_path, capsys, monkeypatch):
    short = ("--epochs", "1", "--warmup_epochs", "0", "--from_scratch")
    monkeypatch.chdir(photos.parent)
    run(Path(photos.name), tmp_path, *short)
    for way in (f"{photos.name}/", f"./{photos.name}", str(photos)):
        run(photos, tmp_path, *short, "--data_path", way)
        assert "after 1 of 1 epochs" in capsys.readouterr().out
    other = write_photos(tmp_path / "other")
    here = (*TINY, *short, "--output_dir", tmp_path, "--data_path", other)
    assert "was made with --data_path " in error_of(transfer.main, capsys, *here)


@pytest.mark.parametrize("value", [torch.tensor([float("nan")]), torch.zeros(3, dtype=torch.int)])
def test_averages_that_do_not_fit_are_one_line(value, photos, tmp_path, capsys):
    """As where train.py continues."""
    short = ("--epochs", "1", "--warmup_epochs", "0", "--from_scratch")
    run(photos, tmp_path, *short)
    path = tmp_path / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    saved["optimizer"]["state"][0]["exp_avg"] = value
    torch.save(saved, path)
    here = (*TINY, *short, "--output_dir", tmp_path, "--data_path", photos)
    error = error_of(transfer.main, capsys, *here)
    assert str(path) in error and "choose another --output_dir" in error


def test_each_fraction_has_a_checkpoint_of_its_own():
    """However near they are: 1/3 with seven and with eight digits are other images."""
    flags = Namespace(output_dir="out")
    fractions = (1.0, 0.5, 0.3333333, 0.33333339)
    found = [transfer.checkpoint_path(flags, fraction).parent.as_posix() for fraction in fractions]
    assert found == ["out", "out/0.5", "out/0.3333333", "out/0.33333339"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_trainings_do_not_write_to_one_folder(photos, tmp_path):
    """The other one is another process, since a process may lock its own file twice."""
    holds = (
        "import sys; from pathlib import Path; import torch\n"
        "from runtime.hardware import World; from training.run_state import claimed\n"
        "with claimed(Path(sys.argv[1]), World(0, 1, torch.device('cpu'), torch.float32)):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(transfer.__file__).parent.parent,
    )
    with other:
        other.stdout.readline()
        with pytest.raises(SystemExit):
            run(photos, tmp_path, "--from_scratch")
        assert not (tmp_path / "checkpoint.pth").exists()
