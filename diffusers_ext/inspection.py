"""Anatomy of a network: what papers draw by hand, computed from the model itself.

Everything but the effective receptive field comes from passes on the meta device, where tensors have shapes but no
contents, so that a network of any size is inspected in seconds:

| what | how |
|---|---|
| shapes, channels, resolution | outputs of modules, by forward hooks |
| attention | calls of `scaled_dot_product_attention`, with the shapes that they get |
| FLOPs | `torch.utils.flop_counter`: matrix products, convolutions and attention; a multiply-add counts 2 |
| activation memory | tensors that autograd saves for the backward pass, in the block that saves them first |
| peak memory | live storages of all tensors, operation by operation; see [`Memory`] |
| receptive field | `diffusers_ext.receptive_field` |

Memory counts tensors: no workspaces of libraries, no fragmentation, no CUDA context. Attention is taken to be fused,
without a matrix of weights.
"""

import contextlib
import difflib
import functools
import inspect
import json
import math
import os
import re
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

import diffusers
from diffusers import ModelMixin

import diffusers_ext
from diffusers_ext.receptive_field import (
    FootprintMode,
    Rectangle,
    effective_receptive_field,
    fill_zero_layers,
)


Size = tuple[int, int]

# Children of these names are lists of blocks, in our models and in diffusers'.
BLOCK_LISTS = ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks", "blocks", "layers")
TEXT_TOKENS = 77  # length of the text that stands for `encoder_hidden_states`
TIMESTEP = 500  # the middle of the usual thousand; noise level of the effective receptive field
MAX_SIZE = 4096  # pixels; the receptive field takes time and memory in proportion
# Without being asked, the effective receptive field is measured where that takes seconds, on as many images.
EFFECTIVE_PARAMETERS, EFFECTIVE_FLOPS, EFFECTIVE_SAMPLES = 80e6, 10e9, 8


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    Args:
        heads: number of heads.
        head_dim: channels of each.
        queries: tokens that ask.
        keys: tokens that answer.
        kind: "self", "cross" (to another sequence, such as a text) or "pool" (one token asks).
        resolution: height and width of the pixels or patches that are its tokens; None where they form no grid.
    """

    heads: int
    head_dim: int
    queries: int
    keys: int
    kind: str
    resolution: Size | None


@dataclass(frozen=True)
class Block:
    """One block, in the order in which blocks run.

    Args:
        name: dotted name in the model; "" for what is in no block.
        kind: "in", "embedding", "down", "mid", "up", "block" or "out".
        module: name of its class.
        output_shape: of its output, batch first; None if it did not run.
        channels: of its output.
        resolution: height and width at which its layers work, before it changes them; None if it has none.
        attention: its attention layers.
        parameters: number of its parameters.
        flops: of a forward pass; a multiply-add counts 2.
        activation_bytes: what autograd keeps of it for the backward pass.
        receptive_field: height and width in pixels of the part of the image that the middle of its output sees.
    """

    name: str
    kind: str
    module: str
    output_shape: tuple[int, ...] | None = None
    channels: int | None = None
    resolution: Size | None = None
    attention: tuple[Attention, ...] = ()
    parameters: int = 0
    flops: int = 0
    activation_bytes: int = 0
    receptive_field: Size | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes, for the batch of the inspection.

    Args:
        weights: parameters and buffers.
        activations: what autograd keeps for the backward pass.
        gradients: of all parameters.
        optimizer: AdamW's two moments.
        forward_peak: of a forward pass without gradients, weights included.
        training_peak: of a training step in this dtype, all of the above included: forward, mean square, backward and
            a step of AdamW (multi-tensor, as on GPUs) whose moments exist already.
        training_peak_in: "forward", "backward" or "optimizer".
    """

    weights: int
    activations: int
    gradients: int
    optimizer: int
    forward_peak: int
    training_peak: int
    training_peak_in: str


@dataclass(frozen=True)
class ReceptiveField:
    """What the centre pixel of the output depends on; normalisation statistics aside.

    Args:
        size: height and width in pixels, also beyond the image; None if it grows with the image ("whole image").
        inside: height and width of it inside the image.
        exact: False where the network cannot run on larger images, which would have shown what lies beyond.
        unknown_operations: operations that were taken to mix everything, since nothing is known of them.
        effective: size in pixels of the effective one (Luo et al., 2016): square root of the number of pixels with
            more than 4.55% of the largest gradient; None if it was not measured.
        effective_of: which weights it was measured on, or why it was not.
    """

    size: Size | None
    inside: Size
    exact: bool = True
    unknown_operations: tuple[str, ...] = ()
    effective: float | None = None
    effective_of: str = ""


