"""What a folder holds: a pipeline, a modular pipeline, a network, an adapter, and the weights of its parts."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


DENOISERS = ("unet", "transformer")
_FIRST = (*DENOISERS, "classifier", "guide_model", "vae")
LORA_FILE = "pytorch_lora_weights.safetensors"
# diffusion_pytorch_model.fp16-00001-of-00002.safetensors: stem, variant, shard
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
_ENDS = 1 << 16  # bytes of the data of a file that its digest takes in, at each end
# Numbers of a config that the card counts with.
_NUMBERS = ("in_channels", "low_res_channels", "num_train_timesteps")
_NUMBERS += ("num_classes", "num_class_embeds", "num_embeds_ada_norm")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}


@dataclass(frozen=True)
class Weights:
    """Weights of a network as stored: number, bytes, the dtype of most of them, and what tells them from others; the
    digest is None for those that are not here."""

    parameters: int
    size: int
    dtype: str
    digest: str | None = None


@dataclass(frozen=True)
class Part:
    """One component of a pipeline, or a network by itself.

    Args:
        name: of the component; of a network by itself "unet", "transformer", "classifier", "vae" or "model".
        class_name: of its class.
        config: what its config.json says; empty where there is none.
        weights: by variant, "" for those without one.
        has_code: whether the code of the class lies beside its weights.
    """

    name: str
    class_name: str
    config: dict[str, Any] = field(repr=False)
    weights: dict[str, Weights]
    has_code: bool = False

    @property
    def stored(self) -> Weights:
        """The weights that are loaded where no variant is asked for, or the first variant."""
        return self.weights.get("") or next(iter(self.weights.values()))


@dataclass(frozen=True)
class Contents:
    """A folder of a model.

    Args:
        folder: itself.
        kind: "pipeline", "modular", "model", "component" (a run folder with one network and no pipeline) or "lora".
        class_name: of the pipeline, of the network, or of the adapter's network, as far as it is known.
        index: what its main JSON file says.
        parts: components that the folder holds, schedulers and tokenizers included.
        self_contained: whether it carries its code.
    """

    folder: Path
    kind: str
    class_name: str
    index: dict[str, Any] = field(repr=False)
    parts: dict[str, Part]
    self_contained: bool = False

    @cached_property
    def networks(self) -> dict[str, Part]:
        """Parts with weights."""
        return {name: part for name, part in self.parts.items() if part.weights}

    @cached_property
    def digest(self) -> str | None:
        """Tells the weights from others; None where there are none, or not all of them are here."""
        digests = [(name, part.stored.digest) for name, part in sorted(self.networks.items())]
        if not digests or any(digest is None for _, digest in digests):
            return None
        return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]

    def with_weights(self, others: Mapping[str, Mapping[str, Weights]]) -> "Contents":
        """The same with weights that lie elsewhere.

        Args:
            others: by component, "" for a network by itself, and variant.
        """
        of = {"": next(iter(self.parts))} if self.kind == "model" else {}
        others = {of.get(name, name): weights for name, weights in others.items()}
        parts = {name: replace(part, weights={**others.get(name, {}), **part.weights})
                 for name, part in self.parts.items()}  # fmt: skip
        return replace(self, parts=parts)

    @property
    def denoiser(self) -> Part | None:
        """The part that removes noise."""
        return next((self.parts[name] for name in DENOISERS if name in self.parts), None)

    @property
    def reads_text(self) -> bool:
        return "text_encoder" in self.parts

    @property
    def variant(self) -> str | None:
        """The one to ask for, where a network is not there without it."""
        named = [set(part.weights) for part in self.networks.values() if "" not in part.weights]
        common = set.intersection(*named) if named else set()
        return min(common) if common else None


def read_folder(folder: Path) -> Contents:
    """Look at a folder; weights are not loaded.

    Raises:
        ValueError: when it is none, or holds nothing that a card can be about, or files that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(
            f"`folder` ({str(folder)!r}) must be the folder of a model; there is none. Fetch a repository with "
            "`diffusers-ext pull`."
        )
    for name, kind in (("model_index.json", "pipeline"), ("modular_model_index.json", "modular")):
        if (folder / name).is_file():
            return _read_pipeline(folder, kind, _read_json(folder / name))
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        if "_class_name" in config:
            part = _read_part(folder, "model", config["_class_name"])
            part = replace(part, name=_natural_name(part))
            return Contents(folder, "model", part.class_name, config, {part.name: part}, "auto_map" in config)
    if (folder / LORA_FILE).is_file():
        adapter = _read_adapter(folder / LORA_FILE)
        return Contents(folder, "lora", adapter["network"], adapter, {})
    for name in (*DENOISERS, "classifier"):  # a run folder of one network
        if (folder / name / "config.json").is_file():
            part = _read_part(folder / name, name)
            return Contents(folder, "component", part.class_name, part.config, {name: part})
    raise ValueError(
        f"`folder` ({str(folder)!r}) holds no model: neither model_index.json, modular_model_index.json, the "
        f"config.json of a network, nor {LORA_FILE}."
    )


