"""guided-diffusion and its relatives: their flags, the names of their weights, their released checkpoints.

One family of networks in three codebases: https://github.com/openai/guided-diffusion (Dhariwal and Nichol, 2021,
https://arxiv.org/abs/2105.05233), https://github.com/openai/improved-diffusion (Nichol and Dhariwal, 2021,
https://arxiv.org/abs/2102.09672) and https://github.com/openai/consistency_models (Song et al., 2023,
https://arxiv.org/abs/2303.01469). Flags keep the names, the meaning and the default values they have there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import ModelMixin

from diffusers_ext.conversion.flags import REQUIRED, Flags, complete, pop_builder
from diffusers_ext.conversion.presets import Preset
from diffusers_ext.conversion.rules import KEEP, TRANSPOSE, Operation, Rule, pointwise, split_qkv, stack
from diffusers_ext.models.unet_adm import ADMAttention, ADMClassifierModel, ADMResnetBlock, ADMUNet2DModel


ADMModel = ADMUNet2DModel | ADMClassifierModel


# What the builders take, and the defaults. `attention_resolutions` are factors of downsampling for a network, and
# sizes in pixels for the `create_*` functions.
_NETWORK = {
    "image_size": REQUIRED,
    "in_channels": REQUIRED,
    "model_channels": REQUIRED,
    "out_channels": REQUIRED,
    "num_res_blocks": REQUIRED,
    "attention_resolutions": REQUIRED,
    "dropout": 0.0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
_CREATE = {
    "image_size": REQUIRED,
    "num_channels": REQUIRED,
    "num_res_blocks": REQUIRED,
    "channel_mult": "",
    "learn_sigma": False,
    "class_cond": False,
    "attention_resolutions": "16",
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "dropout": 0.0,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
_SCRIPT = _CREATE | {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "attention_resolutions": "16,8",
    "num_heads": 4,
    "use_scale_shift_norm": True,
}
_CLASSIFIER = {
    "image_size": 64,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}


_SR_LACKS = ("image_size", "channel_mult", "use_new_attention_order")
_SR_SCRIPT = {k: v for k, v in _SCRIPT.items() if k not in _SR_LACKS} | {"large_size": 256, "small_size": 64}
_UNET_BUILDERS = {
    "UNetModel": _NETWORK | {"num_classes": None},
    "SuperResModel": _NETWORK | {"num_classes": None},
    "create_model": _CREATE,
    "create_model_and_diffusion": _SCRIPT,
    "sr_create_model_and_diffusion": _SR_SCRIPT,
}
_CLASSIFIER_BUILDERS = {
    "EncoderUNetModel": _NETWORK | {"pool": "adaptive"},
    "create_classifier": _CLASSIFIER,
    "create_classifier_and_diffusion": _CLASSIFIER | {"learn_sigma": False},
}
# A run is described by the flags of its network and of its process together, whatever the builder takes of them.
_PROCESS = {
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "sigma_small": False,
    "rescale_timesteps": False,
}
# About training, precision and memory, or about what is around the network of a consistency model.
_NO_EFFECT = {
    "use_fp16", "use_checkpoint", "classifier_use_fp16", "classifier_scale", "timestep_respacing", "use_kl",
    "rescale_learned_sigmas", "sigma_min", "sigma_max", "weight_schedule", "distillation",
}  # fmt: skip
_IGNORED_BY_DDRM = {"type", "in_channels", "out_channels", "resamp_with_conv", "var_type"}
_CHANNEL_MULTS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}


@dataclass(frozen=True)
class Codebase:
    """An architecture, and where its codebase departs from guided-diffusion's UNet.

    Args:
        model_class: our class for it.
        builders: what builds the network there, with the flags and their defaults.
        channel_mults: the channel multipliers that `channel_mult=""` stands for, by image size.
        sr_channel_mults: those of super-resolution networks.
        lacks: flags that it does not have, and the value they would have.
        attention_ndim: dimensions of the weights of the 1x1 convolutions around attention.
        qkv_first: q, k and v are split before the heads, whatever `use_new_attention_order` says.
    """

    model_class: type[ModelMixin]
    builders: Mapping[str, Flags]
    channel_mults: Mapping[int, tuple[float, ...]] = field(default_factory=lambda: _CHANNEL_MULTS)
    sr_channel_mults: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    lacks: Flags = field(default_factory=dict)
    attention_ndim: int = 3
    qkv_first: bool = False


CODEBASES = {
    "guided-diffusion/unet": Codebase(
        ADMUNet2DModel,
        _UNET_BUILDERS,
        sr_channel_mults={512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)},
    ),
    "guided-diffusion/classifier": Codebase(ADMClassifierModel, _CLASSIFIER_BUILDERS),
    "improved-diffusion/unet": Codebase(
        ADMUNet2DModel,
        _UNET_BUILDERS
        | {
            "create_model_and_diffusion": _SCRIPT | {"rescale_timesteps": True},
            "sr_create_model_and_diffusion": _SR_SCRIPT | {"rescale_timesteps": True},
        },
        channel_mults={256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)},
        sr_channel_mults={256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)},
        lacks={"num_head_channels": -1, "resblock_updown": False, "use_new_attention_order": False},
    ),
    "consistency-models/unet": Codebase(
        ADMUNet2DModel,
        {
            "UNetModel": _UNET_BUILDERS["UNetModel"],
            "create_model": _CREATE,
            "create_model_and_diffusion": _SCRIPT | {"attention_resolutions": "32,16,8"},
        },
        attention_ndim=4,
        qkv_first=True,
    ),
}
# What is needed to write a model back, and not in its config.
REMEMBERED_FLAGS = ("use_new_attention_order",)


def complete_flags(architecture: str, flags: Mapping[str, Any]) -> Flags:
    """All flags of a run, defaults included, and the name of its `builder`, recognised where it is not given.

    Args:
        architecture: a key of `CODEBASES`.
        flags: flags under the original's names, or the nested ones of a DDRM configuration file.

    Raises:
        ValueError: when a flag is unknown to the builder, is missing, or has a value that the codebase cannot build.
    """
    codebase = CODEBASES[architecture]
    flags = dict(flags)
    if "model" in flags:
        process = flags.get("diffusion", {})
        flags = {key: value for key, value in flags["model"].items() if key not in _IGNORED_BY_DDRM} | {
            "builder": flags.get("builder", "create_model"),
            "noise_schedule": process.get("beta_schedule", "linear"),
            "diffusion_steps": process.get("num_diffusion_timesteps", 1000),
        }
    builder = pop_builder(flags, codebase.builders, _recognise_builder(codebase, flags), architecture)
    flags = complete(flags, _PROCESS | codebase.builders[builder], _NO_EFFECT, builder, architecture)
    for key, value in codebase.lacks.items():
        if flags.get(key, value) != value:
            raise ValueError(
                f"`config` has {key}={flags[key]!r}, but {architecture!r} can only be built with {value!r}."
            )
    flags["use_new_attention_order"] = codebase.qkv_first or flags.get("use_new_attention_order", False)
    return flags


def _recognise_builder(codebase: Codebase, flags: Flags) -> str:
    if codebase.model_class is ADMClassifierModel:
        return "EncoderUNetModel" if "model_channels" in flags else "create_classifier"
    if "model_channels" in flags:
        return "UNetModel"
    return "sr_create_model_and_diffusion" if "large_size" in flags else "create_model_and_diffusion"


def _network_flags(codebase: Codebase, flags: Flags) -> Flags:
    """Flags of the `create_*` functions as flags of the network that they build."""
    if "model_channels" in flags:
        return flags
    if codebase.model_class is ADMClassifierModel:
        flags = {key.removeprefix("classifier_"): value for key, value in flags.items()}
        flags |= {"num_channels": flags["width"], "num_res_blocks": flags["depth"], "out_channels": 1000}
        flags |= {"dropout": 0.0, "num_heads": 1, "num_head_channels": 64}
    else:
        flags = flags | {
            "out_channels": 6 if flags["learn_sigma"] else 3,
            "num_classes": 1000 if flags["class_cond"] else None,
        }
    super_resolution = "large_size" in flags
    size = flags["large_size" if super_resolution else "image_size"]
    channel_mults = codebase.sr_channel_mults if super_resolution else codebase.channel_mults
    channel_mult = _numbers(flags.get("channel_mult", "")) or channel_mults.get(size)
    if channel_mult is None:
        raise ValueError(
            f"`{'large_size' if super_resolution else 'image_size'}` ({size}) has no channel multipliers in this "
            f"codebase, only {', '.join(map(str, sorted(channel_mults)))} have. Give `channel_mult`, or the flags of "
            "the network itself."
        )
    return flags | {
        "image_size": size,
        "in_channels": 3,
        "model_channels": flags["num_channels"],
        "channel_mult": channel_mult,
        "attention_resolutions": [int(size // pixels) for pixels in _numbers(flags["attention_resolutions"])],
        "conv_resample": True,
        "dims": 2,
    }


def _numbers(value: str | Sequence[float]) -> list[float]:
    """Numbers that are a sequence, or separated by commas as on the command line."""
    if isinstance(value, str):
        return [float(number) for number in value.split(",") if number]
    return list(value)


def to_config(architecture: str, flags: Flags) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Our class and its config for the complete flags of an original.

    Raises:
        ValueError: when the flags contradict each other, or describe a network that is not for images.
    """
    model_class = CODEBASES[architecture].model_class
    super_resolution = flags["builder"] in ("SuperResModel", "sr_create_model_and_diffusion")
    flags = _network_flags(CODEBASES[architecture], flags)
    if flags["dims"] != 2:
        raise ValueError(f"`dims` is {flags['dims']}; only networks for images (2) can be converted.")
    size, model_channels = flags["image_size"], flags["model_channels"]
    widths = tuple(int(multiplier * model_channels) for multiplier in flags["channel_mult"])
    config = {
        "sample_size": size,
        "in_channels": flags["in_channels"],
        "block_out_channels": widths,
        "model_channels": model_channels if model_channels != widths[0] else None,
        "layers_per_block": flags["num_res_blocks"],
        "attention_resolutions": tuple(
            size // 2**level for level in range(len(widths)) if 2**level in flags["attention_resolutions"]
        ),
        "resnet_time_scale_shift": "scale_shift" if flags["use_scale_shift_norm"] else "default",
        "resample_type": "resnet" if flags["resblock_updown"] else "conv" if flags["conv_resample"] else "pool",
        "dropout": flags["dropout"],
        "timestep_scale": 1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0,
    }
    by_width = flags["num_head_channels"] != -1
    if by_width:
        config["attention_head_dim"] = flags["num_head_channels"]
    else:
        config["num_attention_heads"] = flags["num_heads"]
    if model_class is ADMClassifierModel:
        if flags["pool"] == "attention" and not by_width:
            raise ValueError('`pool` "attention" needs `num_head_channels`, the channels of each of its heads.')
        return model_class, config | {"num_classes": flags["out_channels"], "pool": flags["pool"]}
    if not by_width and flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        config["num_attention_heads_upsample"] = flags["num_heads_upsample"]
    if super_resolution:
        config |= {"in_channels": 2 * flags["in_channels"], "low_res_channels": flags["in_channels"]}
    return model_class, config | {"out_channels": flags["out_channels"], "num_class_embeds": flags["num_classes"]}


