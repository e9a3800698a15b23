"""Points in an image: their patches, and drawings of where these look and what is like them.

Shapes: H x W pixels, r x c patches, h heads, D numbers a token, Q queries.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.commandline import InputError
from runtime.panels import Panel, frame_patch, lay_over, named_maps


def check_query(numbers: Sequence[float]) -> None:
    """Raise InputError where --query is not x y of points in the image."""
    if len(numbers) % 2:
        raise InputError(
            f"--query takes x and y of each point, but has {len(numbers)} numbers: give pairs, "
            "such as 0.4 0.6"
        )
    for number in numbers:
        if not 0 <= number <= 1:
            raise InputError(
                f"--query {number:g} must be a fraction of the image's width or height, 0 ... 1: "
                "try 0.4 0.6"
            )


def query_patches(numbers: Sequence[float], rows: int, columns: int) -> list[tuple[int, int]]:
    """Return the row and the column of the patch at each point x y of --query."""
    patches = []
    for x, y in zip(numbers[::2], numbers[1::2], strict=True):
        row = min(int(y * rows), rows - 1)  # 1.0 is in the last patch
        column = min(int(x * columns), columns - 1)
        patches.append((row, column))
    return patches


def cosines(queries: Tensor, tokens: Tensor) -> Tensor:
    """Return how similar each patch is to each query: (Q, D), (r, c, D) -> (Q, r, c), -1 ... 1."""
    units = F.normalize(tokens, dim=-1)
    return torch.einsum("q d, r c d -> q r c", F.normalize(queries, dim=-1), units)


def attention_panels(
    pixels: Tensor, attention: Tensor, patches: list[tuple[int, int]], patch_size: int
) -> list[Panel]:
    """Return where patches of an image look (Fig. 8): a row each, with the heads as files alone.

    (H, W, 3), (h, Q, r, c), and the row and the column of each of the Q patches.
    """
    panels = []
    for query, patch in enumerate(patches):
        framed = frame_patch(pixels, *patch, patch_size)
        panels.append(Panel(f"query {query}", f"query{query}_img", framed, query))
        for name, values in named_maps(attention[:, query]).items():
            row = None
            if name == "mean":
                row = query
            drawn = lay_over(pixels, values, values.min(), values.max(), patch_size)
            drawn = frame_patch(drawn, *patch, patch_size)
            panels.append(Panel("attention", f"query{query}_attn-{name}", drawn, row))
    return panels


def cosine_panels(
    pixels: Tensor,
    maps: Tensor,
    least: Tensor,
    patches: list[tuple[int, int]],
    patch_size: int,
) -> list[Panel]:
    """Return how similar an image's patches are to each query, a row each.

    (H, W, 3), cosines (Q, r, c), and the cosine that is blue in each (Q,).
    patches: the queries' rows and columns, or none where the queries are in another image.
    """
    panels = []
    for query, values in enumerate(maps):
        drawn = lay_over(pixels, values, least[query], 1.0, patch_size)
        if patches:
            drawn = frame_patch(drawn, *patches[query], patch_size)
        title = f"cosine, up to {values.max():.2f}"
        panels.append(Panel(title, f"query{query}_cosine", drawn, query))
    return panels
