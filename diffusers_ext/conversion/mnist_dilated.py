"""The dilated MNIST denoiser of a tutorial: its flags and the names of its weights.

https://github.com/Jackson-Kang/Pytorch-Diffusion-Model-Tutorial, notebook 01. Flags are the arguments of its
`Denoiser` and of its `Diffusion` together.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin

from diffusers_ext.conversion.flags import REQUIRED, Codebase, Flags, complete, pop_builder
from diffusers_ext.conversion.presets import Preset
from diffusers_ext.conversion.rules import KEEP, Rule, pointwise
from diffusers_ext.models.denoiser_dilated import DilatedConvDenoiserModel


_DENOISER = {
    "image_resolution": REQUIRED,
    "hidden_dims": REQUIRED,
    "diffusion_time_embedding_dim": 256,
    "n_times": 1000,
    "beta_minmax": (1e-4, 2e-2),
}
CODEBASES = {"mnist-dilated": Codebase(DilatedConvDenoiserModel, {"Denoiser": _DENOISER})}
# What is needed to write a model back, and not in its config.
REMEMBERED_FLAGS = ()


def complete_flags(architecture: str, flags: Mapping[str, Any]) -> Flags:
    """All flags of a run, defaults included, and the name of its `builder`.

    Args:
        architecture: a key of `CODEBASES`.
        flags: flags under the original's names; `image_resolution` is (height, width, channels).

    Raises:
        ValueError: when a flag is unknown, is missing, or has a value that cannot be converted.
    """
    flags = dict(flags)
    builders = CODEBASES[architecture].builders
    builder = pop_builder(flags, builders, "Denoiser", architecture)
    flags = complete(flags, builders[builder], (), builder, architecture)
    resolution = flags["image_resolution"]
    if len(resolution) != 3 or resolution[0] != resolution[1]:
        raise ValueError(f"`image_resolution` ({resolution}) must be a height, an equal width, and channels.")
    return flags


def to_config(architecture: str, flags: Flags) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Our class and its config for the complete flags of an original."""
    size, _, channels = flags["image_resolution"]
    return DilatedConvDenoiserModel, {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "hidden_channels": tuple(flags["hidden_dims"]),
        "time_embedding_dim": flags["diffusion_time_embedding_dim"],
    }


def to_flags(architecture: str, model: DilatedConvDenoiserModel) -> Flags:
    """Flags of the network that `model` was or would be in the original, the inverse of `to_config`.

    Options that the codebase has no flag for are not looked at here: complete the flags, and compare the config that
    they lead to.
    """
    config = model.config
    return {
        "builder": "Denoiser",
        "image_resolution": [config.sample_size, config.sample_size, config.in_channels],
        "hidden_dims": list(config.hidden_channels),
        "diffusion_time_embedding_dim": config.time_embedding_dim,
    }


# Names there and here, and what becomes of the weights.
_OUTSIDE = (
    ("time_project.0", "time_embedding.linear_1", pointwise(4)),
    ("time_project.1", "time_embedding.linear_2", pointwise(4)),
    ("in_project", "conv_in", KEEP),
    ("out_project", "conv_out", KEEP),
)


def build_rules(architecture: str, flags: Flags, model: DilatedConvDenoiserModel) -> list[Rule]:
    """Which weights of the original are which of `model`; the weights themselves are not read."""
    modules = list(_OUTSIDE)
    for index, block in enumerate(model.blocks):
        modules.append((f"convs.{index}", f"blocks.{index}.conv", KEEP))
        if hasattr(block, "norm"):
            modules.append((f"convs.{index}.group_norm", f"blocks.{index}.norm", KEEP))
    return [
        Rule((f"{original}.{name}",), (f"{ours}.{name}",), operation)
        for original, ours, operation in modules
        for name in ("weight", "bias")
    ]


def to_scheduler_config(architecture: str, flags: Flags, model: DilatedConvDenoiserModel) -> dict[str, Any]:
    """Config of the `DDPMScheduler` that is the process of complete flags.

    The original clamps the noisy image after every step and draws no noise in the last two; the scheduler clips the
    predicted image, and draws none in the last one.
    """
    beta_start, beta_end = flags["beta_minmax"]
    return {
        "beta_schedule": "linear",
        "beta_start": beta_start,
        "beta_end": beta_end,
        "num_train_timesteps": flags["n_times"],
        "variance_type": "fixed_large",
        "prediction_type": "epsilon",
        "clip_sample": True,
        "timestep_spacing": "leading",
    }


# The notebook's own network; its weights were not released.
PRESETS = {
    "mnist_dilated": Preset(
        "mnist-dilated", {"image_resolution": [28, 28, 1], "hidden_dims": [256] * 8}, url=None, licence=None
    ),
}
