"""Each option of the composable UNet does what its formula says."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

from diffusers_ext import ComposableUNet2DModel
from diffusers_ext.models import unet_composable
from diffusers_ext.models.unet_composable import (
    ASPP,
    PRESETS,
    ComposableAttentionBlock,
    ComposableResnetBlock,
    PreActivationResnetBlock,
    SeparableConv2d,
)


TINY = {
    "sample_size": 16,
    "in_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "attention_head_dim": 8,
    "norm_num_groups": 4,  # several channels in a group, or the norm would hide an additive embedding
}
CONDITIONINGS = ("add", "film", "adain", "concat", "cross_attention")
TEMB_DIM = 64


def build(**options) -> ComposableUNet2DModel:
    """A model in evaluation mode of which no layer is silent; the same at every call."""
    torch.manual_seed(0)
    model = ComposableUNet2DModel(**{**TINY, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(batch: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return noise(batch, 3, height, width)


@torch.no_grad()
def predict(model: nn.Module, sample: torch.Tensor, timestep=300, *args, **kwargs) -> torch.Tensor:
    return model(sample, timestep, *args, **kwargs).sample


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max() > 1e-3 * b.abs().max()


def find(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


# Time


def test_sinusoidal_time_embedding_is_the_mlp_of_the_sinusoids():
    embedding = build().time_embedding
    timestep = torch.tensor([0.0, 17.25, 999.0])
    sinusoids = get_timestep_embedding(timestep, 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    expected = embedding.linear_2(F.silu(embedding.linear_1(sinusoids)))
    torch.testing.assert_close(embedding(timestep, torch.float32), expected)


def test_hybrid_time_embedding_adds_the_mlp_to_the_sinusoids():
    embedding = build(time_embedding_type="hybrid").time_embedding
    timestep = torch.tensor([0.0, 17.25, 999.0])
    sinusoids = get_timestep_embedding(timestep, TEMB_DIM, flip_sin_to_cos=True, downscale_freq_shift=0)
    mlp = embedding.linear_2(F.silu(embedding.linear_1(sinusoids)))
    torch.testing.assert_close(embedding(timestep, torch.float32), sinusoids + mlp)
    nn.init.zeros_(embedding.linear_2.weight)
    nn.init.zeros_(embedding.linear_2.bias)
    torch.testing.assert_close(embedding(timestep, torch.float32), sinusoids)


def test_learned_time_embedding_interpolates_its_table():
    embedding = build(time_embedding_type="learned", num_train_timesteps=100).time_embedding

    def mlp(rows):
        return embedding.linear_2(F.silu(embedding.linear_1(rows)))

    table = embedding.table.weight
    assert table.shape == (100, 16)
    timestep = torch.tensor([0, 41, 99.0])
    torch.testing.assert_close(embedding(timestep, torch.float32), mlp(table[[0, 41, 99]]))
    between = embedding(torch.tensor([41.25]), torch.float32)
    torch.testing.assert_close(between, mlp(0.75 * table[41:42] + 0.25 * table[42:43]))
    torch.testing.assert_close(embedding(torch.tensor([-3.0, 500.0]), torch.float32), mlp(table[[0, 99]]))


@pytest.mark.parametrize("word", ["sinusoidal", "learned", "hybrid"])
def test_fractions_of_timesteps_matter(word):
    model, sample = build(time_embedding_type=word), images()
    expected = predict(model, sample, 41)
    for same in (41.0, torch.tensor(41), torch.tensor([41, 41]), torch.tensor([41.0])):
        torch.testing.assert_close(predict(model, sample, same), expected)
    assert differ(predict(model, sample, 41.5), expected)
    assert differ(predict(model, sample, torch.tensor([41, 42]))[1], expected[1])


# Conditioning


def conditioned_block(word: str, order: str = "pre", **options) -> ComposableResnetBlock:
    return (
        build(time_conditioning=word, resnet_order=order, **options).down_blocks[1].resnets[0].train()
    )  # to 32 channels


def modulate(block: ComposableResnetBlock, hidden_states: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
    """What follows the first convolution."""
    return block.modulate(hidden_states, conditions, inner_norm(block))


def inner_norm(block: ComposableResnetBlock) -> nn.Module | None:
    return block.norm2 if isinstance(block, PreActivationResnetBlock) else block.norm1


@pytest.mark.parametrize("order", ["pre", "post"])
def test_add_is_a_sum_before_the_norm(order):
    block = conditioned_block("add", order)
    hidden_states, embedding = noise(2, 32, 8, 8), noise(2, TEMB_DIM, seed=1)
    shift = block.conditionings["add"].proj(embedding)
    expected = inner_norm(block)(hidden_states + shift[:, :, None, None])
    torch.testing.assert_close(modulate(block, hidden_states, add=embedding), expected)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_film_is_a_scale_and_a_shift_after_the_norm(order):
    block = conditioned_block("film", order)
    hidden_states, embedding = noise(2, 32, 8, 8), noise(2, TEMB_DIM, seed=1)
    scale, shift = block.conditionings["film"].proj(embedding)[:, :, None, None].split(32, dim=1)
    expected = inner_norm(block)(hidden_states) * (1 + scale) + shift
    torch.testing.assert_close(modulate(block, hidden_states, film=embedding), expected)


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("norm_type", ["group", "layer", "batch"])
def test_adain_sets_mean_and_deviation_of_each_channel(norm_type, order):
    block = conditioned_block("adain", order, norm_type=norm_type)
    hidden_states, embedding = 5 + 3 * noise(2, 32, 8, 8), noise(2, TEMB_DIM, seed=1)
    scale, mean = block.conditionings["adain"].proj(embedding).split(32, dim=1)
    actual = modulate(block, hidden_states, adain=embedding)
    torch.testing.assert_close(actual.mean(dim=(2, 3)), mean, atol=1e-4, rtol=1e-4)
    deviation = actual.std(dim=(2, 3), unbiased=False)
    torch.testing.assert_close(deviation, (1 + scale).abs(), atol=1e-4, rtol=1e-4)
    one_pixel = modulate(block, hidden_states[:, :, :1, :1], adain=embedding)
    torch.testing.assert_close(one_pixel[:, :, 0, 0], mean)
    assert inner_norm(block) is None


@pytest.mark.parametrize("other", ["add", "film"])
def test_adain_does_not_hide_the_other_embedding(other):
    block = conditioned_block("adain", class_conditioning=other, num_class_embeds=3)
    hidden_states = noise(2, 32, 8, 8)
    conditions = {"adain": noise(2, TEMB_DIM, seed=1), other: noise(2, TEMB_DIM, seed=2)}
    deviation, mean = torch.std_mean(hidden_states, dim=(2, 3), keepdim=True, unbiased=False)
    scale, shift = block.conditionings["adain"].proj(conditions["adain"])[:, :, None, None].split(32, dim=1)
    expected = (hidden_states - mean) / deviation * (1 + scale) + shift
    projection = block.conditionings[other].proj(conditions[other])[:, :, None, None]
    if other == "add":
        expected = expected + projection
    else:
        scale, shift = projection.split(32, dim=1)
        expected = expected * (1 + scale) + shift
    torch.testing.assert_close(modulate(block, hidden_states, **conditions), expected, atol=1e-4, rtol=1e-4)


def test_concat_puts_constant_planes_beside_the_channels():
    block = conditioned_block("concat")
    hidden_states, embedding = noise(2, 16, 8, 8), noise(2, TEMB_DIM, seed=1)
    planes = block.conditionings["concat"].proj(embedding)
    assert block.conv1.in_channels == 16 + planes.shape[1]
    expected = F.conv2d(hidden_states, block.conv1.weight[:, :16], block.conv1.bias, padding=1)
    taps = block.conv1.weight[:, 16:].sum(dim=(2, 3))
    difference = block.first_half(hidden_states, {"concat": embedding}, nn.Identity()) - expected
    interior = (planes @ taps.T)[:, :, None, None].expand(-1, -1, 6, 6)
    torch.testing.assert_close(difference[:, :, 1:-1, 1:-1], interior, atol=1e-5, rtol=1e-4)
    assert differ(difference[:, :, 0], difference[:, :, 4])  # the planes end at the border


def test_film_and_concat_have_different_jacobians():
    """A step of the embedding moves a concatenating convolution by the same amount whatever the image is."""

    def jacobian(word: str, hidden_states: torch.Tensor) -> torch.Tensor:
        block = find(build(time_conditioning=word), ComposableResnetBlock)[0]
        function = lambda e: block.first_half(hidden_states, {word: e}, nn.Identity())  # noqa: E731
        return torch.autograd.functional.jacobian(function, noise(1, TEMB_DIM, seed=1))

    first, second = noise(1, 16, 4, 4), noise(1, 16, 4, 4, seed=2)
    film, concat = jacobian("film", first), jacobian("concat", first)
    assert film.shape == concat.shape == (1, 16, 4, 4, 1, TEMB_DIM)
    assert differ(film, concat)
    torch.testing.assert_close(jacobian("concat", second), concat)
    assert differ(jacobian("film", second), film)
    constant = concat[0, :, 1:-1, 1:-1]
    torch.testing.assert_close(constant, constant[:, :1, :1].expand_as(constant))
    assert differ(film[0, :, 1, 1], film[0, :, 1, 2])


def test_cross_attention_chooses_between_tokens_of_the_embedding():
    model = build(time_conditioning="cross_attention")
    tokens = model.condition_tokens(noise(2, TEMB_DIM))
    assert tokens.shape == (2, 4, TEMB_DIM)
    block = find(model, ComposableAttentionBlock)[0]
    query = noise(2, 64, 32)
    choice = block.attn2(query, tokens)
    only_sum = block.attn2(torch.zeros_like(query), tokens)
    assert differ(choice - only_sum, torch.zeros(1) + 0.1)  # pixels read different mixtures
    assert all(attention.attn2 is not None for attention in find(model, ComposableAttentionBlock))
    assert all(attention.attn2 is None for attention in find(build(), ComposableAttentionBlock))


@pytest.mark.parametrize("time, label", list(itertools.product(CONDITIONINGS, repeat=2)))
def test_time_and_class_enter_as_chosen(time, label):
    model = build(time_conditioning=time, class_conditioning=label, num_class_embeds=5)
    sample, timestep, labels = images(), torch.tensor([20.0, 700.0]), torch.tensor([3, 1])
    expected = predict(model, sample, timestep, labels)
    changed = predict(model, sample, torch.tensor([20.0, 500.0]), labels)
    assert differ(changed[1], expected[1]) and not differ(changed[0], expected[0])
    changed = predict(model, sample, timestep, torch.tensor([3, 2]))
    assert differ(changed[1], expected[1]) and not differ(changed[0], expected[0])
    output = model(sample, timestep, labels).sample
    (output * noise(*output.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    # Equal words share a layer, others do not.
    for block in find(model, ComposableResnetBlock):
        assert set(block.conditionings) == {time, label} - {"cross_attention"}
    assert bool(model.condition_tokens) == ("cross_attention" in (time, label))


def test_embeddings_that_enter_alike_are_summed():
    model = build(num_class_embeds=5)
    conditions = model._conditions(images(), torch.tensor([5.0]), torch.tensor([3, 1]), None, None)
    temb = model.time_embedding(torch.tensor([5.0]), torch.float32)
    assert conditions.keys() == {"film"}
    torch.testing.assert_close(conditions["film"], F.silu(temb + model.class_embedding.weight[[3, 1]]))


def test_null_class_is_the_default_label():
    model, sample = build(num_class_embeds=5, null_class=True), images()
    assert model.class_embedding.weight.shape == (6, TEMB_DIM)
    for labels in ([5, 5], [5]):
        torch.testing.assert_close(predict(model, sample, 300, torch.tensor(labels)), predict(model, sample))
    assert differ(predict(model, sample), predict(model, sample, class_labels=torch.tensor([0])))


# Norms and residual blocks


@pytest.mark.parametrize("word, dims", [("group", (2, 3, 4)), ("layer", (1, 2, 3, 4)), ("batch", (0, 3, 4))])
def test_norm_standardises_its_set(word, dims):
    norm = ComposableUNet2DModel(**TINY, norm_type=word).conv_norm_out.train()
    groups = norm(3 + 2 * noise(4, 16, 8, 8)).unflatten(1, (4, 4))  # image, group, channel, row, column
    variance, mean = torch.var_mean(groups, dim=dims, unbiased=False)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-4, rtol=0)


@pytest.mark.parametrize("word", ["group", "layer", "batch"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_images_meet_only_in_batch_norm_and_only_in_training(word, order):
    model, sample = build(norm_type=word, resnet_order=order), images()
    other = torch.stack([sample[0], noise(3, 16, 16, seed=7)])
    assert not differ(predict(model, other)[0], predict(model, sample)[0])
    model.train()
    assert differ(predict(model, other)[0], predict(model, sample)[0]) == (word == "batch")


def test_group_norm_is_exact_in_both_memory_formats():
    norm = ComposableUNet2DModel(**TINY).conv_norm_out
    hidden_states = 1000 + noise(2, 16, 8, 8)
    expected = norm.double()(hidden_states.double()).float()
    norm.float()
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(norm(hidden_states.to(memory_format=layout)), expected, atol=1e-3, rtol=1e-3)


def test_order_of_the_activation():
    hidden_states, conditions = noise(2, 16, 8, 8), {"film": noise(2, TEMB_DIM, seed=1)}
    for order, start in (("pre", hidden_states), ("post", F.silu(hidden_states))):
        torch.manual_seed(0)
        block = find(ComposableUNet2DModel(**TINY, resnet_order=order), ComposableResnetBlock)[0]
        torch.testing.assert_close(block(hidden_states, conditions), start)  # its branch starts at zero
    pre, post = (find(build(resnet_order=order), ComposableResnetBlock)[0] for order in ("pre", "post"))
    branch = pre.conv1(F.silu(pre.norm1(hidden_states)))
    branch = pre.conv2(F.silu(modulate(pre, branch, **conditions)))
    torch.testing.assert_close(pre(hidden_states, conditions), hidden_states + branch)
    branch = F.silu(modulate(post, post.conv1(hidden_states), **conditions))
    branch = post.norm2(post.conv2(branch))
    torch.testing.assert_close(post(hidden_states, conditions), F.silu(hidden_states + branch))
    with torch.no_grad():  # where activations are written in place
        expected = hidden_states.clone()
        pre(hidden_states, conditions), post(hidden_states, conditions)
    assert torch.equal(hidden_states, expected)


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("conv_type", ["standard", "separable"])
def test_output_starts_at_zero_and_learns(order, conv_type):
    torch.manual_seed(0)
    model = ComposableUNet2DModel(**TINY, resnet_order=order, conv_type=conv_type, norm_type="batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    assert not model(images(), 5).sample.any()
    for _ in range(4):  # each opens one more of the zeros that stand behind each other
        optimizer.zero_grad()
        (model(images(), 5).sample - images()).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name


def test_dropout_is_for_training():
    model = build(dropout=0.5)
    assert torch.equal(predict(model, images()), predict(model, images()))
    model.train()
    assert differ(predict(model, images()), predict(model, images()))


# Convolutions and context


def test_separable_convolution_has_the_stated_parameters():
    for channels, out_channels in ((16, 16), (16, 48), (32, 8)):
        conv = SeparableConv2d(channels, out_channels, 3, padding=1)
        assert sum(parameter.numel() for parameter in conv.parameters()) == 9 * channels + channels * out_channels
        depthwise, pointwise = conv.depthwise.weight, conv.pointwise.weight
        full = pointwise * depthwise.view(1, channels, 3, 3)  # the full kernel that it factorises
        hidden_states = noise(2, channels, 8, 8)
        torch.testing.assert_close(conv(hidden_states), F.conv2d(hidden_states, full, padding=1), atol=1e-5, rtol=1e-4)


def test_separable_model_is_smaller_by_the_stated_numbers():
    standard, separable = build(), build(conv_type="separable")
    saved = 0
    names = {name for name, module in separable.named_modules() if isinstance(module, SeparableConv2d)}
    for name in names:
        conv = standard.get_submodule(name)
        channels, out_channels = conv.in_channels, conv.out_channels
        saved += 9 * channels * out_channels + out_channels - 9 * channels - channels * out_channels
    assert standard.num_parameters() - separable.num_parameters() == saved
    full = {name for name, module in standard.named_modules() if getattr(module, "kernel_size", None) == (3, 3)}
    assert full - names == {"conv_in", "conv_out"}


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("conv_type", ["standard", "separable"])
def test_dilation_spreads_the_receptive_field(dilation, conv_type):
    model = build(dilations=(1, dilation), conv_type=conv_type, norm_type="batch")  # others see whole images
    conditions = {"film": noise(1, TEMB_DIM)}
    for stage, level in ((model.down_blocks[1], dilation), (model.down_blocks[0], 1), (model.up_blocks[0], dilation)):
        block = stage.resnets[0]
        hidden_states = noise(1, block.norm1.num_features, 17, 17).requires_grad_()
        block(hidden_states, conditions)[0, :, 8, 8].sum().backward()
        rows = hidden_states.grad.abs().amax(dim=(0, 1, 3)).nonzero().flatten()
        assert rows.tolist() == list(range(8 - 2 * level, 8 + 2 * level + 1, level))


def test_channel_attention_gates_channels_by_their_means():
    assert build().down_blocks[0].resnets[0].channel_attention(torch.ones(1)) == 1  # nothing
    gate = build(channel_attention=True).down_blocks[0].resnets[0].channel_attention
    hidden_states = noise(2, 16, 8, 8)
    ratio = (gate(hidden_states) / hidden_states).flatten(2)
    torch.testing.assert_close(ratio, ratio[:, :, :1].expand_as(ratio), atol=1e-4, rtol=1e-4)
    assert 0 < ratio.min() and ratio.max() < 1
    squeezed = F.silu(hidden_states.mean(dim=(2, 3)) @ gate.linear_1.weight.T + gate.linear_1.bias)
    expected = torch.sigmoid(squeezed @ gate.linear_2.weight.T + gate.linear_2.bias)
    torch.testing.assert_close(ratio[:, :, 0], expected, atol=1e-4, rtol=1e-4)
    assert gate.linear_1.out_features == 4


def test_aspp_sees_several_scales():
    assert not find(build(), ASPP)
    (pyramid,) = find(build(bottleneck_context="aspp", norm_type="batch"), ASPP)
    assert [branch.dilation[0] for branch in pyramid.branches] == [1, 1, 2, 3]
    assert [branch.kernel_size[0] for branch in pyramid.branches] == [1, 3, 3, 3]
    hidden_states = noise(1, 32, 9, 9).requires_grad_()
    pyramid(hidden_states)[0, :, 4, 4].sum().backward()
    reach = hidden_states.grad[0].abs().amax(dim=0)
    assert (reach > 0).all()  # by the mean
    nn.init.zeros_(pyramid.pool.weight)
    hidden_states.grad = None
    pyramid(hidden_states)[0, :, 4, 4].sum().backward()
    expected = {(4 + y * rate, 4 + x * rate) for y, x in itertools.product((-1, 0, 1), repeat=2) for rate in (1, 2, 3)}
    assert set(map(tuple, hidden_states.grad[0].abs().amax(dim=0).nonzero().tolist())) == expected
    torch.manual_seed(0)
    (pyramid,) = find(ComposableUNet2DModel(**TINY, bottleneck_context="aspp"), ASPP)
    assert torch.equal(pyramid(hidden_states), hidden_states)  # starts at the identity


# Attention


@pytest.mark.parametrize("resolutions, levels", [((), []), ((8,), [1]), ((16,), [0]), ((16, 8), [0, 1])], ids=str)
def test_attention_is_where_it_is_asked_for(resolutions, levels):
    model = build(attention_resolutions=resolutions)
    assert [level for level, block in enumerate(model.down_blocks) if len(block.attentions)] == levels
    assert [1 - level for level, block in enumerate(model.up_blocks) if len(block.attentions)] == levels[::-1]
    assert len(model.mid_block.attentions) == 1
    assert all(
        block.attn1.heads == block.attn1.to_q.out_features // 8 for block in find(model, ComposableAttentionBlock)
    )


def attention_block(word: str, **options) -> ComposableAttentionBlock:
    return build(attention_position_embedding=word, **options).mid_block.attentions[0]  # 32 channels, 8 px, 4 heads


def attend(block: ComposableAttentionBlock, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Self-attention of tokens (B, L, C), without norm and residual sum."""
    bias = None
    if block.positions is not None:
        tokens, bias = block.positions(tokens, height, width)
    return block.attn1(tokens, None, bias)


