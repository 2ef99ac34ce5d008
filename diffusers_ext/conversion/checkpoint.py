"""Reading and writing files of weights without ever executing what is in them."""

import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")

# What is before every key of a model inside DistributedDataParallel, `torch.compile` or a training module.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
_REMEDIES = {
    "a safetensors file": "Rename it to `.safetensors`.",
    "a torch file": "Rename it to `.pt`.",
    "a web page": "Download the file itself.",
    "a Git LFS pointer": "Fetch the file itself with `git lfs pull`.",
    "a TorchScript program": "It could run code: ask for its state dict.",
}

# Where training scripts put the weights and their moving average: the lists of ddim, and the mappings of DiT.
_WEIGHTS_AND_AVERAGES = (("[0]", "[4]"), ("['model']", "['ema']"))

StateDict = dict[str, torch.Tensor]


def read_checkpoint(path: str | os.PathLike, ema: bool = True) -> StateDict:
    """State dict of a file, on the CPU, and mapped into memory where the format allows.

    Args:
        path: a `.safetensors` file, or one that `torch.save` wrote (`.pt`, `.pth`, `.ckpt`, `.bin`).
        ema: as for [`unwrap_state_dict`].

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is not what its name says, is damaged, or holds objects other than tensors and plain
            containers, which are never executed; and as [`unwrap_state_dict`].
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`source` ({path}) is not a file.")
    _check_suffix(path, "source")
    named = "a safetensors file" if path.suffix == ".safetensors" else "a torch file"
    found = _detect_format(path)
    if found != named:
        remedy = _REMEDIES.get(found, "Download it again.")
        raise ValueError(f"`source` ({path}) is named like {named}, but is {found}. {remedy}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # Not chained: torch's text proposes to execute what is in the file.
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"`source` ({path}) holds {f'a pickled `{name[1]}`' if name else 'pickled objects'}, not tensors alone. "
            "That could run code, so nothing was loaded. Ask for a file of `torch.save(model.state_dict(), path)`."
        ) from None
    except Exception as error:  # damaged bytes fail anywhere inside the readers
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"`source` ({path}) is truncated or damaged: {reason}. Download it again.") from None
    return unwrap_state_dict(content, f"`source` ({path})", ema)


def unwrap_state_dict(content: Any, name: str, ema: bool = True) -> StateDict:
    """The one state dict in the content of a checkpoint, without prefixes of wrapping modules.

    One-byte floats become float32, which is exact.

    Args:
        content: nested containers; the state dict is the only mapping in them that holds tensors and nothing else,
            those of optimizers aside. The training checkpoints of ddim, a list of the model, the optimizer, the epoch,
            the step and the moving average, and of DiT, a mapping with `model` and `ema`, hold two.
        name: how an error names `content`.
        ema: of these two, take the moving average, which the originals sample with.

    Raises:
        ValueError: when there is no state dict, or more than one.
    """
    found = dict(_state_dicts(content))
    if tuple(found) in _WEIGHTS_AND_AVERAGES:
        place = tuple(found)[ema]
        found = {place: found[place]}
    if len(found) != 1:
        what = f"{len(found)} state dicts, at {', '.join(found)}" if found else "no mapping of names to tensors alone"
        raise ValueError(
            f"{name} holds {what}. Pass the state dict itself: `torch.load(path, weights_only=True)[...]`."
        )
    state_dict = next(iter(found.values()))
    while prefix := next((p for p in _WRAPPER_PREFIXES if all(key.startswith(p) for key in state_dict)), None):
        state_dict = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}
    return {
        key: tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor
        for key, tensor in state_dict.items()
    }


def write_checkpoint(state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Write a state dict to `path`, as safetensors or as a torch file by its suffix; whole or not at all."""
    path = Path(path)
    _check_suffix(path, "path")
    if any(tensor.is_meta for tensor in state_dict.values()):
        raise ValueError(f"`path` ({path}) cannot be written: the model is on the meta device and has no weights.")
    state_dict = {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        temporary = Path(folder) / path.name
        if path.suffix == ".safetensors":
            save_file(state_dict, temporary, metadata={"format": "pt"})
        else:
            torch.save(state_dict, temporary)
        os.replace(temporary, path)


def _check_suffix(path: Path, argument: str) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"`{argument}` ({path}) must end in one of {', '.join(SUFFIXES)}.")


def _detect_format(path: Path) -> str:
    """What the content of a file is, whatever its name says."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "empty"
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):  # which reads the table of contents at its end
            return "a truncated zip archive"
        with zipfile.ZipFile(path) as archive:
            names = {Path(name).name for name in archive.namelist()}
        if "constants.pkl" in names:
            return "a TorchScript program"
        return "a torch file" if "data.pkl" in names else "a zip archive that torch did not write"
    if head[7:9] == b"\x00{":  # the length of a JSON header in 8 bytes, then the header
        return "a safetensors file"
    if head.startswith(b"\x80"):  # a pickle, what torch wrote before version 1.6
        return "a torch file"
    if head.lstrip().startswith(b"<"):
        return "a web page"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    return "in no known format"


def _state_dicts(content: Any, name: str = "") -> Iterator[tuple[str, StateDict]]:
    """Every mapping from names to tensors in nested containers, and where it is."""
    if isinstance(content, Mapping) and "param_groups" not in content:  # which an optimizer has
        if content and all(isinstance(key, str) and torch.is_tensor(value) for key, value in content.items()):
            yield name, dict(content)
            return
        for key, value in content.items():
            yield from _state_dicts(value, f"{name}[{key!r}]")
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            yield from _state_dicts(value, f"{name}[{index}]")
