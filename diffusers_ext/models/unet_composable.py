"""Composable UNet: the design space of diffusion UNets, one word of the config for each choice.

The frame is the UNet of DDPM (Ho et al., 2020, https://arxiv.org/abs/2006.11239, Appendix B; Ronneberger et al., 2015,
https://arxiv.org/abs/1505.04597); what fills it is chosen in [`ComposableUNet2DModel`]. Every option is a small class
or function here, with its formula and source, found by its word in a table.

Shapes: B batch, C channels, H and W pixels, L = H W tokens, E width of the time and class embeddings, T tokens of the
context that cross-attention reads, D their width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.unets.unet_2d import UNet2DOutput


# Named sizes: 32 px, ten classes and a null class, so that classifier-free guidance works.
_FILM = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64, 128, 256, 512),
    "layers_per_block": 2,
    "attention_resolutions": (16, 8),
    "num_class_embeds": 10,
    "null_class": True,
    "time_conditioning": "film",
    "class_conditioning": "film",
}
PRESETS = {
    "film": _FILM,
    "film-mnist": _FILM
    | {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32, 64, 112),
        "layers_per_block": 1,
        "attention_resolutions": (8,),
        "attention_head_dim": 16,
        "norm_num_groups": 8,
    },
    "additive": _FILM | {"time_conditioning": "add", "class_conditioning": "add"},
    "adain": _FILM | {"time_conditioning": "adain", "class_conditioning": "adain"},
    "separable": _FILM | {"conv_type": "separable"},
    "attention": _FILM
    | {
        "attention_resolutions": (16, 8, 4),
        "attention_position_embedding": "relative",
        "class_conditioning": "cross_attention",
    },
    "theory": _FILM
    | {
        "attention_resolutions": (16, 8, 4),
        "time_embedding_type": "hybrid",
        "class_conditioning": "cross_attention",
        "cross_attention_dim": 512,
        "channel_attention": True,
        "dilations": (1, 1, 2, 2),
        "attention_position_embedding": "relative",
        "bottleneck_context": "aspp",
    },
}

Timestep = int | float | torch.Tensor
Conditions = dict[str, torch.Tensor]  # embeddings (B or 1, E) by the word of their conditioning; context and its mask

_CONCAT_CHANNELS = 16  # planes of constants that the word "concat" puts beside a feature map
_CONDITION_TOKENS = 4  # with a single token, attention would have nothing to choose and be a sum
_ASPP_RATES = (1, 2, 3)  # those of the paper, 6, 12 and 18, would only see padding around a 4 px feature map


# Layers


class ComposableGroupNorm(nn.GroupNorm):
    """Mean 0 and deviation 1 of each group of channels of an image (Wu and He, 2018, https://arxiv.org/abs/1803.08494,
    Sec. 3.1)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # torch's kernel for channels-last images loses digits where a group's mean is large.
        return super().forward(hidden_states.contiguous())


_NORMS = {
    "group": lambda config, channels: ComposableGroupNorm(config.norm_num_groups, channels, config.norm_eps),
    "layer": lambda config, channels: ComposableGroupNorm(1, channels, config.norm_eps),
    "batch": lambda config, channels: nn.BatchNorm2d(channels, config.norm_eps),
}


def _norm(config: FrozenDict, channels: int) -> nn.Module:
    return _NORMS[config.norm_type](config, channels)


