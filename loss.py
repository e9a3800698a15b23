"""The loss (Sec. 3.1, Eq. 3), its centering and its sharpening (Sec. 3.1, "Avoiding collapse").

The student is to predict, from one view of a picture, what the teacher says of another. The teacher's logits are
centered (so that no prototype wins everywhere) and sharpened by a low temperature (so that not all win equally);
each alone collapses, one to a one-hot output and one to the uniform output, where the loss is ln K. H = entropy of
the teacher + KL, and both parts are kept, since they show which collapse it is (Fig. 7).

Departures: the paper sums over the pairs of views, the release averages, and so does this file; the paper's text
writes g + c, its Algorithm 1 and the release subtract the center, and so does this file.

Shapes: B images, V views of each (the first two are global), K prototypes; logits are view-major, (V * B, K).
"""
import torch
from einops import rearrange
from torch import Tensor, nn


class DINOLoss(nn.Module):
    """Cross-entropy of teacher and student over all pairs of different views, in nats."""

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_entropy = self.kl = torch.tensor(0.0)  # of the last forward, in nats; their sum is its loss

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """mean over x in {g1, g2} and views x' != x of H(P_t(x), P_s(x')): (V * B, K), (2 * B, K) -> scalar."""
        B = len(teacher_logits) // 2
        if len(teacher_logits) != 2 * B or len(student_logits) % B or len(student_logits) < 2 * B:
            raise ValueError(f"{len(teacher_logits)} teacher rows are no two views of a batch of which "
                             f"{len(student_logits)} student rows are all views")
        log_p_student = (student_logits.float() / self.student_temp).log_softmax(dim=-1)
        log_p_teacher = ((teacher_logits.detach().float() - self.center) / teacher_temp).log_softmax(dim=-1)
        p_teacher = log_p_teacher.exp()

        cross_entropy = -torch.einsum(  # of teacher view t with student view v: (2, V)
            "tbk, vbk -> tv",
            rearrange(p_teacher, "(t b) k -> t b k", b=B),
            rearrange(log_p_student, "(v b) k -> v b k", b=B)) / B
        V = cross_entropy.shape[1]
        different_view = 1 - torch.eye(2, V, device=cross_entropy.device)  # a view never predicts itself
        loss = (cross_entropy * different_view).sum() / different_view.sum()  # paper: sum; release: mean

        self.teacher_entropy = -(p_teacher * log_p_teacher).sum(dim=-1).mean()
        self.kl = loss.detach() - self.teacher_entropy
        return loss

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """c <- m c + (1 - m) mean of the teacher's logits (Eq. 4); after the loss has used the old c.

        teacher_logits: (any, K). Across processes: give it the mean over all of them, (1, K).
        """
        batch_center = teacher_logits.float().mean(dim=0, keepdim=True)
        self.center.lerp_(batch_center, 1 - self.center_momentum)
