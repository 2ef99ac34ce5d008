"""What a visitor takes away: the Python that draws a column anew, and a zip of images, settings and that Python."""

import json
import platform
import re
import tempfile
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio
import torch
from catalog import Description
from comparison import ColumnState
from pictures import encoded
from plan import OWN_PIPELINES, class_ids, noise_crop, plan, seeds
from settings import LETTERS, Column, Comparison, SettingsError, to_link

import diffusers

import diffusers_ext


WIDTH = 80  # characters of a line of code, as far as its words allow

# What is recorded of a drawn column, besides its images.
RESULTS = (
    "status",
    "error",
    "labels",
    "verdicts",
    "step",
    "num_steps",
    "seconds",
    "network_evaluations",
    "classifier_evaluations",
    "images_per_second",
    "probability",
    "probability_steps",
    "guidance_norm",
    "norm_steps",
)


def code(comparison: Comparison, index: int, description: Description, device: str = "cpu") -> str:
    """Python that draws this column with the same pixels, to be run where the model's `source` is found.

    Args:
        device: where the demo draws; another one draws other last bits.

    Raises:
        SettingsError: for settings that do not fit the model.
    """
    column, way = comparison.columns[index], plan(comparison, index, description)
    classes = {"DiffusionPipeline", way.scheduler} | ({way.guider[0]} if way.guider else set())
    on_cpu = torch.device(device).type == "cpu"
    lines = ["import torch", f"from diffusers import {', '.join(sorted(classes, key=str.lower))}", ""]
    if description.wrapped:
        lines += [f"from diffusers_ext import {description.pipeline}"]
    elif description.pipeline in OWN_PIPELINES:
        lines += ["import diffusers_ext  # from here on, diffusers knows its classes"]
    if lines[-1]:
        lines += [""]
    if on_cpu:
        lines += ["torch.set_num_threads(1)  # on several, sums have other last bits"]
    lines += _call("pipe = DiffusionPipeline.from_pretrained", _loading(column, description))
    if description.wrapped:
        lines += [f"pipe = {description.pipeline}.from_pipe(pipe)  # takes every scheduler, and guidance"]
    if not on_cpu:
        lines += [f"pipe.to({_literal(device)})"]
    options = [f"{name}={_literal(value)}" for name, value in way.scheduler_options.items()]
    lines += _call(f"pipe.scheduler = {way.scheduler}.from_config", ["pipe.scheduler.config", *options])
    if way.guider is not None:
        name, options = way.guider
        lines += _call(f"pipe.guider = {name}", [f"{key}={_literal(value)}" for key, value in options.items()])
    lines += ["", "# One source of noise per image, so that none depends on the others."]
    first, last = seeds(comparison)[0], seeds(comparison)[-1]
    lines += [f"generators = [torch.Generator().manual_seed(seed) for seed in range({first}, {last + 1})]"]
    lines += _noise(comparison, description)
    lines += ["images = pipe("]
    for name, value in way.call.items():
        if name == "class_labels":
            names = _names(comparison, description)
            lines += textwrap.wrap(names, WIDTH, initial_indent="    # ", subsequent_indent="    # ")
        lines += [f"    {name}={_literal(value)},"]
    if noise_crop(comparison, description) is not None:
        lines += ["    sample=noise,"]
    lines += ["    generator=generators,", ").images"]
    lines += ["for i, image in enumerate(images):"]
    lines += [f'    image.save(f"{LETTERS[index]}-{_file_name(column.model)}-{{i}}.png")']
    return "\n".join(lines) + "\n"


def archive(
    comparison: Comparison,
    states: Sequence[ColumnState],
    descriptions: Sequence[Description | None],
    folder: Path,
    device: str = "cpu",
) -> Path:
    """A zip in `folder` with the images of every column, `settings.json` and the Python of every column.

    Args:
        states: of the finished columns.
        descriptions: of their models; None for one that could not be found.
        folder: made where it is missing.
        device: where the demo draws.
    """
    settings, entries, contents = comparison.to_json(), [], {}
    for i, (column, state, description) in enumerate(zip(comparison.columns, states, descriptions, strict=True)):
        letter, files = LETTERS[i], []
        for j, image in enumerate(state.images):
            label = state.labels[j] if state.labels and state.labels[j] is not None else "any"
            files.append(f"{letter}-{_file_name(column.model)}/{j}-{_file_name(label)}.png")
            contents[files[-1]] = encoded(image)
        entry: dict[str, Any] = {"column": letter, "images": files}
        if description is not None:
            entry |= {"source": description.source, "pipeline": description.pipeline}
            try:
                settings["columns"][i]["scheduler"] = plan(comparison, i, description).scheduler
                contents[f"{letter}.py"] = code(comparison, i, description, device)
            except SettingsError:
                pass  # the column has failed, and its `error` says why
        entries.append(entry | {name: getattr(state, name) for name in RESULTS})
    record = {
        "settings": settings,
        "link": to_link(comparison),
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "diffusers_ext": diffusers_ext.__version__,
            "gradio": gradio.__version__,
        },
        "columns": entries,
    }
    contents["settings.json"] = json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    folder.mkdir(parents=True, exist_ok=True)
    # Nobody sees the name that the app serves before the file is whole.
    with tempfile.NamedTemporaryFile(dir=folder, prefix="comparison-", suffix=".part", delete=False) as file:
        part = Path(file.name)
        try:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
                for name, content in contents.items():
                    zipped.writestr(name, content)
        except BaseException:
            part.unlink()
            raise
    return part.replace(part.with_suffix(".zip"))


def _loading(column: Column, description: Description) -> list[str]:
    arguments = [_literal(description.source)]
    if column.dtype != "float32":
        arguments.append(f"dtype=torch.{column.dtype}")
    if not description.source.startswith("model_cards/"):
        arguments.append("use_safetensors=True")
    return arguments


def _noise(comparison: Comparison, description: Description) -> list[str]:
    crop = noise_crop(comparison, description)
    if crop is None:
        return []
    height, width, rows, columns = crop
    shape = f"1, {description.channels}, {height}, {width}"
    return [
        f"# The middle of noise of {height} x {width} pixels, from which larger models start.",
        f"noise = [torch.randn({shape}, generator=generator) for generator in generators]",
        f"noise = torch.cat(noise)[:, :, {rows.start}:{rows.stop}, {columns.start}:{columns.stop}]",
    ]


def _call(function: str, arguments: list[str]) -> list[str]:
    """Lines of a call, with its arguments on one of their own where all would be too wide to read."""
    line = f"{function}({', '.join(arguments)})"
    return [line] if len(line) <= WIDTH else [f"{function}(", f"    {', '.join(arguments)}", ")"]


def _literal(value: object) -> str:
    """`repr`, with double quotes where that takes no escapes."""
    text = repr(value)
    return f'"{text[1:-1]}"' if text.startswith("'") and '"' not in text else text


def _names(comparison: Comparison, description: Description) -> str:
    """Names of the classes for a comment: on one line, whatever the model's config holds."""
    ids = class_ids(comparison, description) or []
    return ", ".join(ascii(description.labels[class_id])[1:-1] for class_id in ids)


def _file_name(text: str) -> str:
    """A part of a path that every system takes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:40] or "x"