@dataclass(frozen=True)
class Precision:
    """Dtypes.

    Args:
        dtype: of the weights that were inspected.
        kept_in_float32: modules that loading in half precision leaves in float32 (`_keep_in_fp32_modules`).
        kept_in_float32_parameters: number of their parameters.
        not_cast: patterns of modules that layerwise casting leaves as they are (`_skip_layerwise_casting_patterns`).
        not_cast_parameters: number of their parameters.
        computed_in_float32: blocks and layers whose output is float32 in a model in half precision, seen in a pass.
    """

    dtype: str
    kept_in_float32: tuple[str, ...] = ()
    kept_in_float32_parameters: int = 0
    not_cast: tuple[str, ...] = ()
    not_cast_parameters: int = 0
    computed_in_float32: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """Anatomy of one network.

    Args:
        name: of the part: preset, folder or Hub id.
        model_class: name of its class.
        input_shape: batch, channels, height and width (or batch, tokens, channels).
        output_shape: of its output.
        parameters: number of all parameters.
        flops: of a forward pass; a multiply-add counts 2.
        blocks: in the order in which they run.
        skips: connections past at least one block: from, to, number of tensors.
        memory, receptive_field, precision: see there.
    """

    name: str
    model_class: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    blocks: tuple[Block, ...]
    skips: tuple[tuple[str, str, int], ...]
    memory: Memory
    receptive_field: ReceptiveField
    precision: Precision


@dataclass(frozen=True)
class Anatomy:
    """What one argument of the command named: a network, or several that belong together.

    Args:
        title: heading.
        networks: a UNet and its classifier, the networks of a pipeline, or just one.
    """

    title: str
    networks: tuple[Network, ...]

    @property
    def parameters(self) -> int:
        return sum(network.parameters for network in self.networks)

    @property
    def flops(self) -> int:
        return sum(network.flops for network in self.networks)


@dataclass(frozen=True)
class Source:
    """Where a network comes from: its class and config, and a folder with weights if there is one."""

    name: str
    model_class: type[ModelMixin]
    config: dict[str, Any] = field(repr=False)
    folder: Path | None = None


