"""MoCo-v2's loss (He et al. 2020, Eq. 1 there), for Tables 7 and 14: find one's own image.

MoCo-v2 is this loss at temperature 0.2 with a momentum teacher (0.999, constant) and no multi-crop.
Its head has one hidden layer and 128 outputs; appendix B's is larger (ablations/rows.py).
Departure: both global views serve as query and as key, as in DINO's pairs.
The original takes one direction. So a step adds two keys an image: a queue of L has L / 2 images.

Shapes: B images, V views, d outputs, L keys in the queue; rows are view by view.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from loss import DINOLoss, split_views


class InfoNCE(DINOLoss):
    """Mean over all pairs of different views of -log exp(q.k / tau) / sum_n exp(q.n / tau).

    q is the student's output of one view, k the teacher's of another, both of length 1.
    n runs over k and the queue: the last queue_length keys of earlier steps.
    world, as runtime.hardware.World, brings the keys of all processes; None: there is one process.
    """

    has_entropy = False
    compiles = False  # forward() collects the keys

    def __init__(
        self, out_dim: int, temperature: float = 0.2, queue_length: int = 65536, world=None
    ):
        super().__init__(out_dim, student_temp=temperature)
        self.world = world
        self.keys: list[Tensor] = []  # of this step, (2 * B, d) for each micro-batch
        generator = torch.Generator().manual_seed(0)  # the same queue in all processes
        queue = torch.randn(queue_length, out_dim, generator=generator)
        self.register_buffer("queue", F.normalize(queue, dim=-1))

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float
    ) -> Tensor:
        """Return the loss: (V * B, d), (2 * B, d) -> scalar. teacher_temp is not used."""
        student_views = split_views(student_logits, teacher_logits)
        V = len(student_views)
        keys = F.normalize(teacher_logits.detach().float(), dim=-1)
        self.keys.append(keys)  # they enter the queue after the step
        key_views = keys.chunk(2)

        loss = 0.0
        for student_view in range(V):
            q = F.normalize(student_views[student_view].float(), dim=-1)
            negatives = q @ self.queue.T / self.student_temp  # (B, L)
            for teacher_view in range(2):
                if student_view == teacher_view:
                    continue
                k = key_views[teacher_view]
                positive = (q * k).sum(dim=-1, keepdim=True) / self.student_temp  # (B, 1)
                scores = torch.cat([positive, negatives], dim=1)
                loss = loss - scores.log_softmax(dim=1)[:, 0].mean()  # column 0: its own image

        loss = loss / (2 * V - 2)
        self.teacher_entropy = torch.zeros_like(loss.detach())
        self.kl = torch.zeros_like(loss.detach())
        return loss

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """Put the step's keys into the queue, where they push out as many of the oldest.

        MoCo has no center, so the argument is not used.
        """
        keys = torch.cat(self.keys)
        if self.world is not None:
            keys = gather(keys, self.world)
        keys = keys[-len(self.queue) :]
        newest = torch.cat([self.queue[len(keys) :], keys])
        self.queue.copy_(newest)
        self.keys.clear()


def gather(rows: Tensor, world) -> Tensor:
    """Return all processes' rows, equally many from each: (n, ...) -> (size * n, ...)."""
    if world.size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world.size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def shuffle_batches(teacher: nn.Module, world) -> None:
    """Let each process's teacher see images of all processes, in a random order undone after it.

    Batch normalisation by process would else show which keys came with a query: they share
    a batch's statistics (He et al., "Shuffling BN"). With one process nothing hides it: with batch
    normalisation train MoCo-v2 on two or more.
    """

    def own_part(rows: Tensor, n: int) -> Tensor:
        """This process's n of the rows of all processes."""
        return rows[n * world.rank : n * (world.rank + 1)]

    def shuffle(module: nn.Module, inputs: tuple) -> tuple:
        crops = inputs[0]
        B = len(crops[0])
        order = torch.randperm(B * world.size, device=world.device)
        order = gather(order, world)[: B * world.size]  # rank 0's order, in all processes
        module.shuffled = order.argsort()
        return ([own_part(gather(crop, world)[order], B) for crop in crops],)

    def restore(module: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
        views = logits.chunk(len(inputs[0]))
        restored = [gather(view, world)[module.shuffled] for view in views]
        return torch.cat([own_part(view, len(views[0])) for view in restored])

    if world.size > 1:
        teacher.register_forward_pre_hook(shuffle)
        teacher.register_forward_hook(restore)