def to_flags(architecture: str, model: ADMModel) -> Flags:
    """Flags of the network that `model` was or would be in the original, the inverse of `to_config`.

    q, k and v are in the order that the model was loaded with, where the codebase has a choice, and else in its
    default order. Other options that the codebase has no flag for are not looked at here: complete the flags, and
    compare the config that they lead to.

    Raises:
        ValueError: when the norms have another number of groups than all of these codebases.
    """
    codebase, config = CODEBASES[architecture], model.config
    if config.norm_num_groups != 32:
        raise ValueError(
            f"`model` has `norm_num_groups` {config.norm_num_groups}, but {architecture!r} has 32 groups in every "
            "norm: no file of that codebase can hold it."
        )
    model_channels = config.model_channels or config.block_out_channels[0]
    low_res_channels = config.get("low_res_channels", 0)
    heads = config.num_attention_heads
    flags = {
        "builder": "EncoderUNetModel" if isinstance(model, ADMClassifierModel) else "UNetModel",
        "image_size": config.sample_size,
        "in_channels": config.in_channels - low_res_channels,
        "model_channels": model_channels,
        "out_channels": config.get("num_classes") or config.out_channels,
        "num_res_blocks": config.layers_per_block,
        "attention_resolutions": [
            2**level
            for level in range(len(config.block_out_channels))
            if config.sample_size // 2**level in config.attention_resolutions
        ],
        "dropout": config.dropout,
        "channel_mult": [width / model_channels for width in config.block_out_channels],
        "conv_resample": config.resample_type != "pool",
        "num_heads": heads or 1,
        "num_head_channels": -1 if heads else config.attention_head_dim,
        "use_scale_shift_norm": config.resnet_time_scale_shift == "scale_shift",
        "resblock_updown": config.resample_type == "resnet",
        "use_new_attention_order": config.get("_original_use_new_attention_order", False)
        and "use_new_attention_order" not in codebase.lacks,
    }
    if isinstance(model, ADMClassifierModel):
        flags["pool"] = config.pool
    else:
        flags["num_classes"] = config.num_class_embeds
        flags["num_heads_upsample"] = config.num_attention_heads_upsample or -1
        if low_res_channels:
            flags["builder"] = "SuperResModel"
    if config.timestep_scale != 1.0:
        flags |= {"rescale_timesteps": True, "diffusion_steps": round(1000 / config.timestep_scale)}
    lacks = {key for key, value in codebase.lacks.items() if flags[key] == value}
    return {key: value for key, value in flags.items() if key not in lacks}