@pytest.mark.parametrize("word", ["none", "sincos2d", "learned_fourier", "relative"])
def test_only_positions_tell_pixels_apart(word):
    block, tokens = attention_block(word), noise(2, 64, 32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert differ(attend(block, tokens[:, order], 8, 8), attend(block, tokens, 8, 8)[:, order]) == (word != "none")


@pytest.mark.parametrize("word", ["none", "sincos2d", "learned_fourier", "relative"])
@pytest.mark.parametrize("height, width", [(8, 24), (2, 2), (32, 16)])
def test_positions_adapt_to_the_size(word, height, width):
    model = build(attention_position_embedding=word)
    assert predict(model, images(2, height, width)).shape == (2, 3, height, width)


def test_sincos_positions_are_those_of_transformers():
    positions = attention_block("sincos2d").positions
    tokens, bias = positions(torch.zeros(2, 64, 32), 8, 8)
    expected = get_2d_sincos_pos_embed(32, 8, base_size=8).float()
    assert bias is None
    torch.testing.assert_close(tokens, expected.expand_as(tokens))
    larger = positions(torch.zeros(1, 128, 32), 8, 16)[0].view(8, 16, 32)  # columns twice as dense
    torch.testing.assert_close(larger[:, ::2], expected.view(8, 8, 32))


def test_learned_fourier_positions_span_every_size():
    positions = attention_block("learned_fourier").positions
    tokens, bias = positions(torch.zeros(1, 15, 32), 3, 5)
    assert bias is None and tokens.shape == (1, 15, 32)
    centre = positions(torch.zeros(1, 1, 32), 1, 1)[0]  # its pixel's centre is that of every image
    torch.testing.assert_close(tokens[:, 7:8], centre)
    wider = positions(torch.zeros(1, 45, 32), 3, 15)[0].view(3, 15, 32)  # the centre of each pixel, and two beside it
    torch.testing.assert_close(wider[:, 1::3], tokens.view(3, 5, 32))
    angles = 2 * torch.pi * torch.tensor([[-1 / 3, -0.4]]) @ positions.frequencies.weight.T
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    expected = positions.linear_2(F.gelu(positions.linear_1(features)))
    torch.testing.assert_close(tokens[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_relative_positions_depend_on_offsets_only():
    positions = attention_block("relative").positions
    tokens = torch.zeros(1, 1, 32)
    small, large = positions(tokens, 4, 6)[1], positions(tokens, 7, 9)[1]
    assert small.shape == (1, 4, 24, 24) and large.shape == (1, 4, 63, 63)
    small, large = (
        small[0].unflatten(1, (4, 6)).unflatten(3, (4, 6)),
        large[0].unflatten(1, (7, 9)).unflatten(3, (7, 9)),
    )
    torch.testing.assert_close(large[:, 2:6, 1:7, 2:6, 1:7], small)  # the same at any place, and at any size
    torch.testing.assert_close(small[:, 1:, 1:, 1:, 1:], small[:, :-1, :-1, :-1, :-1])
    assert differ(small[:, 0, 0, 0, 1], small[:, 0, 1, 0, 0]) and differ(small[:, 0, 0, 0, 1], small[:, 0, 0, 1, 0])
    offset = torch.tensor([[2.0, -1.0]])
    expected = positions.linear_2(F.relu(positions.linear_1(offset.sign() * (1 + offset.abs()).log())))
    torch.testing.assert_close(small[:, 3, 2, 1, 3], expected[0])


def test_translation_of_the_input_translates_the_output():
    """Where heads look at their surroundings, these are the same before and after, but at the border."""
    block = attention_block("relative")
    positions = block.positions
    with torch.no_grad():  # relu(log(1 + offset) - log 2.5) is zero for neighbours; others get no weight
        for parameter in positions.parameters():
            parameter.zero_()
        positions.linear_1.weight[:4] = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        positions.linear_1.bias[:4] = -torch.tensor([2.5, 1.2, 2.5, 2.5]).log()  # on one side not even those
        positions.linear_2.weight[:, :4] = -200
        image = noise(1, 12, 12, 32)
        moved = image.roll((2, 1), dims=(1, 2))
        output, moved_output = (attend(block, x.flatten(1, 2), 12, 12).unflatten(1, (12, 12)) for x in (image, moved))
        expected = output.roll((2, 1), dims=(1, 2))
        interior = (slice(None), slice(3, -1), slice(2, -1))
        torch.testing.assert_close(moved_output[interior], expected[interior], atol=1e-5, rtol=1e-4)
        assert differ(moved_output, expected)  # pixels at the border have new neighbours
        mirrored = attend(block, image.flip(1).flatten(1, 2), 12, 12).unflatten(1, (12, 12)).flip(1)
        assert differ(mirrored[interior], output[interior])
        # Absolute positions move with nothing.
        block = attention_block("sincos2d")
        output, moved_output = (attend(block, x.flatten(1, 2), 12, 12).unflatten(1, (12, 12)) for x in (image, moved))
        assert differ(moved_output[interior], output.roll((2, 1), dims=(1, 2))[interior])


# Cross-attention to other conditions


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=10,
        eos_token_id=49,
    )
    return CLIPTextModel(config).eval()


def test_text_encoder_conditions_the_model(text_encoder):
    model, sample = build(cross_attention_dim=24), images()
    prompt = torch.tensor([[1, 5, 9, 49, 0, 0], [1, 7, 8, 3, 4, 49]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    states = text_encoder(prompt, attention_mask=mask).last_hidden_state
    output = model(sample, 300, encoder_hidden_states=states, encoder_attention_mask=mask).sample
    (output * noise(*output.shape)).sum().backward()
    for name, parameter in text_encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    text_encoder.zero_grad()
    expected = output.detach()
    with torch.no_grad():
        other = text_encoder(prompt.where(prompt != 9, 10), attention_mask=mask).last_hidden_state
        states = states.detach()
        changed = predict(model, sample, encoder_hidden_states=other, encoder_attention_mask=mask)
    assert differ(changed[0], expected[0]) and not differ(changed[1], expected[1])
    assert differ(predict(model, sample), expected)  # no prompt

    padded = states.clone()
    padded[0, 4:] = 100
    for same_mask in (mask, mask.bool(), mask.float()):
        same = predict(model, sample, encoder_hidden_states=padded, encoder_attention_mask=same_mask)
        torch.testing.assert_close(same, expected, atol=1e-5, rtol=1e-4)
    assert differ(predict(model, sample, encoder_hidden_states=padded)[0], expected[0])
    cut = predict(model, sample[:1], encoder_hidden_states=states[:1, :4])
    torch.testing.assert_close(cut, expected[:1], atol=1e-5, rtol=1e-4)


def test_prompt_without_tokens_is_no_prompt():
    model, sample = build(cross_attention_dim=24), images()
    states = noise(2, 6, 24)
    nothing = predict(model, sample, encoder_hidden_states=states, encoder_attention_mask=torch.zeros(2, 6))
    torch.testing.assert_close(nothing, predict(model, sample), atol=1e-5, rtol=1e-4)
    one_for_all = predict(model, sample, encoder_hidden_states=states[:1])
    each = predict(model, sample, encoder_hidden_states=states[:1].expand(2, -1, -1))
    torch.testing.assert_close(one_for_all, each)


def test_prompt_and_class_stand_side_by_side():
    model = build(cross_attention_dim=24, class_conditioning="cross_attention", num_class_embeds=5, null_class=True)
    sample, states, labels = images(), noise(2, 6, 24), torch.tensor([1, 2])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    prompt = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    both = predict(model, sample, class_labels=labels, **prompt)
    assert differ(both, predict(model, sample, **prompt))
    assert differ(both, predict(model, sample, class_labels=labels))
    conditions = model._conditions(sample, torch.tensor([5.0]), labels, states, mask)
    assert conditions["context"].shape == (2, 4 + 1 + 6, 24)  # class, no prompt, prompt
    assert conditions["context_mask"][0, 0, 0].tolist() == [True] * 8 + [False] * 3


def test_fused_projections_change_nothing():
    model = build(cross_attention_dim=24, attention_position_embedding="relative")
    sample, states = images(), noise(2, 6, 24)
    expected = predict(model, sample, encoder_hidden_states=states)
    model.fuse_qkv_projections()
    attentions = find(model, ComposableAttentionBlock)
    assert all(hasattr(block.attn1, "to_qkv") and hasattr(block.attn2, "to_kv") for block in attentions)
    torch.testing.assert_close(predict(model, sample, encoder_hidden_states=states), expected)


# Modes


HARD = {  # everything that could trouble a compiler, a checkpoint or a cast
    "num_class_embeds": 5,
    "null_class": True,
    "cross_attention_dim": 24,
    "time_embedding_type": "learned",
    "class_conditioning": "cross_attention",
    "norm_type": "batch",
    "conv_type": "separable",
    "dilations": (1, 2),
    "channel_attention": True,
    "attention_position_embedding": "relative",
    "bottleneck_context": "aspp",
}
EASY = {
    "num_class_embeds": 5,
    "time_embedding_type": "hybrid",
    "time_conditioning": "concat",
    "class_conditioning": "adain",
    "resnet_order": "post",
    "attention_position_embedding": "learned_fourier",
}
modes = pytest.mark.parametrize("options", [pytest.param(HARD, id="hard"), pytest.param(EASY, id="easy")])


def conditions(options: dict) -> dict[str, torch.Tensor]:
    inputs = {"sample": images(), "timestep": torch.tensor([20.0, 700.5]), "class_labels": torch.tensor([3, 1])}
    if "cross_attention_dim" in options:
        inputs["encoder_hidden_states"] = noise(2, 6, 24)
        inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    return inputs


@modes
def test_export(options):
    model, inputs = build(**options), conditions(options)
    exported = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(exported(**inputs)[0], predict(model, **inputs), atol=1e-5, rtol=1e-4)


@modes
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.01), (torch.bfloat16, 0.08)], ids=str)
def test_half_precision(options, dtype, bound):
    model, inputs = build(**options), conditions(options)
    expected = predict(model, **inputs)
    with torch.autocast("cpu", dtype=dtype):
        actual = predict(model, **inputs).float()
    assert (actual - expected).abs().max() < bound * expected.abs().max()
    inputs["sample"] = inputs["sample"].to(dtype)
    actual = predict(model.to(dtype), **inputs)
    assert actual.dtype == dtype and (actual - expected).abs().max() < bound * expected.abs().max()


@modes
def test_checkpointing_leaves_gradients_equal(options):
    model, inputs = build(**options), conditions(options)
    gradients = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        output = model(**inputs).sample
        (output * noise(*output.shape)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=5e-5)


# Presets and errors


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    options = PRESETS[name]
    with torch.device("meta"):
        model = ComposableUNet2DModel(**options)
        sample = torch.empty(2, options["in_channels"], 32, 32)
        assert model(sample, torch.empty(2), torch.empty(2, dtype=torch.long)).sample.shape == sample.shape
        assert model(sample, torch.empty(2)).sample.shape == sample.shape  # the null class
    assert options["sample_size"] == 32 and options["num_class_embeds"] == 10 and options["null_class"]


def test_preset_film_is_the_stated_one():
    film = PRESETS["film"]
    assert film["block_out_channels"] == tuple(64 * multiplier for multiplier in (1, 2, 4, 8))
    assert film["layers_per_block"] == 2 and film["time_conditioning"] == film["class_conditioning"] == "film"


@pytest.mark.parametrize("option, words", unet_composable._WORDS.items())
def test_unknown_words_are_named_with_the_valid_ones(option, words):
    with pytest.raises(ValueError, match=f"`{option}` is 'fancy'; it must be one of .*") as error:
        ComposableUNet2DModel(**TINY, num_class_embeds=3, **{option: "fancy"})
    assert all(f'"{word}"' in str(error.value) for word in words)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm_num_groups": 64}, r"`block_out_channels` \(16, 32\) must be multiples of `norm_num_groups` \(64\)"),
        ({"block_out_channels": (18, 32)}, r"`block_out_channels` \(18, 32\) must be multiples of `norm_num_groups`"),
        ({"attention_resolutions": (4,)}, r"`attention_resolutions` \(4,\): 4 is not the size .* \[16, 8\]"),
        ({"attention_head_dim": 5}, r"`attention_head_dim` \(5\) must divide 32"),
        ({"dilations": (1, 2, 3)}, r"`dilations` \(1, 2, 3\) must be 2 positive numbers"),
        ({"dilations": (1, 0)}, r"`dilations` \(1, 0\) must be 2 positive numbers"),
        ({"null_class": True}, "`null_class` is True, but there are no classes"),
        (
            {
                "block_out_channels": (16, 30),
                "attention_head_dim": 6,
                "norm_type": "layer",
                "attention_position_embedding": "sincos2d",
            },
            "sincos2d needs multiples of 4 channels",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ComposableUNet2DModel(**{**TINY, **options})


@pytest.mark.parametrize(
    "options, inputs, message",
    [
        ({}, {"sample": torch.zeros(2, 3, 17, 16)}, "`sample` is 17x16 pixels; .* multiples of 2"),
        ({}, {"sample": torch.zeros(2, 4, 16, 16)}, r"`sample` has shape \(2, 4, 16, 16\), expected .*3"),
        ({}, {"timestep": torch.zeros(3)}, "`timestep` has 3 entries for 2 images"),
        ({}, {"class_labels": torch.tensor([1, 2])}, "`class_labels` were given to an unconditional"),
        ({"num_class_embeds": 5}, {}, "`class_labels` are needed"),
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1, 2, 3])}, "`class_labels` has 3 entries for 2"),
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1, 5])}, r"`class_labels` holds 5; .* \[0, 5\)"),
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([-1])}, r"`class_labels` holds -1; .* \[0, 5\)"),
        (
            {"num_class_embeds": 5, "null_class": True},
            {"class_labels": torch.tensor([6])},
            r"`class_labels` holds 6; .* \[0, 6\), the last of which is the null class",
        ),
        ({}, {"encoder_hidden_states": torch.zeros(2, 6, 24)}, "does not attend to them"),
        (
            {"cross_attention_dim": 24},
            {"encoder_hidden_states": torch.zeros(2, 6, 32)},
            r"`encoder_hidden_states` has shape \(2, 6, 32\), expected \(2, tokens, 24\)",
        ),
        (
            {"cross_attention_dim": 24},
            {"encoder_hidden_states": torch.zeros(2, 6, 24), "encoder_attention_mask": torch.ones(2, 5)},
            r"`encoder_attention_mask` has shape \(2, 5\), expected \(2, 6\)",
        ),
        ({"cross_attention_dim": 24}, {"encoder_attention_mask": torch.ones(2, 5)}, "without `encoder_hidden_states`"),
    ],
)
def test_wrong_inputs_are_named(options, inputs, message):
    model = build(**options)
    with pytest.raises(ValueError, match=message):
        model(**{"sample": images(), "timestep": 5, **inputs})
