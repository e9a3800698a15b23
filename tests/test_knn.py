"""The k-NN vote of Table 2, against brute force, and features shared over processes."""

import json
import math
from argparse import Namespace

import pytest
import torch
from PIL import Image
from test_bad_input import error_of

import eval_knn
from data import Images
from features import (
    EvaluationView,
    LabelledFeatures,
    Pixels,
    count_right,
    extract_features,
    knn_accuracies,
    knn_votes,
    nearest_neighbours,
    normalise,
    top_accuracy,
)
from runtime.hardware import World
from training import evaluation
from training.backbone import build_backbone

HERE = World(0, 1, torch.device("cpu"), torch.float32)


def vote(train, labels, test, num_classes: int, k: int = 20) -> torch.Tensor:
    cosines, nearest = nearest_neighbours(train, test, k)
    return knn_votes(cosines, labels[nearest], num_classes)


def test_votes_are_weighted_by_the_exponential_of_the_cosine():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(31, 5, generator=generator), torch.randn(7, 5, generator=generator)
    labels = torch.arange(31) % 3
    votes = vote(train, labels, test, 3, k=11)
    for i in range(7):
        cosines = [torch.cosine_similarity(test[i], train[j], dim=0).item() for j in range(31)]
        nearest = sorted(range(31), key=lambda j: -cosines[j])[:11]
        expected = [
            sum(math.exp(cosines[j] / 0.07) for j in nearest if j % 3 == c) for c in range(3)
        ]
        torch.testing.assert_close(
            votes[i] / votes[i].sum(),
            torch.tensor(expected) / sum(expected),
            check_dtype=False,
            msg="each neighbour must vote with exp(cosine / 0.07)",
        )


def test_nearer_images_outvote_more_images():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    votes = vote(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]]), 2, k=3)
    assert votes[0, 0] > votes[0, 1], "one near image must outvote two far ones: weigh the votes"


def test_at_a_low_temperature_the_nearest_image_decides():
    """lim T -> 0 of the softmax of cosine / T; exp((cosine - 1) / T) itself is 0 in fp32 for
    cosines like these.
    """
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(31, 53, generator=generator), torch.randn(7, 53, generator=generator)
    cosines, nearest = nearest_neighbours(train, test, 11)
    votes = knn_votes(cosines, nearest, 31, temperature=0.001)
    assert cosines.max() < 0.6, "the cosines were meant to be far below 1"
    torch.testing.assert_close(
        votes.argmax(dim=1),
        nearest[:, 0],
        msg="each image is a class of its own, so the "
        "nearest must win: take each row's largest cosine off before the exponential",
    )


def test_more_neighbours_than_images_are_all_images_and_any_number_is_tested():
    votes = vote(torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.randn(2003, 5), 13)
    assert votes.shape == (2003, 13) and (votes[:, 3:] == 0).all()


def test_top_accuracy_is_a_percentage():
    votes = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [3.0, 1.0, 2.0]])
    labels = torch.tensor([0, 1, 0, 1])
    assert top_accuracy(votes, labels) == 50.0 and top_accuracy(votes, labels, k=2) == 75.0
    assert top_accuracy(votes, labels, k=5) == 100.0


def test_the_parts_of_the_test_images_add_up_to_the_accuracies_of_all():
    """Accuracy = 100 sum over the processes of the right answers to their part / n; a part may be
    empty.
    """
    generator = torch.Generator().manual_seed(0)
    data = LabelledFeatures(
        torch.randn(101, 5, generator=generator),
        torch.arange(101) % 7,
        torch.randn(2003, 5, generator=generator),
        torch.arange(2003) % 7,
    )
    parts = torch.arange(2003).split([1201, 0, 802])
    right = sum(count_right(data, part, (3, 20), 0.07) for part in parts)
    cosines, nearest = nearest_neighbours(data.train_features, data.test_features, 20)
    for (k, measured), counted in zip(knn_accuracies(data, (3, 20)).items(), right.tolist()):
        votes = knn_votes(cosines[:, :k], data.train_labels[nearest[:, :k]], 7)
        votes[votes == 0] = -1.0  # no neighbour has the class: it is no candidate
        candidates = votes.topk(5).values > 0
        top5 = (votes.topk(5).indices == data.test_labels[:, None]) & candidates
        top5 = 100 * top5.any(dim=1).float().mean().item()
        expected = [top_accuracy(votes, data.test_labels), top5]
        assert measured == pytest.approx(expected), (
            "sharing and cutting into parts must change nothing"
        )
        assert [100 * one / 2003 for one in counted] == pytest.approx(expected)


