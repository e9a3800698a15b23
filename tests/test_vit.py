"""The Vision Transformer: shapes, names, equations, positions at any resolution."""
import pytest
import torch
import torch.nn.functional as F

import vit

SMALL = {"patch_size": 7, "img_size": 35, "embed_dim": 22, "depth": 3, "num_heads": 2, "init_std": 0.2}


def small_vit(**changes) -> vit.VisionTransformer:
    torch.manual_seed(0)
    return vit.VisionTransformer(**SMALL | changes).eval()


def test_features_attention_and_layers_have_the_stated_shapes_for_a_image_that_is_not_square():
    network, images = small_vit(), torch.randn(3, 3, 14, 77)
    tokens = 1 + 2 * 11
    assert network(images).shape == (3, 22)
    assert network.get_last_selfattention(images).shape == (3, 2, tokens, tokens)
    layers = network.get_intermediate_layers(images, n=2)
    assert [layer.shape for layer in layers] == [(3, tokens, 22)] * 2


def test_the_last_intermediate_layer_holds_the_feature():
    network, images = small_vit(), torch.randn(2, 3, 35, 35)
    torch.testing.assert_close(network.get_intermediate_layers(images, n=3)[-1][:, 0], network(images))


def test_leaving_out_the_last_blocks_patches_changes_neither_the_feature_nor_a_gradient():
    """The loss reads [CLS] alone: what the last block computes for patches reaches nothing."""
    images, direction = torch.randn(3, 3, 14, 77, dtype=torch.float64), torch.randn(3, 22, dtype=torch.float64)
    spared, whole = small_vit().double(), small_vit().double()
    feature, reference = spared(images), whole.get_intermediate_layers(images)[-1][:, 0]
    torch.testing.assert_close(feature, reference)
    (feature * direction).sum().backward()
    (reference * direction).sum().backward()
    for (name, weight), other in zip(spared.named_parameters(), whole.parameters()):
        torch.testing.assert_close(weight.grad, other.grad, msg=f"the gradient of {name} differs")