def inspect_models(
    models: Sequence[str],
    size: int | None = None,
    *,
    batch_size: int = 1,
    dtype: str | None = None,
    effective: str = "auto",
    titles: Sequence[str] = (),
    format: str | None = None,
    output: str | os.PathLike | None = None,
) -> str:
    """Describe networks, one beside the other.

    Args:
        models: each a preset (a released checkpoint such as `256x256_diffusion_uncond`, or a named size such as
            `composable/film`), a folder of a model or a pipeline, or a Hub id (`org/repo` or `org/repo/unet`), of
            which only the config is fetched; `A+B` shows two networks as one column.
        size: height and width of the images in pixels; by default that of the config.
        batch_size: number of images.
        dtype: of weights and images: "float32", "float16" or "bfloat16". By default that of the weights in the folder,
            else float32.
        effective: whether to measure the effective receptive field, on real weights: "auto" where it takes seconds,
            "always" or "never".
        titles: headings, one for each of `models`; by default the names.
        format: "table", "json", "svg" or "html"; by default that of `output`'s suffix, else "table".
        output: file to write, as a whole or not at all.

    Returns:
        The description as text.

    Raises:
        ValueError: for a name that is not known, a folder without a model, a class that is not one of diffusers or of
            this package, and a size that the network refuses.
    """
    from diffusers_ext.inspection_report import FORMATS, render

    models = [models] if isinstance(models, str) else list(models)
    suffix = Path(output).suffix[1:].lower() if output else ""
    format = format or {"svg": "svg", "html": "html", "htm": "html", "json": "json"}.get(suffix, "table")
    for name, value, valid in (
        ("format", format, FORMATS),
        ("effective", effective, ("auto", "always", "never")),
        ("dtype", dtype or "float32", tuple(_DTYPES)),
    ):
        if value not in valid:
            raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(valid)}.")
    if not models:
        raise ValueError("`models` is empty: name at least one model.")
    if titles and len(titles) != len(models):
        raise ValueError(f"`titles` has {len(titles)} entries for {len(models)} models; give one each, or none.")
    for name, value in (("size", size), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    if size is not None and size > MAX_SIZE:
        raise ValueError(f"`size` is {size}; it must be at most {MAX_SIZE}.")
    anatomies = []
    for index, model in enumerate(models):
        sources = find_sources(model)
        networks = tuple(inspect_source(source, size, batch_size, dtype, effective) for source in sources)
        anatomies.append(Anatomy(titles[index] if titles else _title(model), networks))
    text = render(anatomies, format)
    if output is not None:
        _write(Path(output), text)
    return text


def _title(model: str) -> str:
    """Folders by their last name."""
    return "+".join(Path(part).resolve().name if os.path.exists(part) else part for part in _parts(model))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
        file = Path(temporary) / path.name
        file.write_text(text, encoding="utf-8")
        os.replace(file, path)


# Where networks come from


def named_sources() -> dict[str, tuple[type[ModelMixin], dict[str, Any]] | None]:
    """All presets: class and config of named sizes; None for released checkpoints, whose config has to be derived."""
    from diffusers_ext import models
    from diffusers_ext.conversion import presets

    return {**dict.fromkeys(presets), **getattr(models, "PRESETS", {})}


def find_sources(model: str) -> list[Source]:
    """Networks that a word of the command line names; see [`inspect_models`] for the words and errors."""
    sources = []
    for part in _parts(model):
        if part in named_sources():
            sources.append(_preset_source(part))
        elif os.path.exists(part):
            sources += _folder_sources(Path(part), part)
        else:
            sources += _hub_sources(part)
    return sources


def _parts(model: str) -> list[str]:
    if os.path.exists(model) or "+" not in model:
        return [model]
    parts = model.split("+")
    if not all(parts):
        raise ValueError(f"`models` has {model!r}: a `+` stands between the names of two networks.")
    return parts


def _preset_source(name: str) -> Source:
    from diffusers_ext.conversion.original import empty_model, complete_flags, presets

    known = named_sources()[name]
    if known is None:
        architecture = presets[name].architecture
        model = empty_model(architecture, complete_flags(architecture, name, None))
        return Source(name, type(model), {key: model.config[key] for key in model.config if key[0] != "_"})
    return Source(name, *known)


def _folder_sources(folder: Path, name: str) -> list[Source]:
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        parts = [part for part in index if _is_network(index[part]) and (folder / part / "config.json").is_file()]
        if not parts:
            raise ValueError(f"`models` has {name!r}, a pipeline without networks of diffusers.")
        sources = [_config_source(f"{name}/{part}", _read_json(folder / part / "config.json")) for part in parts]
        return [replace(source, folder=folder / part) for source, part in zip(sources, parts)]
    if (folder / "config.json").is_file():
        return [replace(_config_source(name, _read_json(folder / "config.json")), folder=folder)]
    raise ValueError(
        f"`models` has {name!r}, which holds neither a model (config.json) nor a pipeline (model_index.json)."
    )


def _is_network(entry: Any) -> bool:
    """Whether an entry of model_index.json names a class of ours or of diffusers'."""
    return isinstance(entry, list) and len(entry) == 2 and _model_class(entry[1]) is not None


def _model_class(name: Any) -> type[ModelMixin] | None:
    """A class of models by its name in diffusers or in this package; nothing else can be reached by it."""
    if not isinstance(name, str) or not name.isidentifier():
        return None
    for library in (diffusers_ext, diffusers):
        found = getattr(library, name, None)
        if isinstance(found, type) and issubclass(found, ModelMixin) and found is not ModelMixin:
            if found.__module__.partition(".")[0] in ("diffusers", "diffusers_ext"):
                return found
    return None


def _config_source(name: str, config: dict[str, Any]) -> Source:
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    model_class = _model_class(class_name)
    if model_class is None:
        raise ValueError(
            f"`models` has {name!r}, whose config names {class_name!r}: only models of diffusers and of diffusers_ext "
            "are inspected, and no code of others is run."
        )
    return Source(name, model_class, config)


def _hub_sources(name: str) -> list[Source]:
    """A Hub id, `org/repo` or with the folder of a component behind it."""
    words = name.split("/")
    families = {preset.partition("/")[0] for preset in named_sources() if "/" in preset}
    is_id = len(words) >= 2 and all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", word) for word in words)
    if not is_id or words[0] in families:
        raise ValueError(f"`models` has {name!r}, which is no preset and no folder{_suggestion(name)}.")
    repository, subfolder = "/".join(words[:2]), "/".join(words[2:])
    index = None if subfolder else _fetch_json(repository, "model_index.json")
    if index is not None:
        parts = [part for part in index if _is_network(index[part])]
        if not parts:
            raise ValueError(f"`models` has {name!r}, a pipeline without networks of diffusers.")
        return [
            _config_source(f"{name}/{part}", _fetch_json(repository, f"{part}/config.json") or {}) for part in parts
        ]
    config = _fetch_json(repository, f"{subfolder}/config.json" if subfolder else "config.json")
    if config is None:
        raise ValueError(
            f"`models` has {name!r}, which is no preset and no folder, and of which the Hub gives no config "
            f"(wrong name, private, or offline){_suggestion(name)}."
        )
    return [_config_source(name, config)]


def _suggestion(name: str) -> str:
    names = list(named_sources())
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    if not close:
        return f". Presets: {', '.join(names)}"
    return f". Did you mean {' or '.join(close)}?"


def _fetch_json(repository: str, file: str) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _read_json(Path(hf_hub_download(repository, file)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"`models`: {path} is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"`models`: {path} holds no object with the options of a model.")
    return content


def build(source: Source, device: str = "meta") -> ModelMixin:
    """The network of a source, without its weights."""
    with _quiet(), torch.device(device):
        if "_class_name" in source.config:
            return source.model_class.from_config(source.config).eval()
        return source.model_class(**source.config).eval()


def weights_dtype(folder: Path | None) -> str | None:
    """Name of the dtype that most weights in a folder have, read from the headers of its safetensors files."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100e6:
                continue
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                word = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(entry["dtype"], "float32")
                counts[word] = counts.get(word, 0) + math.prod(entry["shape"])
    return max(counts, key=counts.get) if counts else None


_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks about configs that older versions wrote."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


# How a network is called


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


_CLASS_WORDS = ("num_class_embeds", "num_embeds_ada_norm")


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


# Passes on the meta device


class _Trace:
    """Which module runs, and what modules return: hooks on all of them, while entered."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]):
        self.model = model
        self.outputs: dict[str, list[torch.Tensor | torch.Size]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.order: list[str] = []
        self.stack: list[str] = []
        self.on_output = None
        # A module's block is the one whose name its own begins with.
        chosen = set(blocks)
        self.block_of = {
            name: next((prefix for prefix in _prefixes(name) if prefix in chosen), "")
            for name, _ in model.named_modules()
        }

    @property
    def block(self) -> str:
        """Name of the block that runs, "" outside of all."""
        return self.block_of[self.stack[-1]] if self.stack else ""

    def __enter__(self):
        self._handles = []
        for name, module in self.model.named_modules():
            before = module.register_forward_pre_hook(functools.partial(self._before, name))
            after = module.register_forward_hook(functools.partial(self._after, name), with_kwargs=True)
            self._handles += [before, after]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self.stack.clear()

    def _before(self, name: str, module: nn.Module, args: tuple) -> None:
        self.stack.append(name)
        if self.block and self.block not in self.order:
            self.order.append(self.block)

    def _after(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        main = _main_tensor(output)
        if main is not None:
            # The dict keeps the order in which modules finish first: leaves before what they are in.
            self.outputs.setdefault(name, main.shape)
            self.dtypes.setdefault(name, main.dtype)
        if self.on_output is not None:
            self.on_output(name, module, (args, kwargs), main)
        self.stack.pop()


def _prefixes(name: str) -> Iterator[str]:
    """The name itself, then those of all that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _main_tensor(output: Any) -> torch.Tensor | None:
    """What of a module's output goes on to the next: the hidden states, not the copies for skip connections."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):  # diffusers' outputs are
        output = tuple(output.values())
    if not isinstance(output, (tuple, list)):
        values = vars(output).values() if hasattr(output, "__dict__") else ()
        return next((value for value in values if isinstance(value, torch.Tensor)), None)
    tensors = [value for value in output if isinstance(value, torch.Tensor)]
    if not tensors:
        return None
    return tensors[0] if any(isinstance(value, (tuple, list)) for value in output) else tensors[-1]


class _FusedAttention(TorchFunctionMode):
    """Runs attention as the one operation that it is on GPUs, and notes heads and tokens of every call."""

    def __init__(self, trace: _Trace):
        super().__init__()
        self.trace = trace
        self.calls: list[tuple[str, str, torch.Size, torch.Size]] = []  # block, module, shapes of query and key

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args)) | kwargs
        query, key, value = given["query"], given["key"], given["value"]
        if query.ndim != 4:
            return func(*args, **kwargs)
        module = self.trace.stack[-1] if self.trace.stack else ""
        self.calls.append((self.trace.block, module, query.shape, key.shape))
        if query.shape[1] != key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        mask = given.get("attn_mask")
        if mask is not None:
            mask = mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        output = torch.ops.aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            mask,
            torch.is_grad_enabled(),
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
            scale=given.get("scale"),
        )
        return output[0]


class _LiveMemory(TorchDispatchMode):
    """Bytes of the storages that are alive, and their maximum."""

    def __init__(self, alive: Sequence[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in alive:
            self._count(tensor)

    def reset_peak(self) -> int:
        """The maximum so far; the next one starts from now."""
        peak, self.peak = self.peak, self.live
        return peak

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return output


class _Flow(FootprintMode):
    """Footprints, and which blocks read what which others made."""

    def __init__(self, trace: _Trace, image: torch.Tensor, grid: Size):
        super().__init__(image, grid)
        self.trace = trace
        self.edges: dict[tuple[str, str], set[int]] = {}
        self._made = WeakTensorKeyDictionary()
        self._serial = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        output = super().__torch_dispatch__(func, types, args, kwargs)
        block = self.trace.block
        made = {}
        for tensor in inputs:
            made |= self._made.get(tensor, {})
        if block:
            for serial, maker in made.items():
                if maker != block:
                    self.edges.setdefault((maker, block), set()).add(serial)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and self.depends(tensor):
                if block:
                    self._serial += 1
                    self._made[tensor] = {self._serial: block}
                else:
                    self._made[tensor] = made
        return output


def inspect_source(
    source: Source,
    size: int | None = None,
    batch_size: int = 1,
    dtype: str | None = None,
    effective: str = "auto",
) -> Network:
    """Anatomy of one network; arguments and errors as for [`inspect_models`]."""
    dtype = dtype or weights_dtype(source.folder) or "float32"
    model = build(source)
    kept = _kept_in_float32(model)
    _cast(model, _DTYPES[dtype], kept)
    with _quiet():
        try:
            arguments, image, grid = example_inputs(model, size, batch_size, _DTYPES[dtype])
            network = _inspect(model, source.name, arguments, image, grid)
        except (RuntimeError, AssertionError, IndexError) as error:
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            shown = "x".join(str(n) for n in (size, size)) if size else "the size of its config"
            raise ValueError(
                f"`size`: {type(model).__name__} ({source.name}) cannot run on images of {shown}: {reason}"
            ) from error
        field = _measure_effective(source, network, grid, effective)
        network = replace(network, receptive_field=replace(network.receptive_field, **field))
        precision = _precision(model, dtype, kept, size)
    return replace(network, precision=precision)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that a model consists of: members of its lists, and what stands beside them."""
    names: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            is_container = isinstance(child, nn.ModuleList) or any(
                isinstance(getattr(child, word, None), nn.ModuleList) and len(getattr(child, word)) > 0
                for word in BLOCK_LISTS
            )
            if is_container:
                visit(child, f"{prefix}{name}.")
            else:
                names.append(f"{prefix}{name}")

    visit(model, "")
    return names


def _inspect(model: ModelMixin, name: str, arguments: dict[str, Any], image: torch.Tensor, grid: Size) -> Network:
    names = find_blocks(model)
    trace = _Trace(model, names)
    tensors = [*model.parameters(), *model.buffers()]
    inputs = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    weights = sum(storage_bytes(tensors).values())

    # FLOPs, shapes and attention.
    with torch.no_grad(), trace, _FusedAttention(trace) as attention, FlopCounterMode(display=False) as counter:
        output = _main_tensor(model(**arguments))
    output_shape = tuple(output.shape)
    counts = counter.get_flop_counts()
    flops = {block: sum(counts.get(f"{type(model).__name__}.{block}", {}).values()) for block in names}

    # Peak of a forward pass.
    del output
    with torch.no_grad(), _FusedAttention(trace), _LiveMemory([*tensors, *inputs]) as memory:
        model(**arguments)
    forward_peak = memory.peak

    training = _training_memory(model, arguments, [*tensors, *inputs], names)
    fields, edges, unknown, blocks_fields = _receptive_field(model, arguments, image, grid, names)

    order = trace.order + [block for block in names if block not in trace.order]
    modules = dict(model.named_modules())
    numel = {block: sum(p.numel() for p in modules[block].parameters()) for block in names}
    called = _attention_layers(model, trace, attention.calls, grid)
    blocks = []
    first_body = next((i for i, block in enumerate(order) if _list_of(block)), len(order))
    downs = [i for i, block in enumerate(order) if _list_of(block) == "down_blocks"]
    ups = [i for i, block in enumerate(order) if _list_of(block) == "up_blocks"]
    between = range(downs[-1], ups[0]) if downs and ups else range(0)
    for index, block in enumerate(order):
        shape = trace.outputs.get(block)
        if not (numel[block] or flops[block] or called.get(block)):
            continue  # activation functions, dropout
        working = _working_shape(block, trace.outputs)
        blocks.append(
            Block(
                name=block,
                kind=_kind(block, shape, index < first_body, index in between),
                module=type(modules[block]).__name__,
                output_shape=None if shape is None else tuple(shape),
                channels=None if shape is None else shape[1] if len(shape) == 4 else shape[-1],
                resolution=_resolution(working, grid),
                attention=tuple(called.get(block, ())),
                parameters=numel[block],
                flops=flops[block],
                activation_bytes=training["saved"].get(block, 0),
                receptive_field=blocks_fields.get(block),
            )
        )
    total_parameters = sum(p.numel() for p in model.parameters())
    total_flops = counter.get_total_flops()
    rest = Block(
        name="",
        kind="out",
        module="(outside of blocks)",
        parameters=total_parameters - sum(block.parameters for block in blocks),
        flops=total_flops - sum(block.flops for block in blocks),
        activation_bytes=training["activations"] - sum(block.activation_bytes for block in blocks),
        attention=tuple(called.get("", ())),
    )
    if rest.parameters or rest.flops or rest.activation_bytes:
        blocks.append(rest)
    position = {block.name: index for index, block in enumerate(blocks) if block.name}
    # What the next block on the image's way reads is the main path.
    way = sorted({end for edge in edges for end in edge if end in position}, key=position.get)
    skips = tuple(
        (start, end, count)
        for (start, end), count in edges.items()
        if start in way and end in way and way.index(end) > way.index(start) + 1
    )
    return Network(
        name=name,
        model_class=type(model).__name__,
        input_shape=tuple(image.shape),
        output_shape=output_shape,
        parameters=total_parameters,
        flops=total_flops,
        blocks=tuple(blocks),
        skips=skips,
        memory=Memory(
            weights=weights,
            activations=training["activations"],
            gradients=training["gradients"],
            optimizer=training["optimizer"],
            forward_peak=forward_peak,
            training_peak=training["peak"],
            training_peak_in=training["peak_in"],
        ),
        receptive_field=replace(fields, unknown_operations=tuple(sorted(unknown))),
        precision=Precision("float32"),
    )


def storage_bytes(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage that the tensors are in."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def _training_memory(
    model: ModelMixin, arguments: dict[str, Any], alive: list[torch.Tensor], blocks: Sequence[str]
) -> dict[str, Any]:
    """Bytes of a training step, by running one."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # the moments exist from the first step on
    optimizer.zero_grad(set_to_none=True)
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    moments = [x for x in moments if x.ndim]

    known = set(storage_bytes(list(model.parameters())))
    saved: dict[str, int] = {}
    trace = _Trace(model, blocks)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and tensor.device.type == "meta":
            known.add(storage._cdata)
            kept.append(storage)  # its address is its identity
            saved[trace.block] = saved.get(trace.block, 0) + storage.nbytes()
        return tensor

    kept: list[torch.UntypedStorage] = []
    was_training = model.training
    model.train()
    peaks: dict[str, int] = {}
    try:
        # Two runs, since looking at what is saved keeps it alive.
        with trace, _FusedAttention(trace), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = _main_tensor(model(**arguments))
        del output
        kept.clear()
        with _FusedAttention(trace), _LiveMemory([*alive, *moments]) as memory:
            loss = _main_tensor(model(**arguments)).float().square().mean()
            peaks["forward"] = memory.reset_peak()
            loss.backward()
            peaks["backward"] = memory.reset_peak()
            optimizer.step()
            peaks["optimizer"] = memory.reset_peak()
    finally:
        model.train(was_training)
    gradients = [p.grad for p in parameters if p.grad is not None]
    result = {
        "saved": saved,
        "activations": sum(saved.values()),
        "gradients": sum(storage_bytes(gradients).values()),
        "optimizer": sum(storage_bytes(moments).values()),
        "peak": max(peaks.values()),
        "peak_in": max(peaks, key=peaks.get),
    }
    optimizer.zero_grad(set_to_none=True)
    return result


def _receptive_field(
    model: ModelMixin, arguments: dict[str, Any], image: torch.Tensor, grid: Size, names: Sequence[str]
) -> tuple[ReceptiveField, dict[tuple[str, str], int], set[str], dict[str, Size]]:
    """Receptive field of the output and of every block, and how many tensors blocks read of each other."""
    flow, centre, blocks = _footprints(model, arguments, image, grid, names)
    edges = {edge: len(serials) for edge, serials in flow.edges.items()}
    if centre is None:
        return ReceptiveField((0, 0), (0, 0)), edges, flow.whole, blocks
    if not _touches(centre, grid):
        return ReceptiveField(centre.size, centre.size), edges, flow.whole, blocks
    # Larger images show what lies beyond, or that it grows with them.
    for factor in (4, 16):
        larger = (grid[0] * factor, grid[1] * factor)
        try:
            if image.ndim != 4:
                raise ValueError("tokens have positions of their own")
            big = image.new_zeros(*image.shape[:2], *larger)
            given = {key: big if value is image else value for key, value in arguments.items()}
            _, beyond, _ = _footprints(model, given, big, larger, ())
        except (ValueError, RuntimeError, AssertionError, IndexError):
            return ReceptiveField(None, centre.size, exact=False), edges, flow.whole, blocks
        if not _touches(beyond, larger):
            return ReceptiveField(beyond.size, centre.size), edges, flow.whole, blocks
        if (beyond.top, beyond.left, beyond.bottom, beyond.right) == (0, 0, larger[0] - 1, larger[1] - 1):
            # Convolutions alone reach the border of the image only by chance; attention always does.
            if factor > 4 or any(block_field == grid for block_field in blocks.values()):
                break
    return ReceptiveField(None, centre.size), edges, flow.whole, blocks


def _touches(rectangle: Rectangle, grid: Size) -> bool:
    return (
        rectangle.top == 0 or rectangle.left == 0 or rectangle.bottom == grid[0] - 1 or rectangle.right == grid[1] - 1
    )


def _footprints(
    model: ModelMixin, arguments: dict[str, Any], image: torch.Tensor, grid: Size, names: Sequence[str]
) -> tuple[_Flow, Rectangle | None, dict[str, Size]]:
    trace = _Trace(model, names)
    blocks: dict[str, Size] = {}
    chosen = set(names)

    def look(name: str, module: nn.Module, given: tuple, output: torch.Tensor | None) -> None:
        if output is None:
            return
        if "Norm" in type(module).__name__:
            leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            flow.take_positions(output, [leaf for leaf in leaves if leaf.shape == output.shape])
        if name in chosen:
            rectangle = flow.centre(output, _resolution(output.shape, grid))
            if rectangle is not None:
                blocks[name] = rectangle.size

    trace.on_output = look
    flow = _Flow(trace, image, grid)
    with torch.no_grad(), trace, _FusedAttention(trace), flow:
        output = _main_tensor(model(**arguments))
    return flow, flow.centre(output, _resolution(output.shape, grid)), blocks


def _list_of(block: str) -> str | None:
    """Name of the list of blocks that a block is in."""
    return next((word for word in block.split(".") if word in BLOCK_LISTS or word == "mid_block"), None)


def _kind(block: str, shape: torch.Size | None, is_before: bool, is_between: bool) -> str:
    """Kind of a block that runs before all blocks in lists, or between those on the way down and those on the way up."""
    found = _list_of(block)
    if found is not None:
        return {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}.get(found, "block")
    if shape is not None and len(shape) == 2 and is_before or re.search(r"time|temb|label|class_emb", block):
        return "embedding"
    return "mid" if is_between else "in" if is_before else "out"


def _working_shape(block: str, outputs: dict[str, torch.Size]) -> torch.Size | None:
    """Shape of the first image or sequence that a layer of the block returns."""
    for name, shape in outputs.items():
        if (name == block or name.startswith(f"{block}.")) and len(shape) in (3, 4):
            return shape
    return outputs.get(block)


def _resolution(shape: torch.Size | None, grid: Size) -> Size | None:
    if shape is None:
        return None
    if len(shape) == 4:
        return int(shape[2]), int(shape[3])
    return _token_grid(shape[1], grid) if len(shape) == 3 else None


def _token_grid(tokens: int, grid: Size) -> Size | None:
    """Height and width of the patches that so many tokens can be: the image's, divided by one factor."""
    height, width = grid
    for factor in range(1, min(grid) + 1):
        if height % factor == 0 and width % factor == 0 and height * width == tokens * factor**2:
            return height // factor, width // factor
    return None


def _attention_layers(
    model: nn.Module, trace: _Trace, calls: list[tuple[str, str, torch.Size, torch.Size]], grid: Size
) -> dict[str, list[Attention]]:
    """Attention layers of each block: those that were called, and modules that compute attention in another way."""
    modules = dict(model.named_modules())
    layers: dict[str, list[Attention]] = {}
    seen = set()
    for block, name, query, key in calls:
        seen.update(_prefixes(name))
        queries, keys = int(query[2]), int(key[2])
        declared = getattr(modules.get(name), "is_cross_attention", None)
        is_cross = queries != keys if queries > 1 else False
        kind = "pool" if queries == 1 and keys > 1 else "cross" if is_cross or declared is True else "self"
        resolution = _token_grid(queries, grid) if queries > 1 else None
        resolution = resolution or (_token_grid(keys, grid) or _token_grid(keys - 1, grid) if kind == "pool" else None)
        layers.setdefault(block, []).append(Attention(int(query[1]), int(query[3]), queries, keys, kind, resolution))
    for name, module in modules.items():
        heads = next((h for word in ("heads", "num_heads") if isinstance(h := getattr(module, word, None), int)), None)
        is_attention = heads and "attention" in type(module).__name__.lower()
        if not is_attention or name in seen or name not in trace.outputs:
            continue
        if any(inner in seen for inner in (f"{name}.{child}" for child, _ in module.named_modules() if child)):
            continue
        seen.update(_prefixes(name))
        shape = trace.outputs[name]
        tokens = int(math.prod(shape[2:]) if len(shape) == 4 else shape[1])
        channels = int(shape[1] if len(shape) == 4 else shape[-1])
        kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
        layers.setdefault(trace.block_of[name], []).append(
            Attention(heads, channels // heads, tokens, tokens, kind, _token_grid(tokens, grid))
        )
    return layers


# Precision


def _kept_in_float32(model: ModelMixin) -> tuple[str, ...]:
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return (kept,) if isinstance(kept, str) else tuple(kept)


def _cast(model: ModelMixin, dtype: torch.dtype, kept: Sequence[str]) -> None:
    """As `from_pretrained(torch_dtype=dtype)` does."""
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.is_floating_point():
            words = name.split(".")
            target = torch.float32 if any(word in words for word in kept) else dtype
            parameter.data = parameter.data.to(target)


def _precision(model: ModelMixin, dtype: str, kept: tuple[str, ...], size: int | None) -> Precision:
    not_cast = tuple(getattr(model, "_skip_layerwise_casting_patterns", None) or ())
    parameters = list(model.named_parameters())
    computed: list[str] = []
    half = torch.float16 if dtype == "float32" else _DTYPES[dtype]
    _cast(model, half, kept)
    trace = _Trace(model, ())
    try:
        arguments, _, _ = example_inputs(model, size, 1, half)
        with torch.no_grad(), trace, _FusedAttention(trace):
            model(**arguments)
        computed = [name for name, found in trace.dtypes.items() if found == torch.float32 and name]
        # The outermost names say it all.
        computed = [name for name in computed if not any(outer in computed for outer in list(_prefixes(name))[1:])]
    except (RuntimeError, ValueError):
        pass  # not every network runs in half precision
    return Precision(
        dtype=dtype,
        kept_in_float32=kept,
        kept_in_float32_parameters=sum(p.numel() for n, p in parameters if set(n.split(".")) & set(kept)),
        not_cast=not_cast,
        not_cast_parameters=sum(p.numel() for n, p in parameters if any(re.search(w, n) for w in not_cast)),
        computed_in_float32=tuple(computed),
    )


# The effective receptive field


def _measure_effective(source: Source, network: Network, grid: Size, effective: str) -> dict[str, Any]:
    if effective == "never":
        return {"effective_of": "not asked for"}
    if len(network.input_shape) != 4:
        return {"effective_of": "not measured: its input is no image"}
    if effective == "auto" and (network.parameters > EFFECTIVE_PARAMETERS or network.flops > EFFECTIVE_FLOPS):
        return {"effective_of": 'not measured: a large network (`effective` "always" does it)'}
    generator = torch.Generator().manual_seed(0)
    weights = "weights of the folder"
    if source.folder is not None and any(source.folder.glob("*.safetensors")):
        try:
            model = source.model_class.from_pretrained(source.folder, use_safetensors=True)
        except (OSError, RuntimeError, ValueError) as error:
            return {"effective_of": f"not measured: the weights do not load ({str(error).splitlines()[0][:120]})"}
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(source, "cpu")
        fill_zero_layers(model, generator)
        weights = "random weights, zero-initialised layers drawn anew"
    model = model.float().eval().requires_grad_(False)
    if network.parameters > EFFECTIVE_PARAMETERS and getattr(model, "_supports_gradient_checkpointing", False):
        model.enable_gradient_checkpointing()
    arguments, image, _ = example_inputs(model, grid[0])
    samples = int(min(max(2 * EFFECTIVE_FLOPS / max(network.flops, 1), 1), EFFECTIVE_SAMPLES))

    def run(sample: torch.Tensor) -> torch.Tensor:
        return _main_tensor(model(**{key: sample if value is image else value for key, value in arguments.items()}))

    shape = tuple(image.shape[1:])
    try:
        size, _ = effective_receptive_field(run, shape, samples, generator)
    except ValueError as error:
        return {"effective_of": f"not measured: {error}"}
    images = f"{samples} image{'s' if samples > 1 else ''} of normal noise at timestep {TIMESTEP}"
    return {"effective": round(size, 1), "effective_of": f"{weights}, {images}"}


def to_dict(anatomies: Sequence[Anatomy]) -> dict[str, Any]:
    """Everything, as JSON has it."""
    entries = []
    for anatomy in anatomies:
        totals = {"parameters": anatomy.parameters, "flops": anatomy.flops}
        entries.append({"title": anatomy.title, **totals, "networks": [asdict(n) for n in anatomy.networks]})
    return {
        "schema": "diffusers_ext.anatomy/1",
        "units": {"flops": "a multiply-add counts 2", "memory": "bytes", "receptive_field": "pixels"},
        "models": entries,
    }
