"""The loss (Sec. 3.1, Eq. 1 to 4; Sec. 5.3, Eq. 5).

The student predicts, from one view of an image, the teacher's output for another view.
A collapse is the same output for every image. Centering (Eq. 4) keeps one prototype from winning
everywhere (one-hot), but alone leads to the uniform output, where the loss is ln K. Sharpening, a
teacher temperature below the student's, prevents the uniform one, but alone leads to one-hot
(Sec. 5.3).
The loss is entropy + KL (Eq. 5): KL -> 0 shows a collapse, the entropy which one (Fig. 7).

Shapes: B images, V views (the first two are global), K prototypes: the dimensions of the output.
Row v * B + b is view v of image b.
"""
import torch
from torch import Tensor, nn


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student over all pairs of different views, in nats.

    `teacher_entropy` and `kl` are the two parts (Eq. 5) of the last loss, without gradient.
    """

    has_entropy = True  # False for a loss without these parts: BYOL's and MoCo's (ablations/)

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        # a buffer, kept in checkpoints: otherwise a resumed run would start uncentered
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_entropy = torch.zeros(())
        self.kl = torch.zeros(())

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float
    ) -> Tensor:
        """Return the mean cross-entropy (Eq. 3): (V * B, K), (2 * B, K) -> scalar.

        Raises ValueError if the rows are not views of one batch.
        """
        student_views = split_views(student_logits, teacher_logits)
        V = len(student_views)

        # fp32, whatever the networks computed in: bf16 loses the digits of p log p at a large K
        p_teacher = self.teacher_probs(teacher_logits.detach().float(), teacher_temp)
        teacher_views = p_teacher.chunk(2)

        loss = 0.0
        for student_view, logits in enumerate(student_views):  # the student sees all V views
            # Eq. 1: log P_s; one softmax serves both teacher views
            log_p_student = (logits.float() / self.student_temp).log_softmax(dim=-1)
            for teacher_view, p in enumerate(teacher_views):  # the teacher sees the two global ones
                if student_view == teacher_view:
                    continue  # a view never predicts itself: the answer would be a copy
                cross_entropy = -(p * log_p_student).sum(dim=-1)  # Eq. 2: H(P_t, P_s) of each image
                loss = loss + cross_entropy.mean()

        # 2 V pairs, less the 2 of a view with itself
        loss = loss / (2 * V - 2)  # Eq. 3: the sum; Algorithm 1 and the release: the mean

        # each teacher view is in V - 1 pairs: the mean over the two views is that over all pairs
        self.teacher_entropy = entropy(p_teacher)
        self.kl = loss.detach() - self.teacher_entropy  # Eq. 5: H(P_t, P_s) = h(P_t) + KL
        return loss

    def teacher_probs(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Map logits (2 * B, K) to P_t = softmax((g - c) / tau_t) (Eq. 1, centered), fp32."""
        # paper, Sec. 3.1: g + c; paper, Algorithm 1, and release: g - c
        return ((teacher_logits - self.center) / teacher_temp).softmax(dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """Move the center: c <- m c + (1 - m) mean of the teacher's logits (Eq. 4).

        teacher_logits: (n, K), or means of equally many of them: the mean is the same. Call it
        after the loss, which uses the old c.
        """
        batch_center = teacher_logits.float().mean(dim=0, keepdim=True)
        self.center.lerp_(batch_center, 1 - self.center_momentum)  # lerp: c + (1 - m) (mean - c)


def split_views(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, ...]:
    """Split the student's logits (V * B, K) into its V views of (B, K).

    The teacher's (2 * B, K) say what B is.
    Raises ValueError if the rows are not views of one batch.
    """
    B = len(teacher_logits) // 2
    if B == 0 or len(teacher_logits) % 2 or len(student_logits) % B or len(student_logits) < 2 * B:
        raise ValueError(
            f"{len(teacher_logits)} teacher rows and {len(student_logits)} student rows are not "
            "views of one batch: the teacher needs 2 for each image, the student as many or more"
        )
    return student_logits.split(B)


def entropy(p: Tensor) -> Tensor:
    """Return the mean entropy of the rows of p, in nats: (n, K) -> scalar."""
    # entr(p) = -p log p, and 0 at p = 0, where the logarithm would make it NaN
    return torch.special.entr(p).sum(dim=-1).mean()
