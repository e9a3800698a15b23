"""Wrong answers to the exercises, which their tests must catch with words that teach.

An answer is a whole body, or changes of the reference's own text, old to new.
A change whose text is no longer in the reference fails in tests/test_classroom.py.
"""

LOSS = {
    "a missing detach": [("teacher_logits.detach()", "teacher_logits")],
    "a softmax over the images": [("log_softmax(dim=-1)", "log_softmax(dim=0)")],
    "a student's temperature of its own": [("self.student_temp", "0.1")],
    "the same view paired": [("if student_view == teacher_view:", "if False:")],
    "the same view paired, and the mean over all": [
        ("if student_view == teacher_view:", "if False:"),
        ("(2 * V - 2)", "(2 * V)"),
    ],
    "the local crops alone": [
        ("if student_view == teacher_view:", "if student_view < 2:"),
        ("(2 * V - 2)", "(2 * V - 4)"),
    ],
    "divided by all pairs": [("(2 * V - 2)", "(2 * V)")],
    "a softmax in half precision": [
        ("logits.float()", "logits")
    ],
    "the loss kept as the KL": [("loss.detach() - self.teacher_entropy", "loss.detach()")],
    "a KL with its gradient": [
        ("loss.detach() - self.teacher_entropy", "loss - self.teacher_entropy")
    ],
}

CENTER = {
    "the two weights exchanged": [("1 - self.center_momentum", "self.center_momentum")],
    "the last batch's mean alone": [
        ("lerp_(batch_center, 1 - self.center_momentum)", "copy_(batch_center)")
    ],
}

TEACHER = {
    "the two weights exchanged": [("1 - momentum", "momentum")],
    "the student follows the teacher": [
        (
            "teacher_param.lerp_(student_params[name], 1 - momentum)",
            "student_params[name].lerp_(teacher_param, 1 - momentum)",
        )
    ],
    "parameters met by their places": [
        ("student_params[name]", "list(student_params.values())[i]"),
        (
            "for name, teacher_param in teacher.named_parameters():",
            "for i, teacher_param in enumerate(teacher.parameters()):",
        ),
    ],
    "the buffers follow too": [
        (
            "1 - momentum)",
            "1 - momentum)\n"
            "    for mine, its in zip(teacher.buffers(), student.buffers()):\n"
            "        mine.copy_(its)",
        )
    ],
}

SCHEDULE = {
    "the cosine counts from step 0": [
        ("(step - warmup_steps) / max(1, total_steps - warmup_steps)", "step / total_steps")
    ],
    "the warm-up ends a step late": [("max(1, warmup_steps - 1)", "warmup_steps")],
    "start and end exchanged": [("end + (start - end)", "start + (end - start)")],
}

HEAD = {
    "no l2 norm": [("F.normalize(x, dim=-1)", "x")],
    "normalised over the batch": [("F.normalize(x, dim=-1)", "F.normalize(x, dim=0)")],
}

ATTENTION = {
    "no scale": [
        ("scaled_dot_product_attention(q, k, v)", "scaled_dot_product_attention(q, k, v, scale=1)")
    ],
    "the softmax over the queries": [
        (
            "F.scaled_dot_product_attention(q, k, v)",
            "(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-2) @ v",
        )
    ],
    "the heads' outputs interleaved": [("B T (h d)", "B T (d h)")],
    "the last layer forgotten": [("self.proj(rearrange(", "torch.Tensor.contiguous(rearrange(")],
    "fewer keys than tokens": [
        ("q = q[:, :, :queries]", "q, k, v = (t[:, :, :queries] for t in (q, k, v))")
    ],
    "all tokens are queries": [("q = q[:, :, :queries]", "pass")],
}

POSITIONS = {
    "rows and columns exchanged": [
        (
            "((rows + 0.1) / self.grid, (cols + 0.1) / self.grid)",
            "((cols + 0.1) / self.grid, (rows + 0.1) / self.grid)",
        )
    ],
    "the 0.1 forgotten": [("(rows + 0.1)", "rows"), ("(cols + 0.1)", "cols")],
    "a grid known by its number of patches": [
        ("rows == cols == self.grid", "rows * cols == self.grid ** 2")
    ],
}

CROPS = {
    "a pass for each crop": """\
    return head(torch.cat([backbone(crop) for crop in crops]))
""",
    "a pass of the head for each size": """\
    groups = groupby(crops, key=lambda crop: crop.shape[-2:])
    return torch.cat([head(backbone(torch.cat(list(group)))) for _, group in groups])
""",
    "small crops first": """\
    groups = groupby(sorted(crops, key=lambda crop: crop.shape[-1]), key=lambda crop: crop.shape)
    return head(torch.cat([backbone(torch.cat(list(group))) for _, group in groups]))
""",
}