# Names of submodules, there and here.
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_OUTPUT = {
    None: (("out.0", "conv_norm_out"), ("out.2", "conv_out")),
    "attention": (("out.0", "head.0"),),
    "adaptive": (("out.0", "head.0"),),
    "spatial": (("out.0", "head.0"), ("out.2", "head.2")),
    "spatial_v2": (("out.0", "head.0"), ("out.1", "head.1"), ("out.3", "head.3")),
}


def build_rules(architecture: str, flags: Flags, model: ADMModel) -> list[Rule]:
    """Which weights of the original are which of `model`; the weights themselves are not read."""
    ndim = CODEBASES[architecture].attention_ndim
    blocks = dict(_blocks(model))
    rules = [
        *_module("time_embed.0", "time_embedding.linear_1"),
        *_module("time_embed.2", "time_embedding.linear_2"),
        *_module("input_blocks.0.0", "conv_in"),
    ]
    for ours, original in blocks.items():
        module = model.get_submodule(ours)
        if isinstance(module, ADMResnetBlock):
            for there, here in _RESNET:
                if getattr(module, here) is not None:
                    rules += _module(f"{original}.{there}", f"{ours}.{here}")
        elif isinstance(module, ADMAttention):
            groups = 1 if flags["use_new_attention_order"] else module.heads
            rules += _module(f"{original}.norm", f"{ours}.group_norm")
            rules += _qkv(f"{original}.qkv", ours, split_qkv(groups, ndim))
            rules += _module(f"{original}.proj_out", f"{ours}.to_out.0", pointwise(ndim))
        elif module.conv is not None:
            rules += _module(f"{original}.{'op' if ours.startswith('down') else 'conv'}", f"{ours}.conv")

    resnets = list(model.resnets())
    projections = [f"{blocks[name]}.emb_layers.1" for name, _ in resnets]
    for parameter in ("weight", "bias"):
        originals = tuple(f"{projection}.{parameter}" for projection in projections)
        sizes = [resnet.temb_width for _, resnet in resnets]
        rules.append(Rule(originals, (f"temb_projection.{parameter}",), stack(sizes)))
    if model.config.get("num_class_embeds") is not None:
        rules.append(Rule(("label_emb.weight",), ("class_embedding.weight",), KEEP))

    pool = model.config.get("pool")
    for there, here in _OUTPUT[pool]:
        rules += _module(there, here)
    if pool == "attention":
        rules.append(Rule(("out.2.positional_embedding",), ("head.1.positional_embedding",), TRANSPOSE))
        rules += _qkv("out.2.qkv_proj", "head.1", split_qkv(1, 3))
        rules += _module("out.2.c_proj", "head.1.to_out", pointwise(3))
    elif pool == "adaptive":
        rules += _module("out.3", "head.3", pointwise(4))
    return rules