class DilatedConv2d(nn.Conv2d):
    """Convolution whose taps are as far apart as its padding is wide (Yu and Koltun, 2016,
    https://arxiv.org/abs/1511.07122), or side by side without one; a 3x3 kernel then keeps the size of an image.

    From the class of a layer, its kernel and its padding alone peft builds the halves of a LoRA.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, **options
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation=padding or 1, **options)


class SeparableConv2d(nn.Module):
    """Depthwise, then pointwise convolution (Chollet, 2017, https://arxiv.org/abs/1610.02357; Howard et al., 2017,
    https://arxiv.org/abs/1704.04861, Sec. 3.1).

    k^2 C + C C' parameters instead of the k^2 C C' of a full convolution: neither of the two has a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.depthwise = DilatedConv2d(
            in_channels, in_channels, kernel_size, stride, padding, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.pointwise(self.depthwise(hidden_states))


_CONVS = {"standard": DilatedConv2d, "separable": SeparableConv2d}


def _conv(config: FrozenDict, in_channels: int, out_channels: int, dilation: int = 1, stride: int = 1) -> nn.Module:
    return _CONVS[config.conv_type](in_channels, out_channels, 3, stride, padding=dilation)


def _zero(module: nn.Module) -> nn.Module:
    """Zero the last layer of a residual branch, so that training starts from the identity."""
    # A separable convolution whose halves are both zero would never get a gradient.
    last = module.pointwise if isinstance(module, SeparableConv2d) else module
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return module


class ChannelAttention(nn.Module):
    """Squeeze and excitation: `h * sigmoid(W2 silu(W1 mean(h)))`, a gate for each channel from the means of all.

    Hu et al. (2018), https://arxiv.org/abs/1709.01507, Sec. 3; W1 narrows C channels to C / 16 (Sec. 6.1), at least 4.
    Their ReLU is a SiLU here (Tan and Le, 2019, https://arxiv.org/abs/1905.11946): the branch and so its means
    start at zero, where a bias below zero would shut a rectifier for good.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 16, 4)
        self.linear_1 = nn.Linear(channels, hidden)
        self.linear_2 = nn.Linear(hidden, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = self.linear_2(F.silu(self.linear_1(hidden_states.mean(dim=(2, 3)))))
        return hidden_states * gate.sigmoid()[:, :, None, None]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a residual branch that sees the feature map at several scales at once.

    Chen et al. (2017), https://arxiv.org/abs/1706.05587, Sec. 3.3: a 1x1 convolution, 3x3 convolutions of growing
    dilation and the mean over all pixels, side by side, then a 1x1 convolution of all of them.
    """

    def __init__(self, config: FrozenDict, channels: int):
        super().__init__()
        width = channels // 4
        self.norm = _norm(config, channels)
        self.branches = nn.ModuleList([nn.Conv2d(channels, width, 1)])
        self.branches.extend(_conv(config, channels, width, dilation=rate) for rate in _ASPP_RATES)
        self.pool = nn.Linear(channels, width)
        self.proj_out = _zero(nn.Conv2d((2 + len(_ASPP_RATES)) * width, channels, 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = F.silu(self.norm(hidden_states))
        scales = [branch(hidden_states) for branch in self.branches]
        scales.append(self.pool(hidden_states.mean(dim=(2, 3)))[:, :, None, None].expand_as(scales[0]))
        return residual + self.proj_out(F.silu(torch.cat(scales, dim=1)))


_BOTTLENECK_CONTEXTS = {"none": None, "aspp": ASPP}


# Time embeddings, (B,) -> (B, E)


class SinusoidalTimeEmbedding(TimestepEmbedding):
    """`MLP(PE(t))`, PE(t) = [cos(w_i t), sin(w_i t)], w_i = 10000^(-i / half) (Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762, Sec. 3.5; Ho et al., 2020, Appendix B)."""

    def __init__(self, config: FrozenDict, channels: int, temb_dim: int):
        super().__init__(channels, temb_dim)
        self.time_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`timestep` (B,) in float32, in which sines are exact; the result has the dtype given."""
        return super().forward(self.time_proj(timestep).to(dtype))


class HybridTimeEmbedding(TimestepEmbedding):
    """`PE(t) + MLP(PE(t))`: the fixed sinusoids, which tell all timesteps apart from the start, and a learned change.

    A residual connection (He et al., 2016, https://arxiv.org/abs/1512.03385, Eq. 1) around the MLP of
    [`SinusoidalTimeEmbedding`]; PE therefore has the full width E.
    """

    def __init__(self, config: FrozenDict, channels: int, temb_dim: int):
        super().__init__(temb_dim, temb_dim)
        self.time_proj = Timesteps(temb_dim, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        positions = self.time_proj(timestep).to(dtype)
        return positions + super().forward(positions)


class LearnedTimeEmbedding(TimestepEmbedding):
    """`MLP(table[t])`, a learned row for each training timestep (Gehring et al., 2017,
    https://arxiv.org/abs/1705.03122, Sec. 3.1, for positions).

    Between two rows the table is interpolated linearly, `(1 - f) table[i] + f table[i + 1]` at t = i + f; outside it
    its ends are used.
    """

    def __init__(self, config: FrozenDict, channels: int, temb_dim: int):
        super().__init__(channels, temb_dim)
        self.last = config.num_train_timesteps - 1
        self.table = nn.Embedding(config.num_train_timesteps, channels)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        timestep = timestep.clamp(0, self.last)
        lower = timestep.floor()
        fraction = (timestep - lower)[:, None].to(dtype)
        lower = lower.long()
        rows = torch.lerp(
            self.table(lower).to(dtype), self.table((lower + 1).clamp(max=self.last)).to(dtype), fraction
        )
        return super().forward(rows)


_TIME_EMBEDDINGS = {
    "sinusoidal": SinusoidalTimeEmbedding,
    "learned": LearnedTimeEmbedding,
    "hybrid": HybridTimeEmbedding,
}


# Conditioning: how an embedding e (B or 1, E) changes a feature map h (B, C, H, W)


class AddConditioning(nn.Module):
    """`norm(h + W e)`, a sum before the second norm of a residual block (Ho et al., 2020, Appendix B)."""

    def __init__(self, config: FrozenDict, channels: int):
        super().__init__()
        self.proj = nn.Linear(_temb_dim(config), channels)

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.proj(embedding)[:, :, None, None]


class FiLMConditioning(nn.Module):
    """`norm(h) * (1 + scale) + shift`, [scale, shift] = W e (Perez et al., 2018, https://arxiv.org/abs/1709.07871,
    Eq. 2)."""

    def __init__(self, config: FrozenDict, channels: int):
        super().__init__()
        self.proj = nn.Linear(_temb_dim(config), 2 * channels)

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.proj(embedding)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, hidden_states, 1 + scale)


class AdaINConditioning(FiLMConditioning):
    """`sigma (h - mean(h)) / std(h) + mu`: the mean and deviation of each channel become those that e gives.

    Huang and Belongie (2017), https://arxiv.org/abs/1703.06868, Eq. 8, in place of the block's norm; [sigma - 1, mu] =
    W e. A negative sigma mirrors the channel.
    """

    def __init__(self, config: FrozenDict, channels: int):
        super().__init__(config, channels)
        self.eps = config.norm_eps

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        # Unlike `F.instance_norm`, this also takes feature maps of one pixel.
        whitened = torch.group_norm(hidden_states.contiguous(), hidden_states.shape[1], eps=self.eps)
        return super().forward(whitened, embedding)


class ConcatConditioning(nn.Module):
    """`conv([h, W e])`: constant planes beside the channels that a residual block's first convolution reads (Mirza and
    Osindero, 2014, https://arxiv.org/abs/1411.1784; Reed et al., 2016, https://arxiv.org/abs/1605.05396, Sec. 4.1)."""

    def __init__(self, config: FrozenDict, channels: int):
        super().__init__()
        self.proj = nn.Linear(_temb_dim(config), _CONCAT_CHANNELS)

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C + planes, H, W)."""
        batch, _, height, width = hidden_states.shape
        planes = self.proj(embedding)[:, :, None, None].expand(batch, -1, height, width)
        return torch.cat([hidden_states, planes], dim=1)


class TokenConditioning(nn.Module):
    """`attention(q = h, k = v = W e)`: a few tokens made from e, read by the cross-attention of the blocks that have
    attention (Vaswani et al., 2017, Sec. 3.2.3; Rombach et al., 2022, https://arxiv.org/abs/2112.10752, Sec. 3.3)."""

    def __init__(self, config: FrozenDict):
        super().__init__()
        self.proj = nn.Linear(_temb_dim(config), _CONDITION_TOKENS * _context_dim(config))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """(B or 1, E) -> (B or 1, tokens, D)."""
        return self.proj(embedding).unflatten(1, (_CONDITION_TOKENS, -1))


_CONDITIONINGS = {
    "add": AddConditioning,
    "film": FiLMConditioning,
    "adain": AdaINConditioning,
    "concat": ConcatConditioning,
    "cross_attention": TokenConditioning,  # the only one outside residual blocks
}


# Residual blocks


class ComposableResnetBlock(nn.Module):
    """What both orders of a residual block share. Time and class enter around the norm between its convolutions, or
    with the input of the first; if both enter in the same way, they share one layer."""

    def __init__(self, config: FrozenDict, in_channels: int, out_channels: int, dilation: int):
        super().__init__()
        words = [word for word in _words(config) if word != "cross_attention"]
        # AdaIN takes the norm's place, and anything added before it would be lost.
        order = ("adain", "film", "add") if "adain" in words else ("add", "norm", "film")
        self.modulations = [word for word in order if word in (*words, "norm")]
        self.conditionings = nn.ModuleDict({word: _CONDITIONINGS[word](config, out_channels) for word in words})
        extra_channels = _CONCAT_CHANNELS if "concat" in words else 0
        self.conv1 = _conv(config, in_channels + extra_channels, out_channels, dilation)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _conv(config, out_channels, out_channels, dilation)
        self.channel_attention = ChannelAttention(out_channels) if config.channel_attention else nn.Identity()
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def first_half(self, hidden_states: torch.Tensor, conditions: Conditions, norm: nn.Module | None) -> torch.Tensor:
        """The first convolution, then `norm` and all that time and class do to it."""
        if "concat" in self.conditionings:
            hidden_states = self.conditionings["concat"](hidden_states, conditions["concat"])
        return self.modulate(self.conv1(hidden_states), conditions, norm)

    def modulate(self, hidden_states: torch.Tensor, conditions: Conditions, norm: nn.Module | None) -> torch.Tensor:
        for word in self.modulations:
            if word == "norm":
                hidden_states = norm(hidden_states)
            else:
                hidden_states = self.conditionings[word](hidden_states, conditions[word])
        return hidden_states

    def shortcut(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)


class PreActivationResnetBlock(ComposableResnetBlock):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`: the sum of all blocks stays linear (He et al., 2016,
    https://arxiv.org/abs/1603.05027, Fig. 1b)."""

    def __init__(self, config: FrozenDict, in_channels: int, out_channels: int, dilation: int):
        super().__init__(config, in_channels, out_channels, dilation)
        self.norm1 = _norm(config, in_channels)
        self.norm2 = _norm(config, out_channels) if "norm" in self.modulations else None
        _zero(self.conv2)

    def forward(self, hidden_states: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        residual = self.shortcut(hidden_states)
        hidden_states = self.first_half(_silu(self.norm1(hidden_states)), conditions, self.norm2)
        hidden_states = self.conv2(self.dropout(_silu(hidden_states)))
        return residual + self.channel_attention(hidden_states)


class PostActivationResnetBlock(ComposableResnetBlock):
    """`silu(x + norm(conv(silu(norm(conv(x))))))`: convolution, norm, activation, as in He et al. (2015),
    https://arxiv.org/abs/1512.03385, Fig. 2. The last norm's weight starts at zero (Goyal et al., 2017,
    https://arxiv.org/abs/1706.02677, Sec. 5.1)."""

    def __init__(self, config: FrozenDict, in_channels: int, out_channels: int, dilation: int):
        super().__init__(config, in_channels, out_channels, dilation)
        self.norm1 = _norm(config, out_channels) if "norm" in self.modulations else None
        self.norm2 = _zero(_norm(config, out_channels))

    def forward(self, hidden_states: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        residual = self.shortcut(hidden_states)
        hidden_states = _silu(self.first_half(hidden_states, conditions, self.norm1))
        hidden_states = self.norm2(self.conv2(self.dropout(hidden_states)))
        return _silu(residual + self.channel_attention(hidden_states))


_RESNETS = {"pre": PreActivationResnetBlock, "post": PostActivationResnetBlock}


def _silu(hidden_states: torch.Tensor) -> torch.Tensor:
    # Without autograd nobody else holds what a norm or a sum has just made.
    return F.silu(hidden_states, inplace=not torch.is_grad_enabled())


# Attention


class SinCosPositions(nn.Module):
    """Fixed sinusoids of row and column added to the tokens (Vaswani et al., 2017, Sec. 3.5, in two dimensions).

    Rows and columns count from 0 to `size`, that of the feature map in training, whatever the size is now.
    """

    def __init__(self, channels: int, heads: int, size: int):
        super().__init__()
        self.channels, self.size = channels, size

    def forward(self, tokens: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, None]:
        """`tokens` (B, L, C). Returns the tokens with their positions, and no bias of the attention."""
        positions = get_2d_sincos_pos_embed(
            self.channels, (height, width), base_size=self.size, device=tokens.device
        )  # (L, C)
        return tokens + positions.to(tokens.dtype), None


class LearnedFourierPositions(nn.Module):
    """`MLP([cos(2 pi W p), sin(2 pi W p)])` added to the tokens, with learned frequencies W of the position p (Li et
    al., 2021, https://arxiv.org/abs/2106.02795, Sec. 3; Tancik et al., 2020, https://arxiv.org/abs/2006.10739).

    p is a pixel's centre, in [-1/2, 1/2] from border to border, whatever the size.
    """

    def __init__(self, channels: int, heads: int, size: int):
        super().__init__()
        self.frequencies = nn.Linear(2, channels // 2, bias=False)
        nn.init.normal_(self.frequencies.weight)
        self.linear_1 = nn.Linear(2 * (channels // 2), channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, tokens: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, None]:
        rows, columns = ((torch.arange(n, device=tokens.device) + 0.5) / n - 0.5 for n in (height, width))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # (L, 2)
        angles = 2 * math.pi * self.frequencies(grid.to(tokens.dtype)).float()
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(tokens.dtype)
        return tokens + self.linear_2(F.gelu(self.linear_1(features))), None


class RelativePositions(nn.Module):
    """`softmax(q k / sqrt(d) + MLP(i - j)) v`: a bias for each head from the offset of two pixels, and from that only.

    Shaw et al. (2018), https://arxiv.org/abs/1803.02155; the continuous bias of Liu et al. (2022),
    https://arxiv.org/abs/2111.09883, Eqs. 3 and 4, whose MLP reads sign(offset) log(1 + |offset|) in rows and columns
    and so has no largest size. It starts at zero.
    """

    def __init__(self, channels: int, heads: int, size: int):
        super().__init__()
        self.linear_1 = nn.Linear(2, 64)
        self.linear_2 = _zero(nn.Linear(64, heads))

    def forward(self, tokens: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`tokens` (B, L, C), which stay; the bias is `(1, heads, L, L)`, of queries (third) and keys (last)."""
        offsets = (torch.arange(1 - n, n, device=tokens.device, dtype=torch.float32) for n in (height, width))
        offsets = torch.stack(torch.meshgrid(*offsets, indexing="ij"), dim=-1)  # (2H - 1, 2W - 1, 2)
        offsets = (offsets.sign() * offsets.abs().log1p()).to(tokens.dtype)
        table = self.linear_2(F.relu(self.linear_1(offsets))).permute(2, 0, 1)  # (heads, 2H - 1, 2W - 1)
        rows, columns = (torch.arange(n, device=tokens.device) for n in (height, width))
        rows = rows[:, None] - rows + height - 1  # (H, H): where the offset of query and key stands in the table
        columns = columns[:, None] - columns + width - 1
        bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]  # (heads, H, W, H, W)
        return tokens, bias.flatten(3).flatten(1, 2)[None]


_POSITIONS = {
    "none": None,
    "sincos2d": SinCosPositions,
    "learned_fourier": LearnedFourierPositions,
    "relative": RelativePositions,
}


class ComposableAttnProcessor:
    """Attention through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ComposableAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of all tokens to each other, or to a context.

        Args:
            attn: the module whose projections are used.
            hidden_states: `(B, L, C)`, normalised.
            encoder_hidden_states: context `(B, T, D)` of a cross-attention.
            attention_mask: broadcastable to `(B, heads, L, T or L)`; True where a key may be seen, or a bias.

        Returns:
            `(B, L, C)`, before the residual sum.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not attn.fused_projections:
            query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        elif attn.is_cross_attention:
            query, (key, value) = attn.to_q(hidden_states), attn.to_kv(context).chunk(2, dim=-1)
        else:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask.to(query.dtype)  # autocast may have changed either
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](hidden_states.flatten(2))


class ComposableAttention(nn.Module, AttentionModuleMixin):
    """Projections of a self-attention or, with the width of a context, of a cross-attention."""

    _default_processor_cls = ComposableAttnProcessor
    _available_processors = [ComposableAttnProcessor]

    def __init__(self, channels: int, heads: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.is_cross_attention = context_dim is not None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(context_dim or channels, channels)
        self.to_v = nn.Linear(context_dim or channels, channels)
        self.to_out = nn.ModuleList([_zero(nn.Linear(channels, channels))])
        self.set_processor(ComposableAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, *context: torch.Tensor | None) -> torch.Tensor:
        return self.processor(self, hidden_states, *context)


class ComposableAttentionBlock(nn.Module):
    """Self-attention over pixels, then cross-attention to the context where the model has one; both residual."""

    def __init__(self, config: FrozenDict, channels: int, size: int):
        super().__init__()
        heads = channels // config.attention_head_dim
        positions = _POSITIONS[config.attention_position_embedding]
        context_dim = _context_dim(config)
        self.norm1 = _norm(config, channels)
        self.positions = positions(channels, heads, size) if positions else None
        self.attn1 = ComposableAttention(channels, heads)
        self.norm2 = _norm(config, channels) if context_dim else None
        self.attn2 = ComposableAttention(channels, heads, context_dim) if context_dim else None

    def forward(self, hidden_states: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        size = hidden_states.shape[2:]
        tokens, bias = _tokens(self.norm1(hidden_states)), None
        if self.positions is not None:
            tokens, bias = self.positions(tokens, *size)
        # A processor without biases and contexts serves as well where there are none.
        tokens = self.attn1(tokens) if bias is None else self.attn1(tokens, None, bias)
        hidden_states = hidden_states + tokens.transpose(1, 2).unflatten(2, size)
        if self.attn2 is not None:
            tokens = self.attn2(
                _tokens(self.norm2(hidden_states)), conditions["context"], conditions.get("context_mask")
            )
            hidden_states = hidden_states + tokens.transpose(1, 2).unflatten(2, size)
        return hidden_states


def _tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, L, C)."""
    return hidden_states.flatten(2).transpose(1, 2).contiguous()


# Stages of the UNet


class ComposableStage(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the resolution has it."""

    def __init__(
        self, config: FrozenDict, level: int, widths: list[tuple[int, int]], has_attention: bool | None = None
    ):
        super().__init__()
        self.gradient_checkpointing = False
        size = config.sample_size // 2**level
        if has_attention is None:
            has_attention = size in config.attention_resolutions
        dilation = config.dilations[level] if config.dilations else 1
        resnet_class = _RESNETS[config.resnet_order]
        self.resnets = nn.ModuleList(resnet_class(config, *width, dilation) for width in widths)
        self.attentions = nn.ModuleList(
            ComposableAttentionBlock(config, width[1], size) for width in widths if has_attention
        )

    def layer(self, index: int, hidden_states: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        hidden_states = self.run(self.resnets[index], hidden_states, conditions)
        if index < len(self.attentions):
            hidden_states = self.run(self.attentions[index], hidden_states, conditions)
        return hidden_states

    def run(self, module: nn.Module, *inputs) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)


class ComposableResample(nn.Module):
    """Strided convolution, or nearest upsampling and a convolution (Ho et al., 2020; Odena et al., 2016,
    https://doi.org/10.23915/distill.00003, on the checkerboards of transposed convolutions)."""

    def __init__(self, config: FrozenDict, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = _conv(config, channels, channels, stride=1 if up else 2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.up:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return self.conv(hidden_states)


class ComposableDownBlock(ComposableStage):
    def __init__(self, config: FrozenDict, level: int, in_channels: int):
        width = config.block_out_channels[level]
        inputs = [in_channels] + [width] * (config.layers_per_block - 1)
        super().__init__(config, level, [(channels, width) for channels in inputs])
        is_last = level == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if is_last else [ComposableResample(config, width, up=False)])

    def forward(self, hidden_states: torch.Tensor, conditions: Conditions) -> tuple[torch.Tensor, ...]:
        """Returns the feature maps of all layers; the last one is the block's output."""
        features = []
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, conditions)
            features.append(hidden_states)
        for downsampler in self.downsamplers:
            features.append(self.run(downsampler, hidden_states))
        return tuple(features)


class ComposableMidBlock(ComposableStage):
    """Residual block, attention, context of the bottleneck, residual block."""

    def __init__(self, config: FrozenDict):
        width = config.block_out_channels[-1]
        super().__init__(config, len(config.block_out_channels) - 1, [(width, width)], has_attention=True)
        dilation = config.dilations[-1] if config.dilations else 1
        self.resnets.append(_RESNETS[config.resnet_order](config, width, width, dilation))
        context = _BOTTLENECK_CONTEXTS[config.bottleneck_context]
        self.context = context(config, width) if context else None

    def forward(self, hidden_states: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        hidden_states = self.layer(0, hidden_states, conditions)
        if self.context is not None:
            hidden_states = self.run(self.context, hidden_states)
        return self.layer(1, hidden_states, conditions)


class ComposableUpBlock(ComposableStage):
    def __init__(self, config: FrozenDict, level: int, in_channels: int, skip_channels: list[int]):
        width = config.block_out_channels[level]
        inputs = [in_channels] + [width] * (len(skip_channels) - 1)
        super().__init__(config, level, [(a + b, width) for a, b in zip(inputs, skip_channels)])
        self.upsamplers = nn.ModuleList([ComposableResample(config, width, up=True)] if level else [])

    def forward(
        self, hidden_states: torch.Tensor, conditions: Conditions, skips: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """`skips`: one feature map of the down path per layer, in the order of the layers."""
        for index, skip in enumerate(skips):
            hidden_states = self.layer(index, torch.cat([hidden_states, skip], dim=1), conditions)
        for upsampler in self.upsamplers:
            hidden_states = self.run(upsampler, hidden_states)
        return hidden_states


class ComposableUNet2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """UNet of a diffusion model whose parts are chosen by name.

    Args:
        sample_size: height and width in pixels of the training images. Others work as well, if the levels halve them.
        in_channels: channels of the input.
        out_channels: channels of the output; twice those of the image when the variance is learned.
        block_out_channels: width of each level, from the full resolution down. The embeddings are four times as wide
            as the first (E).
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        num_class_embeds: number of classes, None without.
        null_class: adds one label, `num_class_embeds`, that stands for no class; the default of `class_labels`.
        cross_attention_dim: width D of `encoder_hidden_states`, None without. Where there is attention, pixels then
            also attend to them, and to a learned token that stands for no prompt.
        time_embedding_type: "sinusoidal" [`SinusoidalTimeEmbedding`], "learned" [`LearnedTimeEmbedding`] or "hybrid"
            [`HybridTimeEmbedding`].
        num_train_timesteps: rows of the table of a learned time embedding.
        time_conditioning: how the time embedding enters: "add" [`AddConditioning`], "film" [`FiLMConditioning`],
            "adain" [`AdaINConditioning`], "concat" [`ConcatConditioning`] or "cross_attention"
            [`TokenConditioning`]. All but the last act in every residual block.
        class_conditioning: the same for the class embedding. If both enter in the same way, they are summed first.
        norm_type: whose mean becomes 0 and deviation 1, `(h - mean(h)) / sqrt(var(h) + norm_eps)`. "group": a group of
            channels of an image (Wu and He, 2018); "layer": all channels of an image (Ba et al., 2016,
            https://arxiv.org/abs/1607.06450); "batch": a channel of all images (Ioffe and Szegedy, 2015,
            https://arxiv.org/abs/1502.03167). Images of a batch meet in training with the last one, and gradient
            checkpointing then updates the running averages, which evaluation uses, twice per step.
        norm_num_groups: groups of a group norm.
        norm_eps: epsilon of all norms.
        resnet_order: "pre" [`PreActivationResnetBlock`] or "post" [`PostActivationResnetBlock`].
        conv_type: 3x3 convolutions but the first and the last: "standard" or "separable" [`SeparableConv2d`].
        dilations: distance of the taps of residual blocks' convolutions, in pixels of the feature map, per level; the
            middle has that of the last. None: 1 everywhere.
        channel_attention: squeeze and excitation in residual blocks [`ChannelAttention`].
        attention_resolutions: sizes in pixels, at `sample_size`, of the feature maps that get attention. The middle
            always has it.
        attention_head_dim: channels per attention head.
        attention_position_embedding: what self-attention knows of positions: "none", "sincos2d" [`SinCosPositions`],
            "learned_fourier" [`LearnedFourierPositions`] or "relative" [`RelativePositions`].
        bottleneck_context: "none" or "aspp" [`ASPP`], in the middle.
        dropout: rate of dropout in residual blocks during training.

    Raises:
        ValueError: for a word that is no option, with those that are, and for numbers that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ComposableDownBlock", "ComposableMidBlock", "ComposableUpBlock"]
    _repeated_blocks = ["ComposableAttentionBlock"]
    _skip_layerwise_casting_patterns = ["norm", "null_context"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        layers_per_block: int = 2,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        cross_attention_dim: int | None = None,
        time_embedding_type: str = "sinusoidal",
        num_train_timesteps: int = 1000,
        time_conditioning: str = "film",
        class_conditioning: str = "film",
        norm_type: str = "group",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_order: str = "pre",
        conv_type: str = "standard",
        dilations: tuple[int, ...] | None = None,
        channel_attention: bool = False,
        attention_resolutions: tuple[int, ...] = (16, 8),
        attention_head_dim: int = 64,
        attention_position_embedding: str = "none",
        bottleneck_context: str = "none",
        dropout: float = 0.0,
    ):
        super().__init__()
        config = self.config
        _check_config(config)
        temb_dim, context_dim = _temb_dim(config), _context_dim(config)

        self.time_embedding = _TIME_EMBEDDINGS[time_embedding_type](config, block_out_channels[0], temb_dim)
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + null_class, temb_dim)
        self.condition_tokens = None
        if "cross_attention" in _words(config):
            self.condition_tokens = TokenConditioning(config)
        if cross_attention_dim is not None:
            self.null_context = nn.Parameter(torch.randn(1, 1, context_dim) / context_dim**0.5)

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        skips = [block_out_channels[0]]  # widths of what the down path leaves for the up path
        for level, width in enumerate(block_out_channels):
            block = ComposableDownBlock(config, level, skips[-1])
            self.down_blocks.append(block)
            skips += [width] * (len(block.resnets) + len(block.downsamplers))
        self.mid_block = ComposableMidBlock(config)
        self.up_blocks = nn.ModuleList()
        channels = block_out_channels[-1]
        for level, width in reversed(list(enumerate(block_out_channels))):
            inputs = [skips.pop() for _ in range(layers_per_block + 1)]
            self.up_blocks.append(ComposableUpBlock(config, level, channels, inputs))
            channels = width
        self.conv_norm_out = _norm(config, channels)
        self.conv_out = _zero(nn.Conv2d(channels, out_channels, 3, padding=1))

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

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Timestep,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: noisy images `(B, C, H, W)`.
            timestep: noise level in units of the training schedule's steps, 0 being the least noise; one number (int,
                float or 0-d tensor) or one per image `(B,)`. Fractions are meaningful.
            class_labels: class ids `(B,)` or `(1,)` in `[0, num_class_embeds)`, or the null label `num_class_embeds`,
                for a class-conditional UNet only. None: the null label, if there is one.
            encoder_hidden_states: `(B, T, cross_attention_dim)`, such as the last hidden state of a text encoder, for
                a UNet with `cross_attention_dim` only. None: no prompt.
            encoder_attention_mask: `(B, T)`, nonzero where a token may be seen, as tokenizers give it. None: all.
            return_dict: False returns a tuple.

        Returns:
            `UNet2DOutput` with `sample` `(B, out_channels, H, W)`.

        Raises:
            ValueError: for a wrong shape, a label out of range, or a condition that is missing or not understood.
        """
        timestep = self._check_inputs(sample, timestep, class_labels, encoder_hidden_states, encoder_attention_mask)
        conditions = self._conditions(sample, timestep, class_labels, encoder_hidden_states, encoder_attention_mask)
        hidden_states = self.conv_in(sample)
        skips = [hidden_states]
        for block in self.down_blocks:
            skips.extend(block(skips[-1], conditions))
        hidden_states = self.mid_block(skips[-1], conditions)
        for block in self.up_blocks:
            inputs = tuple(skips.pop() for _ in block.resnets)
            hidden_states = block(hidden_states, conditions, inputs)
        output = self.conv_out(_silu(self.conv_norm_out(hidden_states)))
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _conditions(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
    ) -> Conditions:
        """All that conditions the blocks, by the word under which they look for it."""
        config, dtype = self.config, sample.dtype
        embeddings = {"time": self.time_embedding(timestep, dtype)}
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((1,), config.num_class_embeds, device=sample.device)
            labels = class_labels.to(sample.device).reshape(-1)
            embeddings["class"] = self.class_embedding(labels).to(dtype)
        conditions = {
            word: F.silu(sum(embeddings[source] for source in _sources(config, word))) for word in _words(config)
        }
        context = []
        if self.condition_tokens is not None:
            context.append(self.condition_tokens(conditions["cross_attention"]))
        if config.cross_attention_dim is not None:
            context.append(self.null_context.to(dtype))
            if encoder_hidden_states is not None:
                context.append(encoder_hidden_states.to(dtype))
        if context:
            context = [tokens.expand(sample.shape[0], -1, -1) for tokens in context]
            conditions["context"] = torch.cat(context, dim=1)  # (B, T, D)
        if encoder_attention_mask is not None:
            always = conditions["context"].shape[1] - encoder_attention_mask.shape[1]
            mask = F.pad(encoder_attention_mask.to(sample.device, torch.bool), (always, 0), value=True)
            conditions["context_mask"] = mask[:, None, None]  # (B, 1, 1, T)
        return conditions

    def _check_inputs(
        self,
        sample: torch.Tensor,
        timestep: Timestep,
        class_labels: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Check the inputs of `forward`. Returns the timesteps (B,) or (1,) in float32."""
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}, expected (batch, {config.in_channels}, height, width)."
            )
        batch, _, height, width = sample.shape
        factor = 2 ** (len(config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"`sample` is {height}x{width} pixels; height and width must be multiples of {factor}, since "
                f"{len(config.block_out_channels)} levels halve them. Pad or resize the images."
            )
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        for name, values in (("timestep", timestep), ("class_labels", class_labels)):
            if values is not None and values.numel() not in (1, batch):
                raise ValueError(f"`{name}` has {values.numel()} entries for {batch} images; give one, or one each.")
        self._check_labels(class_labels)
        if encoder_hidden_states is None:
            if encoder_attention_mask is not None:
                raise ValueError("`encoder_attention_mask` was given without `encoder_hidden_states`, which it masks.")
            return timestep
        dim, shape = config.cross_attention_dim, tuple(encoder_hidden_states.shape)
        if dim is None:
            raise ValueError(
                "`encoder_hidden_states` were given to a UNet that does not attend to them (`cross_attention_dim` is "
                "None)."
            )
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[2] != dim:
            raise ValueError(f"`encoder_hidden_states` has shape {shape}, expected ({batch}, tokens, {dim}).")
        if encoder_attention_mask is not None and tuple(encoder_attention_mask.shape) != shape[:2]:
            raise ValueError(
                f"`encoder_attention_mask` has shape {tuple(encoder_attention_mask.shape)}, expected {shape[:2]}, one "
                "entry per token of `encoder_hidden_states`."
            )
        return timestep

    def _check_labels(self, class_labels: torch.Tensor | None) -> None:
        classes, null_class = self.config.num_class_embeds, self.config.null_class
        if class_labels is None:
            if classes is not None and not null_class:
                raise ValueError(
                    "`class_labels` are needed by this class-conditional UNet, which has no null class (`null_class`)."
                )
            return
        if classes is None:
            raise ValueError("`class_labels` were given to an unconditional UNet (`num_class_embeds` is None).")
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere one would have to wait
            rows = classes + null_class
            outside = class_labels[(class_labels < 0) | (class_labels >= rows)]
            if outside.numel():
                null = ", the last of which is the null class" if null_class else ""
                raise ValueError(f"`class_labels` holds {outside[0].item()}; labels are in [0, {rows}){null}.")


def _sources(config: FrozenDict, word: str) -> list[str]:
    """Those of time and class that enter in the way that `word` names."""
    sources = ["time"] if config.num_class_embeds is None else ["time", "class"]
    return [source for source in sources if config[f"{source}_conditioning"] == word]


def _words(config: FrozenDict) -> list[str]:
    """The ways in which time and class enter."""
    return [word for word in _CONDITIONINGS if _sources(config, word)]


def _temb_dim(config: FrozenDict) -> int:
    return 4 * config.block_out_channels[0]


def _context_dim(config: FrozenDict) -> int | None:
    """Width of the tokens that cross-attention reads; None where there is none."""
    if config.cross_attention_dim is not None:
        return config.cross_attention_dim
    return _temb_dim(config) if "cross_attention" in _words(config) else None


_WORDS = {
    "time_embedding_type": _TIME_EMBEDDINGS,
    "time_conditioning": _CONDITIONINGS,
    "class_conditioning": _CONDITIONINGS,
    "norm_type": _NORMS,
    "resnet_order": _RESNETS,
    "conv_type": _CONVS,
    "attention_position_embedding": _POSITIONS,
    "bottleneck_context": _BOTTLENECK_CONTEXTS,
}


def _check_config(config: FrozenDict) -> None:
    for option, words in _WORDS.items():
        if config[option] not in words:
            valid = ", ".join(f'"{word}"' for word in words)
            raise ValueError(f"`{option}` is {config[option]!r}; it must be one of {valid}.")
    widths = tuple(config.block_out_channels)
    if config.norm_type == "group" and any(width % config.norm_num_groups for width in widths):
        raise ValueError(
            f"`block_out_channels` {widths} must be multiples of `norm_num_groups` ({config.norm_num_groups}): every "
            "group of a norm has the same number of channels, at least one."
        )
    if config.dilations and (len(config.dilations) != len(widths) or min(config.dilations) < 1):
        raise ValueError(
            f"`dilations` {tuple(config.dilations)} must be {len(widths)} positive numbers, one for each of "
            "`block_out_channels`."
        )
    sizes = [config.sample_size // 2**level for level in range(len(widths))]
    for resolution in config.attention_resolutions:
        if resolution not in sizes:
            raise ValueError(
                f"`attention_resolutions` {tuple(config.attention_resolutions)}: {resolution} is not the size in "
                f"pixels of a feature map; those of a {config.sample_size} px image are {sizes}."
            )
    with_attention = {width for width, size in zip(widths, sizes) if size in config.attention_resolutions}
    for width in sorted(with_attention | {widths[-1]}):
        if width % config.attention_head_dim:
            raise ValueError(
                f"`attention_head_dim` ({config.attention_head_dim}) must divide {width}, the width of a feature map "
                "with attention."
            )
        if config.attention_position_embedding == "sincos2d" and width % 4:
            raise ValueError(
                f"`attention_position_embedding` sincos2d needs multiples of 4 channels, sine and cosine of row and "
                f"column; a feature map with attention has {width} (`block_out_channels`)."
            )
    if config.null_class and config.num_class_embeds is None:
        raise ValueError("`null_class` is True, but there are no classes (`num_class_embeds` is None).")
