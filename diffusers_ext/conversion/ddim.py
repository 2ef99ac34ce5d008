"""The UNet of ermongroup/ddim and DDRM: its flags, the names of its weights, its released checkpoints.

One network in two codebases: https://github.com/ermongroup/ddim (Song et al., 2020,
https://arxiv.org/abs/2010.02502) and https://github.com/bahjat-kawar/ddrm (Kawar et al., 2022,
https://arxiv.org/abs/2201.11793). Flags keep the names and the meaning of the configuration files there, and may be
nested as in these.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import ModelMixin

from diffusers_ext.conversion.flags import REQUIRED, Codebase, Flags, complete, pop_builder
from diffusers_ext.conversion.presets import Preset
from diffusers_ext.conversion.rules import KEEP, Rule, pointwise
from diffusers_ext.models.unet_ddpm import DDPMStage, DDPMUNet2DModel


_MODEL = {
    "image_size": REQUIRED,
    "in_channels": 3,
    "out_ch": 3,
    "ch": REQUIRED,
    "ch_mult": REQUIRED,
    "num_res_blocks": REQUIRED,
    "attn_resolutions": REQUIRED,
    "dropout": 0.0,
    "resamp_with_conv": True,
    "type": "simple",
    "var_type": "fixedlarge",
    "ema": True,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "num_diffusion_timesteps": 1000,
}
_NO_EFFECT = {"ema_rate"}
# Sections of a YAML file that describe the network and its process; of `data` it is the size of the images alone.
_SECTIONS = ("model", "diffusion")
CODEBASES = {"ddim/unet": Codebase(DDPMUNet2DModel, {"Model": _MODEL})}
# What is needed to write a model back, and not in its config.
REMEMBERED_FLAGS = ()


def complete_flags(architecture: str, flags: Mapping[str, Any]) -> Flags:
    """All flags of a run, defaults included, and the name of its `builder`.

    Args:
        architecture: a key of `CODEBASES`.
        flags: flags under the original's names, alone or in the sections of a configuration file.

    Raises:
        ValueError: when a flag is unknown, is missing, or has a value that cannot be converted.
    """
    flags = dict(flags)
    builders = CODEBASES[architecture].builders
    builder = pop_builder(flags, builders, "Model", architecture)
    if "model" in flags:
        if "image_size" not in flags.get("data", {}):
            raise ValueError("`config` lacks `data.image_size`, the size of the images in pixels.")
        size = flags["data"]["image_size"]
        flags = {key: value for section in _SECTIONS for key, value in flags.get(section, {}).items()}
        flags["image_size"] = size
    flags = complete(flags, builders[builder], _NO_EFFECT, builder, architecture)
    if flags["type"] != "simple":
        raise ValueError(f'`config` has type={flags["type"]!r}; only networks of type "simple" can be converted.')
    return flags


def to_config(architecture: str, flags: Flags) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Our class and its config for the complete flags of an original."""
    widths = tuple(multiplier * flags["ch"] for multiplier in flags["ch_mult"])
    sizes = [flags["image_size"] // 2**level for level in range(len(widths))]
    return DDPMUNet2DModel, {
        "sample_size": flags["image_size"],
        "in_channels": flags["in_channels"],
        "out_channels": flags["out_ch"],
        "block_out_channels": widths,
        "model_channels": flags["ch"] if flags["ch"] != widths[0] else None,
        "layers_per_block": flags["num_res_blocks"],
        # Others are resolutions that the network never has.
        "attention_resolutions": tuple(size for size in sizes if size in flags["attn_resolutions"]),
        "resample_type": "conv" if flags["resamp_with_conv"] else "pool",
        "dropout": flags["dropout"],
    }


def to_flags(architecture: str, model: DDPMUNet2DModel) -> Flags:
    """Flags of the network that `model` was or would be in the original, the inverse of `to_config`.

    Options that the codebase has no flag for are not looked at here: complete the flags, and compare the config that
    they lead to.

    Raises:
        ValueError: when the levels have widths that no flag of the original gives.
    """
    config = model.config
    channels = config.model_channels or config.block_out_channels[0]
    if any(width % channels for width in config.block_out_channels):
        raise ValueError(
            f"`model` has `block_out_channels` {tuple(config.block_out_channels)}, but {architecture!r} has multiples "
            f"of the first convolution's width ({channels}) only: no file of that codebase can hold it."
        )
    return {
        "builder": "Model",
        "image_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": channels,
        "ch_mult": [width // channels for width in config.block_out_channels],
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
        "resamp_with_conv": config.resample_type == "conv",
    }


# Names of modules, there and here, and what becomes of their weights.
_OUTSIDE = (
    ("temb.dense.0", "time_embedding.linear_1", KEEP),
    ("temb.dense.1", "time_embedding.linear_2", KEEP),
    ("conv_in", "conv_in", KEEP),
    ("norm_out", "conv_norm_out", KEEP),
    ("conv_out", "conv_out", KEEP),
)
_INSIDE = {
    "resnets": (
        ("norm1", "norm1", KEEP),
        ("conv1", "conv1", KEEP),
        ("temb_proj", "time_emb_proj", KEEP),
        ("norm2", "norm2", KEEP),
        ("conv2", "conv2", KEEP),
        ("nin_shortcut", "conv_shortcut", KEEP),
    ),
    "attentions": (
        ("norm", "group_norm", KEEP),
        ("q", "to_q", pointwise(4)),
        ("k", "to_k", pointwise(4)),
        ("v", "to_v", pointwise(4)),
        ("proj_out", "to_out.0", pointwise(4)),
    ),
    "downsamplers": (("conv", "conv", KEEP),),
    "upsamplers": (("conv", "conv", KEEP),),
}


def build_rules(architecture: str, flags: Flags, model: DDPMUNet2DModel) -> list[Rule]:
    """Which weights of the original are which of `model`; the weights themselves are not read."""
    modules = list(_OUTSIDE)
    for kind, original, ours in _blocks(model):
        modules += [(f"{original}.{there}", f"{ours}.{here}", operation) for there, here, operation in _INSIDE[kind]]
    weights = model.state_dict().keys()  # not all blocks have a shortcut, nor all resampling a convolution
    return [
        Rule((f"{original}.{name}",), (f"{ours}.{name}",), operation)
        for original, ours, operation in modules
        for name in ("weight", "bias")
        if f"{ours}.{name}" in weights
    ]


def _blocks(model: DDPMUNet2DModel) -> Iterator[tuple[str, str, str]]:
    """Kind of everything in the three towers of blocks, its name in the original and its name here."""
    for level, block in enumerate(model.down_blocks):
        yield from _layers(block, f"down.{level}", f"down_blocks.{level}")
    yield "resnets", "mid.block_1", "mid_block.resnets.0"
    yield "attentions", "mid.attn_1", "mid_block.attentions.0"
    yield "resnets", "mid.block_2", "mid_block.resnets.1"
    for index, block in enumerate(model.up_blocks):
        level = len(model.up_blocks) - 1 - index  # the original counts from the full resolution on both ways
        yield from _layers(block, f"up.{level}", f"up_blocks.{index}")


def _layers(block: DDPMStage, original: str, ours: str) -> Iterator[tuple[str, str, str]]:
    for layer in range(len(block.resnets)):
        yield "resnets", f"{original}.block.{layer}", f"{ours}.resnets.{layer}"
    for layer in range(len(block.attentions)):
        yield "attentions", f"{original}.attn.{layer}", f"{ours}.attentions.{layer}"
    yield "downsamplers", f"{original}.downsample", f"{ours}.downsamplers.0"
    yield "upsamplers", f"{original}.upsample", f"{ours}.upsamplers.0"


_BETA_SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "sigmoid": "sigmoid"}
_VARIANCE_TYPES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}


