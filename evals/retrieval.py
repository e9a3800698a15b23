"""Ranking images by frozen features (Sec. 4.2.1, Tables 3 and 4): average precision, several scales, GeM, whitening.

Images stand in the order of their cosine with the query. Average precision is the area under precision against
recall by the trapezoidal rule, as the benchmarks' own programs take it, not the mean of the precisions. Whitening
drops the directions in which its images do not vary; the release raises their variance to a floor.

Shapes: q queries, n images in the database, m images that whitening is learnt on, N patches, D width.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.commandline import InputError


def average_precision(relevant: Tensor, junk: Tensor) -> Tensor:
    """Two (n,) bool in the order of the ranking -> scalar in 0 ... 1, NaN where nothing is relevant.

    AP = 1/P sum over j < P of (j / r_j + (j + 1) / (r_j + 1)) / 2, with r_j images before the relevant one number j,
    junk not counted; 0 / 0 is 1.
    """
    r = relevant[~junk].nonzero().squeeze(1).double()
    j = torch.arange(len(r))
    before = torch.where(r > 0, j / r.clamp(min=1), 1.0)
    return ((before + (j + 1) / (r + 1)) / 2).mean()


def average_precisions(queries: Tensor, database: Tensor, relevant: Tensor, junk: Tensor | None = None) -> Tensor:
    """Each query's AP: features (q, D) and (n, D), two (q, n) bool -> (q,), NaN where nothing is relevant."""
    junk = torch.zeros_like(relevant) if junk is None else junk
    order = (F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T).argsort(dim=1, descending=True, stable=True)
    return torch.stack([average_precision(good[ranking], bad[ranking])
                        for good, bad, ranking in zip(relevant, junk, order)])


class MultiScale(nn.Module):
    """The network's features, averaged over the scales: (B, 3, H, W) -> (B, D), l2-normalised.

    Sides are rounded to whole patches; release: the rest of a side is cut off. As there, the features are averaged as
    they come and normalised at the end.
    """

    def __init__(self, network: nn.Module, patch_size: int, scales: tuple[float, ...] = (1, 2 ** -0.5, 0.5)):
        super().__init__()
        self.network, self.patch_size, self.scales = network, patch_size, scales

    def forward(self, images: Tensor) -> Tensor:
        features = [self.network(self.resized(images, scale)) for scale in self.scales]
        return F.normalize(torch.stack(features).float().mean(dim=0), dim=1)

    def resized(self, images: Tensor, scale: float) -> Tensor:
        size = [max(1, round(side * scale / self.patch_size)) * self.patch_size for side in images.shape[-2:]]
        return images if scale == 1 else F.interpolate(images, size, mode="bilinear")


def gem(tokens: Tensor, p: float = 4) -> Tensor:
    """Generalised mean of each number over the patches, (1/N sum x^p)^(1/p) of x >= 1e-6: (B, N, D) -> (B, D)."""
    return tokens.clamp(min=1e-6).pow(p).mean(dim=1).pow(1 / p)


class Whitening(NamedTuple):
    """x -> (x - mean) matrix: mean (D,) and matrix (D, d), where d <= D directions were kept."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(n, D) -> (n, d)."""
        return (features.double() - self.mean) @ self.matrix


def learn_whitening(features: Tensor, floor: float = 1e-5) -> Whitening:
    """PCA whitening: afterwards these features have mean 0 and covariance 1; (m, D) on the CPU -> Whitening in float64.

    Directions with less than `floor` of the largest variance are dropped, all but m - 1 at least.
    """
    mean = features.double().mean(dim=0)
    _, deviations, directions = torch.linalg.svd(features.double() - mean, full_matrices=False)
    if not deviations[0] > 0:
        raise InputError("the images to learn the whitening on all look alike: give others")
    kept = deviations.square() > floor * deviations[0].square()  # deviations are the singular values: they fall
    return Whitening(mean, directions[kept].T / deviations[kept] * len(features) ** 0.5)
