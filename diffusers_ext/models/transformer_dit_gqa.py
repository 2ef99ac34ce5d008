"""Diffusion transformer with grouped-query attention: DiT and what has been changed in it since, as options.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (DiT, 2023), https://arxiv.org/abs/2212.09748, Sec. 3.2;
grouped queries from Ainslie et al. (GQA, 2023), https://arxiv.org/abs/2305.13245, Sec. 2.2. With one key/value head
per query head, adaLN-Zero, sin-cos positions and tanh-approximated GELU the model is DiT.

Shapes: B batch, C channels, H and W pixels, P side of a patch, h = H / P and w = W / P patches, L = h w tokens,
D hidden size, N query heads, K key/value heads, d channels of a head, so that D = N d.
"""

import torch
import torch.nn.functional as F
from torch import nn

from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_2d_sincos_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm


Timestep = int | float | torch.Tensor
RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]

SINUSOID_CHANNELS = 256
ROTARY_BASE = 100.0  # of Heo et al. (2024); grids of patches are much shorter than texts, for which it is 10000

# Peebles and Xie, Table 1: layers, heads, channels of a head.
_DIT_SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
PRESETS = {
    f"{size}-{patch_size}": {
        "sample_size": 32,  # latents of 256 px images
        "patch_size": patch_size,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_class_embeds": 1000,
        "null_class": True,
    }
    for size, (layers, heads, head_dim) in _DIT_SIZES.items()
    for patch_size in (2, 4, 8)
}
PRESETS["32px"] = {
    "sample_size": 32,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "num_attention_heads": 8,
    "attention_head_dim": 96,
    "num_key_value_heads": 2,
    "num_class_embeds": 10,
    "null_class": True,
}
PRESETS["32px-additive"] = {**PRESETS["32px"], "conditioning": "additive"}
PRESETS["mnist"] = {  # 2.1 M parameters
    **PRESETS["32px"],
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 7,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
}


class PatchEmbed(nn.Conv2d):
    """Linear layer of patches, and the first of two layers that compute in the dtype of their own weights.

    diffusers' layerwise casting leaves the layers of these names in the dtype that they have, whatever the others do.
    """

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        return super().forward(sample.to(self.weight.dtype)).to(sample.dtype)


class OutputProjection(nn.Linear):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype)).to(hidden_states.dtype)


class FP32RMSNorm(nn.RMSNorm):
    """Root mean square norm in float32, in the dtype of the input outside."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps).to(
            hidden_states.dtype
        )


_QK_NORMS = {"rms_norm": FP32RMSNorm, "layer_norm": FP32LayerNorm}


class GQAAttnProcessor:
    """Self-attention of patches through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "GQAAttention", hidden_states: torch.Tensor, image_rotary_emb: RotaryEmbedding | None = None
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D); `image_rotary_emb` are cosines and sines (L, d)."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).split(attn.projection_sizes, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = query.unflatten(-1, (attn.heads, -1))  # (B, L, N, d)
        key, value = (x.unflatten(-1, (attn.kv_heads, -1)) for x in (key, value))  # (B, L, K, d)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        if attn.kv_heads < attn.heads:
            # Most backends refuse `enable_gqa`, and torch's own falls back to its slowest kernel with it. Repeating
            # the few heads gives the same result everywhere; what grouping saves in weights remains.
            key, value = (x.repeat_interleave(attn.heads // attn.kv_heads, dim=2) for x in (key, value))
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = attn.to_out[0](hidden_states.flatten(2))
        return attn.to_out[1](hidden_states)


class GQAAttention(nn.Module, AttentionModuleMixin):
    """Attention whose `kv_heads` keys and values each serve `heads / kv_heads` queries (Ainslie et al., Sec. 2.2).

    `qk_norm` normalises every query and key over its channels before the product: "layer_norm" (Dehghani et al., 2023,
    https://arxiv.org/abs/2302.05442, Sec. 2) or "rms_norm" (Zhang and Sennrich, 2019,
    https://arxiv.org/abs/1910.07467).
    """

    _default_processor_cls = GQAAttnProcessor
    _available_processors = [GQAAttnProcessor]

    def __init__(
        self,
        heads: int,
        head_dim: int,
        kv_heads: int,
        bias: bool,
        qk_norm: str | None,
        norm_eps: float,
        dropout: float,
    ):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.use_bias = bias
        self.is_cross_attention = False
        width, kv_width = heads * head_dim, kv_heads * head_dim
        self.projection_sizes = (width, kv_width, kv_width)
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, kv_width, bias=bias)
        self.to_v = nn.Linear(width, kv_width, bias=bias)
        self.norm_q = _QK_NORMS[qk_norm](head_dim, eps=norm_eps) if qk_norm else None
        self.norm_k = _QK_NORMS[qk_norm](head_dim, eps=norm_eps) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])
        self.set_processor(GQAAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, image_rotary_emb: RotaryEmbedding | None = None) -> torch.Tensor:
        return self.processor(self, hidden_states, image_rotary_emb)


