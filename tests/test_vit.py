"""The Vision Transformer: shapes, names, equations, positions at any resolution."""

import pytest
import torch

import vit

SMALL = {
    "patch_size": 7,
    "img_size": 35,
    "embed_dim": 22,
    "depth": 3,
    "num_heads": 2,
    "init_std": 0.2,
}


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
    torch.testing.assert_close(
        network.get_intermediate_layers(images, n=3)[-1][:, 0], network(images)
    )


def test_leaving_out_the_last_blocks_patches_changes_neither_the_feature_nor_a_gradient():
    """The loss reads [CLS] alone: what the last block computes for patches reaches nothing."""
    images, direction = (
        torch.randn(3, 3, 14, 77, dtype=torch.float64),
        torch.randn(3, 22, dtype=torch.float64),
    )
    spared, whole = small_vit().double(), small_vit().double()
    feature, reference = spared(images), whole.get_intermediate_layers(images)[-1][:, 0]
    torch.testing.assert_close(feature, reference)
    (feature * direction).sum().backward()
    (reference * direction).sum().backward()
    for (name, weight), other in zip(spared.named_parameters(), whole.parameters()):
        torch.testing.assert_close(weight.grad, other.grad, msg=f"the gradient of {name} differs")


@pytest.mark.parametrize("training", [False, True])
def test_forward_cls_is_row_0_of_the_whole_block(training):
    """Also while paths are dropped: the same samples skip the same branches."""
    block, x = vit.Block(22, 2, drop_path=0.5).train(training), torch.randn(7, 5, 22)
    torch.manual_seed(1)
    whole = block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(block.forward_cls(x), whole[:, :1])


def test_the_row_of_cls_alone_is_row_0_of_the_whole_attention():
    network, images = small_vit(), torch.randn(3, 3, 14, 77)
    whole = network.get_last_selfattention(images)
    torch.testing.assert_close(network.get_last_selfattention(images, rows=[0]), whole[:, :, :1])


def test_a_network_exported_with_a_free_batch_gives_the_same_features():
    network = vit.vit_nano().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        network, (torch.randn(3, 3, 64, 64),), dynamic_shapes=({0: batch},)
    ).module()
    for size in (2, 5, 11):
        images = torch.randn(size, 3, 64, 64)
        torch.testing.assert_close(exported(images), network(images))


