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

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from diffusers_ext.inspection.anatomy import (
    Anatomy,
    Attention,
    Block,
    Memory,
    Network,
    Precision,
    ReceptiveField,
    to_dict,
)
from diffusers_ext.inspection.inputs import MAX_SIZE
from diffusers_ext.inspection.passes import DTYPES, inspect_source
from diffusers_ext.inspection.report import FORMATS, render
from diffusers_ext.inspection.sources import Source, find_sources, split


__all__ = [
    "Anatomy",
    "Attention",
    "Block",
    "Memory",
    "Network",
    "Precision",
    "ReceptiveField",
    "Source",
    "find_sources",
    "inspect_models",
    "inspect_source",
    "to_dict",
]


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
    models = [models] if isinstance(models, str) else list(models)
    suffix = Path(output).suffix[1:].lower() if output else ""
    format = format or {"svg": "svg", "html": "html", "htm": "html", "json": "json"}.get(suffix, "table")
    for name, value, valid in (
        ("format", format, FORMATS),
        ("effective", effective, ("auto", "always", "never")),
        ("dtype", dtype or "float32", tuple(DTYPES)),
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
    return "+".join(Path(part).resolve().name if os.path.exists(part) else part for part in split(model))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as temporary:
        file = Path(temporary) / path.name
        file.write_text(text, encoding="utf-8")
        os.replace(file, path)