def test_the_feature_is_layer_normalised():
    feature = small_vit()(torch.randn(5, 3, 35, 35))
    torch.testing.assert_close(feature.mean(dim=1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(feature.var(dim=1, unbiased=False), torch.ones(5), atol=1e-3, rtol=0)


def test_attention_is_the_softmax_of_scaled_products_query_by_query():
    q, k, v = torch.randn(3, 2, 3, 5, 7, dtype=torch.float64).unbind(0)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                scores = torch.stack([(q[b, h, i] * k[b, h, j]).sum() / 7 ** 0.5 for j in range(5)])
                weights = scores.exp() / scores.exp().sum()
                torch.testing.assert_close(vit.attention_probs(q, k)[b, h, i], weights, msg="a query's weights are a "
                                           "softmax over the keys, the last axis, of products divided by sqrt(d)")
                torch.testing.assert_close(vit.attend(q, k, v)[b, h, i], weights @ v[b, h])


def test_explicit_attention_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 3, 37, 16).unbind(0)
    torch.testing.assert_close(vit.attention_probs(q, k) @ v, F.scaled_dot_product_attention(q, k, v))
    half = [x.bfloat16() for x in (q, k, v)]
    torch.testing.assert_close(vit.attend(*half).float(), vit.attend(q, k, v), atol=3e-2, rtol=3e-2)


def test_the_attention_shown_is_the_attention_used():
    network, images = small_vit(), torch.randn(2, 3, 35, 35)
    x = network.tokens(images)
    for block in network.blocks[:-1]:
        x = block(x)
    last = network.blocks[-1]
    probs = network.get_last_selfattention(images)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2, 2, 26))
    values = last.attn.queries_keys_values(last.norm1(x))[2]
    by_hand = last.attn.proj((probs @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(last.attn(last.norm1(x)), by_hand)


def test_patches_are_mapped_as_by_the_convolution_whose_weights_they_have():
    embed, images = small_vit().patch_embed, torch.randn(2, 3, 14, 77)
    torch.testing.assert_close(embed(images), embed.proj(images).permute(0, 2, 3, 1))


def bicubic(t: float) -> list[float]:
    """Keys' cubic kernel with a = -0.75 (PyTorch's) at the distances 1 + t, t, 1 - t, 2 - t."""
    a = -0.75
    near = lambda d: (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1
    far = lambda d: a * d ** 3 - 5 * a * d ** 2 + 8 * a * d - 4 * a
    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


@pytest.mark.parametrize(("rows", "cols"), [(3, 8), (6, 6), (5, 4), (11, 2)])
def test_positions_are_sampled_bicubically_with_the_releases_scale(rows, cols):
    network = small_vit()
    grid, learnt = 5, network.pos_embed.detach()[0, 1:].view(5, 5, 22)
    resized = network.positions(rows, cols)[0, 1:].view(rows, cols, 22)
    clamp = lambda i: min(max(i, 0), grid - 1)
    for row in range(rows):
        for col in range(cols):
            y, x = (row + 0.5) * grid / (rows + 0.1) - 0.5, (col + 0.5) * grid / (cols + 0.1) - 0.5
            y0, x0 = int(y // 1), int(x // 1)
            expected = sum(wy * wx * learnt[clamp(y0 + i - 1), clamp(x0 + j - 1)]
                           for i, wy in enumerate(bicubic(y - y0)) for j, wx in enumerate(bicubic(x - x0)))
            torch.testing.assert_close(resized[row, col], expected, atol=1e-5, rtol=1e-4,
                                       msg=f"row {row}, column {col} of {rows} x {cols}: rows before columns, D behind "
                                           "both, and the + 0.1 of the release in the scale")


def test_positions_are_the_learnt_ones_on_their_own_grid_only():
    network = small_vit()
    as_learnt = network.positions(5, 5) is network.pos_embed
    assert as_learnt, "on the learnt grid nothing is to be interpolated: its positions are self.pos_embed itself"
    same_number = small_vit(img_size=28).positions(2, 8)  # 16 patches, as 4 x 4, but not the same places
    assert not torch.allclose(same_number, small_vit(img_size=28).pos_embed), \
        "2 x 8 patches are as many as 4 x 4, but lie elsewhere: compare rows and columns, not their product"


@pytest.mark.parametrize(("height", "width", "nearest"), [(36, 35, "35 x 35"), (35, 40, "35 x 42"), (3, 7, "7 x 7")])
def test_a_size_that_does_not_divide_is_refused_with_the_nearest_sizes(height, width, nearest):
    with pytest.raises(ValueError, match=f"multiples of 7, such as {nearest}"):
        small_vit()(torch.randn(1, 3, height, width))


def test_state_dict_has_the_released_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in vit.vit_small(patch_size=16).state_dict().items()}
    block = {"norm1.weight": (384,), "norm1.bias": (384,), "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
             "attn.proj.weight": (384, 384), "attn.proj.bias": (384,), "norm2.weight": (384,), "norm2.bias": (384,),
             "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,),
             "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,)}
    expected = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "patch_embed.proj.weight": (384, 3, 16, 16),
                "patch_embed.proj.bias": (384,), "norm.weight": (384,), "norm.bias": (384,)}
    expected |= {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    assert shapes == expected


@pytest.mark.parametrize(("build", "millions"), [(vit.vit_tiny, 5.5), (vit.vit_small, 21.7), (vit.vit_base, 85.8)])
def test_parameters_number_what_table_1_says(build, millions):
    with torch.device("meta"):
        network = build(patch_size=16)
    assert sum(param.numel() for param in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_drop_path_grows_with_depth_and_spares_evaluation():
    network = small_vit(drop_path_rate=0.5)
    assert [block.drop_path.keep.item() for block in network.blocks] == [1.0, 0.75, 0.5]
    images = torch.randn(2, 3, 35, 35)
    torch.testing.assert_close(network(images), small_vit()(images))
    network.train()
    assert not torch.allclose(network(images), network(images)), "in training, samples must skip branches at random"


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_a_sample_that_skips_a_branch_costs_nothing_and_changes_nothing(keep):
    """x + branch(x) kept / keep, value and gradient, though the branch is computed for the kept samples alone."""
    x = torch.randn(7, 5, 3, requires_grad=True)
    drop = vit.DropPath(1 - keep).train()
    layer, seen = torch.nn.Linear(3, 3), []

    def branch(x):
        seen.append(len(x))
        return layer(x)[:, :2]

    torch.manual_seed(1)
    out = drop(x, branch, 2)
    torch.manual_seed(1)
    kept = torch.rand(7) < keep
    expected = x[:, :2] + layer(x)[:, :2] * (kept / max(keep, 1e-9)).view(7, 1, 1)
    torch.testing.assert_close(out, expected)
    assert seen == [int(kept.sum())], "the branch was computed for samples that skip it"
    for got, want in zip(*(torch.autograd.grad(each.square().sum(), [x, layer.weight]) for each in (out, expected))):
        torch.testing.assert_close(got, want)


def test_a_block_that_no_sample_takes_still_gives_every_weight_a_gradient():
    """Processes that average gradients wait for each other's: a missing one would stop the training."""
    block = vit.Block(22, 2, drop_path=1 - 1e-9).train()
    block(torch.randn(3, 101, 22)).sum().backward()
    assert all(param.grad is not None and not param.grad.any() for param in block.parameters())
