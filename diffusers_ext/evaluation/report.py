"""Reports of an evaluation: JSON, a table, plots, and results in a model card."""

import json
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from diffusers_ext.cards.blocks import limits
from diffusers_ext.cards.card import ORDER, without_results
from diffusers_ext.cards.document import (
    append,
    as_it_was,
    block,
    dated,
    get_block,
    join,
    parse_metadata,
    plain,
    set_block,
    set_metadata,
    split,
    undated,
)
from diffusers_ext.cards.folder import read_folder
from diffusers_ext.evaluation.samples import Samples
from diffusers_ext.evaluation.sweep import point_name, value_name
from diffusers_ext.files import write_atomically
from diffusers_ext.training.data import Batch


BLOCK = "evaluation"  # of a card
# Kinds of metrics, as the metadata of model cards name them, by the beginning of the name.
METRIC_TYPES = {
    "FID": "fid",
    "KID": "kid",
    "FD": "frechet_distance",
    "KD": "kernel_distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "pairwise-distance": "pairwise_distance",
    "accuracy": "accuracy",
    "CLIP-score": "clip_score",
    "bits-per-dim": "bits_per_dim",
}
# Those that go into the metadata of a card; its table has all.
HEADLINES = (
    "fid",
    "kid",
    "frechet_distance",
    "kernel_distance",
    "precision",
    "recall",
    "accuracy",
    "clip_score",
    "bits_per_dim",
)
GAP = 4  # pixels between two pictures


