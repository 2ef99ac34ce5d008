"""ADM: the UNet and the noise-aware classifier of guided-diffusion.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), https://arxiv.org/abs/2105.05233, Sec. 3
(architecture) and Sec. 4 (classifier). The UNets of improved-diffusion (Nichol and Dhariwal, 2021,
https://arxiv.org/abs/2102.09672) and of consistency models (Song et al., 2023, https://arxiv.org/abs/2303.01469) are
members of the same family.

Shapes: B batch, C channels, H and W pixels, L = H W tokens, E width of the time embedding, S stacked widths of what
all residual blocks read of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import BaseOutput


# Named sizes for small images; those of the released checkpoints are in `diffusers_ext.conversion.presets`.
_DIGITS = {
    "sample_size": 8,
    "in_channels": 1,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_resolutions": (4,),
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}
_MNIST = _DIGITS | {"sample_size": 32, "attention_resolutions": (8,)}
_MNIST_GUIDED = _MNIST | {"block_out_channels": (32, 64, 96), "num_class_embeds": 10, "null_class": True}
PRESETS = {
    "digits": _DIGITS | {"out_channels": 2},
    "mnist-small": _MNIST | {"block_out_channels": (16, 48, 96), "out_channels": 2},
    "mnist-28": _MNIST_GUIDED | {"sample_size": 28, "attention_resolutions": (7,), "out_channels": 1},
    "mnist-32": _MNIST_GUIDED | {"attention_resolutions": (8,), "out_channels": 1},
    # Width and depth of improved-diffusion's CIFAR-10 network, with the blocks and heads of ADM.
    "cifar-32": {
        "sample_size": 32,
        "out_channels": 6,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 3,
        "attention_resolutions": (16, 8),
        "num_class_embeds": 10,
        "dropout": 0.3,
    },
}
CLASSIFIER_PRESETS = {
    "digits": _DIGITS | {"num_classes": 10},
    "mnist-small": _MNIST | {"block_out_channels": (16, 48, 64), "num_classes": 10},
}

Timestep = int | float | torch.Tensor
Resample = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class ADMClassifierOutput(BaseOutput):
    """Output of [`ADMClassifierModel`].

    Args:
        logits: unnormalised log-probabilities of the classes `(B, num_classes)`.
    """

    logits: torch.Tensor


class ADMGroupNorm(nn.GroupNorm):
    """Group norm that is exact in both memory formats of an image, with an affine part for each image if need be.

    A group never spans two images, so B images of C channels are one image of B C channels to it, each with a weight
    and a bias of its own.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if _is_channels_last(hidden_states):
            batch = hidden_states.shape[0]
            return self.normalise(hidden_states, self.weight.expand(batch, -1), self.bias.expand(batch, -1))
        return super().forward(hidden_states)

    def normalise(self, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """`hidden_states` (B, C, H, W), `weight` and `bias` (B, C). Returns (B, C, H, W)."""
        if _is_channels_last(hidden_states):
            return _group_norm_channels_last(hidden_states, self.num_groups, weight, bias, self.eps)
        batch, channels, height, width = hidden_states.shape
        return F.group_norm(
            hidden_states.reshape(1, batch * channels, height, width),
            batch * self.num_groups,
            weight.flatten(),
            bias.flatten(),
            self.eps,
        ).view(batch, channels, height, width)


class FiLMGroupNorm(ADMGroupNorm):
    """`silu(norm(x) * (1 + scale) + shift)`: group normalisation, feature-wise modulation and activation.

    The modulation (Perez et al., 2018, https://arxiv.org/abs/1709.07871; "AdaGN" in Dhariwal and Nichol, Sec. 3) is
    folded into the affine part of the norm, so that the feature map is read and written once.
    """

    def forward(self, hidden_states: torch.Tensor, scale_shift: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden_states` (B, C, H, W); `scale_shift` (B or 1, 2C), the scale first. Returns (B, C, H, W)."""
        if scale_shift is None:
            hidden_states = super().forward(hidden_states)
        else:
            scale, shift = scale_shift.expand(hidden_states.shape[0], -1).chunk(2, dim=1)
            hidden_states = self.normalise(hidden_states, self.weight * (1 + scale), self.bias * (1 + scale) + shift)
        # Without autograd nobody else holds the norm's output.
        return F.silu(hidden_states, inplace=not torch.is_grad_enabled())


def _is_float32_inference_on_cpu(hidden_states: torch.Tensor) -> bool:
    """Where layouts and algorithms are ours to choose: CUDA, compilers and autograd have better or other ways."""
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _is_channels_last(hidden_states: torch.Tensor) -> bool:
    return not hidden_states.is_contiguous() and hidden_states.is_contiguous(memory_format=torch.channels_last)


def _group_norm_channels_last(
    hidden_states: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Group norm of pixels (B, H, W, C) in memory, with a weight and a bias (B, C) for each image.

    torch's own kernel for this layout takes the variance as a difference of squares, which loses digits where a
    group's mean is large, and copies the image on CUDA. Averages over pixels are matrix products here.
    """
    height, width = hidden_states.shape[2:]
    pixels = hidden_states.permute(0, 2, 3, 1).flatten(1, 2).float()  # (B, L, C), a view in float32
    average = pixels.new_full((len(pixels), 1, height * width), 1 / (height * width))

    def group_mean(values: torch.Tensor) -> torch.Tensor:
        mean = torch.bmm(average, values).unflatten(2, (num_groups, -1)).mean(dim=3)  # (B, 1, groups)
        return mean.repeat_interleave(values.shape[2] // num_groups, dim=2)  # (B, 1, C)

    with torch.autocast(hidden_states.device.type, enabled=False):  # products in half precision lose the mean
        centred = pixels - group_mean(pixels)
        scale = weight[:, None] * torch.rsqrt(group_mean(centred.square()) + eps)
    output = torch.addcmul(bias[:, None].to(scale.dtype), centred, scale).to(hidden_states.dtype)
    return output.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def downsample(hidden_states: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(hidden_states, kernel_size=2)


def upsample(hidden_states: torch.Tensor) -> torch.Tensor:
    return F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution as the matrix product of pixels that it is."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _is_channels_last(hidden_states):
            return super().forward(hidden_states)
        hidden_states = F.linear(hidden_states.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return hidden_states.permute(0, 3, 1, 2)


class WinogradConv2d(nn.Conv2d):
    """3x3 convolution that takes 16 multiplications for 2x2 output pixels in place of 36, where that pays.

    Algorithm F(2x2, 3x3) of Lavin and Gray (2016), https://arxiv.org/abs/1509.09308, Sec. 4.1, for inference on CPUs,
    whose library has none; that of CUDA chooses such algorithms by itself.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        batch, channels, height, width = hidden_states.shape
        if not _is_float32_inference_on_cpu(hidden_states):
            return super().forward(hidden_states)
        if (
            self.kernel_size != (3, 3)
            or self.bias is None  # half of a LoRA, which peft builds from this class
            or min(channels, self.out_channels) < 128  # too few for what transforming the image costs
            or batch * height * width < 1024  # and here for what transforming the weight costs
            or height % 2
            or width % 2
        ):
            if batch * height * width < 1024 and self.weight.is_contiguous():
                # torch would copy the weight into the order of the image, and it is the larger of the two here.
                hidden_states = hidden_states.contiguous()
            return super().forward(hidden_states)
        # u = G w G^T: one matrix (C_in, C_out) for each of the 16 elements of a transformed tile.
        basis = self.weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        weight = torch.kron(basis, basis) @ self.weight.permute(2, 3, 1, 0).reshape(9, -1)
        weight = weight.view(16, channels, self.out_channels)
        padded = F.pad(hidden_states.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, C_in)
        output = hidden_states.new_empty(batch, height // 2, 2, width // 2, 2, self.out_channels)
        # Rows of tiles whose transforms (16 floats per tile and channel) stay in the cache.
        rows = max(1, 2**16 // (width // 2 * max(channels, self.out_channels)))
        for image, result in zip(padded, output):
            for row in range(0, height // 2, rows):
                self._tiles(image[2 * row : 2 * (row + rows) + 2], weight, result[row : row + rows])
        return output.view(batch, height, width, self.out_channels).permute(0, 3, 1, 2)

    def _tiles(self, image: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> None:
        """`image` (2h + 2, 2w + 2, C_in), `weight` (16, C_in, C_out); writes `output` (h, 2, w, 2, C_out)."""
        height, width, channels = image.shape[0] // 2 - 1, image.shape[1] // 2 - 1, image.shape[2]
        columns = image.new_empty(4, 2 * height + 2, width, channels)
        _winograd_input(image[:, 0::2], image[:, 1::2], columns)
        tiles = image.new_empty(4, 4, height, width, channels)  # v = B^T d B
        _winograd_input(columns[:, 0::2], columns[:, 1::2], tiles)
        products = torch.bmm(tiles.view(16, -1, channels), weight).view(4, 4, height, width, -1)
        rows = _winograd_output(products)  # y = A^T m A
        for y, row in enumerate(rows):
            for x, pixels in enumerate(_winograd_output(row)):
                torch.add(pixels, self.bias, out=output[:, y, :, x])


def _winograd_input(even: torch.Tensor, odd: torch.Tensor, out: torch.Tensor) -> None:
    """One side of B^T d B, over the second dimension, of which the even and the odd entries are given."""
    first, third, second, fourth = even[:, :-1], even[:, 1:], odd[:, :-1], odd[:, 1:]
    torch.sub(first, third, out=out[0])
    torch.add(second, third, out=out[1])
    torch.sub(third, second, out=out[2])
    torch.sub(second, fourth, out=out[3])


def _winograd_output(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One side of A^T m A, over the first dimension of 4."""
    return (products[1] + products[2]).add_(products[0]), (products[1] - products[2]).sub_(products[3])


class UpsampleConv2d(nn.Conv2d):
    """3x3 convolution of the nearest-upsampled image, as one transposed convolution of the image itself.

    Each output pixel sees 2x2 input pixels only, with sums of taps as weights: 4 multiplications instead of 9.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C_out, 2H, 2W)."""
        if self.kernel_size != (3, 3):  # second half of a LoRA, which peft builds from this class
            return super().forward(hidden_states)
        # Row i of a 4-tap kernel of stride 2 sums these taps of the 3-tap kernel.
        sums = self.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        weight = self.weight.flatten(2) @ torch.kron(sums, sums).T  # (C_out, C_in, 9) -> (C_out, C_in, 16)
        weight = weight.unflatten(2, (4, 4)).transpose(0, 1)
        return F.conv_transpose2d(hidden_states, weight, self.bias, stride=2, padding=1)


def zero_module(module: nn.Module) -> nn.Module:
    """Zero the parameters of a residual branch's last layer, so that training starts from the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ADMResnetBlock(nn.Module):
    """Residual block; `resample` is the function that changes the resolution of both of its paths, if any."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scale_shift: bool,
        dropout: float,
        norm_num_groups: int,
        norm_eps: float,
        resample: Resample | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.scale_shift = scale_shift
        self.temb_width = 2 * out_channels if scale_shift else out_channels
        self.norm1 = FiLMGroupNorm(norm_num_groups, in_channels, norm_eps)
        conv_class = UpsampleConv2d if resample is upsample else WinogradConv2d
        self.conv1 = conv_class(in_channels, out_channels, 3, padding=1)
        self.norm2 = FiLMGroupNorm(norm_num_groups, out_channels, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(WinogradConv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = PointwiseConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """`hidden_states` (B, C_in, H, W), `temb` (B or 1, temb_width). Returns (B, C_out, H', W')."""
        residual = hidden_states
        hidden_states = self.norm1(hidden_states)
        if self.resample is not None:
            residual = self.resample(residual)
            if self.resample is downsample:
                hidden_states = self.resample(hidden_states)
        hidden_states = self.conv1(hidden_states)
        if self.scale_shift:
            hidden_states = self.norm2(hidden_states, temb)
        else:
            hidden_states = self.norm2(hidden_states + temb[:, :, None, None])
        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return residual + hidden_states


class ADMResample(nn.Module):
    """Resampling outside residual blocks: by a convolution (strided, or after nearest upsampling), or without."""

    def __init__(self, channels: int, resample: Resample, use_conv: bool):
        super().__init__()
        self.resample = resample
        self.conv = None
        if use_conv and resample is upsample:
            self.conv = UpsampleConv2d(channels, channels, 3, padding=1)
        elif use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.resample(hidden_states) if self.conv is None else self.conv(hidden_states)


class ADMAttnProcessor:
    """Self-attention over pixels through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "ADMAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` (B, L, C), normalised. Returns (B, L, C), before the residual sum."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value)
        )  # (B, L, heads, C / heads)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](hidden_states.flatten(2))


class ADMAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = ADMAttnProcessor
    _available_processors = [ADMAttnProcessor]

    def __init__(self, channels: int, heads: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.is_cross_attention = False
        self.group_norm = ADMGroupNorm(norm_num_groups, channels, norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([zero_module(nn.Linear(channels, channels))])
        self.set_processor(ADMAttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        height, width = hidden_states.shape[2:]
        tokens = self.group_norm(hidden_states).flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, L, C)
        tokens = self.processor(self, tokens)
        return hidden_states + tokens.transpose(1, 2).unflatten(2, (height, width))


class ADMStage(nn.Module):
    """Residual blocks of one resolution, each followed by self-attention where the resolution has it."""

    def __init__(self, resnets: list[ADMResnetBlock], attentions: list[ADMAttention]):
        super().__init__()
        self.gradient_checkpointing = False
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.num_tembs = len(resnets)

    def layer(self, index: int, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.run(self.resnets[index], hidden_states, temb)
        if index < len(self.attentions):
            hidden_states = self.run(self.attentions[index], hidden_states)
        return hidden_states

    def run(self, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)


class ADMDownBlock(ADMStage):
    def __init__(
        self, resnets: list[ADMResnetBlock], attentions: list[ADMAttention], downsampler: nn.Module | None = None
    ):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])
        self.num_tembs += isinstance(downsampler, ADMResnetBlock)

    def forward(self, hidden_states: torch.Tensor, tembs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns the feature maps of all layers; the last one is the block's output."""
        features = []
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, tembs[index])
            features.append(hidden_states)
        for downsampler in self.downsamplers:
            features.append(self.run(downsampler, hidden_states, *tembs[len(self.resnets) :]))
        return tuple(features)


class ADMMidBlock(ADMStage):
    """Residual block, attention, residual block."""

    def forward(self, hidden_states: torch.Tensor, tembs: list[torch.Tensor]) -> torch.Tensor:
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, tembs[index])
        return hidden_states


class ADMUpBlock(ADMStage):
    def __init__(
        self, resnets: list[ADMResnetBlock], attentions: list[ADMAttention], upsampler: nn.Module | None = None
    ):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])
        self.num_tembs += isinstance(upsampler, ADMResnetBlock)

    def forward(
        self, hidden_states: torch.Tensor, tembs: list[torch.Tensor], skips: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """`skips`: one feature map of the down path per layer, in the order of the layers."""
        for index, skip in enumerate(skips):
            hidden_states = self.layer(index, torch.cat([hidden_states, skip], dim=1), tembs[index])
        for upsampler in self.upsamplers:
            hidden_states = self.run(upsampler, hidden_states, *tembs[len(self.resnets) :])
        return hidden_states


class ADMBackbone(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """What the UNet and the classifier share: time embedding, down path, middle and how the blocks read time."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ADMDownBlock", "ADMMidBlock", "ADMUpBlock"]
    _repeated_blocks = ["ADMAttention"]  # residual blocks come in more shapes than a compiler keeps apart
    _skip_layerwise_casting_patterns = ["norm", "positional_embedding"]

    def _build_encoder(self) -> None:
        """Modules from the input to the middle block, as `self.config` says."""
        config = self.config
        _check_config(config)
        widths = config.block_out_channels
        model_channels = config.model_channels or widths[0]

        self.time_proj = Timesteps(model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(model_channels, 4 * model_channels)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
            self.down_blocks.append(
                ADMDownBlock(
                    [self._resnet(channels, width) for channels in inputs],
                    self._attentions(level, len(inputs), config.num_attention_heads),
                    self._resampler(width, downsample) if level < len(widths) - 1 else None,
                )
            )
        self.mid_block = ADMMidBlock(
            [self._resnet(widths[-1], widths[-1]) for _ in range(2)],
            [self._attention(widths[-1], config.num_attention_heads)],
        )

    def _build_temb_projection(self) -> None:
        """One linear layer for what all residual blocks read of the time embedding: E -> S."""
        self._temb_widths = [resnet.temb_width for _, resnet in self.resnets()]
        self.temb_projection = nn.Linear(self.time_embedding.linear_2.out_features, sum(self._temb_widths))

    def _resnet(self, in_channels: int, out_channels: int, resample: Resample | None = None) -> ADMResnetBlock:
        config = self.config
        return ADMResnetBlock(
            in_channels,
            out_channels,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            dropout=config.dropout,
            norm_num_groups=config.norm_num_groups,
            norm_eps=config.norm_eps,
            resample=resample,
        )

    def _resampler(self, channels: int, resample: Resample) -> nn.Module:
        if self.config.resample_type == "resnet":
            return self._resnet(channels, channels, resample)
        return ADMResample(channels, resample, use_conv=self.config.resample_type == "conv")

    def _attention(self, channels: int, heads: int | None) -> ADMAttention:
        option, divisor = (
            ("num_attention_heads", heads) if heads else ("attention_head_dim", self.config.attention_head_dim)
        )
        if channels % divisor:
            raise ValueError(f"`{option}` ({divisor}) must divide the {channels} channels that get attention.")
        heads = heads or channels // divisor
        return ADMAttention(channels, heads, self.config.norm_num_groups, self.config.norm_eps)

    def _attentions(self, level: int, count: int, heads: int | None) -> list[ADMAttention]:
        if self.config.sample_size // 2**level not in self.config.attention_resolutions:
            return []
        return [self._attention(self.config.block_out_channels[level], heads) for _ in range(count)]

    def resnets(self) -> Iterator[tuple[str, ADMResnetBlock]]:
        """Name and module of every residual block, in the order of execution and of `temb_projection`'s rows."""
        for name, module in self.named_modules():
            if isinstance(module, ADMResnetBlock):
                yield name, module

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str, **kwargs) -> "ADMBackbone":
        """Load an original checkpoint; arguments as in `diffusers_ext.conversion.from_single_file`."""
        from diffusers_ext.conversion import from_single_file

        return from_single_file(cls, pretrained_model_link_or_path, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, with weights at addresses like those that torch chooses: last bits of sums depend on it."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for x in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            # Subclasses of `Parameter` are quantised, without an address of their own.
            if type(x) is nn.Parameter and x.device.type == "cpu" and x.data_ptr() % 64 and not x.is_inference():
                x.data = x.data.clone()
        return loaded

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, prefix: str | None = None, **kwargs) -> None:
        """As in diffusers, and without options what `save_lora_adapter` wrote: safetensors, names without a prefix."""
        if "use_safetensors" not in kwargs:
            kwargs.setdefault("weight_name", "pytorch_lora_weights.safetensors")
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix, **kwargs)

    def embed_time(self, timestep: Timestep, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """What all residual blocks read of time and class, as one matrix product.

        Computed once for all N timesteps of a schedule, row i is what `forward` takes as `temb` in step i.

        Args:
            timestep: N timesteps, a number or a tensor with 0 or 1 dimensions; see `forward`.
            class_labels: class ids `(N,)` or `(1,)` of a class-conditional UNet; see `forward`.

        Returns:
            `(N, S)` in the dtype of the model.
        """
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=self.device).reshape(-1)
        return self._embed_time(timestep, self._class_rows(class_labels, self.device), self.dtype)

    def _class_rows(self, class_labels: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """Rows of the class embedding `(N,)` or `(1,)`, checked; None for a model without classes."""
        rows, null_class = self.config.get("num_class_embeds"), self.config.get("null_class")
        if rows is None:
            if class_labels is not None:
                raise ValueError("`class_labels` were given to an unconditional UNet (`num_class_embeds` is None).")
            return None
        if class_labels is None:
            if not null_class:
                raise ValueError(
                    "`class_labels` are needed by this class-conditional UNet, which has no null class (`null_class`)."
                )
            return torch.full((1,), rows, device=device)
        rows += null_class
        # Elsewhere a look at the values would wait for the device, or break the graph.
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = class_labels[(class_labels < 0) | (class_labels >= rows)]
            if outside.numel():
                raise ValueError(f"`class_labels` has {outside[0].item()}; labels of this UNet are 0 to {rows - 1}.")
        return class_labels.to(device)

    def _embed_time(
        self, timestep: torch.Tensor, class_labels: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        frequencies = self.time_proj(timestep * self.config.timestep_scale)  # (N,) -> (N, E / 4), float32
        temb = self.time_embedding(frequencies.to(dtype))  # (N, E)
        if class_labels is not None:
            temb = temb + self.class_embedding(class_labels)
        return self.temb_projection(F.silu(temb))

    def _encode(self, sample: torch.Tensor, tembs: Iterator[torch.Tensor]) -> list[torch.Tensor]:
        """Feature maps of the down path, from `conv_in` to the last layer, and of the middle block, in this order."""
        if _is_float32_inference_on_cpu(sample):
            # Stored pixel by pixel, images need no copies for matrix products, and convolutions are no slower.
            sample = sample.contiguous(memory_format=torch.channels_last)
        features = [self.conv_in(sample)]
        for block in self.down_blocks:
            features.extend(block(features[-1], _take(tembs, block)))
        features.append(self.mid_block(features[-1], _take(tembs, self.mid_block)))
        return features

    def _prepare(
        self,
        sample: torch.Tensor,
        timestep: Timestep | None,
        class_labels: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """Check the inputs of `forward`; returns the piece of the time embedding for each residual block in turn."""
        config = self.config
        channels = config.in_channels - config.get("low_res_channels", 0)
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"`sample` has shape {tuple(sample.shape)}, expected (batch, {channels}, height, width).")
        factor = 2 ** (len(config.block_out_channels) - 1)
        if sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"`sample` is {sample.shape[2]}x{sample.shape[3]} pixels; height and width must be multiples of "
                f"{factor}, since {len(config.block_out_channels)} levels halve them. Pad or resize the images."
            )
        if temb is None:
            timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
            class_labels = self._class_rows(class_labels, sample.device)
            for name, values in (("timestep", timestep), ("class_labels", class_labels)):
                if values is not None and values.numel() not in (1, sample.shape[0]):
                    raise ValueError(
                        f"`{name}` has {values.numel()} entries for {sample.shape[0]} images; give one, or one each."
                    )
            temb = self._embed_time(timestep, class_labels, sample.dtype)
        return iter(temb.split(self._temb_widths, dim=1))


class ADMUNet2DModel(ADMBackbone):
    """UNet of guided-diffusion (ADM), improved-diffusion and consistency models.

    Args:
        sample_size: height and width in pixels of the training images. Others work as well, if the levels halve them.
        in_channels: channels of the input, those of the low-resolution image included.
        out_channels: channels of the output; twice those of the image when the variance is learned (Nichol and
            Dhariwal, 2021, Sec. 3.1): first the prediction, then v in about [-1, 1].
        block_out_channels: width of each level, from the full resolution down.
        model_channels: width of the sinusoidal time embedding. None: that of the first level, which differs from it
            only where the original's first channel multiplier is not 1 (512 px: 0.5).
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        attention_resolutions: sizes in pixels, at `sample_size`, of the feature maps that get self-attention. The
            middle block always has it.
        num_attention_heads: number of heads at every resolution. None: channels / `attention_head_dim`.
        attention_head_dim: channels per head where `num_attention_heads` is None.
        num_attention_heads_upsample: number of heads on the way up, where it differs.
        num_class_embeds: number of classes of a class-conditional UNet.
        null_class: one more class of index `num_class_embeds` that stands for no class, for classifier-free guidance
            (Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598, Sec. 3.2).
        low_res_channels: channels of the low-resolution image of a super-resolution UNet.
        resnet_time_scale_shift: "scale_shift" (modulation after the second norm) or "default" (sum before it).
        resample_type: "resnet" (inside a residual block), "conv" (strided, or after nearest upsampling) or "pool"
            (2x2 mean, nearest; no parameters).
        dropout: rate of dropout in residual blocks during training.
        norm_num_groups: groups of the group norms (always 32 in the originals).
        norm_eps: epsilon of the group norms.
        timestep_scale: the network sees `timestep * timestep_scale`; 1000 / T for models trained with T steps and the
            original's `rescale_timesteps`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (192, 384, 576, 768),
        model_channels: int | None = None,
        layers_per_block: int = 3,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        num_attention_heads: int | None = None,
        attention_head_dim: int = 64,
        num_attention_heads_upsample: int | None = None,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        low_res_channels: int = 0,
        resnet_time_scale_shift: str = "scale_shift",
        resample_type: str = "resnet",
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        timestep_scale: float = 1.0,
    ):
        super().__init__()
        self._build_encoder()
        if num_class_embeds is not None:
            temb_dim = self.time_embedding.linear_2.out_features
            self.class_embedding = nn.Embedding(num_class_embeds + null_class, temb_dim)

        # Widths of what the down path leaves: conv_in, then per level its layers and its downsampler.
        skips = [block_out_channels[0]]
        for level, width in enumerate(block_out_channels):
            skips += [width] * (layers_per_block + (level < len(block_out_channels) - 1))
        channels = block_out_channels[-1]
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(block_out_channels))):
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(self._resnet(channels + skips.pop(), width))
                channels = width
            heads = num_attention_heads_upsample or num_attention_heads
            attentions = self._attentions(level, len(resnets), heads)
            self.up_blocks.append(
                ADMUpBlock(resnets, attentions, self._resampler(width, upsample) if level > 0 else None)
            )
        self.conv_norm_out = FiLMGroupNorm(norm_num_groups, channels, norm_eps)
        self.conv_out = zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))
        self._build_temb_projection()

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Timestep | None,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: noisy images `(B, C, H, W)`, C without the low-resolution channels.
            timestep: noise level in units of the training schedule's steps, 0 being the least noise; one number (int,
                float or 0-d tensor) or one per image `(B,)`. Fractions are meaningful.
            class_labels: class ids, one `(1,)` or one per image `(B,)`, in `[0, num_class_embeds)`; with `null_class`
                also `num_class_embeds`, which None stands for. None for an unconditional UNet.
            low_res: low-resolution images `(B, low_res_channels, h, w)`, for a super-resolution UNet only; resized
                bilinearly to H x W here.
            temb: `(B, S)` or `(1, S)` from `embed_time`, in place of `timestep` and `class_labels`.
            return_dict: False returns a tuple.

        Returns:
            `UNet2DOutput` with `sample` `(B, out_channels, H, W)`.

        Raises:
            ValueError: for a wrong shape, a label or low-resolution image that is missing or not understood, or a
                label out of range.
        """
        if (low_res is None) != (self.config.low_res_channels == 0):
            raise ValueError(
                "`low_res` images are needed by this super-resolution UNet."
                if low_res is None
                else "`low_res` images were given to a UNet that has no channels for them (`low_res_channels` is 0)."
            )
        tembs = self._prepare(sample, timestep, class_labels, temb)
        if low_res is not None:
            expected = (sample.shape[0], self.config.low_res_channels)
            if low_res.ndim != 4 or low_res.shape[:2] != expected:
                raise ValueError(
                    f"`low_res` has shape {tuple(low_res.shape)}, expected {expected} and a height and a width."
                )
            low_res = F.interpolate(low_res, size=sample.shape[2:], mode="bilinear")
            sample = torch.cat([sample, low_res.to(sample.dtype)], dim=1)

        *skips, hidden_states = self._encode(sample, tembs)
        for block in self.up_blocks:
            inputs = tuple(skips.pop() for _ in block.resnets)
            hidden_states = block(hidden_states, _take(tembs, block), inputs)
        output = self.conv_out(self.conv_norm_out(hidden_states))
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def to_diffusers(self) -> UNet2DModel:
        """The equal `diffusers.UNet2DModel`, for people who want the weights without this package.

        A null class becomes its last class, which has to be given by number there.

        Raises:
            ValueError: where `UNet2DModel` cannot express the architecture, with every reason.
        """
        unet = UNet2DModel(**_diffusers_config(self.config)).to(self.dtype)
        state_dict = self.state_dict()
        names = [name for name, _ in self.resnets()]
        for kind in ("weight", "bias"):
            stacked = state_dict.pop(f"temb_projection.{kind}")
            for name, rows in zip(names, stacked.split(self._temb_widths)):
                state_dict[f"{name}.time_emb_proj.{kind}"] = rows
        unet.load_state_dict(state_dict)
        return unet.train(self.training).to(self.device)

    @classmethod
    def from_diffusers(cls, unet: UNet2DModel) -> "ADMUNet2DModel":
        """The equal of a `diffusers.UNet2DModel`; the way back from `to_diffusers`.

        Raises:
            ValueError: where the model is not an ADM, with every option in which it differs.
        """
        model = cls(**_adm_config(unet.config)).to(unet.dtype)
        state_dict = unet.state_dict()
        for kind in ("weight", "bias"):
            rows = [state_dict.pop(f"{name}.time_emb_proj.{kind}") for name, _ in model.resnets()]
            state_dict[f"temb_projection.{kind}"] = torch.cat(rows)
        model.load_state_dict(state_dict)
        return model.train(unet.training).to(unet.device)


class AttentionPool2D(nn.Module):
    """Class logits read by a mean token that attends to all pixels (Radford et al., 2021, https://arxiv.org/abs/2103.00020,
    Sec. 2.4)."""

    def __init__(self, channels: int, size: int, heads: int, out_features: int):
        super().__init__()
        self.heads = heads
        self.size = size
        self.positional_embedding = nn.Parameter(torch.randn(1 + size * size, channels) / channels**0.5)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, out_features)."""
        positions = self._positions(*hidden_states.shape[2:]).to(hidden_states.dtype)
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (B, L, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + positions
        query, key, value = self.to_q(tokens[:, :1]), self.to_k(tokens), self.to_v(tokens)  # only the mean token asks
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in (query, key, value))
        return self.to_out(dispatch_attention_fn(query, key, value).flatten(1))

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Positions `(1 + height * width, C)`, interpolated where the feature map is not of the trained size."""
        if (height, width) == (self.size, self.size):
            return self.positional_embedding
        grid = self.positional_embedding[1:].T.unflatten(1, (self.size, self.size))
        grid = F.interpolate(grid[None], size=(height, width), mode="bicubic")[0]
        return torch.cat([self.positional_embedding[:1], grid.flatten(1).T])


