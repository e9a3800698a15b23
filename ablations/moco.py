"""MoCo-v2's loss (He et al. 2020, Eq. 1 there; Chen et al. 2020), for Table 7, row 8, and Table 14: tell the own
image from many others.

MoCo-v2 itself is this loss at temperature 0.2 with a momentum teacher (0.999, constant), no multi-crop, and a head of
one hidden layer that ends in 128 outputs (DINO's appendix B gives it a larger one: ablations/rows.py). Departures: both
global views serve as query and as key, as in DINO's own pairs; the original takes one direction.

Shapes: B images, V views, d outputs, L keys in the queue; outputs are view-major.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import DINOLoss, batch_size, mean_over_pairs


class InfoNCE(DINOLoss):
    """mean over x in {g1, g2} and views x' != x of -log exp(q.k / tau) / (exp(q.k / tau) + sum_j exp(q.n_j / tau)).

    q is the student's output of x', k the teacher's of x, both of length 1; n_j are the queue: the last queue_length
    keys of earlier steps, from all processes. gather: all processes' rows, (n, d) -> (world n, d).
    """

    def __init__(self, out_dim: int, temperature: float = 0.2, queue_length: int = 65536,
                 gather: Callable[[Tensor], Tensor] = lambda rows: rows):
        super().__init__(out_dim, student_temp=temperature)
        self.gather, self.keys = gather, []
        generator = torch.Generator().manual_seed(0)  # equal in all processes
        self.register_buffer("queue", F.normalize(torch.randn(queue_length, out_dim, generator=generator), dim=-1))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """(V * B, d), (2 * B, d) -> scalar; teacher_temp is not used."""
        B = batch_size(student_logits, teacher_logits)
        queries = F.normalize(student_logits.float(), dim=-1).unflatten(0, (-1, B))
        keys = F.normalize(teacher_logits.detach().float(), dim=-1)
        self.keys.append(keys)
        positive = torch.einsum("v b d, x b d -> v x b", queries, keys.unflatten(0, (2, B))) / self.student_temp
        negative = (queries @ self.queue.T / self.student_temp).logsumexp(dim=-1).unsqueeze(1)  # (V, 1, B)
        loss = mean_over_pairs(torch.logaddexp(positive, negative) - positive)
        self.teacher_entropy = self.kl = torch.zeros_like(loss.detach())
        return loss

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """There is no center: the step's keys (2 * B, d) enter the queue (L, d), and as many of the oldest leave it."""
        keys = self.gather(torch.cat(self.keys))[-len(self.queue):]
        self.queue.copy_(torch.cat([self.queue[len(keys):], keys]))
        self.keys.clear()


def shuffle_batches(teacher: nn.Module, world) -> None:
    """Let each process's teacher see images of all processes, in a random order that is undone after it.

    Batch normalisation by process would else betray which keys came with a query (He et al., "Shuffling BN"). world:
    the processes, as runtime.hardware.World; with one there is nothing to shuffle.
    """
    share = lambda rows, n: rows[n * world.rank:n * (world.rank + 1)]

    def shuffle(module: nn.Module, inputs: tuple) -> tuple:
        B = len(inputs[0][0])
        order = world.gather(torch.randperm(B * world.size, device=world.device))[:B * world.size]
        module.shuffled = order.argsort()  # rank 0's order, in all processes
        return ([share(world.gather(crop)[order], B) for crop in inputs[0]],)

    def restore(module: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
        views = logits.chunk(len(inputs[0]))
        return torch.cat([share(world.gather(view)[module.shuffled], len(view)) for view in views])

    if world.size > 1:
        teacher.register_forward_pre_hook(shuffle)
        teacher.register_forward_hook(restore)
