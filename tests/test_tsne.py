"""Fig. 11: class means and points by hand, the figure, and the line without scikit-learn."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evals import tsne
from training.backbone import build_backbone


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(build_backbone("vit_nano", 8, 16, init_std=0.2).state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of seven images."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(7):
            pixels = rng.integers(0, 256, (17, 19, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def run(tmp_path: Path, *flags) -> None:
    fixed = ("--eval_size", 16, "--device", "cpu", "--output_dir", tmp_path / "out")
    tsne.main([str(flag) for flag in (*fixed, *flags)])


def error_of(capsys, tmp_path: Path, *flags) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_class_is_the_mean_of_its_features():
    features = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0]])
    means = tsne.class_means(features, torch.tensor([4, 4, 0]))
    assert means.tolist() == [[5, 7], [2, 4]]


def test_clusters_of_directions_stay_together_in_the_plane():
    """Lengths do not count: each cluster has features of all lengths."""
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3).repeat_interleave(11, dim=0)
    features = directions + 0.05 * torch.randn(33, 3, generator=generator)
    features = features * torch.rand(33, 1, generator=generator).add(0.1)
    places = tsne.to_plane(tsne.load_tsne(), features, seed=0)
    nearest = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(dim=1)
    assert torch.equal(nearest // 11, torch.arange(33) // 11)


class Recorder:
    """Stands for scikit-learn's TSNE: keeps what it gets, and returns two of the numbers."""

    def __init__(self, **settings):
        Recorder.settings = settings

    def fit_transform(self, features: np.ndarray) -> np.ndarray:
        Recorder.features = features
        return features[:, :2]


def test_the_values_are_the_papers():
    """PCA to 30, perplexity 20, learning rate 200, 5,000 iterations; fewer points, fewer of each.

    The 30 are the directions of the largest variance: all is kept of features that have no others.
    """
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(101, 23, generator=generator) @ torch.randn(23, 67, generator=generator)
    tsne.to_plane(Recorder, wide, seed=0)
    assert Recorder.features.shape == (101, 30)
    expected = {"perplexity": 20, "learning_rate": 200, "max_iter": 5000}
    assert Recorder.settings.items() >= expected.items()
    directions = torch.nn.functional.normalize(wide, dim=1)
    torch.testing.assert_close(
        torch.cdist(torch.from_numpy(Recorder.features), torch.from_numpy(Recorder.features)),
        torch.cdist(directions, directions), atol=1e-3, rtol=0,
    )
    tsne.to_plane(Recorder, wide[:7], seed=0)
    assert Recorder.features.shape == (7, 7) and Recorder.settings["perplexity"] == 2


@pytest.mark.parametrize(("many", "points"), [(100, "21 images"), (2, "3 classes")])
def test_the_figure_has_images_or_the_means_of_many_classes(
    weights, photos, tmp_path, capsys, monkeypatch, many, points
):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(tsne, "MANY_CLASSES", many)
    if many == 2:
        for i in range(7):  # a fourth class: t-SNE wants a few points
            (photos / "dog").mkdir(exist_ok=True)
            (photos / "cat" / f"{i}.png").rename(photos / "dog" / f"{i}.png")
            Image.new("RGB", (17, 19), (i, 0, 0)).save(photos / "cat" / f"{i}.png")
        points = "4 classes"
    run(tmp_path, "--pretrained_weights", weights, "--data_path", photos, "--thumbnails")
    assert points in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "tsne.png") as figure:
        assert figure.width > figure.height > 500


def test_what_is_missing_is_one_line(weights, photos, tmp_path, capsys, monkeypatch):
    flags = ("--pretrained_weights", weights, "--data_path")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert "pip install scikit-learn" in error_of(capsys, tmp_path, *flags, photos)
    old = SimpleNamespace(TSNE=lambda n_iter=1000: None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", old)
    assert "scikit-learn 1.5 or newer" in error_of(capsys, tmp_path, *flags, photos)
    monkeypatch.setattr(tsne, "load_tsne", lambda: None)
    assert "has no labels" in error_of(capsys, tmp_path, *flags, photos / "ant")
    assert "--most 3" in error_of(capsys, tmp_path, *flags, photos, "--most", 3)
    monkeypatch.setattr(tsne, "MOST_THUMBNAILS", 20)
    monkeypatch.setattr(tsne, "extract_features", None)  # refused before the long part
    assert "--most 20" in error_of(capsys, tmp_path, *flags, photos, "--thumbnails")
    monkeypatch.setattr(tsne, "MANY_CLASSES", 2)
    monkeypatch.setattr(tsne, "MOST_THUMBNAILS", 2)
    said = error_of(capsys, tmp_path, *flags, photos, "--thumbnails")
    assert "3 thumbnails" in said and "--most" not in said, "which changes no number of classes"