def test_the_evaluation_view_is_a_resized_centre_crop_for_any_shape():
    view = EvaluationView(size=56, crop=0.875, mean=(0, 0, 0), std=(1, 1, 1))
    ramp = torch.arange(128, dtype=torch.uint8).expand(3, 64, 128)
    seen = view(ramp)
    assert seen.shape == (3, 56, 56)
    assert (seen[0, 0, [0, -1]] * 255).tolist() == pytest.approx(
        [36, 91]
    )  # the middle 56 of 128 columns
    assert view(torch.zeros(3, 7, 300, dtype=torch.uint8)).shape == (3, 56, 56)


def test_pixels_are_normalised_colour_by_colour():
    """(x / 255 - mean) / std, at 0 and at 255, of any shape."""
    image = torch.tensor([0, 255], dtype=torch.uint8).expand(3, 5, 2)
    seen = normalise(image, (0.5, 0.4, 0.3), (0.1, 0.2, 0.5))
    torch.testing.assert_close(seen[:, 0], torch.tensor([[-5.0, 5.0], [-2.0, 3.0], [-0.6, 1.4]]))


def test_features_keep_the_images_order():
    images = torch.arange(13 * 3 * 8 * 8).view(13, 3, 8, 8).byte()
    view = EvaluationView(8, 1.0, (0, 0, 0), (1, 1, 1))
    features = extract_features(Pixels(), Images(images), view, HERE, batch_size=5)
    torch.testing.assert_close(features, images.flatten(1).float() / 255)


def test_features_are_taken_in_evaluation_mode_and_the_mode_is_given_back():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9)).train()
    images = torch.full((5, 3, 4, 4), 255, dtype=torch.uint8)
    features = extract_features(
        network, Images(images), EvaluationView(4, 1.0, (0, 0, 0), (1, 1, 1)), HERE
    )
    assert features.eq(1).all() and network.training


@pytest.mark.parametrize("side", [32, 224])
def test_raw_pixels_are_a_feature_of_bounded_width(side):
    assert Pixels()(torch.rand(2, 3, side, side)).shape == (2, 3 * min(side, 64) ** 2)


def write_flat_photos(folder):
    """Twelve images in three classes, each of one brightness: pixels tell them apart."""
    for i in range(12):
        path = folder / "abc"[i % 3] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (17, 13), (90 * (i % 3) + i,) * 3).save(path)
    return folder


