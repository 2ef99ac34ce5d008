"""DDPM: the UNet of Ho et al., as ermongroup/ddim and DDRM have it.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020), https://arxiv.org/abs/2006.11239, App. B; weights are
released with Song et al. (2020), https://arxiv.org/abs/2010.02502, and Kawar et al. (2022),
https://arxiv.org/abs/2201.11793. State dicts have the names of `diffusers.UNet2DModel`.

Shapes: B batch, C channels, H and W pixels, L = H W tokens, E width of the time embedding.
"""

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


_DDIM_256 = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "layers_per_block": 2,
    "attention_resolutions": (16,),
}
PRESETS = {
    "cifar10": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "attention_resolutions": (16,),
        "dropout": 0.1,
    },
    "celeba-64": {
        "sample_size": 64,
        "block_out_channels": (128, 256, 256, 256, 512),
        "layers_per_block": 2,
        "attention_resolutions": (16,),
        "dropout": 0.1,
    },
    "lsun-256": _DDIM_256,
    "celebahq-256": _DDIM_256,
    # About 2 M parameters, class-conditional, for comparisons of architectures.
    "mnist-32": {
        "sample_size": 32,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32, 64, 80),
        "layers_per_block": 2,
        "attention_resolutions": (8,),
        "num_class_embeds": 10,
        "null_class": True,
        "norm_num_groups": 8,
    },
}


def zero_module(module: nn.Module) -> nn.Module:
    """Zero the parameters of a residual branch's last layer, so that training starts from the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class DDPMResnetBlock(nn.Module):
    """Norm, SiLU, convolution; twice, with the embedding of time and class added in between."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        dropout: float,
        norm_num_groups: int,
        norm_eps: float,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """`hidden_states` (B, C_in, H, W), `temb` (B or 1, E) behind its SiLU. Returns (B, C_out, H, W)."""
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = hidden_states + self.time_emb_proj(temb)[:, :, None, None]
        hidden_states = self.conv2(self.dropout(F.silu(self.norm2(hidden_states))))
        return residual + hidden_states


class DDPMAttnProcessor:
    """Self-attention over pixels through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "DDPMAttention", hidden_states: torch.Tensor) -> torch.Tensor:
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


class DDPMAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = DDPMAttnProcessor
    _available_processors = [DDPMAttnProcessor]

    def __init__(self, channels: int, heads: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.is_cross_attention = False
        self.group_norm = nn.GroupNorm(norm_num_groups, channels, norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([zero_module(nn.Linear(channels, channels))])
        self.set_processor(DDPMAttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        height, width = hidden_states.shape[2:]
        tokens = self.group_norm(hidden_states).flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, L, C)
        tokens = self.processor(self, tokens)
        return hidden_states + tokens.transpose(1, 2).unflatten(2, (height, width))


class DDPMDownsample(nn.Module):
    """Half the resolution: by a strided convolution of the image with zeros at its right and lower edge, or a mean."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if use_conv else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.conv is None:
            return F.avg_pool2d(hidden_states, kernel_size=2)
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class DDPMUpsample(nn.Module):
    """Twice the resolution: nearest neighbours, then if need be a convolution."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return hidden_states if self.conv is None else self.conv(hidden_states)


class DDPMStage(nn.Module):
    """Residual blocks of one resolution, each followed by self-attention where the resolution has it."""

    def __init__(self, resnets: list[DDPMResnetBlock], attentions: list[DDPMAttention]):
        super().__init__()
        self.gradient_checkpointing = False
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def layer(self, index: int, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.run(self.resnets[index], hidden_states, temb)
        if index < len(self.attentions):
            hidden_states = self.run(self.attentions[index], hidden_states)
        return hidden_states

    def run(self, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)


class DDPMDownBlock(DDPMStage):
    def __init__(
        self, resnets: list[DDPMResnetBlock], attentions: list[DDPMAttention], downsampler: DDPMDownsample | None
    ):
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the feature maps of all layers; the last one is the block's output."""
        features = []
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, temb)
            features.append(hidden_states)
        for downsampler in self.downsamplers:
            features.append(self.run(downsampler, hidden_states))
        return tuple(features)


class DDPMMidBlock(DDPMStage):
    """Residual block, attention, residual block."""

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, temb)
        return hidden_states


