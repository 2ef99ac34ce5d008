"""Dilated convolutional denoiser: convolutions at full resolution, whose growing dilation sees the whole image.

The denoiser of the DDPM lesson in https://github.com/Jackson-Kang/Pytorch-Diffusion-Model-Tutorial, which trains it on
MNIST by Ho et al., "Denoising Diffusion Probabilistic Models" (2020), https://arxiv.org/abs/2006.11239. Exponentially
growing dilations follow Yu and Koltun (2016), https://arxiv.org/abs/1511.07122.

Shapes: B batch, C channels, H and W pixels, D hidden channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput


PRESETS = {
    # 4,870,913 parameters
    "mnist": {"sample_size": 28, "in_channels": 1, "out_channels": 1, "hidden_channels": (256,) * 8},
    "mnist-small": {"sample_size": 28, "in_channels": 1, "hidden_channels": (64,) * 8, "time_embedding_dim": 64},
}


class DilatedConv2d(nn.Conv2d):
    """Convolution with as much dilation as padding, which a 3x3 kernel needs for an image of the same size.

    From the class of a layer, its kernel and its padding alone peft builds the halves of a LoRA.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, **options
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation=padding or 1, **options)


class DilatedConv(nn.Module):
    """`x + conv(x)` of the feature map to which the embedding of time and class was added."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.conv = DilatedConv2d(channels, channels, 3, padding=dilation)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """`hidden_states` (B, D, H, W), `temb` (B or 1, D). Returns (B, D, H, W)."""
        hidden_states = hidden_states + temb[:, :, None, None]
        return hidden_states + self.conv(hidden_states)


class DilatedNorm(nn.GroupNorm):
    """`silu(norm(x + y))`: what all blocks have in common, for a compiler, which makes one kernel of it."""

    def forward(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(hidden_states + update))


class DilatedBlock(DilatedConv):
    """`silu(norm(x + conv(x)))`: normalised behind the residual sum, not inside its branch."""

    def __init__(self, channels: int, dilation: int, norm_num_groups: int, norm_eps: float):
        super().__init__(channels, dilation)
        self.norm = DilatedNorm(norm_num_groups, channels, norm_eps)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """`hidden_states` (B, D, H, W), `temb` (B or 1, D). Returns (B, D, H, W)."""
        hidden_states = hidden_states + temb[:, :, None, None]
        return self.norm(hidden_states, self.conv(hidden_states))


class DilatedConvDenoiserModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Stack of dilated 3x3 convolutions without any change of resolution, so that images of every size fit.

    Args:
        sample_size: height and width in pixels of the training images.
        in_channels: channels of the images.
        out_channels: channels of the output; twice those of the image when the variance is learned (Nichol and
            Dhariwal, 2021, https://arxiv.org/abs/2102.09672, Sec. 3.1).
        hidden_channels: width D of every layer, equal for all since each is a residual sum.
        dilations: distance in pixels of the taps of each layer. None: 1, then 3^((i - 1) // 2) for layer i = 1, 2 ...;
            eight layers have 1, 1, 1, 3, 3, 9, 9, 27.
        time_embedding_dim: width of the sinusoidal time embedding, even.
        num_class_embeds: number of classes of a class-conditional model.
        null_class: one more class of index `num_class_embeds` that stands for no class, for classifier-free guidance.
        norm_num_groups: groups of the group norms; the first layer has no norm and no activation.
        norm_eps: epsilon of the group norms.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DilatedConv", "DilatedBlock"]
    _repeated_blocks = ["DilatedNorm"]  # each dilation of a whole block would be compiled on its own
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        out_channels: int = 1,
        hidden_channels: tuple[int, ...] = (256, 256, 256, 256, 256, 256, 256, 256),
        dilations: tuple[int, ...] | None = None,
        time_embedding_dim: int = 256,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        norm_num_groups: int = 8,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        _check_config(self.config)
        width = hidden_channels[0]
        if dilations is None:
            dilations = [1] + [3 ** ((layer - 1) // 2) for layer in range(1, len(hidden_channels))]
        self.gradient_checkpointing = False

        self.time_proj = Timesteps(time_embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(time_embedding_dim, width)
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + null_class, width)
        self.conv_in = nn.Conv2d(in_channels, width, 7, padding=3)
        self.blocks = nn.ModuleList([DilatedConv(width, dilations[0])])
        for dilation in dilations[1:]:
            self.blocks.append(DilatedBlock(width, dilation, norm_num_groups, norm_eps))
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str, **kwargs) -> "DilatedConvDenoiserModel":
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
                also `num_class_embeds`, which None stands for. None for an unconditional model.
            return_dict: False returns a tuple.

        Returns:
            `UNet2DOutput` with `sample` `(B, out_channels, H, W)`.

        Raises:
            ValueError: for a wrong shape, or a class label that is missing, not understood, or out of range.
        """
        channels = self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"`sample` has shape {tuple(sample.shape)}, expected (batch, {channels}, height, width).")
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        if timestep.numel() not in (1, len(sample)):
            raise ValueError(
                f"`timestep` has {timestep.numel()} entries for {len(sample)} images; give one, or one each."
            )
        class_labels = _class_rows(class_labels, sample, self.config)

        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))  # (B or 1,) -> (B or 1, D)
        if class_labels is not None:
            temb = temb + self.class_embedding(class_labels)
        hidden_states = self.conv_in(sample)  # (B, D, H, W)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb)
            else:
                hidden_states = block(hidden_states, temb)
        output = self.conv_out(hidden_states)
        return UNet2DOutput(sample=output) if return_dict else (output,)


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
    widths, dilations = tuple(config.hidden_channels), config.dilations
    if len(widths) == 0 or len(set(widths)) > 1:
        raise ValueError(
            f"`hidden_channels` {widths} must be one or more equal widths: every layer adds to what it gets."
        )
    if widths[0] % config.norm_num_groups:
        raise ValueError(
            f"`hidden_channels` {widths} must be multiples of `norm_num_groups` ({config.norm_num_groups})."
        )
    if dilations is not None and (len(dilations) != len(widths) or min(dilations) < 1):
        raise ValueError(
            f"`dilations` {tuple(dilations)} must be {len(widths)} numbers of pixels from 1, one for each of "
            "`hidden_channels`."
        )
    if config.time_embedding_dim % 2 or config.time_embedding_dim < 4:
        raise ValueError(
            f"`time_embedding_dim` ({config.time_embedding_dim}) must be even and at least 4: half of it are sines, "
            "half cosines, and the second frequency is the end of their range."
        )
    if config.null_class and config.num_class_embeds is None:
        raise ValueError("`null_class` needs classes: give their number as `num_class_embeds`.")
