"""DiT: its flags, the names of its weights, its released checkpoints.

https://github.com/facebookresearch/DiT (Peebles and Xie, 2023, https://arxiv.org/abs/2212.09748). Flags keep the
names, the meaning and the default values they have there.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin

from diffusers_ext.conversion.flags import Codebase, Flags, complete, pop_builder
from diffusers_ext.conversion.presets import Preset
from diffusers_ext.conversion.rules import KEEP, Rule, split_qkv
from diffusers_ext.models.transformer_dit_gqa import GQADiTTransformer2DModel


# What the class takes, and the defaults.
_NETWORK = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
}
# Depth, hidden size and heads that the functions named DiT-XL/2 and so on fix, as they do the size of patches.
_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
_FIXED = {"DiT": {}} | {
    f"DiT-{size}/{patch_size}": {
        "depth": depth,
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "num_heads": num_heads,
    }
    for size, (depth, hidden_size, num_heads) in _SIZES.items()
    for patch_size in (2, 4, 8)
}
CODEBASES = {
    "dit": Codebase(
        GQADiTTransformer2DModel,
        {
            builder: {flag: default for flag, default in _NETWORK.items() if flag not in fixed}
            for builder, fixed in _FIXED.items()
        },
    )
}
# What is needed to write a model back, and not in its config.
REMEMBERED_FLAGS = ()


def complete_flags(architecture: str, flags: Mapping[str, Any]) -> Flags:
    """All flags of the network, defaults included, and the name of its `builder`, the class `DiT` if it is not given.

    Args:
        architecture: a key of `CODEBASES`.
        flags: flags under the original's names.

    Raises:
        ValueError: when a flag is unknown to the builder, as those are that it fixes, or is not a truth value though
            its default is one.
    """
    flags = dict(flags)
    builders = CODEBASES[architecture].builders
    builder = pop_builder(flags, builders, "DiT", architecture)
    return complete(flags, builders[builder], (), builder, architecture) | _FIXED[builder]


def to_config(architecture: str, flags: Flags) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Our class and its config for the complete flags of an original.

    Raises:
        ValueError: when the heads do not divide the hidden size.
    """
    width, heads = flags["hidden_size"], flags["num_heads"]
    if width % heads:
        raise ValueError(f"`hidden_size` ({width}) must be a multiple of `num_heads` ({heads}).")
    return CODEBASES[architecture].model_class, {
        "sample_size": flags["input_size"],
        "patch_size": flags["patch_size"],
        "in_channels": flags["in_channels"],
        "out_channels": flags["in_channels"] * (2 if flags["learn_sigma"] else 1),
        "num_layers": flags["depth"],
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_key_value_heads": heads,
        "mlp_ratio": flags["mlp_ratio"],
        "num_class_embeds": flags["num_classes"],
        "null_class": flags["class_dropout_prob"] > 0,
    }


def to_flags(architecture: str, model: GQADiTTransformer2DModel) -> Flags:
    """Flags of the network that `model` was or would be in the original, the inverse of `to_config`.

    Options that the original has no flag for are not looked at here: complete the flags, and compare the config that
    they lead to.

    Raises:
        ValueError: when `model` is unconditional, which a DiT never is.
    """
    config = model.config
    if config.num_class_embeds is None:
        raise ValueError(
            "`model` is unconditional (`num_class_embeds` is None), but every DiT has a table of classes: no file of "
            "that codebase can hold it."
        )
    return {
        "builder": "DiT",
        "input_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "depth": config.num_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.mlp_ratio,
        "class_dropout_prob": 0.1 if config.null_class else 0.0,
        "num_classes": config.num_class_embeds,
        "learn_sigma": config.out_channels == 2 * config.in_channels,
    }


# Names of layers with a weight and a bias, there and here; then those of a block.
_LAYERS = (
    ("x_embedder.proj", "patch_embed"),
    ("t_embedder.mlp.0", "time_embedding.linear_1"),
    ("t_embedder.mlp.2", "time_embedding.linear_2"),
    ("final_layer.adaLN_modulation.1", "modulation_out"),
    ("final_layer.linear", "proj_out"),
)
_BLOCK_LAYERS = (
    ("adaLN_modulation.1", "modulation"),
    ("attn.proj", "attn.to_out.0"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
)
# Names of single tensors. The fixed positions are stored there too, and kept as they are.
_TENSORS = (
    ("pos_embed", "pos_embed"),
    ("y_embedder.embedding_table.weight", "class_embedding.weight"),
)


def build_rules(architecture: str, flags: Flags, model: GQADiTTransformer2DModel) -> list[Rule]:
    """Which weights of the original are which of `model`; the weights themselves are not read."""
    rules = [Rule((original,), (ours,), KEEP) for original, ours in _TENSORS]
    layers = list(_LAYERS)
    for index in range(flags["depth"]):
        original, ours = f"blocks.{index}", f"transformer_blocks.{index}"
        layers += [(f"{original}.{there}", f"{ours}.{here}") for there, here in _BLOCK_LAYERS]
        for parameter in ("weight", "bias"):
            parts = tuple(f"{ours}.attn.to_{part}.{parameter}" for part in "qkv")
            rules.append(Rule((f"{original}.attn.qkv.{parameter}",), parts, split_qkv(groups=1, ndim=2)))
    for original, ours in layers:
        for parameter in ("weight", "bias"):
            rules.append(Rule((f"{original}.{parameter}",), (f"{ours}.{parameter}",), KEEP))
    return rules


def to_scheduler_config(architecture: str, flags: Flags, model: GQADiTTransformer2DModel) -> dict[str, Any]:
    """Config of the `DDPMScheduler` that is the process DiT is trained and sampled with, unrespaced."""
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "variance_type": "learned_range" if flags["learn_sigma"] else "fixed_large",
        "prediction_type": "epsilon",
        "clip_sample": False,
        "timestep_spacing": "linspace",
    }


_URL = "https://dl.fbaipublicfiles.com/DiT/models"
_LICENCE = "cc-by-nc-4.0"
PRESETS = {
    f"DiT-XL-2-{size}x{size}": Preset(
        "dit",
        {"builder": "DiT-XL/2", "input_size": size // 8, "num_classes": 1000},
        f"{_URL}/DiT-XL-2-{size}x{size}.pt",
        _LICENCE,
        num_inference_steps=250,
        guidance_scale=4.0,
    )
    for size in (256, 512)
}
# The other sizes of the paper, for 256 px, whose weights were not released.
PRESETS |= {
    f"{builder.replace('/', '-')}-256x256": Preset("dit", {"builder": builder}, None, None)
    for builder in _FIXED
    if builder not in ("DiT", "DiT-XL/2")
}
