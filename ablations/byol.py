"""BYOL's loss (its paper's Eq. 2: Grill et al. 2020), for Tables 7 and 14: squared distance in place of cross-entropy.

BYOL itself is this loss with a predictor on the student, a momentum teacher, no multi-crop, and a head of one hidden
layer with batch normalisation that ends in 256 outputs, without prototypes (ablations/rows.py has its settings): row 7
of Table 7. Row 5 keeps DINO's head, center and crops, and takes the distance between l2-normalised outputs, unsharpened
(appendix B). Where the center goes there is not said: here it is subtracted from the teacher's logits before the norm.

Shapes: B images, V views, K outputs; logits are view-major.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from loss import DINOLoss, batch_size, mean_over_pairs


class SquaredDistance(DINOLoss):
    """mean over x in {g1, g2} and views x' != x of || s / |s| - t / |t| ||^2 = 2 - 2 cos(s, t), between 0 and 4.

    No temperatures, and no entropy to report; center_momentum = 1 leaves BYOL's outputs as they are.
    """

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """(V * B, K), (2 * B, K) -> scalar; teacher_temp is not used."""
        B = batch_size(student_logits, teacher_logits)
        s = F.normalize(student_logits.float(), dim=-1).unflatten(0, (-1, B))
        t = F.normalize(teacher_logits.detach().float() - self.center, dim=-1).unflatten(0, (2, B))
        loss = mean_over_pairs(2 - 2 * torch.einsum("v b k, x b k -> v x b", s, t))
        self.teacher_entropy = self.kl = torch.zeros_like(loss.detach())
        return loss
