"""BYOL's loss (Grill et al. 2020, Eq. 2 there), for Tables 7 and 14: a squared distance.

BYOL is this loss with a predictor on the student, a momentum teacher and no multi-crop.
Its head has one hidden layer with batch normalisation and ends in 256 outputs (ablations/rows.py).
That is row 7 of Table 7. Row 5 keeps DINO's head, center and crops, and takes the distance between
l2-normalised outputs, unsharpened (appendix B). The paper does not say where the center goes:
here it is subtracted from the teacher's logits before they are normalised.

Shapes: B images, V views, K outputs; rows are view by view.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from loss import DINOLoss, split_views


class SquaredDistance(DINOLoss):
    """Mean over all pairs of different views of || s / |s| - t / |t| ||^2, between 0 and 4.

    There is no temperature, and no entropy to report. center_momentum = 1 switches the center off.
    """

    has_entropy = False

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float
    ) -> Tensor:
        """Return the loss: (V * B, K), (2 * B, K) -> scalar. teacher_temp is not used."""
        student_views = split_views(student_logits, teacher_logits)
        V = len(student_views)
        centered = teacher_logits.detach().float() - self.center
        teacher_views = F.normalize(centered, dim=-1).chunk(2)

        loss = 0.0
        for student_view in range(V):
            s = F.normalize(student_views[student_view].float(), dim=-1)
            for teacher_view in range(2):
                if student_view == teacher_view:
                    continue
                t = teacher_views[teacher_view]
                cosine = (s * t).sum(dim=-1)
                loss = loss + (2 - 2 * cosine).mean()  # ||s - t||^2, since both have length 1

        loss = loss / (2 * V - 2)
        self.teacher_entropy = torch.zeros_like(loss.detach())
        self.kl = torch.zeros_like(loss.detach())
        return loss
