"""Every metric against its plain form where data are few, alike, tied or empty."""

import math

import numpy as np
import pytest
import torch
from test_davis import naive_f
from test_linear import trained

from attention import jaccard, keep_mass, mass_on_object, object_scores
from evals.attention_segmentation import measure_network
from evals.davis import contour_accuracy, region_similarity
from evals.image_retrieval import same_class_scores
from evals.linear import accuracies
from evals.masked_images import MaskedImages
from evals.retrieval import average_precisions
from features import LabelledFeatures, knn_accuracies, top_accuracy
from runtime.hardware import World
from training.backbone import build_backbone

HERE = World(0, 1, torch.device("cpu"), torch.float32)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- k-NN


def plain_knn(data: LabelledFeatures, k: int) -> list[float]:
    """Top-1 and top-5 in % by loops; only classes with a vote are candidates."""
    right = [0, 0]
    for feature, label in zip(data.test_features, data.test_labels.tolist()):
        cosines = []
        for other in data.train_features:
            cosines.append(torch.cosine_similarity(feature.double(), other.double(), dim=0).item())
        nearest = sorted(range(len(cosines)), key=lambda j: -cosines[j])[:k]
        votes: dict[int, float] = {}
        for j in nearest:
            of = data.train_labels[j].item()
            votes[of] = votes.get(of, 0.0) + math.exp(cosines[j] / 0.07)
        ranking = sorted(votes, key=lambda of: -votes[of])
        right[0] += label in ranking[:1]
        right[1] += label in ranking[:5]
    return [100 * one / len(data.test_labels) for one in right]


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 13])
@pytest.mark.parametrize("images", [1, 2, 3, 7, 31])
def test_knn_of_few_images_neighbours_and_classes_is_that_of_plain_loops(images, classes):
    data = LabelledFeatures(
        noise(images, 5, seed=images),
        torch.arange(images) % classes,
        noise(11, 5, seed=99),
        torch.arange(11) % classes,
    )
    for k, found in knn_accuracies(data, (1, 2, 3, 5, 20)).items():
        assert found == pytest.approx(plain_knn(data, k)), (
            f"k = {k}: a class that no neighbour voted for must not be among the first five"
        )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_knn_of_constant_features_gives_every_image_the_same_answer(value):
    """As after a collapse: top-1 is how often one class occurs, and not more."""
    data = LabelledFeatures(
        torch.full((30, 5), value),
        torch.arange(30) // 10,
        torch.full((12, 5), value),
        torch.arange(12) // 6,  # classes 0 and 1, six each
    )
    for k, (top1, top5) in knn_accuracies(data, (1, 5, 20)).items():
        assert top1 in (0.0, 50.0), f"k = {k}"
        assert top5 in (0.0, 50.0, 100.0) and top5 >= top1


def test_a_class_that_only_the_test_images_have_is_never_right():
    data = LabelledFeatures(
        noise(7, 5), torch.zeros(7).long(), noise(3, 5, seed=1), torch.tensor([0, 1, 6])
    )
    for found in knn_accuracies(data, (1, 7)).values():
        assert found == pytest.approx([100 / 3, 100 / 3])


# ---- top-k and the linear probe


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 6, 11])
def test_top_accuracies_of_few_classes_are_those_of_sorted_scores(classes):
    scores, labels = noise(13, classes, seed=classes), torch.arange(13) % classes
    for k in (1, 5):
        right = 0
        for row, label in zip(scores.tolist(), labels.tolist()):
            best = sorted(range(classes), key=lambda of: -row[of])[:k]
            right += label in best
        assert top_accuracy(scores, labels, k) == pytest.approx(100 * right / 13)


@pytest.mark.parametrize(
    ("features", "labels", "top1"),
    [
        (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [0, 1], 100.0),  # one image a class
        (torch.tensor([[1.0, 2.0]]), [0], 100.0),  # one image
        (noise(7, 3), [0] * 7, 100.0),  # one class
        (torch.ones(10, 3), [0, 0, 0, 0, 0, 0, 0, 1, 1, 2], 70.0),  # constant: the commonest class
        (torch.zeros(10, 3), [0, 0, 0, 0, 0, 0, 0, 1, 1, 2], 70.0),  # the bias alone
    ],
)
def test_the_linear_probe_of_few_or_constant_features(features, labels, top1):
    labels = torch.tensor(labels)
    classes = 1 + int(labels.max())
    heads = trained([1.0], [(features, labels)], epochs=50, classes=classes)
    ((found, top5),) = accuracies(heads, features, labels)
    assert found == pytest.approx(top1)
    assert top5 == 100, "with at most five classes each is among the first five"


# ---- average precision


def plain_ap(ranking: list[bool]) -> float:
    """The area under precision against recall, trapezoid by trapezoid."""
    area, hits = 0.0, 0
    for seen, relevant in enumerate(ranking):
        if relevant:
            before = hits / seen if seen else 1.0
            hits += 1
            area += (before + hits / (seen + 1)) / 2
    return area / hits if hits else math.nan