class DDPMUpBlock(DDPMStage):
    def __init__(
        self, resnets: list[DDPMResnetBlock], attentions: list[DDPMAttention], upsampler: DDPMUpsample | None
    ):
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, skips: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """`skips`: one feature map of the down path per layer, in the order of the layers."""
        for index, skip in enumerate(skips):
            hidden_states = self.layer(index, torch.cat([hidden_states, skip], dim=1), temb)
        for upsampler in self.upsamplers:
            hidden_states = self.run(upsampler, hidden_states)
        return hidden_states


class DDPMUNet2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """UNet of Ho et al. (2020), with class labels beyond the original if need be.

    Args:
        sample_size: height and width in pixels of the training images. Others work as well, if the levels halve them.
        in_channels: channels of the images.
        out_channels: channels of the output; twice those of the image when the variance is learned (Nichol and
            Dhariwal, 2021, https://arxiv.org/abs/2102.09672, Sec. 3.1).
        block_out_channels: width of each level, from the full resolution down.
        model_channels: width of the first convolution's output and of the sinusoidal time embedding. None: that of the
            first level, which differs from it only where the original's first `ch_mult` is not 1.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        attention_resolutions: sizes in pixels, at `sample_size`, of the feature maps that get self-attention. The
            middle block always has it.
        attention_head_dim: channels per attention head. None: one head of the full width, as in the original.
        num_class_embeds: number of classes of a class-conditional UNet.
        null_class: one more class of index `num_class_embeds` that stands for no class, for classifier-free guidance.
        resample_type: "conv" (strided, or after nearest upsampling) or "pool" (2x2 mean, nearest; no parameters).
        dropout: rate of dropout in residual blocks during training.
        norm_num_groups: groups of the group norms (always 32 in the original).
        norm_eps: epsilon of the group norms.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DDPMDownBlock", "DDPMMidBlock", "DDPMUpBlock"]
    _repeated_blocks = ["DDPMAttention"]  # residual blocks come in more shapes than a compiler keeps apart
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        model_channels: int | None = None,
        layers_per_block: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        attention_head_dim: int | None = None,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        resample_type: str = "conv",
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        _check_config(self.config)
        widths, use_conv, last = block_out_channels, resample_type == "conv", len(block_out_channels) - 1
        channels = model_channels or widths[0]

        self.time_proj = Timesteps(channels, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(channels, 4 * channels)
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + null_class, 4 * channels)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)

        skips = [channels]  # widths of the feature maps that the way up gets
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            resnets = []
            for _ in range(layers_per_block):
                resnets.append(self._resnet(channels, width))
                channels = width
            skips += [width] * (layers_per_block + (level < last))
            downsampler = DDPMDownsample(width, use_conv) if level < last else None
            self.down_blocks.append(DDPMDownBlock(resnets, self._attentions(level, len(resnets)), downsampler))
        self.mid_block = DDPMMidBlock(
            [self._resnet(channels, channels) for _ in range(2)], [self._attention(channels)]
        )
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(self._resnet(channels + skips.pop(), width))
                channels = width
            upsampler = DDPMUpsample(width, use_conv) if level > 0 else None
            self.up_blocks.append(DDPMUpBlock(resnets, self._attentions(level, len(resnets)), upsampler))
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels, norm_eps)
        self.conv_out = zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))

    def _resnet(self, in_channels: int, out_channels: int) -> DDPMResnetBlock:
        return DDPMResnetBlock(
            in_channels,
            out_channels,
            temb_channels=self.time_embedding.linear_2.out_features,
            dropout=self.config.dropout,
            norm_num_groups=self.config.norm_num_groups,
            norm_eps=self.config.norm_eps,
        )

    def _attention(self, channels: int) -> DDPMAttention:
        heads = channels // (self.config.attention_head_dim or channels)
        return DDPMAttention(channels, heads, self.config.norm_num_groups, self.config.norm_eps)

    def _attentions(self, level: int, count: int) -> list[DDPMAttention]:
        if self.config.sample_size // 2**level not in self.config.attention_resolutions:
            return []
        return [self._attention(self.config.block_out_channels[level]) for _ in range(count)]

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str, **kwargs) -> "DDPMUNet2DModel":
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

    def forward(
        self,
        sample: torch.Tensor,
        timestep: int | float | torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: noisy images `(B, C, H, W)`.
            timestep: noise level in units of the training schedule's steps, 0 being the least noise; one number (int,
                float or 0-d tensor) or one per image `(B,)`. Fractions are meaningful.
            class_labels: class ids, one `(1,)` or one per image `(B,)`, in `[0, num_class_embeds)`; with `null_class`
                also `num_class_embeds`, which None stands for. None for an unconditional UNet.
            return_dict: False returns a tuple.

        Returns:
            `UNet2DOutput` with `sample` `(B, out_channels, H, W)`.

        Raises:
            ValueError: for a wrong shape, or a class label that is missing, not understood, or out of range.
        """
        channels, levels = self.config.in_channels, len(self.config.block_out_channels)
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"`sample` has shape {tuple(sample.shape)}, expected (batch, {channels}, height, width).")
        factor = 2 ** (levels - 1)
        if sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"`sample` is {sample.shape[2]}x{sample.shape[3]} pixels; height and width must be multiples of "
                f"{factor}, since {levels} levels halve them. Pad or resize the images."
            )
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        if timestep.numel() not in (1, len(sample)):
            raise ValueError(
                f"`timestep` has {timestep.numel()} entries for {len(sample)} images; give one, or one each."
            )
        class_labels = _class_rows(class_labels, sample, self.config)

        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))  # (B or 1,) -> (B or 1, E)
        if class_labels is not None:
            temb = temb + self.class_embedding(class_labels)
        temb = F.silu(temb)
        skips = [self.conv_in(sample)]
        for block in self.down_blocks:
            skips.extend(block(skips[-1], temb))
        hidden_states = self.mid_block(skips[-1], temb)
        for block in self.up_blocks:
            inputs = tuple(skips.pop() for _ in block.resnets)
            hidden_states = block(hidden_states, temb, inputs)
        output = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def to_diffusers(self) -> UNet2DModel:
        """The equal `diffusers.UNet2DModel`, for people who want the weights without this package.

        A null class becomes the last one of its classes, whose label has to be given.

        Raises:
            ValueError: where `UNet2DModel` cannot express the architecture, with every reason.
        """
        return _with_weights_of(self, UNet2DModel, _diffusers_config(self.config))

    @classmethod
    def from_diffusers(cls, unet: UNet2DModel) -> "DDPMUNet2DModel":
        """The equal of a `diffusers.UNet2DModel`; the way back from `to_diffusers`.

        Raises:
            ValueError: where the model is not a DDPM UNet, with every option in which it differs.
        """
        return _with_weights_of(unet, cls, _ddpm_config(unet.config))