class ADMClassifierModel(ADMBackbone):
    """Noise-aware classifier of guided-diffusion: the down path and middle of an ADM UNet, then a pool.

    Args:
        num_classes: number of logits.
        pool: how feature maps become logits. "attention": one attention over the last feature map; "adaptive": its
            mean over pixels, then a linear layer; "spatial" and "spatial_v2": the means of every feature map of the
            down path, then two layers with ReLU, or with group norm and SiLU.

    The others are those of [`ADMUNet2DModel`]. Head of the attention pool: `attention_head_dim` channels each.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        model_channels: int | None = None,
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        num_attention_heads: int | None = None,
        attention_head_dim: int = 64,
        pool: str = "attention",
        resnet_time_scale_shift: str = "scale_shift",
        resample_type: str = "resnet",
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        timestep_scale: float = 1.0,
    ):
        super().__init__()
        self._build_encoder()
        channels = block_out_channels[-1]
        features = sum(width * layers_per_block for width in block_out_channels) + sum(block_out_channels[:-1])
        features += block_out_channels[0] + channels  # conv_in and the middle block
        if pool == "attention":
            size = sample_size // 2 ** (len(block_out_channels) - 1)
            self.head = nn.Sequential(
                FiLMGroupNorm(norm_num_groups, channels, norm_eps),
                AttentionPool2D(channels, size, channels // attention_head_dim, num_classes),
            )
        elif pool == "adaptive":
            self.head = nn.Sequential(
                FiLMGroupNorm(norm_num_groups, channels, norm_eps),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                zero_module(nn.Linear(channels, num_classes)),
            )
        elif pool == "spatial":
            self.head = nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, num_classes))
        elif pool == "spatial_v2":
            self.head = nn.Sequential(
                nn.Linear(features, 2048),
                nn.GroupNorm(norm_num_groups, 2048, norm_eps),
                nn.SiLU(),
                nn.Linear(2048, num_classes),
            )
        else:
            raise ValueError(f'`pool` is {pool!r}; it must be "attention", "adaptive", "spatial" or "spatial_v2".')
        self._build_temb_projection()

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Timestep | None,
        temb: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ADMClassifierOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: noisy images `(B, C, H, W)` of the variance-preserving process, sqrt(abar) x_0 +
                sqrt(1 - abar) eps.
            timestep: their noise level, as for [`ADMUNet2DModel`]: one number or one per image `(B,)`.
            temb: `(B, S)` or `(1, S)` from `embed_time`, in place of `timestep`.
            return_dict: False returns a tuple.

        Returns:
            `ADMClassifierOutput` with `logits` `(B, num_classes)`.
        """
        features = self._encode(sample, self._prepare(sample, timestep, temb=temb))
        if self.config.pool in ("spatial", "spatial_v2"):
            logits = self.head(torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1))
        else:
            logits = self.head(features[-1])
        return ADMClassifierOutput(logits=logits) if return_dict else (logits,)


