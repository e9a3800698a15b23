"""The loss (Sec. 3.1, Eq. 1 to 3), its centering (Eq. 4) and its sharpening (Sec. 3.1, "Avoiding collapse").

The student is to predict, from one view of an image, what the teacher says of another. The teacher's logits are
centered (so that no prototype wins everywhere) and sharpened by a low temperature (so that not all win equally);
each alone collapses, one to a one-hot output and one to the uniform output, where the loss is ln K. The loss is the
teacher's entropy + KL (Eq. 5), and both parts are kept, since they show which collapse it is (Fig. 7).

Departures: the paper sums over the pairs of views, the release averages, and so does this file; the paper's text
writes g + c, its Algorithm 1 and the release subtract the center, and so does this file.

In place of centering, the teachers of Tables 7 and 15 share the prototypes out among the batch (SwAV's
Sinkhorn-Knopp, and its first iteration, a softmax over the batch), both global views taken as one batch.

Shapes: B images, V views of each (the first two are global), K prototypes; logits are view-major, (V * B, K).
"""
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class CrossEntropy(torch.autograd.Function):
    """sum over v, b, k of -p log softmax(s / tau) (Eq. 2, the sums of Eq. 3 in p): s (V * B, K), P (B, K) -> scalar.

    p, what view v is to predict, is the sum of the teacher's outputs on the other global views: P_2 for view 1, P_1
    for view 2, P_1 + P_2 for local views. The gradient (n softmax(s / tau) - p) / tau, with n = sum_k p, falls out of
    the same pass, view by view: autograd would go over the logits again, and keep several tensors of their size.
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, p1: Tensor, p2: Tensor, tau: float) -> Tensor:
        gradient, total, both = torch.empty_like(student_logits), p1.new_zeros(()), p1 + p2
        for view, (s, g) in enumerate(zip(student_logits.split(len(p1)), gradient.split(len(p1)), strict=True)):
            p, n = [(p2, 1), (p1, 1), (both, 2)][min(view, 2)]
            log_p_student = (s.float() / tau).log_softmax(dim=-1)
            total -= torch.linalg.vecdot(p, log_p_student).sum()  # one flat dot would lose digits at large K
            g.copy_(log_p_student.exp_().mul_(n).sub_(p))
        ctx.gradient, ctx.tau = gradient, tau
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, so it serves once
        if gradient is None:
            raise RuntimeError("this loss went backward before: compute it again")
        return gradient.mul_(grad_total / ctx.tau), None, None, None


def cross_entropy(student_logits: Tensor, p1: Tensor, p2: Tensor, tau: float) -> Tensor:
    """The same in closed form, n logsumexp(s / tau) - <p, s / tau>: torch.compile makes its gradient, and faster."""
    s = rearrange(student_logits.float() / tau, "(v b) k -> v b k", b=len(p1))
    log_sums = s.logsumexp(dim=-1)
    return (log_sums[:2].sum() + 2 * log_sums[2:].sum()
            - (p2 * s[0]).sum() - (p1 * s[1]).sum() - ((p1 + p2) * s[2:]).sum())


def sinkhorn_knopp(logits: Tensor, iterations: int, total: Callable[[Tensor], Tensor] = lambda x: x,
                   largest: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """log q, where q starts as exp(logits) and in turn gets equal prototypes (columns) and rows that sum to 1.

    (n, K) -> (n, K), of probabilities: no softmax follows. SwAV, Sec. 3 (Cuturi 2013). total and largest are the sum
    and the maximum over all processes, whose rows are one batch. In logarithms, since exp(1 / 0.01) is out of range.
    """
    log_q = logits.float()
    for _ in range(iterations):
        top = largest(log_q.amax(dim=0))
        log_q = log_q - top - total((log_q - top).exp().sum(dim=0)).log()
        log_q = log_q.log_softmax(dim=1)
    return log_q


def batch_size(student_logits: Tensor, teacher_logits: Tensor) -> int:
    """B of (V * B, K) and (2 * B, K); raises ValueError if the rows are no views of one batch."""
    B = len(teacher_logits) // 2
    if not B or len(teacher_logits) != 2 * B or len(student_logits) % B or len(student_logits) < 2 * B:
        raise ValueError(f"{len(teacher_logits)} teacher rows are no two views of a batch of which "
                         f"{len(student_logits)} student rows are all views")
    return B


def mean_over_pairs(terms: Tensor) -> Tensor:
    """The mean of all pairs of different views: (V, 2, B), of student's view v and teacher's view x -> scalar."""
    V, _, B = terms.shape
    return (terms.sum() - terms[0, 0].sum() - terms[1, 1].sum()) / ((2 * V - 2) * B)


class DINOLoss(nn.Module):
    """Cross-entropy of teacher and student over all pairs of different views, in nats.

    centering: center, or instead of it sinkhorn or batch_softmax, over all the teacher's rows in all processes (of a
    micro-batch, where a step is made of several).
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9,
                 centering: str = "center", total: Callable[[Tensor], Tensor] = lambda x: x,
                 largest: Callable[[Tensor], Tensor] = lambda x: x):
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.iterations = {"center": 0, "batch_softmax": 1, "sinkhorn": 3}[centering]
        self.total, self.largest = total, largest
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_entropy = self.kl = torch.tensor(0.0)  # of the last forward, in nats; their sum is its loss

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """mean over x in {g1, g2} and views x' != x of H(P_t(x), P_s(x')) (Eq. 3): (V * B, K), (2 * B, K) -> scalar."""
        B = batch_size(student_logits, teacher_logits)
        log_p_teacher = self.log_targets(teacher_logits.detach().float(), teacher_temp)
        p_teacher = log_p_teacher.exp()
        self.teacher_entropy = -torch.linalg.vecdot(p_teacher, log_p_teacher).mean()

        sum_over_pairs = cross_entropy if torch.compiler.is_compiling() else CrossEntropy.apply
        pairs = 2 * (len(student_logits) // B) - 2  # a view never predicts itself
        loss = sum_over_pairs(student_logits, *p_teacher.split(B), self.student_temp) / (pairs * B)
        self.kl = loss.detach() - self.teacher_entropy  # Eq. 5
        return loss

    def log_targets(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """log P_t = log softmax((g - c) / tau) (Eq. 1), or Sinkhorn-Knopp's shares: (2 * B, K) -> (2 * B, K)."""
        if self.iterations:
            return sinkhorn_knopp(teacher_logits / teacher_temp, self.iterations, self.total, self.largest)
        return ((teacher_logits - self.center) / teacher_temp).log_softmax(dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """c <- m c + (1 - m) mean of the teacher's logits (Eq. 4); after the loss has used the old c.

        teacher_logits: (any, K). Across processes: give it the mean over all of them, (1, K).
        """
        batch_center = teacher_logits.float().mean(dim=0, keepdim=True)
        self.center.lerp_(batch_center, 1 - self.center_momentum)