def _read_pipeline(folder: Path, kind: str, index: dict[str, Any]) -> Contents:
    named = index.get("_class_name" if kind == "pipeline" else "_blocks_class_name") or index.get("_class_name")
    parts = {}
    for name in sorted(index, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)):
        entry = index[name]
        if name.startswith("_") or not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[1], str):
            continue
        if (folder / name).is_dir():
            has_code = isinstance(entry[0], str) and (folder / name / f"{entry[0]}.py").is_file()
            parts[name] = replace(_read_part(folder / name, name, entry[1]), has_code=has_code)
    code = isinstance(named, list) or "auto_map" in index or any(part.has_code for part in parts.values())
    class_name = _identifier(named[-1] if isinstance(named, list) and named else named, folder)
    return Contents(folder, kind, class_name, index, parts, code)


def _read_part(folder: Path, name: str, class_name: Any = None) -> Part:
    files = ("config.json", "scheduler_config.json")
    config = next((_read_json(folder / file) for file in files if (folder / file).is_file()), {})
    for word in _NUMBERS:
        if word in config and type(config[word]) not in (int, type(None)):
            raise ValueError(f"`folder`: `{word}` in the config of {folder} is {config[word]!r}; it must be a number.")
    class_name = class_name or config.get("_class_name")
    if class_name is None:  # a network of transformers by itself
        class_name = next(iter(config.get("architectures") or ()), None)
    return Part(_identifier(name, folder), _identifier(class_name, folder), config, read_weights(folder))


def _identifier(name: Any, folder: Path) -> str:
    """A name of a class or component, which goes into the snippet of the card.

    Raises:
        ValueError: when it is none.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`folder`: {folder} names {name!r} where the name of a class or component must stand.")
    return name


def read_weights(folder: Path) -> dict[str, Weights]:
    """Weights of a network by variant, from the headers of its safetensors files.

    Raises:
        ValueError: for a file that is none.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = _WEIGHTS.fullmatch(path.name)
        if found:
            files.setdefault(found[1] or "", []).append(path)
    weights = {}
    for variant, paths in files.items():
        tensors = [tensor for path in paths for tensor in _tensors(path).values()]
        weights[variant] = sum_up(tensors, sum(path.stat().st_size for path in paths), _digest(paths))
    return weights


def sum_up(tensors: Iterable[tuple[list[int], str]], size: int, digest: str | None = None) -> Weights:
    """Weights of these shapes and dtypes, the dtypes as safetensors calls them."""
    counts: dict[str, int] = {}
    for shape, dtype in tensors:
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    dtype = max(counts, key=counts.get, default="F32")
    return Weights(sum(counts.values()), size, _DTYPES.get(dtype, dtype.lower()), digest)


def _digest(paths: list[Path]) -> str:
    """Of the headers and of both ends of the data: cheap, and other weights differ there."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(file.read(int.from_bytes(file.read(8), "little") + _ENDS))
            file.seek(max(file.tell(), path.stat().st_size - _ENDS))
            digest.update(file.read())
    return digest.hexdigest()


def _tensors(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor, from the header of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: (piece.get_shape(), piece.get_dtype()) for key, piece in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`folder`: {path} is no safetensors file ({error}).") from error


def _natural_name(part: Part) -> str:
    """What a pipeline calls such a network."""
    for word, name in (("Classifier", "classifier"), ("Transformer", "transformer"), ("Autoencoder", "vae")):
        if word in part.class_name:
            return name
    return "unet" if "UNet" in part.class_name or "Denoiser" in part.class_name else "model"


def _read_adapter(path: Path) -> dict[str, Any]:
    """What the file of an adapter tells: the network it is for, the prefix of its names, ranks, layers, parameters."""
    shapes = {key: shape for key, (shape, _) in _tensors(path).items()}
    down = {key: shape for key, shape in shapes.items() if ".lora_A." in key or ".lora.down." in key}
    prefixes = {key.partition(".")[0] for key in shapes} & {*DENOISERS, "classifier"}
    prefix = min(prefixes) if len(prefixes) == 1 else None
    transformer = any(key.startswith("transformer_blocks.") for key in down)
    return {
        "network": prefix or ("transformer" if transformer else "unet"),
        "prefix": prefix,
        "ranks": sorted({shape[0] for shape in down.values()}),
        "layers": len(down),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
    }


def _read_json(path: Path) -> dict[str, Any]:
    from diffusers_ext.hub.safety import parse_json  # `hub` imports this package

    content = parse_json(path, f"`folder`: {path}")
    if not isinstance(content, dict):
        raise ValueError(f"`folder`: {path} must hold an object.")
    return content
