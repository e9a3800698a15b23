"""Figure against ground: do a head's scores tell an object's pixels from all others?

Not in the paper. Fig. 4's Jaccard wants large attention on the object. A head that leaves the
object dark against a bright ground knows it as well. The AUC measures both.

AUC: the probability that a pixel of the figure has a larger score than one of the ground; equal
scores count half. 50 % is chance. A pixel has the score of its patch. Void pixels do not count.

What is chosen or fit, a head and its sign or weights of all heads, is chosen on other images: of
five folds, each is measured with what the other four chose. Each image's own best head and sign
flatters, as Fig. 4's best head does: compare it with the untrained network's.

Photographers put objects in the middle. So every number stands beside a centre prior's: the log of
a Gaussian around the image's centre. Its width changes no order of pixels, and so no AUC.

Shapes: n images, P patches of all images together, h heads, r x c patches of one image, H x W
pixels.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS = 5
PRIOR = "AUC, centre prior"  # the one score that no network has a part in


class Patches(NamedTuple):
    """The patches of all images together.

    image (P,): the number of its image, 0 ... n - 1.
    figure, ground (P,): the pixels of each in a patch, as fractions of its image's.
    prior (P,), heads (P, h): the centre prior and the log of each head's attention, both
    standardised within the image. mean (P,): the heads' mean attention.
    """

    image: Tensor
    figure: Tensor
    ground: Tensor
    prior: Tensor
    mean: Tensor
    heads: Tensor


def pixels_in_patches(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Return how many of a mask's pixels lie in each patch: bool (H, W) -> (r c,)."""
    height, width = mask.shape
    row = torch.arange(height) * rows // height  # the patch of each pixel, as nearest has it
    column = torch.arange(width) * columns // width
    patch = columns * row[:, None] + column
    return torch.bincount(patch[mask], minlength=rows * columns).float()


def centre_prior(rows: int, columns: int) -> Tensor:
    """Return minus the squared distance of each patch from the centre, in image sides: (r c,)."""
    y = (torch.arange(rows) + 0.5) / rows - 0.5
    x = (torch.arange(columns) + 0.5) / columns - 0.5
    return -(y[:, None] ** 2 + x**2).flatten()


def standardise(scores: Tensor) -> Tensor:
    """Return scores of mean 0 and deviation 1: (..., r c) -> (..., r c). Constant ones become 0."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    return centred / deviation.clamp(min=1e-6)


def patch_rows(number: int, attention: Tensor, objects: Tensor, void: Tensor) -> Tensor:
    """Return one image's patches as rows, in the order of Patches.

    attention (h, r, c), objects bool (O, H, W), void bool (H, W) -> (r c, 5 + h).
    """
    rows, columns = attention.shape[1:]
    figure = objects.any(dim=0) & ~void
    ground = ~figure & ~void
    labelled = figure.sum() + ground.sum()
    maps = attention.flatten(1)
    heads = standardise(maps.clamp(min=1e-12).log())
    parts = [
        torch.full((rows * columns,), float(number)),
        pixels_in_patches(figure, rows, columns) / labelled,
        pixels_in_patches(ground, rows, columns) / labelled,
        standardise(centre_prior(rows, columns)),
        maps.mean(dim=0),
        *heads,
    ]
    return torch.stack(parts, dim=1)


def to_patches(rows: Tensor) -> Patches:
    """Return the rows of all images as Patches: (P, 5 + h)."""
    _, image = rows[:, 0].unique(return_inverse=True)
    figure, ground, prior, mean = rows[:, 1:5].unbind(dim=1)
    return Patches(image, figure, ground, prior, mean, rows[:, 5:])


def auc(scores: Tensor, figure: Tensor, ground: Tensor) -> Tensor:
    """Return sum over i, j of figure[i] ground[j] [s_i > s_j], in %; a tie counts half.

    Divided by the same sum without the condition. All (P,) -> (). NaN without figure or ground.
    """
    values, place = scores.unique(return_inverse=True)
    zeros = torch.zeros(len(values), dtype=torch.double)
    figure = zeros.index_add(0, place, figure.double())
    ground = zeros.index_add(0, place, ground.double())
    below = ground.cumsum(dim=0) - ground / 2  # with a lower score, and half of an equal one's
    return 100 * (figure * below).sum() / (figure.sum() * ground.sum())


def aucs(scores: Tensor, patches: Patches) -> Tensor:
    """Return every image's AUC of every score: (P, m) -> (n, m)."""
    sizes = patches.image.bincount().tolist()  # an image's patches stand together
    figures = patches.figure.split(sizes)
    grounds = patches.ground.split(sizes)
    found = []
    for image, figure, ground in zip(scores.split(sizes), figures, grounds, strict=True):
        found.append(torch.stack([auc(score, figure, ground) for score in image.unbind(dim=1)]))
    return torch.stack(found)