@pytest.mark.parametrize("images", [1, 2, 3, 5, 17])
def test_average_precisions_in_small_databases_are_those_of_plain_loops(images):
    queries, database = noise(7, 3, seed=images), noise(images, 3, seed=50)
    relevant = noise(7, images, seed=51) > 0.3
    junk = (noise(7, images, seed=52) > 0.5) & ~relevant
    found = average_precisions(queries, database, relevant, junk)
    for i in range(7):
        cosines = torch.cosine_similarity(queries[i : i + 1], database)
        order = sorted(range(images), key=lambda j: -cosines[j].item())
        expected = plain_ap([bool(relevant[i, j]) for j in order if not junk[i, j]])
        assert found[i].item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_features_rank_by_chance_though_the_images_stand_class_by_class(value):
    """Equal cosines: the order of the files must not answer. Chance is about 1/C."""
    classes, each = 10, 12
    labels = torch.arange(classes).repeat_interleave(each)
    found = same_class_scores(torch.full((classes * each, 3), value), labels)["mAP %"]
    rng = np.random.default_rng(0)
    chance = []
    for _ in range(300):
        others = rng.permutation(labels[1:].numpy()) == 0
        chance.append(100 * plain_ap(others.tolist()))
    assert found == pytest.approx(np.mean(chance), abs=3.0), (
        "a collapsed network must not profit from the order of the database"
    )


# ---- J, F, Jaccard, mass on the object


def small_masks(height: int, width: int) -> torch.Tensor:
    """An empty mask, a full one, one pixel in a corner, a line, and noise: bool (5, H, W)."""
    masks = torch.zeros(5, height, width, dtype=torch.bool)
    masks[1] = True
    masks[2, 0, 0] = True
    masks[3, height // 2] = True
    masks[4] = noise(height, width) > 0
    return masks


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (2, 2), (3, 7), (11, 5)])
def test_j_and_f_of_tiny_and_empty_masks_are_those_of_plain_loops(height, width):
    masks = small_masks(height, width)
    for mask in masks:
        for truth in masks:
            both, either = 0, 0
            for y in range(height):
                for x in range(width):
                    both += bool(mask[y, x]) and bool(truth[y, x])
                    either += bool(mask[y, x]) or bool(truth[y, x])
            region = region_similarity(mask[None], truth[None]).item()
            assert region == pytest.approx(both / either if either else 1.0)
            overlap = jaccard(mask, truth).item()
            assert overlap == pytest.approx(both / either if either else 0.0)
            outline = contour_accuracy(mask[None], truth[None]).item()
            assert outline == pytest.approx(naive_f(mask.numpy(), truth.numpy()), abs=1e-9)


@pytest.mark.parametrize("mass", [0.01, 0.3, 0.6, 0.8, 0.999, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (2, 5), (7, 3)])
def test_kept_patches_are_the_heaviest_and_the_fewest_also_where_all_are_equal(
    mass, rows, columns
):
    for attention in (torch.ones(1, rows, columns), noise(3, rows, columns).exp()):
        for weights, kept in zip(attention, keep_mass(attention, mass)):
            share = (weights / weights.sum()).flatten()
            kept = kept.flatten()
            assert share[kept].sum() >= mass - 1e-5
            assert share[kept].sum() - share[kept].min() < mass + 1e-5, "one patch too many"
            assert (share[kept].min() >= share[~kept]).all()


@pytest.mark.parametrize(("rows", "columns", "patch"), [(1, 1, 1), (1, 3, 2), (2, 2, 4), (3, 2, 5)])
def test_mass_on_object_is_that_of_a_loop_over_pixels(rows, columns, patch):
    attention = noise(5, 2, rows, columns).exp()
    masks = small_masks(rows * patch, columns * patch)
    found = mass_on_object(attention, masks)
    for image in range(5):
        for head in range(2):
            on = 0.0
            for y in range(rows * patch):
                for x in range(columns * patch):
                    if masks[image, y, x]:
                        on += attention[image, head, y // patch, x // patch].item() / patch**2
            expected = on / attention[image, head].sum().item()
            assert found[image, head].item() == pytest.approx(expected, rel=1e-4)
    assert found[0].eq(0).all() and found[1].allclose(torch.ones(2)), "empty: 0, full: 1"


def test_a_map_without_mass_has_none_on_the_object():
    """In fp16 all of [CLS]'s attention may lie on [CLS]; a mean over images must stay a number."""
    nothing = torch.zeros(1, 2, 3, 3)
    assert mass_on_object(nothing, torch.ones(1, 6, 6).bool()).eq(0).all()
    assert not keep_mass(nothing, 0.6).any()


def test_an_object_without_pixels_does_not_count(monkeypatch):
    """As a pet whose trimap has no inside: the image is left out, not scored 0."""
    torch.manual_seed(0)
    network = build_backbone("vit_nano", 8, 16, init_std=0.2).eval()
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    objects = torch.zeros(2, 16, 16, dtype=torch.bool)
    objects[0, 3:11, 2:9] = True
    void = torch.zeros(16, 16, dtype=torch.bool)
    one = (image, objects[:1], void)
    flags = type("Flags", (), {"num_workers": 0})
    wanted = measure_network(network, {}, MaskedImages([one], tuple), 16, [60], flags, HERE)
    items = [one, (image, objects[1:], void), (image, objects, void)]
    found = measure_network(network, {}, MaskedImages(items, tuple), 16, [60], flags, HERE)
    for name, values in wanted.values.items():
        assert found.values[name].tolist() == pytest.approx(2 * values.tolist()), name
    assert (found.images, found.objects) == (2, 2)


def test_scores_of_a_constant_map_are_those_of_the_kept_patches():
    maps = torch.ones(1, 2, 2)
    objects = torch.ones(1, 4, 4, dtype=torch.bool)
    scores = object_scores(maps, objects, torch.zeros(4, 4, dtype=torch.bool), (75,))
    assert scores["jaccard_best_head_75"] == pytest.approx(75.0)
    assert scores["mass_on_object"] == pytest.approx(1.0)
