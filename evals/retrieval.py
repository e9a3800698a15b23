"""Ranking images by frozen features (Sec. 4.2.1, Tables 3 and 4).

Average precision, features at several scales, GeM, whitening. Images are ranked by their cosine
with the query. Average precision is the area under precision against recall by the trapezoidal
rule, as the benchmarks' own programs take it, not the mean of the precisions. Precision at k, mP@k,
is as there too.

Shapes: q queries, n images in the database, m images that whitening is learnt on, N patches, D
width.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.commandline import InputError


def average_precision(relevant: Tensor, junk: Tensor) -> Tensor:
    """Return AP of one ranking in 0 ... 1, NaN where nothing is relevant.

    AP = 1/P sum over j < P of (j / r_j + (j + 1) / (r_j + 1)) / 2, where r_j images stand before
    the relevant one number j; 0 / 0 is 1. Both arguments: bool (n,), in the order of the ranking.
    """
    r = relevant[~junk].nonzero().squeeze(1).double()  # junk is taken out, not counted wrong
    j = torch.arange(len(r))
    precision_before = torch.where(r > 0, j / r.clamp(min=1), 1.0)
    precision_after = (j + 1) / (r + 1)
    return ((precision_before + precision_after) / 2).mean()


def precision_at(relevant: Tensor, junk: Tensor, k: int) -> Tensor:
    """Return the fraction of relevant images among the first k, NaN where nothing is relevant.

    Official: if the last relevant image stands before place k, the ranking ends with it.
    Both arguments: bool (n,), in the order of the ranking.
    """
    ranking = relevant[~junk].double()
    places = ranking.nonzero().squeeze(1)
    if len(places) == 0:
        return torch.tensor(torch.nan, dtype=torch.double)
    last = int(places[-1]) + 1
    return ranking[: min(k, last)].mean()


def ranking_scores(
    queries: Tensor,
    database: Tensor,
    relevant: Tensor,
    junk: Tensor | None = None,
    ks: tuple[int, ...] = (),
) -> Tensor:
    """Return each query's AP and precisions at ks: -> (q, 1 + number of ks).

    features (q, D) and (n, D), relevant and junk bool (q, n).
    """
    if junk is None:
        junk = torch.zeros_like(relevant)
    # images of equal cosine must not stand in the order of the files, which is by class
    shuffled = torch.randperm(len(database), generator=torch.Generator().manual_seed(0))
    database = database[shuffled]
    relevant = relevant[:, shuffled]
    junk = junk[:, shuffled]
    cosines = F.normalize(queries, dim=1) @ F.normalize(database, dim=1).T
    order = cosines.argsort(dim=1, descending=True, stable=True)
    scores = []
    for query, ranking in enumerate(order):
        ranked = relevant[query, ranking], junk[query, ranking]
        precisions = [precision_at(*ranked, k) for k in ks]
        scores.append(torch.stack([average_precision(*ranked), *precisions]))
    return torch.stack(scores)


def average_precisions(
    queries: Tensor, database: Tensor, relevant: Tensor, junk: Tensor | None = None
) -> Tensor:
    """Return each query's AP: features (q, D), (n, D), two bool (q, n) -> (q,)."""
    return ranking_scores(queries, database, relevant, junk)[:, 0]


class MultiScale(nn.Module):
    """The mean of a network's features at several scales, l2-normalised: (B, 3, H, W) -> (B, D).

    Sides are rounded to whole patches; the release cuts off the rest of a side. As there, the
    features are averaged as they come and normalised at the end.
    """

    def __init__(
        self,
        network: nn.Module,
        patch_size: int,
        scales: tuple[float, ...] = (1, 2**-0.5, 0.5),
    ):
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        self.scales = scales

    def forward(self, images: Tensor) -> Tensor:
        features = [self.network(self.resized(images, scale)) for scale in self.scales]
        mean = torch.stack(features).float().mean(dim=0)
        return F.normalize(mean, dim=1)

    def resized(self, images: Tensor, scale: float) -> Tensor:
        """Return the images, scaled to whole patches."""
        if scale == 1:
            return images
        size = []
        for side in images.shape[-2:]:
            patches = max(1, round(side * scale / self.patch_size))
            size.append(patches * self.patch_size)
        return F.interpolate(images, size, mode="bilinear")


def gem(tokens: Tensor, p: float = 4) -> Tensor:
    """Return the generalised mean over the patches, (1/N sum x^p)^(1/p): (B, N, D) -> (B, D).

    x below 1e-6 counts as 1e-6, as in the release: p = 4 would make -x as strong as x.
    """
    return tokens.clamp(min=1e-6).pow(p).mean(dim=1).pow(1 / p)


class Whitening(NamedTuple):
    """x -> (x - mean) matrix, with mean (D,) and matrix (D, d). It keeps d <= D directions."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(n, D) -> (n, d)."""
        return (features.double() - self.mean) @ self.matrix


def learn_whitening(features: Tensor, floor: float = 1e-5) -> Whitening:
    """Return the PCA whitening after which these features have mean 0 and covariance 1.

    (m, D) on the CPU -> Whitening in float64. Directions with less than `floor` of the largest
    variance are dropped; m images span at most m - 1.
    """
    features = features.double()
    mean = features.mean(dim=0)
    _, deviations, directions = torch.linalg.svd(features - mean, full_matrices=False)
    largest = deviations[0]  # the singular values fall
    if not largest > 0:
        raise InputError("the images to learn the whitening on all look alike: give others")
    kept = deviations.square() > floor * largest.square()
    matrix = directions[kept].T / deviations[kept] * len(features) ** 0.5
    return Whitening(mean, matrix)


def learn_release_whitening(features: Tensor, floor: float = 1e-5) -> Whitening:
    """Return the release's whitening, which scales by the second moments around 0.

    x -> (x - mean) V / sqrt(d), where V d V^T = X^T X / m, X not centred. A d below `floor` of the
    largest is raised to it, so that all D directions are kept. (m, D) on the CPU -> Whitening in
    float64.
    """
    features = features.double()
    moments = features.T @ features / len(features)
    variances, directions = torch.linalg.eigh(moments)
    largest = variances[-1]  # the eigenvalues rise
    if not largest > 0:
        raise InputError("the images to learn the whitening on have features of 0: give others")
    raised = variances.clamp(min=floor * largest)
    return Whitening(features.mean(dim=0), directions / raised.sqrt())