def _blocks(model: ADMModel) -> Iterator[tuple[str, str]]:
    """Our name and the original's of everything in the three towers of blocks, which it numbers through."""
    index = 0
    for level, block in enumerate(model.down_blocks):
        for layer in range(len(block.resnets)):
            index += 1
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{index}.0"
            if block.attentions:
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{index}.1"
        if block.downsamplers:
            index += 1
            yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{index}.0"
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    index = -1
    for level, block in enumerate(getattr(model, "up_blocks", ())):
        for layer in range(len(block.resnets)):
            index += 1
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{index}.0"
            if block.attentions:
                yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{index}.1"
        if block.upsamplers:  # behind the last layer, in the same block of the original
            yield f"up_blocks.{level}.upsamplers.0", f"output_blocks.{index}.{2 if block.attentions else 1}"


def _module(original: str, ours: str, operation: Operation = KEEP) -> list[Rule]:
    return [Rule((f"{original}.{name}",), (f"{ours}.{name}",), operation) for name in ("weight", "bias")]


def _qkv(original: str, ours: str, operation: Operation) -> list[Rule]:
    return [
        Rule((f"{original}.{name}",), tuple(f"{ours}.to_{part}.{name}" for part in "qkv"), operation)
        for name in ("weight", "bias")
    ]


