"""The exercises as data, easiest first.

Nothing of a solution stands here: what is left out is taken from the source itself.
The wrong answers that the tests must catch are in tests/classroom_answers.py.
"""
from typing import NamedTuple


class Exercise(NamedTuple):
    """One function to write.

    file and name: where it is; a method is named Class.method.
    title: a few words. task: what to write. equation: the same as mathematics.
    look: what is worth a look once it passes.
    tests: those that check it, as pytest names them, under tests/.
    """

    file: str
    name: str
    title: str
    task: str
    equation: str
    look: str
    tests: tuple[str, ...]

    @property
    def place(self) -> str:
        """The name under which progress is kept."""
        return f"{self.file}:{self.name}"


LADDER = (
    Exercise(
        file="loss.py",
        name="DINOLoss.forward",
        title="the loss",
        task=(
            "The student predicts from one view what the teacher says of another. "
            "split_views(student_logits, teacher_logits) returns the student's V views, and "
            "self.teacher_probs(logits, temperature) returns P_t (Eq. 1) for the rows of both "
            "teacher views, the first view's first. The student's temperature is "
            "self.student_temp. No gradient may reach the teacher. The logits may be bf16: compute "
            "in fp32. A view is never paired with itself: how many pairs are there? Keep the two "
            "parts of the loss in self.teacher_entropy (entropy(p) computes it) and in self.kl, "
            "both without gradient."
        ),
        equation=(
            "P_s = softmax(g_s / tau_s) over the K prototypes\n"
            "H(P_t, P_s) = - sum_k P_t[k] log P_s[k]    (Eq. 2)\n"
            "loss = mean of H(P_t(x), P_s(x')) over x in {g1, g2}, x' != x, and images    (Eq. 3)\n"
            "loss = entropy of P_t + KL    (Eq. 5)"
        ),
        look=(
            "`python -m classroom run train.py --preset lab --output_dir "
            "runs/my-loss`, two minutes: its last entropy, KL and k-NN are near the unchanged "
            "run's, above lab 1."
        ),
        tests=(
            "test_loss.py::"
            "test_eq_3_the_loss_is_the_cross_entropy_averaged_over_pairs_of_different_views",
            "test_loss.py::test_the_gradient_comes_from_pairs_of_different_views",
            "test_loss.py::test_no_gradient_reaches_the_teacher",
            "test_loss.py::test_half_precision_logits_are_computed_in_fp32",
            "test_loss.py::test_entropy_and_kl_are_non_negative_and_sum_to_the_loss",
        ),
    ),
    Exercise(
        file="loss.py",
        name="DINOLoss.update_center",
        title="the center",
        task=(
            "The center follows the mean of the teacher's logits over the batch, each prototype's "
            "its own, as an exponential moving average, computed in fp32. Subtracted from the "
            "logits, it keeps one prototype from winning everywhere."
        ),
        equation=(
            "c <- m c + (1 - m) mean_b g_t(x_b)    (Eq. 4)\n"
            "m = self.center_momentum, c = self.center, (1, K)"
        ),
        look='classroom/README.md, "No centering": what happens without it.',
        tests=(
            "test_loss.py::test_eq_4_the_center_is_an_average_of_the_teachers_logits",
            "test_loss.py::test_center_momentum_one_switches_centering_off",
        ),
    ),
    Exercise(
        file="teacher.py",
        name="update_teacher",
        title="the EMA teacher",
        task=(
            "Every parameter of the teacher moves a little towards the student's of the same name, "
            "in place. Pair them by name, not by place: a student may have more of them, such as "
            "a predictor. Nothing else moves: the running statistics of a batch normalisation are "
            "buffers, and the teacher's own."
        ),
        equation="theta_t <- lambda theta_t + (1 - lambda) theta_s    lambda = momentum",
        look=(
            "the k-NN panel of `curves.png` in a run's folder: is the teacher above its student, "
            "as in Fig. 6?"
        ),
        tests=(
            "test_teacher.py::test_after_n_steps_the_teacher_is_the_weighted_sum_of_all_students",
            "test_teacher.py::test_parameters_meet_by_their_names",
            "test_teacher.py::test_buffers_are_the_teachers_own",
        ),
    ),
    Exercise(
        file="optimizer.py",
        name="cosine",
        title="the schedules",
        task=(
            "Learning rate, weight decay and teacher momentum follow half a cosine from start to "
            "end. The learning rate first rises linearly: step 0 has 0, also where the warm-up is "
            "that one step, and the last step of the warm-up already has start. The first step of "
            "the cosine has start too. The step after the last one would have end."
        ),
        equation=(
            "warm-up: start step / (warmup_steps - 1)\n"
            "then:    end + (start - end) (1 + cos(pi p)) / 2\n"
            "p: the fraction of the steps after the warm-up that is over"
        ),
        look="the right panel of `curves.png` in a run's folder.",
        tests=(
            "test_optimizer.py::test_the_cosine_falls_from_start_to_end_through_the_middle",
            "test_optimizer.py::"
            "test_the_warm_up_is_linear_from_zero_and_reaches_the_start_value_on_its_last_step",
            "test_optimizer.py::test_after_the_warm_up_it_is_the_releases_closed_form",
        ),
    ),
    Exercise(
        file="head.py",
        name="DINOHead.forward",
        title="the head",
        task=(
            "Fig. 9: through self.mlp to the bottleneck, to length 1, and through self.last_layer "
            "to the K prototypes."
        ),
        equation=(
            "x = mlp(features)\n"
            "logits = last_layer(x / ||x||), each the cosine of x and a prototype"
        ),
        look=(
            "`python -m ablations.train --preset lab --head_l2_bottleneck false "
            "--output_dir runs/no-l2`: a head that normalises nothing."
        ),
        tests=("test_head.py::test_logits_are_cosines_with_the_prototypes",),
    ),
    Exercise(
        file="vit.py",
        name="Attention.forward",
        title="attention",
        task=(
            "How much each token, a query, takes from every other, a key: a softmax of their "
            "products. self.queries_keys_values(x) returns q, k and v, each (B, h, N, d). Without "
            "the factor the products spread as sqrt(d), and the softmax has hardly a gradient. The "
            "heads' outputs stand side by side, head after head, and self.proj mixes them. With "
            "`queries` only that many tokens, the first, are queries; all stay keys."
        ),
        equation=(
            "A[b, h, i, j] = softmax over j of  q[b, h, i] . k[b, h, j] / sqrt(d)\n"
            "out[b, i] = proj(concat over h of  sum_j A[b, h, i, j] v[b, h, j])"
        ),
        look=(
            "`attention.png` in a run's folder: row 0 of A; visualize_attention.py draws it on "
            "your images."
        ),
        tests=(
            "test_vit.py::"
            "test_attention_mixes_the_values_head_by_head_with_the_softmax_of_scaled_products",
        ),
    ),
    Exercise(
        file="vit.py",
        name="VisionTransformer.positions",
        title="position interpolation",
        task=(
            "The position embeddings are learnt on a square grid, self.grid patches a side; the "
            "first row of self.pos_embed is [CLS]'s. The learnt grid gets them as they are. "
            "Another grid gets them by bicubic interpolation, and [CLS] keeps its own. As in the "
            "release, 0.1 is added to the rows and columns of the scale."
        ),
        equation=(
            "scale = ((rows + 0.1) / grid, (cols + 0.1) / grid)\n"
            'F.interpolate(..., scale_factor=scale, mode="bicubic")\n'
            "(1, 1 + grid^2, D) -> (1, D, grid, grid) -> (1, D, rows, cols) "
            "-> (1, 1 + rows cols, D)"
        ),
        look="its caller, `tokens`: the demo's local crops have 24 pixels, its grid is of 48.",
        tests=(
            "test_vit.py::test_positions_are_sampled_bicubically_with_the_releases_scale",
            "test_vit.py::test_positions_are_the_learnt_ones_on_their_own_grid_only",
        ),
    ),
    Exercise(
        file="multicrop.py",
        name="forward_crops",
        title="the multi-crop forward",
        task=(
            "Crops of one size go through the backbone together: it runs once for the globals and "
            "once for the locals, which stand one after the other in the list. The teacher gets no "
            "locals. The head then sees all features in one pass, since it may have a batch "
            "normalisation. The views stay in their order."
        ),
        equation=(
            "V crops (B, 3, S, S) -> features (V B, D), one backbone pass for each size\n"
            "                     -> logits (V B, K), one head pass"
        ),
        look='classroom/README.md, "No multi-crop": what the locals cost, and what they bring.',
        tests=(
            "test_multicrop.py::test_one_backbone_pass_per_resolution_keeps_the_order_of_the_views",
        ),
    ),
    Exercise(
        file="optimizer.py",
        name="parameter_groups",
        title="weight decay, and on what",
        task=(
            "Two groups for the optimizer: matrices decay; biases and the scales of "
            "normalisations, which have one axis, do not. What takes no gradient, as the frozen "
            'gain of the prototypes, is in neither. "decays" says of each group whether it does. '
            'The second also has a "weight_decay" of 0.0, since AdamW\'s own is 0.01.'
        ),
        equation=(
            '[{"params": [...], "decays": True},\n'
            ' {"params": [...], "decays": False, "weight_decay": 0.0}]'
        ),
        look='`train.py:set_schedules`, which reads "decays" at each step.',
        tests=("test_train.py::test_biases_and_norms_do_not_decay_but_positions_and_cls_do",),
    ),
    Exercise(
        file="train.py",
        name="train_step",
        title="a step of Algorithm 1",
        task=(
            "Clear the gradients of the last step. For each micro-batch the teacher sees the two "
            "global crops and takes no gradient, and the student sees all crops; both run under "
            "world.autocast(). Average the gradients of the micro-batches, then clip them by "
            "settings.clip_grad, and keep the norm that clip_gradients returns. "
            "hardware.unwrap(student) is the network itself: clip that, and drop the gradients of "
            "its head.last_layer if now.last_layer_frozen. Then the student steps, the teacher "
            "follows (follow is update_teacher), and last the center moves, by the mean of the "
            "teacher's logits over the micro-batches and over the processes. "
            "world.mean(tensor) is the mean over the processes, entry by entry."
        ),
        equation=(
            "loss -> backward -> clip -> student's step -> teacher's EMA -> center\n"
            "once a step, not once a micro-batch\n"
            "returns, (4,): the means over the micro-batches of loss, dino_loss.teacher_entropy\n"
            "and dino_loss.kl, and the norm"
        ),
        look=(
            "`python -m classroom run train.py --preset lab --output_dir runs/my-step`: the "
            "labs' unchanged run, trained by your step."
        ),
        tests=(
            "test_train.py::test_a_step_is_algorithm_1",
            "test_train.py::test_the_teacher_sees_the_two_global_views_only",
            "test_train.py::test_accumulated_micro_batches_are_one_step_of_the_whole_batch",
            "test_train.py::test_a_frozen_last_layer_does_not_move_and_the_rest_does",
            "test_train.py::test_a_step_calls_the_student_that_knows_the_other_processes",
            "test_train.py::test_the_center_averages_the_logits_of_all_processes",
            "test_train.py::test_a_step_in_bf16_is_near_the_step_in_fp32",
        ),
    ),
    Exercise(
        file="features.py",
        name="knn_votes",
        title="the k-NN vote",
        task=(
            "Each of the k nearest images votes for its label with a weight that falls with the "
            "distance. The votes of a row may all be multiplied by one factor: subtract its "
            "largest cosine, or the exponential overflows at a low T."
        ),
        equation=(
            "votes[i, c] = sum of exp(cosine[i, j] / T) over the neighbours j of i with label c"
        ),
        look=(
            "`python eval_knn.py --pretrained_weights runs/labs/both/checkpoint.pth "
            "--temperature 1`: do weights matter?"
        ),
        tests=(
            "test_knn.py::test_votes_are_weighted_by_the_exponential_of_the_cosine",
            "test_knn.py::test_nearer_images_outvote_more_images",
            "test_knn.py::test_at_a_low_temperature_the_nearest_image_decides",
        ),
    ),
    Exercise(
        file="attention.py",
        name="keep_mass",
        title="the mask that keeps a fraction of the attention",
        task=(
            "The mask of Fig. 1 and 4: of each map the fewest patches, the heaviest first, that "
            "together hold at least the fraction `mass` of it. A map is the last two axes "
            "together, of r x c patches, and need not sum to 1."
        ),
        equation="smallest set M with  sum over M of a[i] >= mass sum over all of a[i]",
        look=(
            "the mask beside the maps in a run's `attention.png`; visualize_attention.py has "
            "--threshold for yours."
        ),
        tests=(
            "test_attention.py::"
            "test_keep_mass_keeps_the_fewest_heaviest_patches_that_hold_the_mass",
            "test_attention.py::test_dropping_one_more_patch_would_keep_too_little",
        ),
    ),
    Exercise(
        file="ablations/variants.py",
        name="sinkhorn_knopp",
        title="Sinkhorn-Knopp",
        task=(
            "SwAV does not center: it shares the prototypes out among the batch. q starts as "
            "exp(logits). In turn the columns are made equal, then the rows made to sum to 1. Work "
            "with log q: to divide a column by its sum is to subtract the logarithm of its sum of "
            "exponentials. A column runs over the rows of all processes: world.largest(the maximum "
            "of each column) is subtracted before the exponential, and world.total(the sum of each "
            "column) is the sum; where world is None there is one process. Return log q."
        ),
        equation=(
            "repeat:  q[i, k] <- q[i, k] / sum_i q[i, k]    prototypes, the columns\n"
            "         q[i, k] <- q[i, k] / sum_k q[i, k]    samples, the rows, last"
        ),
        look=(
            "`python -m ablations.train --centering sinkhorn --preset lab "
            "--output_dir runs/sinkhorn` (Table 7, row 3)."
        ),
        tests=(
            "test_variants.py::test_sinkhorn_knopp_equals_the_algorithm_in_float64",
            "test_variants.py::"
            "test_sinkhorns_rows_sum_to_one_and_its_columns_are_equal_in_the_end",
            "test_variants.py::test_sinkhorn_stays_finite_at_the_lowest_temperature",
            "test_variants.py::"
            "test_sinkhorn_shares_the_prototypes_out_among_the_batch_of_all_processes",
        ),
    ),
    Exercise(
        file="evals/video_segmentation.py",
        name="propagate",
        title="labels that propagate",
        task=(
            "Each patch of a frame takes the labels of those patches of earlier frames that are "
            "most like it: the topk largest cosines among those at most radius rows and columns "
            "away, weighted by a softmax. At radius 0 all are near. If fewer than topk are near, "
            "all count. Go row by row: all cosines at once would not fit into memory."
        ),
        equation=(
            "label[i] = sum over the topk likest j near i of  w[i, j] label[j]\n"
            "w[i, .] = softmax(cos(i, .) / T)\n"
            "(r, c, D), (m, r, c, D), labels (m, r, c, C) -> (r, c, C)"
        ),
        look=(
            "`python -m evals.video_segmentation "
            "--pretrained_weights runs/labs/both/checkpoint.pth`, and its GIFs."
        ),
        tests=(
            "test_video.py::test_propagation_agrees_with_a_loop_over_all_pairs",
            "test_video.py::test_a_patch_hears_exactly_the_patches_in_its_window",
        ),
    ),
)