class GQADiTBlock(nn.Module):
    """Pre-norm transformer block: attention, then a feed-forward network, each a residual branch.

    With adaLN-Zero a branch f is x + gate * f(norm(x) * (1 + scale) + shift); shift, scale and gate are linear in the
    condition and zero at first, so that the block starts as the identity (Peebles and Xie, Sec. 3.2). Without, it is
    x + f(norm(x)), the norm with weights of its own.
    """

    def __init__(self, config):
        super().__init__()
        width = config.num_attention_heads * config.attention_head_dim
        modulated = config.conditioning == "ada_norm_zero"
        self.modulation = nn.Linear(width, 6 * width) if modulated else None
        self.norm1 = FP32LayerNorm(width, config.norm_eps, elementwise_affine=not modulated)
        self.attn = GQAAttention(
            config.num_attention_heads,
            config.attention_head_dim,
            config.num_key_value_heads,
            bias=config.attention_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
        )
        self.norm2 = FP32LayerNorm(width, config.norm_eps, elementwise_affine=not modulated)
        inner = int(width * config.mlp_ratio)
        if config.activation_fn == "swiglu":
            inner = 2 * inner // 3  # two matrices on the way in: as many weights as without the gate
        self.ff = FeedForward(width, activation_fn=config.activation_fn, inner_dim=inner, dropout=config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
    ) -> torch.Tensor:
        """`hidden_states` (B, L, D); `temb` (B or 1, D), the activated condition of adaLN-Zero. Returns (B, L, D)."""
        if self.modulation is None:
            hidden_states = hidden_states + self.attn(self.norm1(hidden_states), image_rotary_emb)
            return hidden_states + self.ff(self.norm2(hidden_states))
        modulation = self.modulation(temb)[:, None]  # (B or 1, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        attn_output = self.attn(_modulate(self.norm1(hidden_states), shift1, scale1), image_rotary_emb)
        hidden_states = torch.addcmul(hidden_states, gate1, attn_output)
        ff_output = self.ff(_modulate(self.norm2(hidden_states), shift2, scale2))
        return torch.addcmul(hidden_states, gate2, ff_output)


def _modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, hidden_states, 1 + scale)


class GQADiTTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    """Diffusion transformer over patches of an image or of latents.

    Args:
        sample_size: height and width of the training images or latents. Others work as well, if `patch_size` divides
            them.
        patch_size: side of the square of pixels that becomes a token.
        in_channels: channels of the input.
        out_channels: channels of the output; twice those of the input when the variance is learned (Nichol and
            Dhariwal, 2021, https://arxiv.org/abs/2102.09672, Sec. 3.1): first the prediction, then v in about [-1, 1].
        num_layers: number of blocks.
        num_attention_heads: query heads of each block.
        attention_head_dim: channels of a head; the hidden size is `num_attention_heads * attention_head_dim`.
        num_key_value_heads: key/value heads, a divisor of `num_attention_heads`: 1 is multi-query attention, all of
            them, which None stands for, ordinary attention.
        mlp_ratio: inner width of the feed-forward networks, in hidden sizes; 2/3 of it with "swiglu", which then has
            as many weights.
        activation_fn: "gelu-approximate" (tanh, as in DiT), "gelu", or "swiglu" (Shazeer, 2020,
            https://arxiv.org/abs/2002.05202, Eq. 6).
        conditioning: how blocks read time and class. "ada_norm_zero": adaLN-Zero, see [`GQADiTBlock`]; "additive":
            their embedding is added to every token once, before the first block.
        time_embedding_type: "sinusoidal" (sinusoids, then two layers) or "learned" (a table with a row for each of
            the `num_train_timesteps`, linear in between and constant outside).
        class_embedding_type: "learned" (a table) or "sinusoidal" (of the label's number, then two layers).
        qk_norm: None, "rms_norm" or "layer_norm" of queries and keys, see [`GQAAttention`].
        position_embedding: "sincos" (fixed) or "learned": a table of the training grid that is added to the tokens,
            interpolated bicubically for other grids; "rotary": axial, half of the channels of queries and keys turn
            with the row and half with the column (Heo et al., 2024, https://arxiv.org/abs/2403.13298, Sec. 3).
        num_class_embeds: number of classes of a class-conditional model.
        null_class: one more label, `num_class_embeds`, that stands for no class (Ho and Salimans, 2022,
            https://arxiv.org/abs/2207.12598). Replacing labels by it in training is the trainer's task.
        attention_bias: whether the projections to queries, keys and values have a bias.
        norm_eps: epsilon of all norms.
        dropout: rate of dropout in both branches of a block during training.
        num_train_timesteps: rows of the table of a learned time embedding.

    Raises:
        ValueError: for an option that does not exist, or numbers that do not divide each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["GQADiTBlock"]
    _repeated_blocks = ["GQADiTBlock"]
    _skip_layerwise_casting_patterns = ["norm", "pos_embed"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 4,
        in_channels: int = 3,
        out_channels: int = 3,
        num_layers: int = 2,
        num_attention_heads: int = 8,
        attention_head_dim: int = 96,
        num_key_value_heads: int | None = None,
        mlp_ratio: float = 4.0,
        activation_fn: str = "gelu-approximate",
        conditioning: str = "ada_norm_zero",
        time_embedding_type: str = "sinusoidal",
        class_embedding_type: str = "learned",
        qk_norm: str | None = None,
        position_embedding: str = "sincos",
        num_class_embeds: int | None = None,
        null_class: bool = False,
        attention_bias: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        if num_key_value_heads is None:
            self.register_to_config(num_key_value_heads=num_attention_heads)
        _check_config(self.config)
        width = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False

        self.patch_embed = PatchEmbed(in_channels, width, patch_size, stride=patch_size)
        self.pos_embed = None
        if position_embedding != "rotary":
            # Fixed positions are a frozen parameter, as in DiT's checkpoints, and not computed anew on loading.
            positions = self._initial_positions(width, sample_size // patch_size)
            self.pos_embed = nn.Parameter(positions, requires_grad=position_embedding == "learned")  # (1, L, D)

        self.time_proj = Timesteps(SINUSOID_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        if time_embedding_type == "sinusoidal":
            self.time_embedding = TimestepEmbedding(SINUSOID_CHANNELS, width)
        else:
            self.time_embedding = nn.Embedding(num_train_timesteps, width)
        if num_class_embeds is not None and class_embedding_type == "sinusoidal":
            self.class_embedding = TimestepEmbedding(SINUSOID_CHANNELS, width)
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + null_class, width)

        self.transformer_blocks = nn.ModuleList(GQADiTBlock(self.config) for _ in range(num_layers))
        modulated = conditioning == "ada_norm_zero"
        self.norm_out = FP32LayerNorm(width, norm_eps, elementwise_affine=not modulated)
        self.modulation_out = nn.Linear(width, 2 * width) if modulated else None
        self.proj_out = OutputProjection(width, patch_size * patch_size * out_channels)
        self._initialise()

    def _initial_positions(self, width: int, grid: int) -> torch.Tensor:
        """(1, L, D)."""
        if self.config.position_embedding == "learned":
            return 0.02 * torch.randn(1, grid * grid, width)
        # The first half of the channels are sines and cosines of the column, the second half of the row.
        positions = get_2d_sincos_pos_embed(width, grid, base_size=grid)[None]
        return positions.to(torch.get_default_dtype())  # in which diffusers may build the model

    @torch.no_grad()
    def _initialise(self) -> None:
        """Weights before training, as in DiT: see Peebles and Xie, Sec. 3.2 and 4."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # a linear layer of patches
        nn.init.zeros_(self.patch_embed.bias)
        for name, parameter in self.named_parameters():
            if name.startswith(("time_embedding", "class_embedding")) and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "modulation" in name or name.startswith("proj_out"):
                nn.init.zeros_(parameter)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str, **kwargs) -> "GQADiTTransformer2DModel":
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
        timestep: Timestep,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: noisy images or latents `(B, C, H, W)`.
            timestep: noise level in units of the training schedule's steps, 0 being the least noise; one number (int,
                float or 0-d tensor) or one per image `(B,)`. Fractions are meaningful.
            class_labels: class ids `(B,)` or `(1,)` in `[0, num_class_embeds)`, or `num_class_embeds` for no class
                where there is a null class, which None then stands for.
            return_dict: False returns a tuple.

        Returns:
            `Transformer2DModelOutput` with `sample` `(B, out_channels, H, W)`.

        Raises:
            ValueError: for a wrong shape, and for labels that are missing, not understood, or out of range.
        """
        timestep, class_labels = self._check_inputs(sample, timestep, class_labels)
        height, width = (size // self.config.patch_size for size in sample.shape[2:])
        temb = self._embed_condition(timestep, class_labels, sample.dtype)  # (B or 1, D)
        hidden_states = self.patch_embed(sample).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, L, D)
        image_rotary_emb = None
        if self.pos_embed is None:
            image_rotary_emb = self._rotary_embedding(height, width, sample.device)
        else:
            hidden_states = hidden_states + self._positions(height, width).to(hidden_states.dtype)
        if self.modulation_out is None:
            hidden_states, temb = hidden_states + temb[:, None], None
        else:
            temb = F.silu(temb)

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, image_rotary_emb)
            else:
                hidden_states = block(hidden_states, temb, image_rotary_emb)

        hidden_states = self.norm_out(hidden_states)
        if self.modulation_out is not None:
            hidden_states = _modulate(hidden_states, *self.modulation_out(temb)[:, None].chunk(2, dim=-1))
        output = self._unpatchify(self.proj_out(hidden_states), height, width)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _embed_condition(
        self, timestep: torch.Tensor, class_labels: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Sum of the embeddings of time and class, (B or 1, D)."""
        if self.config.time_embedding_type == "sinusoidal":
            temb = self.time_embedding(self.time_proj(timestep).to(dtype))
        else:
            timestep = timestep.clamp(0, self.config.num_train_timesteps - 1)
            fraction = timestep.frac().to(dtype)[:, None]
            below, above = timestep.floor().long(), timestep.ceil().long()
            temb = torch.lerp(self.time_embedding(below), self.time_embedding(above), fraction)
        if class_labels is None:
            return temb
        if self.config.class_embedding_type == "sinusoidal":
            class_labels = self.time_proj(class_labels).to(dtype)
        return temb + self.class_embedding(class_labels)

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Table of positions `(1, height * width, D)`, interpolated where the grid is not that of the training."""
        grid = self.config.sample_size // self.config.patch_size
        if (height, width) == (grid, grid):
            return self.pos_embed
        table = self.pos_embed.float().transpose(1, 2).unflatten(2, (grid, grid))  # (1, D, grid, grid)
        return F.interpolate(table, size=(height, width), mode="bicubic").flatten(2).transpose(1, 2)

    def _rotary_embedding(self, height: int, width: int, device: torch.device) -> RotaryEmbedding:
        """Cosines and sines `(L, d)` of the angles by which pairs of channels turn."""
        axes = []
        for positions in (
            torch.arange(height, device=device).repeat_interleave(width),
            torch.arange(width, device=device).repeat(height),
        ):
            dim = self.config.attention_head_dim // 2
            axes.append(get_1d_rotary_pos_embed(dim, positions, theta=ROTARY_BASE, use_real=True))
        (row_cos, row_sin), (column_cos, column_sin) = axes
        return torch.cat([row_cos, column_cos], dim=1), torch.cat([row_sin, column_sin], dim=1)

    def _unpatchify(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, L, P P C) -> (B, C, H, W)."""
        patch_size = self.config.patch_size
        patches = hidden_states.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (height, width))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height * patch_size, width * patch_size)

    def _check_inputs(
        self, sample: torch.Tensor, timestep: Timestep, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Timesteps `(B,)` or `(1,)` in float32, and labels likewise or None for an unconditional model."""
        config = self.config
        if sample.ndim != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}, expected (batch, {config.in_channels}, height, width)."
            )
        if sample.shape[2] % config.patch_size or sample.shape[3] % config.patch_size:
            raise ValueError(
                f"`sample` is {sample.shape[2]}x{sample.shape[3]} pixels; height and width must be multiples of "
                f"{config.patch_size}, the `patch_size`. Pad or resize the images."
            )
        if config.num_class_embeds is None and class_labels is not None:
            raise ValueError("`class_labels` were given to an unconditional transformer (`num_class_embeds` is None).")
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        if config.num_class_embeds is not None:
            if class_labels is None and not config.null_class:
                raise ValueError(
                    "`class_labels` are needed by this class-conditional transformer, which has no null class."
                )
            label = config.num_class_embeds if class_labels is None else class_labels
            class_labels = torch.as_tensor(label, device=sample.device).reshape(-1)
        for name, values in (("timestep", timestep), ("class_labels", class_labels)):
            if values is not None and values.numel() not in (1, sample.shape[0]):
                raise ValueError(
                    f"`{name}` has {values.numel()} entries for {sample.shape[0]} images; give one, or one each."
                )
        # Elsewhere than on the CPU, reading values would wait for all that is computed before.
        if class_labels is not None and class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            last = config.num_class_embeds + config.null_class - 1
            for label in (class_labels.min().item(), class_labels.max().item()):
                if not 0 <= label <= last:
                    message = f"`class_labels` has {label}, outside the range of labels from 0 to {last}."
                    if label == 1000:
                        message += (
                            " `DiTPipeline` says 1000 for no class, whatever the network: guide with "
                            "`ClassConditionalPipeline`, or draw with `guidance_scale=1`."
                        )
                    raise ValueError(message)
        return timestep, class_labels


_OPTIONS = {
    "activation_fn": ("gelu-approximate", "gelu", "swiglu"),
    "conditioning": ("ada_norm_zero", "additive"),
    "time_embedding_type": ("sinusoidal", "learned"),
    "class_embedding_type": ("learned", "sinusoidal"),
    "qk_norm": (None, "rms_norm", "layer_norm"),
    "position_embedding": ("sincos", "learned", "rotary"),
}


def _check_config(config) -> None:
    for option, values in _OPTIONS.items():
        if config[option] not in values:
            valid = ", ".join(map(repr, values))
            raise ValueError(f"`{option}` is {config[option]!r}; it must be one of {valid}.")
    if config.sample_size % config.patch_size:
        raise ValueError(f"`patch_size` ({config.patch_size}) must divide `sample_size` ({config.sample_size}).")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"`num_key_value_heads` ({kv_heads}) must divide `num_attention_heads` ({heads}): every key/value head "
            "serves the same number of query heads."
        )
    width = heads * config.attention_head_dim
    if config.position_embedding == "sincos" and width % 4:
        raise ValueError(
            f'`position_embedding` "sincos" needs a hidden size that is a multiple of 4, not {width} '
            f"(`num_attention_heads` {heads} times `attention_head_dim` {config.attention_head_dim}): sines and "
            "cosines of rows and columns."
        )
    if config.position_embedding == "rotary" and config.attention_head_dim % 4:
        raise ValueError(
            f'`position_embedding` "rotary" needs `attention_head_dim` ({config.attention_head_dim}) to be a multiple '
            "of 4: pairs of channels for rows and columns."
        )
    if config.null_class and config.num_class_embeds is None:
        raise ValueError("`null_class` needs `num_class_embeds`: an unconditional model has no labels to leave out.")


def _register_for_caching() -> None:
    """Tell diffusers' caches and layer skipping where a block and its attention have their hidden states."""
    try:
        from diffusers.hooks._helpers import (
            AttentionProcessorMetadata,
            AttentionProcessorRegistry,
            TransformerBlockMetadata,
            TransformerBlockRegistry,
        )
    except ImportError:  # private there; without it everything but these hooks works
        return
    TransformerBlockRegistry.register(GQADiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
    AttentionProcessorRegistry.register(
        GQAAttnProcessor,
        AttentionProcessorMetadata(
            skip_processor_output_fn=lambda attn, hidden_states, *args, **kwargs: hidden_states
        ),
    )


_register_for_caching()