def to_scheduler_config(architecture: str, flags: Flags, model: ADMModel) -> dict[str, Any]:
    """Config of the `DDPMScheduler` that is the process of complete flags, unrespaced.

    Raises:
        ValueError: when the process is not a discrete one with a linear or cosine schedule.
    """
    if architecture == "consistency-models/unet":
        raise ValueError(
            f"`architecture` ({architecture!r}) has a preconditioned network and a continuous process, not the "
            "discrete one of `DDPMScheduler`."
        )
    steps = flags["diffusion_steps"]
    if flags["noise_schedule"] == "linear":
        # 1e-4 to 0.02 for 1000 steps, and in inverse proportion to the number of steps.
        schedule = {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    elif flags["noise_schedule"] == "cosine":
        schedule = {"beta_schedule": "squaredcos_cap_v2"}
    else:
        raise ValueError(f'`noise_schedule` is {flags["noise_schedule"]!r}; it must be "linear" or "cosine".')
    learned = model.config.out_channels == 2 * (model.config.in_channels - model.config.low_res_channels)
    return schedule | {
        "num_train_timesteps": steps,
        "variance_type": "learned_range" if learned else "fixed_small" if flags["sigma_small"] else "fixed_large",
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "clip_sample": True,
        "timestep_spacing": "linspace",
    }


# Flags of the released checkpoints, as the authors' README files and `launch.sh` give them.
_ADM = {
    "builder": "create_model_and_diffusion",
    "attention_resolutions": "32,16,8",
    "image_size": 256,
    "learn_sigma": True,
    "num_channels": 256,
    "num_head_channels": 64,
    "resblock_updown": True,
}
_ADM_64 = _ADM | {
    "class_cond": True,
    "dropout": 0.1,
    "image_size": 64,
    "noise_schedule": "cosine",
    "num_channels": 192,
    "num_res_blocks": 3,
    "use_new_attention_order": True,
}
_ADM_UPSAMPLER = {
    "builder": "sr_create_model_and_diffusion",
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "large_size": 256,
    "learn_sigma": True,
    "num_channels": 192,
    "resblock_updown": True,
    "small_size": 64,
}
_ADM_UPSAMPLER_512 = _ADM_UPSAMPLER | {
    "attention_resolutions": "32,16",
    "large_size": 512,
    "num_head_channels": 64,
    "small_size": 128,
}
_IMPROVED = {
    "builder": "create_model_and_diffusion",
    "diffusion_steps": 4000,
    "image_size": 64,
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "num_channels": 128,
    "num_res_blocks": 3,
}
_IMPROVED_CONDITIONAL = _IMPROVED | {"class_cond": True, "num_channels": 192, "rescale_timesteps": False}
_IMPROVED_CIFAR10 = _IMPROVED | {"dropout": 0.3, "image_size": 32}
_IMPROVED_UPSAMPLER = {
    "builder": "sr_create_model_and_diffusion",
    "class_cond": True,
    "diffusion_steps": 4000,
    "learn_sigma": True,
    "num_channels": 192,
    "rescale_timesteps": False,
}
_IMPROVED_LSUN = {
    "builder": "create_model_and_diffusion",
    "attention_resolutions": "16",
    "image_size": 256,
    "learn_sigma": True,
    "num_heads": 1,
    "rescale_timesteps": False,
    "use_scale_shift_norm": False,
}
_CM_IMAGENET = {
    "builder": "create_model_and_diffusion",
    "class_cond": True,
    "image_size": 64,
    "num_channels": 192,
    "num_head_channels": 64,
    "num_res_blocks": 3,
    "resblock_updown": True,
}
_CM_LSUN = {
    "builder": "create_model_and_diffusion",
    "image_size": 256,
    "num_channels": 256,
    "num_head_channels": 64,
    "resblock_updown": True,
    "use_scale_shift_norm": False,
}


def _presets(architecture: str, folder: str, runs: Mapping[str, tuple]) -> dict[str, Preset]:
    """`runs`: flags, then if the authors name them the number of sampling steps and the scale of guidance."""
    url = f"https://openaipublic.blob.core.windows.net/{folder}"
    return {
        name: Preset(architecture, flags, f"{url}/{name}.pt", "mit", *facts) for name, (flags, *facts) in runs.items()
    }


PRESETS = _presets(
    "guided-diffusion/unet",
    "diffusion/jul-2021",
    {
        "64x64_diffusion": (_ADM_64, 250, 1.0),
        "128x128_diffusion": (_ADM | {"class_cond": True, "image_size": 128, "num_head_channels": -1}, 250, 0.5),
        "256x256_diffusion": (_ADM | {"class_cond": True}, 250, 1.0),
        "256x256_diffusion_uncond": (_ADM, 250, 10.0),
        "512x512_diffusion": (_ADM | {"class_cond": True, "image_size": 512}, 250, 4.0),
        "64_256_upsampler": (_ADM_UPSAMPLER, 250),
        "128_512_upsampler": (_ADM_UPSAMPLER_512, 250),
        "lsun_bedroom": (_ADM | {"dropout": 0.1}, 1000),
        "lsun_cat": (_ADM | {"dropout": 0.1}, 1000),
        "lsun_horse": (_ADM | {"dropout": 0.1}, 1000),
        "lsun_horse_nodropout": (_ADM, 1000),
    },
)
PRESETS |= _presets(
    "guided-diffusion/classifier",
    "diffusion/jul-2021",
    {
        "64x64_classifier": ({"builder": "create_classifier", "image_size": 64, "classifier_depth": 4},),
        "128x128_classifier": ({"builder": "create_classifier", "image_size": 128},),
        "256x256_classifier": ({"builder": "create_classifier", "image_size": 256},),
        "512x512_classifier": ({"builder": "create_classifier", "image_size": 512},),
    },
)
# A fine-tuned 512x512_diffusion without its label embedding, by Katherine Crowson; not a release of OpenAI.
PRESETS["512x512_diffusion_uncond_finetune"] = Preset("guided-diffusion/unet", _ADM | {"image_size": 512}, None, None)
PRESETS |= _presets(
    "improved-diffusion/unet",
    "diffusion/march-2021",
    {
        "imagenet64_uncond_100M_1500K": (_IMPROVED, 250),
        "imagenet64_uncond_vlb_100M_1500K": (_IMPROVED | {"use_kl": True}, 250),
        "imagenet64_cond_270M_250K": (_IMPROVED_CONDITIONAL, 250),
        "cifar10_uncond_50M_500K": (_IMPROVED_CIFAR10, 250),
        "cifar10_uncond_vlb_50M_500K": (_IMPROVED_CIFAR10 | {"use_kl": True}, 250),
        "upsample_cond_500K": (_IMPROVED_UPSAMPLER, 250),
        "lsun_uncond_100M_1200K_bs128": (_IMPROVED_LSUN, 250),
        "lsun_uncond_100M_2400K_bs64": (_IMPROVED_LSUN, 250),
    },
)
PRESETS |= _presets(
    "consistency-models/unet",
    "consistency",
    {
        "edm_imagenet64_ema": (_CM_IMAGENET | {"dropout": 0.1}, 40),
        "cd_imagenet64_l2": (_CM_IMAGENET, 1),
        "cd_imagenet64_lpips": (_CM_IMAGENET, 1),
        "ct_imagenet64": (_CM_IMAGENET, 1),
        "edm_bedroom256_ema": (_CM_LSUN | {"dropout": 0.1}, 40),
        "cd_bedroom256_l2": (_CM_LSUN, 1),
        "cd_bedroom256_lpips": (_CM_LSUN, 1),
        "ct_bedroom256": (_CM_LSUN, 1),
        "edm_cat256_ema": (_CM_LSUN | {"dropout": 0.1}, 40),
        "cd_cat256_l2": (_CM_LSUN, 1),
        "cd_cat256_lpips": (_CM_LSUN, 1),
        "ct_cat256": (_CM_LSUN, 1),
    },
)
