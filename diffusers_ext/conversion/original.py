"""Original checkpoint <-> model of this package, in memory and in files."""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from diffusers import ModelMixin

from diffusers_ext.conversion import ddim, dit, guided_diffusion, mnist_dilated
from diffusers_ext.conversion.checkpoint import SUFFIXES, read_checkpoint, unwrap_state_dict, write_checkpoint
from diffusers_ext.conversion.presets import Preset
from diffusers_ext.conversion.rules import check_layout, to_original, to_ours


StateDict = dict[str, torch.Tensor]

# The module of each architecture's family. It has `CODEBASES`, `PRESETS`, `REMEMBERED_FLAGS`, `complete_flags`,
# `to_config`, `to_flags`, `build_rules` and `to_scheduler_config`.
_MODULES = (guided_diffusion, ddim, dit, mnist_dilated)
_FAMILIES = {architecture: module for module in _MODULES for architecture in module.CODEBASES}

architectures = tuple(_FAMILIES)
presets: dict[str, Preset] = {name: preset for module in _MODULES for name, preset in module.PRESETS.items()}


def load_original(
    source: str | os.PathLike | Mapping[str, torch.Tensor],
    architecture: str,
    *,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> ModelMixin:
    """Load a checkpoint of an original codebase into our model for it.

    Args:
        source: a `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors` file, of which nothing is executed; or a state dict,
            whose tensors are copied and may be on the meta device. A state dict inside a training checkpoint is found
            if it is the only one, and so is the moving average in those of ddim (of its weights if the flag `ema` is
            False) and DiT.
        architecture: one of `architectures`: codebase and network.
        preset: name of the released checkpoint that `source` is, one of `presets`.
        config: instead of `preset`, the original's flags under the original's names. `"builder"` among them names the
            class or function that takes them, and can be left out where they are those of a whole run.

    Returns:
        The model in evaluation mode, in the dtype and on the device of the weights.

    Raises:
        FileNotFoundError: when `source` is no file.
        ValueError: for an unknown name or flag, for a file that is not a checkpoint, and for a checkpoint that does
            not fit: the error lists every key that is missing, unknown, or of another shape, and the architecture
            and released checkpoint that it resembles.
    """
    flags = complete_flags(architecture, preset, config)
    family = _FAMILIES[architecture]
    model = empty_model(architecture, flags)
    rules = family.build_rules(architecture, flags, model)
    ema = flags.get("ema", True)
    if isinstance(source, (str, os.PathLike)):
        name = f"`source` ({source})"
        state_dict = read_checkpoint(source, ema)
    else:
        name = "`source`"
        state_dict = {key: tensor.clone() for key, tensor in unwrap_state_dict(source, name, ema).items()}
    described = f"preset {preset!r}" if preset else "`config`"
    problem = f"{name} does not fit {architecture!r} with {described}"
    try:
        check_layout(state_dict, to_original(model.state_dict(), rules), problem)
    except ValueError as error:
        raise ValueError(f"{error}{_resemblance(state_dict, architecture)}") from None
    model.load_state_dict(to_ours(state_dict, rules), strict=True, assign=True)
    remembered = {f"_original_{name}": flags[name] for name in family.REMEMBERED_FLAGS}
    model.register_to_config(_original_architecture=architecture, **remembered)
    return model.eval()


def save_original(
    model: ModelMixin,
    path: str | os.PathLike,
    architecture: str | None = None,
    *,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that an original codebase reads, the inverse of [`load_original`].

    Args:
        model: a model of this package.
        path: file to write, torch or safetensors by its suffix. It is written as a whole or not at all.
        architecture: whose file to write. By default where the model came from, and for a model that was not converted
            the first of `architectures` that its class has.
        preset: released checkpoint that has the network of `model`.
        config: instead of `preset`, flags that the original will be built with. By default the flags are derived.

    Returns:
        The flags to build the original with. With `builder` removed they are its arguments.

    Raises:
        ValueError: when the original has no flags for this model, or the given ones describe another.
    """
    state_dict, flags = original_state_dict(model, architecture, preset=preset, config=config)
    write_checkpoint(state_dict, path)
    return flags


def original_state_dict(
    model: ModelMixin,
    architecture: str | None = None,
    *,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[StateDict, dict[str, Any]]:
    """What [`save_original`] writes, and the flags that it returns; arguments and errors are the same."""
    architecture = architecture or model.config.get("_original_architecture") or _default_architecture(type(model))
    family = _family(architecture)
    model_class = family.CODEBASES[architecture].model_class
    if not isinstance(model, model_class):
        raise ValueError(f"`model` is a {type(model).__name__}, but {architecture!r} is a {model_class.__name__}.")
    if preset is None and config is None:
        config = family.to_flags(architecture, model)
    flags = complete_flags(architecture, preset, config)
    empty = empty_model(architecture, flags)
    differences = [
        f"{name}={model.config[name]!r} instead of {value!r}"
        for name, value in empty.config.items()
        if not name.startswith("_") and _plain(value) != _plain(model.config[name])
    ]
    if differences:
        raise ValueError(
            f"`model` is not what {architecture!r} builds with its flags: it has {', '.join(differences)}."
        )
    check_layout(
        model.state_dict(),
        empty.state_dict(),
        "`model` has other weights than its config says (unload adapters and unfuse projections first)",
    )
    state_dict = to_original(model.state_dict(), family.build_rules(architecture, flags, model))
    return state_dict, dict(config if preset is None else presets[preset].flags)


def from_single_file(
    cls: type[ModelMixin],
    path_or_url: str | os.PathLike,
    *,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    torch_dtype: torch.dtype | None = None,
) -> ModelMixin:
    """`cls.from_single_file` of our models: [`load_original`] for one class, from a file or a link.

    Args:
        cls: class to load.
        path_or_url: a checkpoint file, or an http(s) link to one. Downloads are cached, in huggingface_hub's cache if
            they come from there, else in `torch.hub.get_dir()`.
        preset: name of the released checkpoint. By default the name of the file, if it is one.
        config: instead of `preset`, the original's flags, see [`load_original`].
        architecture: which codebase `config` is of, by default the first of `architectures` that `cls` has.
        torch_dtype: dtype to convert the weights to.

    Raises:
        ValueError: as [`load_original`], and when the checkpoint is not one of `cls`.
    """
    stem = Path(str(path_or_url).partition("?")[0]).stem
    if preset is None and config is None:
        if stem not in presets:
            raise ValueError(
                f"`path_or_url` ({path_or_url}) is not named like a released checkpoint: give `preset`, one of "
                f"{', '.join(presets)}, or `config`, the original's flags."
            )
        preset = stem
    if architecture is None:
        architecture = presets[preset].architecture if preset in presets else _default_architecture(cls)
    path = _download(str(path_or_url)) if re.match(r"https?://", str(path_or_url)) else path_or_url
    model = load_original(path, architecture, preset=preset, config=config)
    if not isinstance(model, cls):
        raise ValueError(f"`path_or_url` ({path_or_url}) is a {type(model).__name__}, not a {cls.__name__}.")
    return model if torch_dtype is None else model.to(torch_dtype)


def complete_flags(architecture: str, preset: str | None, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """All flags of a released checkpoint, or of the user's flags, defaults included."""
    family = _family(architecture)
    if (preset is None) == (config is None):
        raise ValueError("Give either `preset`, a released checkpoint's name, or `config`, the original's flags.")
    if preset is not None:
        names = [name for name in presets if presets[name].architecture == architecture]
        if preset not in names:
            raise ValueError(f"`preset` ({preset!r}) is not one of {architecture!r}. Valid: {', '.join(names)}.")
        config = presets[preset].flags
    return family.complete_flags(architecture, config)


def to_scheduler_config(architecture: str, flags: Mapping[str, Any], model: ModelMixin) -> dict[str, Any]:
    """Config of the `DDPMScheduler` that is the process of complete flags, unrespaced.

    Raises:
        ValueError: when `DDPMScheduler` has no such process.
    """
    return _family(architecture).to_scheduler_config(architecture, flags, model)


def _resemblance(state_dict: StateDict, architecture: str) -> str:
    """A sentence on what weights that do not fit `architecture` look like; empty where nothing is more like them."""
    kinds = _kinds({key: tensor.shape for key, tensor in state_dict.items()})
    likeness = {}
    for candidate in architectures:
        expected = _kinds(_layout(next(name for name in presets if presets[name].architecture == candidate)))
        likeness[candidate] = len(kinds & expected) / len(kinds | expected)
    best = max(likeness, key=likeness.get)
    if likeness[best] < 0.5:
        return ""
    layout = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    for candidate in sorted(likeness, key=likeness.get, reverse=True):
        if likeness[candidate] > 0.75 * likeness[best]:
            names = [name for name in presets if presets[name].architecture == candidate and _layout(name) == layout]
            if names:
                return f"\nIt looks like a `{candidate}` checkpoint ({' or '.join(names)})."
    return f"\nIt looks like a `{best}` checkpoint." if likeness[best] > likeness[architecture] else ""


def _kinds(layout: Mapping[str, tuple[int, ...]]) -> set[tuple[str, int]]:
    """What tells architectures apart, and is the same in every size: names without numbers, numbers of dimensions."""
    return {(re.sub(r"\d+", "#", key), len(shape)) for key, shape in layout.items()}


@functools.cache
def _layout(preset: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a released checkpoint."""
    architecture = presets[preset].architecture
    flags = complete_flags(architecture, preset, None)
    model = empty_model(architecture, flags)
    rules = _family(architecture).build_rules(architecture, flags, model)
    return {key: tuple(tensor.shape) for key, tensor in to_original(model.state_dict(), rules).items()}


def _family(architecture: str) -> ModuleType:
    if architecture not in _FAMILIES:
        raise ValueError(f"`architecture` ({architecture!r}) is unknown. Valid: {', '.join(architectures)}.")
    return _FAMILIES[architecture]


def _default_architecture(model_class: type[ModelMixin]) -> str:
    """The first architecture that a class of models has."""
    for architecture, family in _FAMILIES.items():
        if issubclass(model_class, family.CODEBASES[architecture].model_class):
            return architecture
    raise ValueError(f"`model` is a {model_class.__name__}, which no original codebase has.")


def empty_model(architecture: str, flags: Mapping[str, Any]) -> ModelMixin:
    model_class, model_config = _family(architecture).to_config(architecture, flags)
    with torch.device("meta"):
        return model_class(**model_config)


def _plain(value: Any) -> Any:
    """JSON turns tuples into lists."""
    return list(value) if isinstance(value, tuple) else value


def _download(url: str) -> str:
    """Local path of a downloaded file."""
    hub = re.match(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+)", url)
    if hub:
        repository, revision, name = hub.groups()
        return hf_hub_download(repository, name, revision=revision)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url.partition("?")[0]).name
    if path.suffix not in SUFFIXES:
        raise ValueError(f"`path_or_url` ({url}) must end in one of {', '.join(SUFFIXES)}.")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    return str(path)
