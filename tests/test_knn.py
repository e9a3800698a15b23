"""The k-NN vote of Table 2, against brute force, and features shared over processes."""
import json
import math

import pytest
import torch
from test_bad_input import error_of

import eval_knn
from data import Images
from eval_knn import LabelledFeatures, knn_accuracies, knn_votes, nearest_neighbours, right_answers
from features import EvaluationView, Pixels, extract_features, normalise, top_accuracy
from runtime.hardware import World
from training.checkpoint import save_checkpoint

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
        expected = [sum(math.exp(cosines[j] / 0.07) for j in nearest if j % 3 == c) for c in range(3)]
        torch.testing.assert_close(votes[i] / votes[i].sum(), torch.tensor(expected) / sum(expected),
                                   check_dtype=False, msg="each neighbour must vote with exp(cosine / 0.07)")


def test_nearer_images_outvote_more_images():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    votes = vote(train, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]]), 2, k=3)
    assert votes[0, 0] > votes[0, 1], "one near image must outvote two far ones: weigh the votes"


def test_at_a_low_temperature_the_nearest_image_decides():
    """lim T -> 0 of the softmax of cosine / T; exp((cosine - 1) / T) itself is 0 in fp32 for cosines like these."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(31, 53, generator=generator), torch.randn(7, 53, generator=generator)
    cosines, nearest = nearest_neighbours(train, test, 11)
    votes = knn_votes(cosines, nearest, 31, temperature=0.001)
    assert cosines.max() < 0.6, "the cosines were meant to be far below 1"
    torch.testing.assert_close(votes.argmax(dim=1), nearest[:, 0], msg="each image is a class of its own, so the "
                               "nearest must win: take each row's largest cosine off before the exponential")


def test_more_neighbours_than_images_are_all_images_and_any_number_is_asked():
    votes = vote(torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.randn(2003, 5), 13)
    assert votes.shape == (2003, 13) and (votes[:, 3:] == 0).all()


def test_top_accuracy_is_a_share_in_percent():
    votes = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [3.0, 1.0, 2.0]])
    labels = torch.tensor([0, 1, 0, 1])
    assert top_accuracy(votes, labels) == 50.0 and top_accuracy(votes, labels, k=2) == 75.0
    assert top_accuracy(votes, labels, k=5) == 100.0


def test_the_shares_of_the_images_asked_add_up_to_the_accuracies_of_all():
    """Accuracy = 100 sum over the processes of the right answers to their share / n; a share may be empty."""
    generator = torch.Generator().manual_seed(0)
    data = LabelledFeatures(torch.randn(101, 5, generator=generator), torch.arange(101) % 7,
                            torch.randn(2003, 5, generator=generator), torch.arange(2003) % 7)
    shares = torch.arange(2003).split([1201, 0, 802])
    right = sum(right_answers(data, share, (3, 20), 0.07) for share in shares)
    cosines, nearest = nearest_neighbours(data.train_features, data.test_features, 20)
    for (k, measured), counted in zip(knn_accuracies(data, (3, 20)).items(), right.tolist()):
        votes = knn_votes(cosines[:, :k], data.train_labels[nearest[:, :k]], 7)
        expected = [top_accuracy(votes, data.test_labels, among) for among in (1, 5)]
        assert measured == pytest.approx(expected), "sharing and cutting into parts must change nothing"
        assert [100 * one / 2003 for one in counted] == pytest.approx(expected)


def test_the_evaluation_view_is_a_resized_centre_crop_for_any_shape():
    view = EvaluationView(size=56, crop=0.875, mean=(0, 0, 0), std=(1, 1, 1))
    ramp = torch.arange(128, dtype=torch.uint8).expand(3, 64, 128)
    seen = view(ramp)
    assert seen.shape == (3, 56, 56)
    assert (seen[0, 0, [0, -1]] * 255).tolist() == pytest.approx([36, 91])  # the middle 56 of 128 columns
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
    features = extract_features(network, Images(images), EvaluationView(4, 1.0, (0, 0, 0), (1, 1, 1)), HERE)
    assert features.eq(1).all() and network.training


@pytest.mark.parametrize("side", [32, 224])
def test_raw_pixels_are_a_feature_of_bounded_width(side):
    assert Pixels()(torch.rand(2, 3, side, side)).shape == (2, 3 * min(side, 64) ** 2)


def test_features_that_were_kept_vote_again_without_weights_or_images(tmp_path, capsys):
    """And the results still tell whose features they are."""
    features = LabelledFeatures(torch.randn(31, 5), torch.arange(31) % 3, torch.randn(7, 5), torch.arange(7) % 3)
    save_checkpoint(tmp_path / "features.pth", {"features": {"vit_small": features._asdict()}, "data": "made up",
                                                "args": {"arch": "vit_small", "patch_size": 16}, "weights": "mine.pth"})
    kept, again = ["--dump_features", tmp_path / "again.pth"], ["--load_features", tmp_path / "again.pth"]
    for flags in ["--load_features", tmp_path / "features.pth", *kept], again:
        eval_knn.main([str(flag) for flag in (*flags, "--nb_knn", 20, "--results", tmp_path / "results.jsonl")])
        line = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
        expected = knn_accuracies(features)[20][0]
        assert line["measured"]["vit_small, k = 20, top-1 %"] == pytest.approx(expected, abs=1e-3)
        assert line["paper"] == {"vit_small, k = 20, top-1 %": 74.5} and line["data"] == "made up"
        assert line["weights"] == "mine.pth", "the file must say whose features it keeps"
    assert "74.5" in capsys.readouterr().out, "the table must show the paper's number beside ours"


@pytest.mark.parametrize("wrong", [{"features": {}}, {"args": {"patch_size": 16}}, {"args": {}}, {"features": [1]},
                                   {"features": {"vit_small": {"train_features": torch.randn(3, 5)}}}])
def test_a_file_of_something_else_is_no_kept_features(tmp_path, capsys, wrong):
    one = {"train_features": torch.randn(3, 5), "train_labels": torch.arange(3),
           "test_features": torch.randn(2, 5), "test_labels": torch.arange(2)}
    good = {"features": {"vit_small": one}, "args": {"arch": "vit_small", "patch_size": 16}, "data": "", "weights": ""}
    save_checkpoint(tmp_path / "features.pth", good | wrong)
    said = error_of(eval_knn.main, capsys, "--load_features", tmp_path / "features.pth")
    assert "features.pth' was not written by --dump_features" in said
