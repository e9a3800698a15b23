"""Principal components of patch tokens, as colours.

Shapes: r x c patches, D numbers a token.
"""

import torch
from torch import Tensor


class PrincipalColours:
    """Where the patch tokens of all images vary most, as colours.

    z = (token - mean) v_1, v_2, v_3, by the leading eigenvectors of the covariance, are red,
    green and blue. Two standard deviations of z to either side of grey span a colour.
    All images together: alike patches then have one colour in all of them.
    """

    def __init__(self):
        self.count = 0
        self.total = 0.0  # of the tokens: (D,)
        self.products = 0.0  # of each two of their numbers: (D, D)

    def add(self, tokens: Tensor) -> None:
        """Take the tokens of one more image into account: (r, c, D)."""
        flat = tokens.flatten(0, 1).double()
        self.count += len(flat)
        self.total = self.total + flat.sum(dim=0)
        self.products = self.products + flat.T @ flat

    def of(self, tokens: Tensor) -> Tensor:
        """Return the colours of one image: (r, c, D) -> (r, c, 3) in 0 ... 1."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        variances, vectors = torch.linalg.eigh(covariance)
        # eigh sorts the eigenvalues upwards
        variances = variances[-3:].flip(0)
        vectors = vectors[:, -3:].flip(1)
        # an eigenvector has no sign of its own: make its largest entry positive
        largest = vectors.abs().argmax(dim=0, keepdim=True)
        vectors = vectors * vectors.gather(0, largest).sign()

        z = (tokens.double() - mean) @ vectors
        span = 4 * variances.clamp(min=1e-24).sqrt()  # tokens all alike are grey
        return (0.5 + z / span).clamp(0, 1).float()