def write_tables(result: dict[str, Any], folder: Path) -> None:
    """Write `evaluation.json` and `evaluation.md`.

    Args:
        result: as [`evaluate`] returns it, with any number of points.
        folder: is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    write_atomically(folder / "evaluation.md", f"# Evaluation of {result['model']}\n\n{table(result)}\n")


def draw_plots(result: dict[str, Any], folder: Path) -> None:
    """Draw `precision_recall.png` and, of a sweep, `sweep.png`, as far as they were measured."""
    points = [(point["swept"], _by_kind(point["metrics"])) for point in result["points"]]
    if points and {"precision", "recall"} <= points[0][1].keys():
        _save(_precision_recall(result, points), folder / "precision_recall.png")
    if len(points) > 1:
        _save(_sweep(result, points), folder / "sweep.png")


def table(result: dict[str, Any]) -> str:
    """Markdown: a row per point, a column per metric with its 95% interval, and what is needed to read it."""
    parts = []
    if result["points"]:
        settings = list(dict.fromkeys(name for point in result["points"] for name in point["settings"]))
        names = list(dict.fromkeys(metric["name"] for point in result["points"] for metric in point["metrics"]))
        rows = [[*(name.replace("_", " ") for name in settings), "samples", *names]]
        rows.append(["---"] * len(rows[0]))
        for point in result["points"]:
            metrics = {metric["name"]: metric for metric in point["metrics"]}
            cells = [value_name(point["settings"].get(name, "–")) for name in settings]
            figures = [_figure(metrics[name]) if name in metrics else "–" for name in names]
            rows.append([*cells, f"{point['num_samples']:,}", *figures])
        parts += ["\n".join("| " + " | ".join(row) + " |" for row in rows)]
    for metric in result["model_metrics"]:
        count, steps = metric["num_samples"], metric["details"].get("num_steps")
        name = _title(metric["name"], result["model_settings"])
        parts.append(f"{name}: {_figure(metric)}, {count:,} images of {metric['reference']}, {steps} timesteps.")
    if result["noise_levels"] is not None:
        from diffusers_ext.evaluation.noise_levels import NoiseLevelReport

        report = NoiseLevelReport.from_dict(result["noise_levels"])
        about = (
            f"Accuracy of the classifier by noise level: {report.num_images:,} images of {_reference(result)} at each."
        )
        parts += [about, report.table()]
    parts.append(_about(result))
    return "\n\n".join(parts)


def compare_images(samples: Samples, reference: Batch, path: Path, rows: int = 8) -> None:
    """Picture: samples on the left, references on the right, of the same classes where both have labels."""
    count = min(rows * rows, len(samples))
    images, labels = reference.images, reference.labels
    if samples.labels is None or labels is None:
        chosen = list(range(min(count, len(images))))
    else:
        left = {int(label): (labels == label).nonzero().flatten().tolist() for label in labels.unique()}
        chosen = [left[label].pop(0) for label in samples.labels[:count].tolist() if left.get(label)]
    columns = int(np.ceil(count**0.5))
    both = [_grid(samples.images[:count], columns), _grid(images[chosen].numpy(), columns)]
    height = max(half.shape[0] for half in both)
    gap = np.full((height, 2 * GAP, both[0].shape[2]), 255, dtype=np.uint8)
    both = [np.pad(half, ((0, height - half.shape[0]), (0, 0), (0, 0)), constant_values=255) for half in both]
    _save_image(np.concatenate([both[0], gap, both[1]], axis=1), path)


def compare_points(rows: Sequence[np.ndarray], path: Path) -> None:
    """Picture: the first samples `(n, C, H, W)` of every point of a sweep, a row each."""
    length = min(len(row) for row in rows)
    _save_image(_grid(np.concatenate([row[:length] for row in rows]), length), path)


def write_results_to_card(path: Path, result: dict[str, Any]) -> None:
    """Put the results of an evaluation into a model card: `model-index` in its metadata, and a table in its text.

    Text and other metadata stay as they are. A result of the same metric, data and settings is replaced, and so are
    all of other weights than the folder of the card holds now. The table stands between two comments, which are
    appended where they are missing.

    Args:
        path: README.md of a model, or a folder with one; it is created where it is missing.
        result: as [`evaluate`] returns it.

    Raises:
        ValueError: when the card's metadata cannot be read.
    """
    path = path / "README.md" if path.is_dir() else path
    folder = path.resolve().parent
    content = path.read_bytes().decode("utf-8") if path.exists() else f"\n# {folder.name}\n"
    try:
        digest = read_folder(folder).digest
    except ValueError:  # a card by itself
        digest = None
    try:
        content = add_results(content, folder.name, result, digest)
    except (ValueError, TypeError) as error:
        raise ValueError(f"The metadata of {path} cannot be read: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def add_results(content: str, name: str, result: dict[str, Any], digest: str | None = None) -> str:
    """The text of a card with the results of an evaluation; see [`write_results_to_card`].

    Args:
        content: of the card.
        name: of the model, where the card has no results yet.
        result: as [`evaluate`] returns it.
        digest: of the weights that were evaluated; None where that is not known.
    """
    metadata, text = split(plain(content))
    told = get_block(text, BLOCK)
    if told is not None and digest is not None and undated(told)[1] not in (None, digest):
        metadata = set_metadata(
            metadata, {"model-index": without_results(parse_metadata(metadata).get("model-index"))}
        )
    data = ModelCard(f"---\n{metadata or '{}'}\n---\n").data
    data.model_name = data.model_name or name
    new = eval_results(result, data.get("pipeline_tag") or "unconditional-image-generation")
    identities = {_identity(entry) for entry in new}
    data.eval_results = [entry for entry in data.eval_results or [] if _identity(entry) not in identities] + new
    tables = dated(table(result), digest, digest)
    if told is not None:
        text = set_block(text, BLOCK, tables)
    else:
        text = append(text, f"{ORDER[BLOCK]}\n\n{block(BLOCK, tables)}")
    if get_block(text, "limits") is not None:  # which said that there are no results
        text = set_block(text, "limits", limits(evaluated=True))
    index = data.to_dict().get("model-index")
    return as_it_was(join(set_metadata(metadata, {"model-index": index}), text), content)


def eval_results(result: dict[str, Any], task: str) -> list[EvalResult]:
    """The figures as the metadata of model cards has them.

    Args:
        result: as [`evaluate`] returns it.
        task: `pipeline_tag` of the model.
    """
    name, split = result["reference"], result["reference_split"]
    data = {"task_type": task, "dataset_type": name, "dataset_name": name, "dataset_split": split}
    entries = []
    figures = [(point["settings"], metric) for point in result["points"] for metric in point["metrics"]]
    of_model = result["model_settings"]
    for settings, metric in figures + [(of_model, metric) for metric in result["model_metrics"]]:
        if metric_type(metric["name"]) not in HEADLINES:
            continue
        told = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        arguments = told | {"num_samples": metric["num_samples"], "seed": metric["seed"]}
        arguments |= {key: metric[key] for key in ("num_reference", "extractor") if metric[key] is not None}
        if metric["low"] is not None:
            arguments["interval_95"] = [_rounded(metric["low"]), _rounded(metric["high"])]
        title = _title(metric["name"], settings)
        entry = {"metric_type": metric_type(metric["name"]), "metric_value": _rounded(metric["value"])}
        entries.append(EvalResult(**data, **entry, metric_name=title, metric_args=arguments))
    if result["noise_levels"] is not None:
        kept = result["noise_levels"]
        for level in kept["levels"]:
            title = f"top-1 accuracy, timesteps {level['first_timestep']} to {level['last_timestep']}"
            title = _title(title, of_model)
            arguments = of_model | {"num_images": kept["num_images"], "seed": kept["seed"]}
            arguments["interval_95"] = [_rounded(level["top1_low"]), _rounded(level["top1_high"])]
            entry = {"metric_type": "accuracy", "metric_value": _rounded(level["top1"])}
            classified = data | {"task_type": "image-classification"}
            entries.append(EvalResult(**classified, **entry, metric_name=title, metric_args=arguments))
    return entries


def metric_type(name: str) -> str:
    """`FD-pca64` -> `frechet_distance`."""
    return next((kind for start, kind in METRIC_TYPES.items() if name == start or name.startswith(f"{start}-")), name)


def _title(name: str, settings: dict[str, Any]) -> str:
    """`FD-pca64 (scheduler=ddim, eta=1)`."""
    return f"{name} ({point_name(settings).replace(',', ', ')})" if settings else name


def _identity(entry: EvalResult) -> tuple[str, ...]:
    return (entry.dataset_type, entry.dataset_split or "", entry.metric_type, entry.metric_name or "")


def _figure(metric: dict[str, Any]) -> str:
    """`2.52 [2.31, 2.74]`; shares in percent."""
    values = [metric["value"]] if metric["low"] is None else [metric["value"], metric["low"], metric["high"]]
    percent = metric_type(metric["name"]) in ("accuracy", "precision", "recall", "coverage")
    words = [f"{100 * value:.1f}" if percent else f"{value:.4g}" for value in values]
    unit = "%" if percent else ""
    return f"{words[0]}{unit}" + (f" [{words[1]}, {words[2]}]" if len(words) > 1 else "")


def _about(result: dict[str, Any], plot: bool = False) -> str:
    """The small print: reference, extractor, judge, seed, notes; in a plot the number of samples too."""
    metrics = [metric for point in result["points"] for metric in point["metrics"]]
    sentences = [f"Reference: {_reference(result)}"]
    counts = sorted({metric["num_reference"] for metric in metrics if metric["num_reference"]})
    sentences[0] += f", {', '.join(f'{count:,}' for count in counts)} images." if counts else "."
    features = next((metric["extractor"] for metric in metrics if metric_type(metric["name"]) != "accuracy"), None)
    if features is not None:
        sentences.append(f"Features: {features}.")
    judged = next((metric for metric in metrics if metric["name"] == "accuracy"), None)
    if judged is not None:
        sentences.append(f"Accuracy: share of samples that the judge {judged['extractor']} reads as asked for")
        right = judged["details"].get("judge_on_reference")
        sentences[-1] += "." if right is None else f"; it reads {right:.1%} of the references right."
    sentences.append(f"Seed {result['seed']}. {'Bars' if plot else 'In brackets'}: 95% bootstrap intervals.")
    if plot:
        counts = sorted({point["num_samples"] for point in result["points"]})
        sentences.insert(0, f"{', '.join(map(str, counts))} samples each.")
    sentences += dict.fromkeys(f"Note: {metric['note']}" for metric in metrics if metric["note"])
    return " ".join(sentences)


def _reference(result: dict[str, Any]) -> str:
    return f"{result['reference']} {result['reference_split']}"


def _by_kind(metrics: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {metric_type(metric["name"]): metric for metric in metrics}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _new_figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "diffusers_ext[eval]"') from error
    return Figure(figsize=size, layout="constrained")


def _errorbar(axes: Any, x: list[dict], y: list[dict], label: str | None, line: str = "") -> None:
    """Points with the intervals of both metrics."""
    bars = []
    for metrics in (x, y):
        known = [(m["low"], m["high"]) if m["low"] is not None else (m["value"],) * 2 for m in metrics]
        bars.append([[max(m["value"] - k[0], 0) for m, k in zip(metrics, known)],
                     [max(k[1] - m["value"], 0) for m, k in zip(metrics, known)]])  # fmt: skip
    values = [[m["value"] for m in metrics] for metrics in (x, y)]
    axes.errorbar(
        *values, xerr=bars[0], yerr=bars[1], marker="o", capsize=2, elinewidth=0.8, linestyle=line, label=label
    )


def _precision_recall(result: dict[str, Any], points: list[tuple[dict, dict]]) -> Any:
    figure = _new_figure((6, 5))
    axes = figure.subplots()
    for settings, metrics in points:
        _errorbar(axes, [metrics["recall"]], [metrics["precision"]], point_name(settings) or None)
    axes.set(xlabel="recall: references among the samples", ylabel="precision: samples among the references")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(_wrapped(_about(result, plot=True)), fontsize=7)
    if points[0][0]:
        axes.legend(fontsize=7)
    return figure


def _sweep(result: dict[str, Any], points: list[tuple[dict, dict]]) -> Any:
    """Trade-off curves: a line for each setting of all options but one, which runs along the line."""
    swept = [point["swept"] for point in result["points"]]
    numeric = [name for name in swept[0] if all(isinstance(values[name], int | float) for values in swept)]
    along = "guidance_scale" if "guidance_scale" in numeric else (numeric or list(swept[0]))[0]
    kinds = points[0][1].keys()
    distance = next((kind for kind in ("fid", "frechet_distance", "kid", "kernel_distance") if kind in kinds), None)
    pairs = [("accuracy", distance)] if distance is not None and "accuracy" in kinds else []
    pairs += [("recall", "precision")] if {"precision", "recall"} <= kinds else []
    if not pairs:
        pairs = [(None, kind) for kind in list(kinds)[:2]]
    figure = _new_figure((5.5 * len(pairs), 5))
    for axes, (x, y) in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs):
        values = list(dict.fromkeys(point[along] for point in swept))
        lines: dict[str, list[int]] = {}
        for index, point in enumerate(swept):
            lines.setdefault(point_name({k: v for k, v in point.items() if k != along}), []).append(index)
        for label, indices in lines.items():
            ys = [points[index][1][y] for index in indices]
            if x is None:
                places = [
                    swept[index][along] if along in numeric else values.index(swept[index][along]) for index in indices
                ]
                xs = [{"value": place, "low": None} for place in places]
            else:
                xs = [points[index][1][x] for index in indices]
            _errorbar(axes, xs, ys, label or None, line="-")
            for index, one, other in zip(indices, xs, ys):
                axes.annotate(value_name(swept[index][along]), (one["value"], other["value"]), fontsize=7,
                              xytext=(4, 4), textcoords="offset points")  # fmt: skip
        if x is None and along not in numeric:
            axes.set_xticks(range(len(values)), map(value_name, values))
        axes.set(xlabel=x or along, ylabel=points[0][1][y]["name"])
        if any(lines):
            axes.legend(fontsize=7)
    figure.suptitle(_wrapped(f"At the points: {along}. {_about(result, plot=True)}", 110), fontsize=7)
    return figure


def _wrapped(text: str, width: int = 80) -> str:
    return re.sub(rf"(.{{1,{width}}})(?:\s+|$)", r"\1\n", text).rstrip()


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)


def _grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 `(N, C, H, W)` -> one image `(H', W', C)` with rows of `columns` images, the missing ones white."""
    missing = -len(images) % columns
    images = np.concatenate([images, np.full((missing, *images.shape[1:]), 255, dtype=np.uint8)])
    channels, height, width = images.shape[1:]
    grid = images.reshape(-1, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return grid.reshape(-1, columns * width, channels)


def _save_image(pixels: np.ndarray, path: Path) -> None:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image = image.resize([side * max(1, 512 // max(image.size)) for side in image.size], Image.Resampling.NEAREST)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    image.save(partial, format="png")
    os.replace(partial, path)