def best_of_either_sign(head_aucs: Tensor) -> tuple[int, int]:
    """Return the head whose mean AUC is farthest from 50 %, and its sign: (n, h).

    Sign -1: the object is dark, and 100 - AUC counts.
    """
    distances = head_aucs.nanmean(dim=0) - 50
    head = distances.abs().nan_to_num().argmax().item()
    sign = 1 if distances[head] >= 0 else -1
    return head, sign


def best_head_aucs(head_aucs: Tensor) -> Tensor:
    """Return each image's AUC of the head that is best on the other folds, by that head's sign.

    Fold f has the images f, f + 5, f + 10 ... Of the creatures, whose classes take turns, it has
    two classes, and the others none of them. (n, h) -> (n,).
    """
    fold = torch.arange(len(head_aucs)) % FOLDS
    found = torch.empty_like(head_aucs[:, 0])
    for number in range(FOLDS):
        head, sign = best_of_either_sign(head_aucs[fold != number])
        found[fold == number] = 50 + sign * (head_aucs[fold == number, head] - 50)
    return found


def fit_logistic(features: Tensor, figure: Tensor, ground: Tensor) -> Tensor:
    """Return the weights w and the bias of P(figure) = sigmoid(w x + b), the bias last.

    features (P, d), figure and ground (P,), which weigh the patches -> (d + 1,).
    """
    inputs = F.pad(features, (0, 1), value=1.0)
    weights = torch.zeros(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")
    total = figure.sum() + ground.sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weights
        likelihood = figure * F.logsigmoid(logits) + ground * F.logsigmoid(-logits)
        penalty = 1e-4 * weights.square().sum()  # keeps them finite where nothing is mistaken
        value = penalty - likelihood.sum() / total
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def combined(features: Tensor, patches: Patches) -> Tensor:
    """Return the logit of every patch, by a regression fit on the other folds' images.

    features (P, d) -> (P,).
    """
    logits = torch.empty(len(features))
    fold = patches.image % FOLDS
    for number in range(FOLDS):
        mine = fold == number
        others = ~mine
        weights = fit_logistic(features[others], patches.figure[others], patches.ground[others])
        logits[mine] = features[mine] @ weights[:-1] + weights[-1]
    return logits


def figure_ground_scores(patches: Patches) -> tuple[dict[str, Tensor], Tensor]:
    """Return every image's AUCs in %, each (n,), and each head's mean over all images (h,).

    The gain over the prior is a difference in points. One image alone has no other to learn from,
    and so only the first three.
    """
    fixed = torch.stack([patches.prior, patches.mean], dim=1)
    of_prior, of_mean = aucs(fixed, patches).unbind(dim=1)
    of_each_head = aucs(patches.heads, patches)
    heads = of_each_head.nanmean(dim=0)
    found = {PRIOR: of_prior, "AUC, heads' mean": of_mean}
    found["AUC, each image's best head and sign"] = 50 + (of_each_head - 50).abs().amax(dim=1)
    if len(of_prior) < 2:
        return found, heads

    with_prior = torch.cat([patches.prior.unsqueeze(1), patches.heads], dim=1)
    learned = [combined(patches.heads, patches), combined(with_prior, patches)]
    of_heads, of_both = aucs(torch.stack(learned, dim=1), patches).unbind(dim=1)
    found["AUC, one best head and sign"] = best_head_aucs(of_each_head)
    found["AUC, all heads"] = of_heads
    found["AUC, prior and all heads"] = of_both
    found["AUC, gain over the prior"] = of_both - of_prior
    return found, heads


def bootstrap(values: Tensor, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """Return the 95 % interval of the mean of (n,) by resampling images, NaNs left out.

    What was fit is not fit again.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values[~values.isnan()]
    if len(values) == 0:
        return torch.nan, torch.nan
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[picks].mean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high