GROUPS = {
    "everything decays": """\
    params = [param for param in student.parameters() if param.requires_grad]
    return [{"params": params, "decays": True},
            {"params": [], "decays": False, "weight_decay": 0.0}]
""",
    "AdamW's own weight decay": """\
    params = [param for param in student.parameters() if param.requires_grad]
    return [{"params": [param for param in params if param.ndim > 1], "decays": True},
            {"params": [param for param in params if param.ndim <= 1], "decays": False}]
""",
    "the frozen gain is optimised": """\
    params = list(student.parameters())
    return [{"params": [param for param in params if param.ndim > 1], "decays": True},
            {"params": [param for param in params if param.ndim <= 1], "decays": False,
             "weight_decay": 0.0}]
""",
}

UPDATE_CENTER = "dino_loss.update_center(world.mean(torch.stack(teacher_means)))"
FOLLOW = "follow(network, teacher, now.teacher_momentum)"
CLIP = "norm = clip_gradients(network, settings.clip_grad)"
STEP = {
    "the center updated before the loss": [
        ("loss = dino_loss(", "dino_loss.update_center(teacher_logits); loss = dino_loss("),
        (UPDATE_CENTER, "pass"),
    ],
    "the teacher follows before the student's step": [
        (FOLLOW, "pass"),
        ("optimizer.step()", f"{FOLLOW}; optimizer.step()"),
    ],
    "the gradients not clipped": [("settings.clip_grad", "0")],
    "a frozen layer's gradients dropped before clipping": [
        (CLIP, "pass"),
        ("optimizer.step()", f"{CLIP}; optimizer.step()"),
    ],
    "the gradients kept for the next step": [("optimizer.zero_grad()", "pass")],
    "the other processes forgotten": [
        ("student_logits = student(crops)", "student_logits = hardware.unwrap(student)(crops)")
    ],
    "a center of each process's own": [
        (
            "world.mean(torch.stack(teacher_means))",
            "torch.stack(teacher_means).mean(dim=0, keepdim=True)",
        )
    ],
    "the gradients summed over the micro-batches": [("(loss / len(micro_batches))", "loss")],
    "full precision whatever the flag says": [("with world.autocast():", "if True:")],
}

VOTES = {
    "each neighbour one vote": [
        ("((cosines - largest) / temperature).exp()", "torch.ones_like(cosines)")
    ],
    "the temperature forgotten": [(" / temperature", "")],
    "the largest not subtracted": [("cosines - largest", "cosines - 1")],
}

MASK = {
    "the lightest are kept": """\
    flat = attention.flatten(-2)
    weights, order = (flat / flat.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
    kept = weights.cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)
""",
    "the fraction that goes, not the one that stays": """\
    flat = attention.flatten(-2)
    weights, order = (flat / flat.sum(dim=-1, keepdim=True)).sort(dim=-1)
    kept = weights.cumsum(dim=-1) > mass
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)
""",
    "a map taken to sum to 1": """\
    weights, order = attention.flatten(-2).sort(dim=-1)
    kept = weights.cumsum(dim=-1) > 1 - mass
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)
""",
    "a patch too few": """\
    flat = attention.flatten(-2)
    weights, order = (flat / flat.sum(dim=-1, keepdim=True)).sort(dim=-1)
    kept = weights.cumsum(dim=-1) - weights > 1 - mass
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)
""",
}

SINKHORN = {
    "the rows before the columns": [
        ("top = log_q.amax(dim=0)", "log_q = log_q.log_softmax(dim=1); top = log_q.amax(dim=0)"),
        ("        log_q = log_q.log_softmax(dim=1)\n", ""),
    ],
    "the maximum not subtracted": [
        ("(log_q - top).exp()", "log_q.exp()"),
        (" - top - sums", " - sums"),
    ],
    "the columns of one process alone": [("sums = world.total(sums)", "pass")],
}

LABELS = {
    "weights that do not sum to 1": [(".softmax(dim=1)", ".exp()")],
    "the softmax over the patches of the frame": [(".softmax(dim=1)", ".softmax(dim=0)")],
    "columns without a limit": [(".masked_fill(far, -torch.inf)", "")],
}

WRONG = {
    "loss.py:DINOLoss.forward": LOSS,
    "loss.py:DINOLoss.update_center": CENTER,
    "teacher.py:update_teacher": TEACHER,
    "optimizer.py:cosine": SCHEDULE,
    "head.py:DINOHead.forward": HEAD,
    "vit.py:Attention.forward": ATTENTION,
    "vit.py:VisionTransformer.positions": POSITIONS,
    "multicrop.py:forward_crops": CROPS,
    "optimizer.py:parameter_groups": GROUPS,
    "train.py:train_step": STEP,
    "features.py:knn_votes": VOTES,
    "attention.py:keep_mass": MASK,
    "ablations/variants.py:sinkhorn_knopp": SINKHORN,
    "evals/video_segmentation.py:propagate": LABELS,
}