def test_features_are_kept_for_other_programs_and_vote_as_the_table_says(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(build_backbone("vit_nano", 8, 16).state_dict(), tmp_path / "weights.pth")
    flags = [
        "--pretrained_weights",
        tmp_path / "weights.pth",
        "--data_path",
        write_flat_photos(tmp_path / "photos"),
        "--eval_size",
        16,
        "--nb_knn",
        3,
        "--dump_features",
        tmp_path / "features.pth",
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--results",
        tmp_path / "results.jsonl",
    ]
    eval_knn.main([str(flag) for flag in flags])
    kept = torch.load(tmp_path / "features.pth", weights_only=True)
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert (
        "10 images train, 2 test (every fifth image), 3 classes, 16 pixels"
        in line["data"]
        == kept["data"]
    )
    assert kept["weights"] == line["weights"] and kept["args"]["arch"] == "vit_nano"
    for name in ("vit_nano", "untrained", "raw pixels"):
        accuracies = knn_accuracies(LabelledFeatures(**kept["features"][name]), (3,))[3]
        assert line["measured"][f"{name}, k = 3, top-1 %"] == pytest.approx(accuracies[0], abs=1e-3)
    assert "74.5 % on ImageNet" in capsys.readouterr().out, "the paper's number stands beside ours"


def test_the_paper_has_a_column_where_it_has_a_number(capsys):
    evaluation.print_table({"row": 13.7, "other": 5}, {"row": 41.8}, {})
    assert capsys.readouterr().out == (
        "          here   paper\nrow      13.70    41.8\nother     5.00       -\n"
    )
    evaluation.print_table({"row": 13.7, "other": 5}, {}, {})
    assert capsys.readouterr().out == "          here\nrow      13.70\nother     5.00\n"


def knn_flags(tmp_path, data_path) -> list[str]:
    torch.manual_seed(0)
    torch.save(build_backbone("vit_nano", 8, 16).state_dict(), tmp_path / "weights.pth")
    flags = ["--pretrained_weights", tmp_path / "weights.pth", "--data_path", data_path]
    flags += ["--eval_size", 16, "--device", "cpu", "--num_workers", 0]
    flags += ["--results", tmp_path / "results.jsonl"]
    return [str(flag) for flag in flags]


@pytest.mark.parametrize("layout", ["flat", "train and test", "few with labels", "labelled"])
def test_features_of_any_folder_are_kept_with_file_names(layout, tmp_path, capsys):
    photos = tmp_path / "photos"
    names = {
        "flat": ["a b.png", "c.png"],
        "train and test": ["train/1.png", "train/2.png", "test/3.png"],
        "few with labels": ["cat/1.png", "dog/2.png"],
        "labelled": [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(5)],
    }[layout]
    for number, name in enumerate(names):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (17, 13), (20 * number, 0, 90)).save(photos / name)
    kept = tmp_path / "features.pth"
    eval_knn.main([*knn_flags(tmp_path, photos), "--dump_features", str(kept)])
    kept = torch.load(kept, weights_only=True)
    features = LabelledFeatures(**kept["features"]["vit_nano"])
    files = kept["train_files"] + kept["test_files"]
    assert sorted(files) == sorted(str(photos / name) for name in names)
    assert len(features.train_features) == len(features.train_labels) == len(kept["train_files"])
    assert len(features.test_features) == len(features.test_labels) == len(kept["test_files"])
    assert (layout in ("flat", "train and test")) == bool((features.train_labels < 0).all())
    said = capsys.readouterr().out
    assert ("top-1" in said) == (layout == "labelled")
    assert ("written: " in said) == (layout != "labelled")


def test_without_labels_the_line_names_the_flag_that_needs_none(tmp_path, capsys):
    Image.new("RGB", (17, 13)).save(tmp_path / "a.png")
    said = error_of(eval_knn.main, capsys, *knn_flags(tmp_path, tmp_path))
    assert "has no labels" in said and "--dump_features needs none" in said


def test_an_evaluation_prints_what_is_left_out(tmp_path, capsys):
    photos = write_flat_photos(tmp_path / "photos")
    (photos / "a/notes.csv").write_text("1,2")
    (photos / "b/torn.png").write_bytes(b"torn")
    (photos / "d").mkdir()
    eval_knn.main([*knn_flags(tmp_path, photos), "--nb_knn", "3", "--skip_bad_images"])
    said = capsys.readouterr().out
    for line in ("no images in", "not read: 1 .csv", "skipped 1 images that cannot be read"):
        assert line in said
    assert "10 images train, 2 test (every fifth image), 3 classes" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--nb_knn 5 0", "--nb_knn [5, 0] must be at least 1"),
        ("--temperature 0", "--temperature 0.0 must be above 0"),
        ("--temperature nan", "--temperature nan must be finite"),
        ("--batch_size 0", "--batch_size 0 must be at least 1"),
    ],
)
def test_a_bad_flag_is_one_line_with_its_bound(flags, said, tmp_path, capsys):
    assert said in error_of(
        eval_knn.main, capsys, "--pretrained_weights", "x.pth", *flags.split(), "--device", "cpu"
    )


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, 74.5),
        ({"dataset": "flowers102"}, 89.1),
        ({"dataset": "cifar10"}, None),
        ({"temperature": 0.1}, None),
    ],
)
def test_the_paper_s_number_is_of_the_same_images_and_protocol(changes, number):
    flags = Namespace(**({"dataset": "imagenet", "temperature": 0.07} | changes))
    args = {"arch": "vit_small", "patch_size": 16}
    assert eval_knn.paper_number(flags, args, 1000, 224) == number
    assert eval_knn.paper_number(flags, args, 1000, 64) is None, "it is of 224 pixels"


def test_a_folder_with_other_than_1000_classes_is_not_imagenet():
    flags = Namespace(dataset="", temperature=0.07)
    args = {"arch": "vit_small", "patch_size": 16}
    assert eval_knn.paper_number(flags, args, 1000, 224) == 74.5
    assert eval_knn.paper_number(flags, args, 37, 224) is None