def test_blocks_with_different_rates_share_one_compiled_graph():
    """A rate that were a float would make a graph of each block, up to the compiler's limit."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    network = small_vit(drop_path_rate=0.5, depth=5).train()
    for block in network.blocks[:-1]:
        block.compile(backend=backend)
    network(torch.randn(2, 3, 35, 35))
    torch.compiler.reset()
    assert len(graphs) == 1, f"4 blocks were compiled to {len(graphs)} graphs"


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (vit.vit_nano, (8, 64, 128, 4, 4)),
        (vit.vit_tiny, (16, 224, 192, 12, 3)),
        (vit.vit_small, (16, 224, 384, 12, 6)),
        (vit.vit_base, (16, 224, 768, 12, 12)),
    ],
)
def test_each_network_has_its_row_of_sizes_and_takes_others_by_keyword(build, sizes):
    patch_size, _, dim, _, heads = sizes
    with torch.device("meta"):
        network, other = build(), build(7, img_size=35, depth=2)
    assert (
        network.patch_size,
        network.grid * patch_size,
        network.embed_dim,
        len(network.blocks),
    ) == sizes[:4]
    assert network.blocks[0].attn.num_heads == heads
    assert (other.patch_size, other.grid, len(other.blocks), other.embed_dim) == (7, 5, 2, dim)


def test_the_feature_is_layer_normalised():
    feature = small_vit()(torch.randn(5, 3, 35, 35))
    torch.testing.assert_close(feature.mean(dim=1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(feature.var(dim=1, unbiased=False), torch.ones(5), atol=1e-3, rtol=0)


def test_attention_is_the_softmax_of_scaled_products_query_by_query():
    q, k = torch.randn(2, 2, 3, 5, 7, dtype=torch.float64).unbind(0)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                scores = torch.stack([(q[b, h, i] * k[b, h, j]).sum() / 7**0.5 for j in range(5)])
                weights = scores.exp() / scores.exp().sum()
                torch.testing.assert_close(
                    vit.attention_probs(q, k)[b, h, i],
                    weights,
                    msg="a query's weights are a "
                    "softmax over the keys, the last axis, of products divided by sqrt(d)",
                )


def test_attention_mixes_the_values_head_by_head_with_the_softmax_of_scaled_products():
    """The fused kernel computes what Sec. 3.2 of "Attention is all you need" writes, and nothing
    else.
    """
    torch.manual_seed(0)
    B, N, h, d = 2, 5, 3, 7
    attention, x = vit.Attention(h * d, h).double(), torch.randn(B, N, h * d, dtype=torch.float64)
    q, k, v = attention.qkv(x).split(h * d, dim=-1)
    heads = []
    for one in range(h):
        part = slice(one * d, (one + 1) * d)
        scores = torch.einsum("b i d, b j d -> b i j", q[..., part], k[..., part]) / d**0.5
        heads.append(torch.einsum("b i j, b j d -> b i d", scores.softmax(dim=-1), v[..., part]))
    expected = attention.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(
        attention(x),
        expected,
        msg="each head mixes its values by a softmax over the keys of "
        "q k / sqrt(d); the heads stand one after the other before the last layer",
    )
    torch.testing.assert_close(
        attention(x, queries=2),
        expected[:, :2],
        msg="with queries=2 only the first two tokens ask, and they still look at all",
    )


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


def test_a_patch_is_mapped_linearly_by_itself():
    embed, images = small_vit().patch_embed, torch.randn(2, 3, 14, 77)
    patch = images[1, :, 7:14, 21:28]
    expected = embed.proj.weight.flatten(1) @ patch.flatten() + embed.proj.bias
    torch.testing.assert_close(embed(images)[1, 1, 3], expected)


def bicubic(t: float) -> list[float]:
    """Keys' cubic kernel with a = -0.75 (PyTorch's) at the distances 1 + t, t, 1 - t, 2 - t."""
    a = -0.75
    near = lambda d: (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = lambda d: a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
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
            expected = sum(
                wy * wx * learnt[clamp(y0 + i - 1), clamp(x0 + j - 1)]
                for i, wy in enumerate(bicubic(y - y0))
                for j, wx in enumerate(bicubic(x - x0))
            )
            torch.testing.assert_close(
                resized[row, col],
                expected,
                atol=1e-5,
                rtol=1e-4,
                msg=f"row {row}, column {col} of {rows} x {cols}: rows before columns, D behind "
                "both, and the + 0.1 of the release in the scale",
            )


def test_positions_are_the_learnt_ones_on_their_own_grid_only():
    network = small_vit()
    as_learnt = network.positions(5, 5) is network.pos_embed
    assert as_learnt, (
        "on the learnt grid nothing is to be interpolated: its positions are self.pos_embed itself"
    )
    same_number = small_vit(img_size=28).positions(
        2, 8
    )  # 16 patches, as 4 x 4, but not the same places
    assert not torch.allclose(same_number, small_vit(img_size=28).pos_embed), (
        "2 x 8 patches are as many as 4 x 4, but lie elsewhere: "
        "compare rows and columns, not their product"
    )


@pytest.mark.parametrize(
    ("height", "width", "nearest"), [(36, 35, "35 x 35"), (35, 40, "35 x 42"), (3, 7, "7 x 7")]
)
def test_a_size_that_does_not_divide_is_refused_with_the_nearest_sizes(height, width, nearest):
    with pytest.raises(ValueError, match=f"multiples of 7, such as {nearest}"):
        small_vit()(torch.randn(1, 3, height, width))


def test_state_dict_has_the_released_names_and_shapes():
    shapes = {
        name: tuple(value.shape)
        for name, value in vit.vit_small(patch_size=16).state_dict().items()
    }
    block = {
        "norm1.weight": (384,),
        "norm1.bias": (384,),
        "attn.qkv.weight": (1152, 384),
        "attn.qkv.bias": (1152,),
        "attn.proj.weight": (384, 384),
        "attn.proj.bias": (384,),
        "norm2.weight": (384,),
        "norm2.bias": (384,),
        "mlp.fc1.weight": (1536, 384),
        "mlp.fc1.bias": (1536,),
        "mlp.fc2.weight": (384, 1536),
        "mlp.fc2.bias": (384,),
    }
    expected = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    expected |= {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    assert shapes == expected


@pytest.mark.parametrize(
    ("build", "millions"), [(vit.vit_tiny, 5.5), (vit.vit_small, 21.7), (vit.vit_base, 85.8)]
)
def test_parameters_number_what_table_1_says(build, millions):
    with torch.device("meta"):
        network = build(patch_size=16)
    assert sum(param.numel() for param in network.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.1
    )


def test_drop_path_grows_with_depth_and_spares_evaluation():
    network = small_vit(drop_path_rate=0.5)
    assert [block.drop_path.keep.item() for block in network.blocks] == [1.0, 0.75, 0.5]
    images = torch.randn(2, 3, 35, 35)
    torch.testing.assert_close(network(images), small_vit()(images))
    network.train()
    assert not torch.allclose(network(images), network(images)), (
        "in training, samples must skip branches at random"
    )


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_sample_keeps_a_branch_whole_or_not_at_all(rate):
    """Kept with chance 1 - rate and divided by it, so that the mean stays."""
    torch.manual_seed(0)
    drop = vit.DropPath(rate).train()
    kept = drop(torch.ones(10007, 2, 3))
    assert set(kept.unique().tolist()) <= {0.0, drop.keep.reciprocal().item()}
    assert (kept == kept[:, :1, :1]).all(), "a sample is kept in part"
    assert kept.mean() == pytest.approx(1, abs=0.03)
    assert (drop.eval()(torch.ones(5, 2, 3)) == 1).all(), "paths are dropped in training only"


def test_a_block_that_no_sample_takes_still_gives_every_weight_a_gradient():
    """Processes that average gradients wait for each other's: a missing one would stop the
    training.
    """
    block = vit.Block(22, 2, drop_path=1 - 1e-9).train()
    block(torch.randn(3, 101, 22)).sum().backward()
    assert all(param.grad is not None and not param.grad.any() for param in block.parameters())
