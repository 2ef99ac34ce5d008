"""Arguments that a network of diffusers or of this package can be called with."""

import functools
import inspect
import math
from typing import Any

import torch

from diffusers import ModelMixin

from diffusers_ext.inspection.anatomy import Size


TEXT_TOKENS = 77  # length of the text that stands for `encoder_hidden_states`
TIMESTEP = 500  # the middle of the usual thousand; noise level of the effective receptive field
MAX_SIZE = 4096  # pixels; the receptive field takes time and memory in proportion
_CLASS_WORDS = ("num_class_embeds", "num_embeds_ada_norm")


def example_inputs(
    model: ModelMixin,
    size: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], torch.Tensor, Size]:
    """Arguments of `model.forward`, on its device.

    Args:
        model: a network of diffusers or of this package.
        size: height and width in pixels (of latents, where it sees those); by default that of its config.
        batch_size: number of images.
        dtype: of images and texts.

    Returns:
        The arguments by name, the one among them that is the image, and the height and width of its grid.

    Raises:
        ValueError: for a network that needs something unknown.
    """
    config, device = model.config, model.device
    parameters = inspect.signature(model.forward).parameters
    height, width = (size, size) if size else _default_size(config)
    if max(height, width) > MAX_SIZE:
        raise ValueError(f"`size`: the config says {height}x{width}, more than {MAX_SIZE}; give a smaller one.")
    zeros = functools.partial(torch.zeros, device=device, dtype=dtype)
    channels = config.get("in_channels", 3) - (config.get("low_res_channels") or 0)
    # Transformers with positions as an argument take latents whose 2x2 pixels have become the channels of a token.
    packed = "img_ids" in parameters or "img_shapes" in parameters
    if packed:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        image = zeros(batch_size, height * width, channels)
    else:
        image = zeros(batch_size, channels, height, width)
    text_width = next(
        (
            config[word][-1] if isinstance(config[word], (tuple, list)) else config[word]
            for word in ("encoder_hid_dim", "joint_attention_dim", "caption_channels", "cross_attention_dim")
            if config.get(word)
        ),
        None,
    )
    classes = next((config[word] for word in _CLASS_WORDS if config.get(word)), None)
    is_class_conditional = classes is not None and (
        config.get("num_embeds_ada_norm") is None or "norm_type" not in config or config.norm_type == "ada_norm_zero"
    )
    labels = None
    if is_class_conditional or config.get("class_embed_type") == "timestep":
        labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    elif config.get("class_embed_type") in ("projection", "simple_projection"):
        labels = zeros(batch_size, config.projection_class_embeddings_input_dim)
    elif config.get("class_embed_type") == "identity":
        labels = zeros(batch_size, 4 * config.block_out_channels[0])
    timestep = torch.full((batch_size,), TIMESTEP, device=device)
    values = {
        "timestep": timestep,
        "timesteps": timestep,
        "class_labels": labels,
        "img_ids": zeros(height * width, 3),
        "txt_ids": zeros(TEXT_TOKENS, 3),
        "guidance": zeros(batch_size) if config.get("guidance_embeds") else None,
        "added_cond_kwargs": _added_conditions(config, batch_size, zeros),
    }
    if text_width:
        values["encoder_hidden_states"] = zeros(batch_size, TEXT_TOKENS, text_width)
    if config.get("pooled_projection_dim"):
        values["pooled_projections"] = zeros(batch_size, config.pooled_projection_dim)
    if config.get("low_res_channels"):
        values["low_res"] = zeros(batch_size, config.low_res_channels, max(1, height // 4), max(1, width // 4))
    arguments: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in ("sample", "hidden_states", "x"):
            arguments[name] = image
        elif values.get(name) is not None:
            arguments[name] = values[name]
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            if name not in ("class_labels", "timestep"):
                raise ValueError(f"`{name}` of {type(model).__name__} is an input that cannot be made up.")
            arguments[name] = None
    if not any(value is image for value in arguments.values()):
        raise ValueError(f"{type(model).__name__} takes no image.")
    return arguments, image, (height, width)


def _default_size(config) -> Size:
    size = next(
        (config[word] for word in ("sample_size", "default_sample_size", "image_size") if config.get(word)), 64
    )
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]


def _added_conditions(config, batch_size: int, zeros) -> dict[str, Any] | None:
    if config.get("addition_embed_type") == "text_time":  # Stable Diffusion XL
        ids = 6 if config.projection_class_embeddings_input_dim % 256 == 0 else 5
        text = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        return {"text_embeds": zeros(batch_size, text), "time_ids": zeros(batch_size, ids)}
    if "use_additional_conditions" in config:  # PixArt
        if config.use_additional_conditions or (
            config.use_additional_conditions is None and config.sample_size == 128
        ):
            return {"resolution": zeros(batch_size, 2), "aspect_ratio": zeros(batch_size, 1)}
        return {"resolution": None, "aspect_ratio": None}
    return None
