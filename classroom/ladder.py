"""The exercises as data, easiest first: which function, what to write, its equation, its tests, and wrong answers.

Nothing of a solution stands here: the bodies are taken out of the source itself. A wrong answer is a change of the
reference's own text, old to new, so that it cannot drift unnoticed; tests/test_classroom.py proves that each fails with
words that say why.
"""
from typing import NamedTuple


class Exercise(NamedTuple):
    """Where the function is, as file.py:name; what it is for; its equation; what to look at when it passes; its tests
    as pytest names them, under tests/; and wrong answers, each a name and the changes that make it.
    """

    place: str
    title: str
    text: str
    equation: str
    look: str
    tests: tuple[str, ...]
    wrong: dict[str, list[tuple[str, str]]]

    @property
    def file(self) -> str:
        return self.place.partition(":")[0]

    @property
    def name(self) -> str:
        return self.place.partition(":")[2]


LADDER = (
    Exercise(
        "bench/plain.py:PlainLoss.forward", "the cross-entropy of two softmaxes",
        "The loss as a textbook writes it, in two plain loops. The teacher's logits, less self.center (which stays as "
        "it is here), go through a softmax with a low temperature, the student's through one with self.student_temp; "
        "the loss is the mean of their cross-entropies over all pairs of different views. The rows are view by view, B "
        "of each: split(B) gives the views. No gradient may reach the teacher.",
        "P_t = softmax((g_t - c) / tau_t)    P_s = softmax(g_s / tau_s)    over the K prototypes, c = self.center\n"
        "loss = mean over x in {g1, g2}, views x' != x, and images of  - sum_k P_t(x)[k] log P_s(x')[k]",
        "`python -m classroom run -m bench --parts loss` times yours beside the one that training uses (exercise 16).",
        ("test_loss.py::test_eq_3_the_loss_is_the_cross_entropy_averaged_over_pairs_of_different_views[PlainLoss]",
         "test_loss.py::test_a_view_is_never_paired_with_itself[PlainLoss]",
         "test_loss.py::test_no_gradient_reaches_the_teacher[PlainLoss]"),
        {"a missing detach": [("teacher_logits.detach()", "teacher_logits")],
         "a softmax over the images": [("teacher_temp).softmax(dim=-1)", "teacher_temp).softmax(dim=0)")],
         "a student's temperature of its own": [("self.student_temp", "0.1")],
         "the same view paired": [(" if t != v]", "]")]}),
    Exercise(
        "loss.py:DINOLoss.update_center", "the center",
        "The center follows the mean of the teacher's logits over the batch, each prototype's its own, as an "
        "exponential moving average. Taken off the logits, it keeps one prototype from winning everywhere.",
        "c <- m c + (1 - m) mean_b g_t(x_b)        m = self.center_momentum, c = self.center, (1, K)   (Eq. 4)",
        "classroom/README.md, \"No centering\": what happens without it.",
        ("test_loss.py::test_eq_4_the_center_is_an_average_of_the_teachers_logits",
         "test_loss.py::test_center_momentum_one_switches_centering_off"),
        {"the two shares exchanged": [("1 - self.center_momentum", "self.center_momentum")],
         "the last batch's mean alone": [("lerp_(batch_center, 1 - self.center_momentum)", "copy_(batch_center)")]}),
    Exercise(
        "teacher.py:update_teacher", "the EMA teacher",
        "Every parameter of the teacher moves a little towards the student's of the same name, in place; nothing else "
        "does: a batch normalisation's running statistics are buffers, and the teacher's own.",
        "theta_t <- lambda theta_t + (1 - lambda) theta_s        lambda = momentum, 0.996 or more",
        "the k-NN panel of `curves.png` in a run's folder: is the teacher above its student, as in Fig. 6?",
        ("test_teacher.py::test_after_n_steps_the_teacher_is_the_weighted_sum_of_all_students",
         "test_teacher.py::test_parameters_meet_by_their_names",
         "test_teacher.py::test_buffers_are_the_teachers_own"),
        {"the two shares exchanged": [("1 - momentum", "momentum")],
         "the student follows the teacher": [("teacher_param.lerp_(student_params[name], 1 - momentum)",
                                              "student_params[name].lerp_(teacher_param, 1 - momentum)")],
         "parameters met by their places": [("student_params[name]", "list(student_params.values())[i]"),
                                            ("for name, teacher_param in teacher.named_parameters():",
                                             "for i, teacher_param in enumerate(teacher.parameters()):")],
         "the buffers follow too": [("1 - momentum)", "1 - momentum)\n    for mine, its in zip(teacher.buffers(), "
                                     "student.buffers()):\n        mine.copy_(its)")]}),
    Exercise(
        "loss.py:mean_over_pairs", "skipping the same view",
        "BYOL's and MoCo's losses give a term for every view v of the student and every view x of the teacher, whose "
        "two are the student's first two: terms[0, 0] and terms[1, 1] want a mere copy, and the mean leaves them out.",
        "mean of terms[v, x, b] over all b, v < V and x < 2 with v != x: how many are these?",
        "classroom/README.md, \"The same view paired\": what such terms do to DINO.",
        ("test_loss.py::test_the_mean_over_pairs_leaves_the_same_view_out",),
        {"the same view paired": [("terms.sum() - terms[0, 0].sum() - terms[1, 1].sum()", "terms.sum()"),
                                  ("(2 * V - 2)", "(2 * V)")],
         "the local crops alone": [("(terms.sum() - terms[0, 0].sum() - terms[1, 1].sum()) / ((2 * V - 2) * B)",
                                    "terms[2:].mean()")],
         "divided by all pairs": [("(2 * V - 2)", "(2 * V)")]}),
    Exercise(
        "optimizer.py:cosine", "the schedules",
        "Learning rate, weight decay and teacher momentum follow half a cosine from start to end. The learning rate "
        "rises linearly from 0 before that: step 0 has 0 (also where the warm-up is that one step), its last step has "
        "start already. The first step of the cosine has start too; the one after the last would have end.",
        "warm-up: start step / (warmup_steps - 1)\n"
        "then:    end + (start - end) (1 + cos(pi p)) / 2    p: which share of the steps after the warm-up is over",
        "the right panel of `curves.png` in a run's folder.",
        ("test_optimizer.py::test_the_cosine_falls_from_start_to_end_through_the_middle",
         "test_optimizer.py::test_the_warm_up_is_linear_from_zero_and_reaches_the_start_value_on_its_last_step",
         "test_optimizer.py::test_after_the_warm_up_it_is_the_releases_closed_form"),
        {"the cosine counts from step 0": [("(step - warmup_steps) / max(1, total_steps - warmup_steps)",
                                            "step / total_steps")],
         "the warm-up ends a step late": [("max(1, warmup_steps - 1)", "warmup_steps")],
         "start and end exchanged": [("end + 0.5 * (start - end)", "start + 0.5 * (end - start)")]}),
    Exercise(
        "head.py:DINOHead.forward", "the head",
        "Through self.mlp to the bottleneck, through self.predictor if there is one, to length 1, and through "
        "self.last_layer to the K prototypes. Without the bottleneck (self.l2_bottleneck is false) the last layer "
        "follows the MLP at once, a predictor comes behind it, and nothing is normalised.",
        "x = predictor(mlp(features))        logits = last_layer(x / ||x||), each the cosine of x and a prototype",
        "`python train.py --epochs 4 --head_l2_bottleneck false --output_dir runs/no-l2`: a head without.",
        ("test_head.py::test_logits_are_cosines_with_the_prototypes",
         "test_methods.py::test_a_predictor_is_the_students_alone_and_sits_on_the_projection",
         "test_methods.py::test_without_the_bottleneck_the_head_is_hidden_layers_and_a_linear_one"),
        {"no l2 norm": [("F.normalize(x, dim=-1)", "x")],
         "normalised over the batch": [("F.normalize(x, dim=-1)", "F.normalize(x, dim=0)")],
         "the predictor forgotten": [("if self.predictor:", "if False:")],
         "no predictor without the bottleneck": [("if self.predictor:", "if self.predictor and self.l2_bottleneck:")]}),
    Exercise(
        "vit.py:attention_probs", "attention",
        "How much each token, a query, takes from every other, a key: a softmax of their scalar products. Without the "
        "factor the products grow with the width, and the softmax has no gradient left.",
        "A[b, h, i, j] = softmax over j of  q[b, h, i] . k[b, h, j] / sqrt(d)",
        "`attention.png` in a run's folder: A's row 0; visualize_attention.py draws it on your images.",
        ("test_vit.py::test_attention_is_the_softmax_of_scaled_products_query_by_query",),
        {"no scale": [(" * q.shape[-1] ** -0.5", "")],
         "the softmax over the queries": [("softmax(dim=-1)", "softmax(dim=-2)")]}),
    Exercise(
        "vit.py:VisionTransformer.positions", "position interpolation",
        "The position embeddings are learnt on a square grid (self.grid patches a side; the first row of "
        "self.pos_embed is [CLS]'s). Another grid gets them by bicubic interpolation, and [CLS] keeps its own; the "
        "learnt grid gets them as they are. As in the release, 0.1 is added to the rows and columns of the scale.",
        "scale = ((rows + 0.1) / grid, (cols + 0.1) / grid)        F.interpolate(..., scale_factor, mode=\"bicubic\")\n"
        "(1, 1 + grid^2, D) -> (1, D, grid, grid) -> (1, D, rows, cols) -> (1, 1 + rows cols, D)",
        "the method below it, `tokens`: the demo's local crops are 24 pixels, on a grid learnt for 48.",
        ("test_vit.py::test_positions_are_sampled_bicubically_with_the_releases_scale",
         "test_vit.py::test_positions_are_the_learnt_ones_on_their_own_grid_only"),
        {"rows and columns exchanged": [("((rows + 0.1) / self.grid, (cols + 0.1) / self.grid)",
                                         "((cols + 0.1) / self.grid, (rows + 0.1) / self.grid)")],
         "the 0.1 forgotten": [("(rows + 0.1)", "rows"), ("(cols + 0.1)", "cols")],
         "a grid known by its number of patches": [("rows == cols == self.grid", "rows * cols == self.grid ** 2")]}),
    Exercise(
        "multicrop.py:forward_crops", "the multi-crop forward",
        "Crops of one size go through the backbone together, so that it runs once for the globals and once for the "
        "locals, which stand one after the other in the list; the teacher gets no locals. The head then sees all "
        "features in one pass, since it may have a batch normalisation, and the views stay in their order.",
        "V crops (B, 3, S, S) -> features (V B, D), one backbone pass for each size -> logits (V B, K), one head pass",
        "classroom/README.md, \"No multi-crop\": what the locals cost, and what they are worth.",
        ("test_multicrop.py::test_one_backbone_pass_per_resolution_keeps_the_order_of_the_views",),
        {"a pass for each crop": [("backbone(torch.cat(list(group))) for _, group in same_size",
                                   "backbone(crop) for crop in crops")],
         "a pass of the head for each size": [("head(torch.cat([backbone(", "torch.cat([head(backbone("),
                                              ("(list(group)))", "(list(group))))"), ("same_size]))", "same_size])")],
         "small crops first": [("groupby(crops, ", "groupby(sorted(crops, key=lambda crop: crop.shape[-1]), ")]}),
    Exercise(
        "optimizer.py:parameter_groups", "weight decay, and on what",
        "Two groups for the optimiser: matrices decay; biases and the scales of normalisations, which have one axis, "
        "do not. What takes no gradient, as the frozen gain of the prototypes, is in neither. Each group says under "
        "\"decays\" whether it does; the second has \"weight_decay\": 0.0 too, since AdamW's own is 0.01.",
        "[{\"params\": [...], \"decays\": True}, {\"params\": [...], \"decays\": False, \"weight_decay\": 0.0}]",
        "`train.py:train_step`, where \"decays\" is multiplied with the schedule's value.",
        ("test_train.py::test_biases_and_norms_do_not_decay_but_positions_and_cls_do",),
        {"everything decays": [("param.ndim > 1", "True"), ("param.ndim <= 1", "False")],
         "AdamW's own weight decay": [(", \"weight_decay\": 0.0", "")],
         "the frozen gain is optimised": [("student.parameters() if param.requires_grad", "student.parameters()")]}),
    Exercise(
        "train.py:train_step", "a step of Algorithm 1",
        "The last step's gradients go. For each micro-batch: the teacher sees the two global crops and takes no "
        "gradient, the student (ddp_student) sees all; both under world.autocast(). The micro-batches' gradients "
        "are averaged, clipped (what that returns is kept), and dropped for student.head.last_layer if it is "
        "frozen; lr and weight_decay of the optimiser's groups are set (a group decays if its \"decays\" says so); "
        "the student steps, the teacher follows, and last the center, by the mean of the teacher's logits over the "
        "micro-batches and over the processes (world.mean(tensor), of the same shape). With values.teacher_lags the "
        "teacher becomes the student (momentum 0) just before its step.",
        "loss -> backward -> clip -> student's step -> teacher's EMA -> center; once a step, not once a micro-batch\n"
        "returns, (4,), the micro-batches' means of (loss, dino_loss.teacher_entropy, dino_loss.kl), and the norm",
        "`python -m classroom run train.py --epochs 4 --output_dir runs/my-step`: the demo, trained by your step.",
        ("test_train.py::test_a_step_is_algorithm_1", "test_train.py::test_the_teacher_sees_the_two_global_views_only",
         "test_train.py::test_accumulated_micro_batches_are_one_step_of_the_whole_batch",
         "test_train.py::test_a_frozen_last_layer_does_not_move_and_the_rest_does",
         "test_train.py::test_a_step_calls_the_student_that_knows_the_other_processes",
         "test_train.py::test_the_center_averages_the_logits_of_all_processes",
         "test_train.py::test_a_step_in_bf16_is_near_the_step_in_fp32",
         "test_methods.py::test_fig_6s_teachers_are_the_student_of_the_step_that_their_name_says"),
        {"the center updated before the loss": [
            ("        loss = dino_loss(", "        dino_loss.update_center(teacher_logits)\n        loss = dino_loss("),
            ("    dino_loss.update_center(world.mean(torch.stack(teacher_mean)))\n", "")],
         "the teacher follows before the student's step": [
            ("    update_teacher(student, teacher, values.teacher_momentum)\n", ""),
            ("optimizer.step()", "update_teacher(student, teacher, values.teacher_momentum); optimizer.step()")],
         "the gradients not clipped": [("clip_gradients(student, clip_grad)", "clip_gradients(student, 0)")],
         "a frozen layer's gradients dropped before clipping": [
            ("    norm = clip_gradients(student, clip_grad)\n", ""),
            ("    optimizer.step()", "    norm = clip_gradients(student, clip_grad)\n    optimizer.step()")],
         "the gradients kept for the next step": [("    optimizer.zero_grad()\n", "")],
         "the other processes forgotten": [("ddp_student(crops)", "student(crops)")],
         "a center of each process's own": [("world.mean(torch.stack(teacher_mean))",
                                             "torch.stack(teacher_mean).mean(dim=0, keepdim=True)")],
         "the gradients summed over the micro-batches": [("(loss / len(micro_batches))", "loss")]}),
    Exercise(
        "eval_knn.py:knn_votes", "the k-NN vote",
        "Each of the k nearest images votes for its label with a weight that falls with the distance. A row's votes "
        "may all be multiplied by one factor: take its largest cosine off, or at a low T the exponential overflows.",
        "votes[i, c] = sum over the neighbours j of i with label c of  exp(cosine[i, j] / T)",
        "`python eval_knn.py --pretrained_weights runs/labs/both/checkpoint.pth --temperature 1`: do weights matter?",
        ("test_knn.py::test_votes_are_weighted_by_the_exponential_of_the_cosine",
         "test_knn.py::test_nearer_images_outvote_more_images",
         "test_knn.py::test_at_a_low_temperature_the_nearest_image_decides"),
        {"each neighbour one vote": [("((cosines - largest) / temperature).exp()", "torch.ones_like(cosines)")],
         "the temperature forgotten": [(" / temperature", "")],
         "the largest not taken off": [("cosines - largest", "cosines - 1")]}),
    Exercise(
        "attention.py:keep_mass", "the mask that keeps a share of the attention",
        "The mask of Fig. 1 and 4: of each map the fewest patches, the heaviest first, that together hold at least the "
        "share `mass` of it. A map is the last two axes together, of r x c patches, and need not sum to 1.",
        "smallest set M with  sum over M of a[i] >= mass sum over all of a[i]",
        "the mask beside the maps in a run's `attention.png`; visualize_attention.py has --threshold for yours.",
        ("test_attention.py::test_keep_mass_keeps_the_fewest_heaviest_patches_that_hold_the_mass",
         "test_attention.py::test_dropping_one_more_patch_would_keep_too_little"),
        {"the lightest are kept": [("sort(dim=-1)", "sort(dim=-1, descending=True)")],
         "the share that goes, not the one that stays": [("1 - mass  #", "mass  #")],
         "a map taken to sum to 1": [("(flat / flat.sum(dim=-1, keepdim=True))", "flat")],
         "a patch too few": [(".cumsum(dim=-1) > 1 - mass", ".cumsum(dim=-1) - weights > 1 - mass")]}),
    Exercise(
        "loss.py:sinkhorn_knopp", "Sinkhorn-Knopp",
        "Instead of centering, SwAV shares the prototypes out among the batch: q starts as exp(logits), and in turn "
        "the columns are made equal, then the rows to sum to 1. Work with log q, from which a column's logarithm of "
        "its sum of exponentials is taken off. total and largest reduce over all processes: take largest(maximum of "
        "each column) off before the exponential, and total(sum of each column) for the sum. Return log q.",
        "repeat:  q[i, k] <- q[i, k] / sum_i q[i, k]      prototypes, the columns\n"
        "         q[i, k] <- q[i, k] / sum_k q[i, k]      samples, the rows, last",
        "`python train.py --centering sinkhorn --epochs 4 --output_dir runs/sinkhorn` (Table 7, row 3).",
        ("test_methods.py::test_sinkhorn_knopp_equals_the_algorithm_in_float64",
         "test_methods.py::test_sinkhorns_rows_sum_to_one_and_its_columns_are_equal_in_the_end",
         "test_methods.py::test_sinkhorn_stays_finite_at_the_lowest_temperature",
         "test_methods.py::test_sinkhorn_shares_the_prototypes_out_among_the_batch_of_all_processes"),
        {"the rows before the columns": [
            ("        top = largest(", "        log_q = log_q.log_softmax(dim=1)\n        top = largest("),
            ("        log_q = log_q.log_softmax(dim=1)\n    return", "    return")],
         "the maximum not taken off": [("log_q - top - total((log_q - top).exp()", "log_q - total(log_q.exp()")]}),
    Exercise(
        "evals/video_segmentation.py:propagate", "labels that propagate",
        "Each patch of a frame takes the labels of those patches of earlier frames that are most like it: the topk "
        "largest cosines among those at most radius rows and columns away (radius 0: all are near), weighted by a "
        "softmax; all, where fewer than topk are near. Go row by row: all cosines at once would not fit into memory.",
        "label[i] = sum over the topk likest j near i of  w[i, j] label[j]      w[i, .] = softmax(cos(i, .) / T)\n"
        "(r, c, D), (m, r, c, D), labels (m, r, c, C) -> (r, c, C)",
        "`python -m evals.video_segmentation --pretrained_weights runs/labs/both/checkpoint.pth`, and its GIFs.",
        ("test_video.py::test_propagation_agrees_with_a_loop_over_all_pairs",
         "test_video.py::test_a_patch_hears_exactly_the_patches_in_its_window"),
        {"weights that do not sum to 1": [("(best / temperature).softmax(dim=1)", "(best / temperature).exp()")],
         "the softmax over the patches asked": [("softmax(dim=1)", "softmax(dim=0)")],
         "columns without a limit": [(".masked_fill(far, -torch.inf)", "")]}),
    Exercise(
        "loss.py:CrossEntropy.forward", "the loss that training uses, and its gradient by hand",
        "The sum over pairs of exercise 1, view by view (student_logits.split(len(p1))), and its derivative by the "
        "student's logits, which the same pass finds: autograd would go over them again. p1, p2: the teacher's outputs "
        "on the globals. ctx.gradient gets the gradient without its 1 / tau, ctx.tau gets tau: backward wants both. "
        "Logits may be bf16: compute in fp32.",
        "p = P_2 for view 1, P_1 for view 2, P_1 + P_2 for the locals        n = sum_k p[k] = 1, 1, 2\n"
        "total = - sum over views, images, k of  p[k] log softmax(s / tau)[k]\n"
        "d total / d s = (n softmax(s / tau) - p) / tau",
        "`python -m classroom run train.py --epochs 4 --compile false --output_dir runs/my-loss`: it trains.",
        ("test_loss.py::test_eq_3_the_loss_is_the_cross_entropy_averaged_over_pairs_of_different_views[DINOLoss]",
         "test_loss.py::test_a_view_is_never_paired_with_itself[DINOLoss]",
         "test_loss.py::test_the_compiled_form_and_its_gradient_equal_the_written_out_ones[dtype0]",
         "test_loss.py::test_the_compiled_form_and_its_gradient_equal_the_written_out_ones[dtype1]"),
        {"the same view paired": [("[(p2, 1), (p1, 1), (both, 2)][min(view, 2)]", "(both, 2)")],
         "two teachers' views, one softmax": [(".mul_(n)", "")]}),
)