def to_scheduler_config(architecture: str, flags: Flags, model: DDPMUNet2DModel) -> dict[str, Any]:
    """Config of the `DDPMScheduler` that is the process of complete flags.

    The predicted image is clipped, as the original's ancestral sampler does; its DDIM sampler does not.

    Raises:
        ValueError: when diffusers has no such schedule of betas or variance.
    """
    for flag, known in (("beta_schedule", _BETA_SCHEDULES), ("var_type", _VARIANCE_TYPES)):
        if flags[flag] not in known:
            raise ValueError(f"`{flag}` is {flags[flag]!r}; it must be one of {', '.join(known)}.")
    return {
        "beta_schedule": _BETA_SCHEDULES[flags["beta_schedule"]],
        "beta_start": flags["beta_start"],
        "beta_end": flags["beta_end"],
        "num_train_timesteps": flags["num_diffusion_timesteps"],
        "variance_type": _VARIANCE_TYPES[flags["var_type"]],
        "prediction_type": "epsilon",
        "clip_sample": True,
        "timestep_spacing": "leading",
    }


# Flags of the released checkpoints, as in the authors' configuration files.
_SMALL = {"ch": 128, "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.1, "var_type": "fixedlarge"}
_CIFAR10 = _SMALL | {"image_size": 32, "ch_mult": [1, 2, 2, 2]}
_CELEBA = _SMALL | {"image_size": 64, "ch_mult": [1, 2, 2, 2, 4]}
_LARGE = {
    "image_size": 256,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
    "var_type": "fixedsmall",
}
# Moving averages of the weights of Ho et al. (2020), converted by Patrick Esser. Neither these weights nor those of
# celeba_hq come from the authors of DDIM, and no licence is stated with them.
_CONVERTED = "https://heibox.uni-heidelberg.de/f"
_DDRM = "https://image-editing-test-12345.s3-us-west-2.amazonaws.com/checkpoints"

PRESETS = {
    "cifar10": Preset("ddim/unet", _CIFAR10, f"{_CONVERTED}/2e4f01e2d9ee49bab1d5/?dl=1", None),
    "celeba": Preset("ddim/unet", _CELEBA, None),
    "bedroom": Preset("ddim/unet", _LARGE, f"{_CONVERTED}/b95206528f384185889b/?dl=1", None),
    "church": Preset("ddim/unet", _LARGE, f"{_CONVERTED}/44ccb50ef3c6436db52e/?dl=1", None),
    "cat": Preset("ddim/unet", _LARGE, f"{_CONVERTED}/0701aac3aa69457bbe34/?dl=1", None),
    "celeba_hq": Preset("ddim/unet", _LARGE, f"{_DDRM}/celeba_hq.ckpt", None),
}
