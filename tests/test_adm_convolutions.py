"""The convolutions and the norm of the ADM models equal the plain ones, however they are computed."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_ext.models.unet_adm import FiLMGroupNorm, PointwiseConv2d, UpsampleConv2d, WinogradConv2d


LAYOUTS = [torch.contiguous_format, torch.channels_last]


def build(conv_class, in_channels, out_channels):
    size = 1 if conv_class is PointwiseConv2d else 3
    return conv_class(in_channels, out_channels, size, padding=size // 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 128, 32, 32), (3, 160, 24, 22), (2, 128, 16, 64), (1, 128, 8, 8)], ids=str)
@pytest.mark.parametrize("conv_class", [WinogradConv2d, UpsampleConv2d, PointwiseConv2d])
def test_convolution_equals_conv2d_in_float64(conv_class, shape, layout):
    torch.manual_seed(0)
    conv = build(conv_class, shape[1], 144)
    image = torch.randn(shape)
    seen = image.double()
    if conv_class is UpsampleConv2d:
        seen = F.interpolate(seen, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(seen, conv.weight.double(), conv.bias.double(), padding=conv.padding)
    with torch.no_grad():
        actual = conv(image.to(memory_format=layout))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("conv_class", [WinogradConv2d, UpsampleConv2d, PointwiseConv2d])
def test_convolution_has_the_gradients_of_conv2d(conv_class):
    torch.manual_seed(0)
    conv = build(conv_class, 128, 128).double()
    image = torch.randn(1, 128, 32, 32, dtype=torch.float64, requires_grad=True)
    inputs = (image, conv.weight, conv.bias)
    seen = F.interpolate(image, scale_factor=2.0, mode="nearest") if conv_class is UpsampleConv2d else image
    plain = F.conv2d(seen, conv.weight, conv.bias, padding=conv.padding)
    direction = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * direction).sum(), inputs)
    actual = torch.autograd.grad((conv(image) * direction).sum(), inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_norm_equals_modulated_group_norm_in_float64(mean, layout):
    # A mean far above the deviation is where a variance taken as a difference of squares loses its digits.
    torch.manual_seed(0)
    norm = FiLMGroupNorm(32, 64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    image = torch.randn(3, 64, 16, 16) + mean
    scale_shift = torch.randn(3, 128)
    scale, shift = scale_shift.double()[:, :, None, None].chunk(2, dim=1)
    plain = F.group_norm(image.double(), 32, norm.weight.double(), norm.bias.double())
    for actual, expected in (
        (norm(image.to(memory_format=layout)), F.silu(plain)),
        (norm(image.to(memory_format=layout), scale_shift), F.silu(plain * (1 + scale) + shift)),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * (1 + mean))


def test_one_modulation_serves_the_whole_batch():
    norm = FiLMGroupNorm(32, 64)
    image, scale_shift = torch.randn(3, 64, 8, 8), torch.randn(1, 128)
    torch.testing.assert_close(norm(image, scale_shift), norm(image, scale_shift.expand(3, -1)))