def _with_weights_of(model: ModelMixin, model_class: type[ModelMixin], config: dict) -> ModelMixin:
    """Another class of model with a copy of the weights, in the dtypes, on the devices and in the mode of `model`."""
    with torch.device("meta"):
        other = model_class(**config)
    other.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return other.train(model.training)


# Options of `UNet2DModel` that have one possible value in this UNet.
_DIFFUSERS_CONSTANTS = {
    "time_embedding_type": "positional",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "add_attention": True,
    "act_fn": "silu",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "downsample_padding": 0,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
}
_SHARED_OPTIONS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "num_class_embeds",
    "dropout",
    "norm_num_groups",
    "norm_eps",
)


def _block_types(attention: list[bool]) -> dict[str, tuple[str, ...]]:
    """Names of the levels, from the full resolution down, that have attention or not."""
    return {
        "down_block_types": tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
    }


def _diffusers_config(config) -> dict:
    """Options of the `UNet2DModel` that equals a `DDPMUNet2DModel` of this config."""
    width = config.block_out_channels[0]
    reasons = []
    if config.model_channels not in (None, width):
        reasons.append(f"its first convolution is as wide as the first level ({width}), not {config.model_channels}")
    if config.resample_type == "pool":
        reasons.append("it has no resampling without parameters")
    if reasons:
        raise ValueError("`diffusers.UNet2DModel` cannot express this model: " + "; ".join(reasons) + ".")
    sizes = [config.sample_size // 2**level for level in range(len(config.block_out_channels))]
    options = {option: config[option] for option in _SHARED_OPTIONS}
    if config.null_class:
        options["num_class_embeds"] += 1
    return _DIFFUSERS_CONSTANTS | options | _block_types([size in config.attention_resolutions for size in sizes])


def _ddpm_config(config) -> dict:
    """Options of the `DDPMUNet2DModel` that equals a `UNet2DModel` of this config: `_diffusers_config` backwards."""
    attention = ["Attn" in block for block in config.down_block_types]
    expected = _DIFFUSERS_CONSTANTS | _block_types(attention)
    differences = [
        f"`{option}` is {config[option]!r}, not {value!r}"
        for option, value in expected.items()
        if (tuple(config[option]) if isinstance(config[option], list) else config[option]) != value
    ]
    if not isinstance(config.sample_size, int):
        differences.append(f"`sample_size` is {config.sample_size!r}, not a number of pixels")
    if config.attn_norm_num_groups not in (None, config.norm_num_groups):
        differences.append(f"`attn_norm_num_groups` is {config.attn_norm_num_groups}, not {config.norm_num_groups}")
    if config.time_embedding_dim not in (None, 4 * config.block_out_channels[0]):
        differences.append(
            f"`time_embedding_dim` is {config.time_embedding_dim}, not 4 * {config.block_out_channels[0]}"
        )
    if differences:
        raise ValueError("This `UNet2DModel` is not a DDPM UNet: " + "; ".join(differences) + ".")
    resolutions = tuple(config.sample_size // 2**level for level, has in enumerate(attention) if has)
    options = {option: config[option] for option in _SHARED_OPTIONS}
    return options | {"block_out_channels": tuple(config.block_out_channels), "attention_resolutions": resolutions}


def _class_rows(class_labels: torch.Tensor | None, sample: torch.Tensor, config) -> torch.Tensor | None:
    """Rows of the class embedding `(B,)` or `(1,)` on the device of `sample`; None in an unconditional model."""
    rows = config.num_class_embeds
    if rows is None:
        if class_labels is not None:
            raise ValueError("`class_labels` were given to an unconditional model (`num_class_embeds` is None).")
        return None
    if class_labels is None:
        if not config.null_class:
            raise ValueError(
                "`class_labels` are needed by this class-conditional model, which has no null class (`null_class`)."
            )
        return torch.tensor([rows], device=sample.device)
    class_labels = torch.as_tensor(class_labels).reshape(-1)
    if class_labels.numel() not in (1, len(sample)):
        raise ValueError(
            f"`class_labels` has {class_labels.numel()} entries for {len(sample)} images; give one, or one each."
        )
    rows += config.null_class
    # Elsewhere a look at the values would wait for the device, or break the graph.
    if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = class_labels[(class_labels < 0) | (class_labels >= rows)]
        if len(outside):
            raise ValueError(f"`class_labels` has {outside[0].item()}; labels of this model are 0 to {rows - 1}.")
    return class_labels.to(sample.device)


def _check_config(config) -> None:
    widths = tuple(config.block_out_channels)
    if config.resample_type not in ("conv", "pool"):
        raise ValueError(f'`resample_type` is {config.resample_type!r}; it must be "conv" or "pool".')
    named = {"block_out_channels": widths, "model_channels": (config.model_channels or widths[0],)}
    for option, values in named.items():
        if any(width % config.norm_num_groups for width in values):
            raise ValueError(
                f"`{option}` {values if len(values) > 1 else values[0]} must be multiples of `norm_num_groups` "
                f"({config.norm_num_groups})."
            )
    sizes = [config.sample_size // 2**level for level in range(len(widths))]
    for resolution in config.attention_resolutions:
        if resolution not in sizes:
            raise ValueError(
                f"`attention_resolutions` {tuple(config.attention_resolutions)}: {resolution} is not the size in "
                f"pixels of a feature map of this UNet: {', '.join(map(str, sizes))} at `sample_size`."
            )
    with_attention = {width for size, width in zip(sizes, widths) if size in config.attention_resolutions}
    for width in sorted(with_attention | {widths[-1]}):
        if config.attention_head_dim is not None and (
            config.attention_head_dim < 1 or width % config.attention_head_dim
        ):
            raise ValueError(
                f"`attention_head_dim` ({config.attention_head_dim}) must divide {width}, the width of a feature map "
                "with attention."
            )
    if config.null_class and config.num_class_embeds is None:
        raise ValueError("`null_class` needs classes: give their number as `num_class_embeds`.")