def _take(tembs: Iterator[torch.Tensor], stage: ADMStage) -> list[torch.Tensor]:
    return [next(tembs) for _ in range(stage.num_tembs)]


# Options of `UNet2DModel` that have one possible value in an ADM.
_DIFFUSERS_CONSTANTS = {
    "time_embedding_type": "positional",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "add_attention": True,
    "act_fn": "silu",
    "downsample_padding": 1,
    "class_embed_type": None,
}
# Its names of a level without attention, and with.
_DIFFUSERS_BLOCKS = {
    ("down", "resnet"): ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    ("down", "conv"): ("DownBlock2D", "AttnDownBlock2D"),
    ("up", "resnet"): ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    ("up", "conv"): ("UpBlock2D", "AttnUpBlock2D"),
}
_SHARED_OPTIONS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "layers_per_block",
    "num_class_embeds",
    "resnet_time_scale_shift",
    "dropout",
    "norm_num_groups",
    "norm_eps",
)


def _diffusers_config(config) -> dict:
    """Options of the `UNet2DModel` that equals an `ADMUNet2DModel` of this config."""
    widths = tuple(config.block_out_channels)
    attention = [config.sample_size // 2**level in config.attention_resolutions for level in range(len(widths))]
    attention_widths = {width for width, has in zip(widths, attention) if has} | {widths[-1]}
    heads = config.num_attention_heads
    head_dims = {width // heads for width in attention_widths} if heads else {config.attention_head_dim}

    reasons = []
    if config.model_channels not in (None, widths[0]):
        reasons.append(f"its time embedding is as wide as the first level ({widths[0]}), not {config.model_channels}")
    if len(head_dims) > 1 or config.num_attention_heads_upsample not in (None, heads):
        reasons.append("it has one width of attention heads, not one number of heads for all resolutions")
    if config.resample_type == "pool":
        reasons.append("it has no resampling without parameters")
    if config.low_res_channels:
        reasons.append("it has no input for a low-resolution image")
    if config.timestep_scale != 1:
        reasons.append(f"it does not scale timesteps (by {config.timestep_scale})")
    if reasons:
        raise ValueError("`diffusers.UNet2DModel` cannot express this model: " + "; ".join(reasons) + ".")

    down, up = (_DIFFUSERS_BLOCKS[way, config.resample_type] for way in ("down", "up"))
    return {
        **_DIFFUSERS_CONSTANTS,
        **{option: config[option] for option in _SHARED_OPTIONS},
        "num_class_embeds": config.num_class_embeds and config.num_class_embeds + config.null_class,
        "block_out_channels": widths,
        "down_block_types": tuple(down[has] for has in attention),
        "up_block_types": tuple(up[has] for has in reversed(attention)),
        "downsample_type": config.resample_type,
        "upsample_type": config.resample_type,
        "attention_head_dim": head_dims.pop(),
        "attn_norm_num_groups": config.norm_num_groups,
    }


def _adm_config(config) -> dict:
    """Options of the `ADMUNet2DModel` that equals a `UNet2DModel` of this config: `_diffusers_config` backwards."""
    widths = tuple(config.block_out_channels)
    attention = ["Attn" in block for block in config.down_block_types]
    size = config.sample_size if isinstance(config.sample_size, int) else 0  # an error below
    options = {
        **{option: config[option] for option in _SHARED_OPTIONS},
        "block_out_channels": widths,
        "attention_resolutions": tuple(size // 2**n for n, has in enumerate(attention) if has),
        "attention_head_dim": config.attention_head_dim,
        "resample_type": config.downsample_type,
    }
    expected = dict(_DIFFUSERS_CONSTANTS)
    if ("down", config.downsample_type) in _DIFFUSERS_BLOCKS:
        down, up = (_DIFFUSERS_BLOCKS[way, config.downsample_type] for way in ("down", "up"))
        expected["down_block_types"] = tuple(down[has] for has in attention)
        expected["up_block_types"] = tuple(up[has] for has in reversed(attention))
    expected["upsample_type"] = config.downsample_type
    # The middle attention of a "default" model is normalised anyway.
    if config.attn_norm_num_groups is not None or config.resnet_time_scale_shift != "default":
        expected["attn_norm_num_groups"] = config.norm_num_groups
    differences = [
        f"`{option}` is {config[option]!r}, not {value!r}"
        for option, value in expected.items()
        if (tuple(config[option]) if isinstance(config[option], list) else config[option]) != value
    ]
    if not isinstance(config.sample_size, int):
        differences.append(f"`sample_size` is {config.sample_size!r}, not a number of pixels")
    if config.attention_head_dim is None:
        differences.append("`attention_head_dim` is None, one head of the full width per level")
    if config.time_embedding_dim not in (None, 4 * widths[0]):
        differences.append(f"`time_embedding_dim` is {config.time_embedding_dim}, not 4 * {widths[0]}")
    if differences:
        raise ValueError("This `UNet2DModel` is not an ADM: " + "; ".join(differences) + ".")
    return options


def _check_config(config) -> None:
    if config.resnet_time_scale_shift not in ("scale_shift", "default"):
        raise ValueError(
            f'`resnet_time_scale_shift` is {config.resnet_time_scale_shift!r}; it must be "scale_shift" or "default".'
        )
    if config.resample_type not in ("resnet", "conv", "pool"):
        raise ValueError(f'`resample_type` is {config.resample_type!r}; it must be "resnet", "conv" or "pool".')
    if config.get("null_class") and config.num_class_embeds is None:
        raise ValueError("`null_class` needs classes: give their number as `num_class_embeds`.")
    for width in config.block_out_channels:
        if width % config.norm_num_groups:
            raise ValueError(
                f"`block_out_channels` {tuple(config.block_out_channels)} must be multiples of `norm_num_groups` "
                f"({config.norm_num_groups})."
            )
    sizes = [config.sample_size // 2**level for level in range(16)]
    for resolution in config.attention_resolutions:
        if resolution not in sizes:
            raise ValueError(
                f"`attention_resolutions` {tuple(config.attention_resolutions)}: {resolution} is not the size in "
                f"pixels of a feature map of a {config.sample_size} px image, which is halved from level to level."
            )
    widths = config.block_out_channels
    with_attention = {width for size, width in zip(sizes, widths) if size in config.attention_resolutions}
    with_attention.add(widths[-1])
    divisors = [("num_attention_heads" if config.num_attention_heads else "attention_head_dim", with_attention)]
    if config.get("num_attention_heads_upsample"):
        divisors.append(("num_attention_heads_upsample", with_attention))
    if config.get("pool") == "attention":
        divisors.append(("attention_head_dim", {widths[-1]}))
    for option, divided in divisors:
        for width in divided:
            if not config[option] or width % config[option]:
                raise ValueError(
                    f"`{option}` ({config[option]}) must divide {width}, the width of a feature map with attention."
                )
