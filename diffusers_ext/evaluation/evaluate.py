"""Evaluating a model or its samples against a reference data set: metrics, sweeps, report and model card."""

import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from diffusers import DiffusionPipeline

from diffusers_ext.evaluation.drawing import CALL_OPTIONS, DrawingOptions, drawing, open_pipeline
from diffusers_ext.evaluation.estimates import Metric
from diffusers_ext.evaluation.measures import References, measure_bits_per_dim, measure_classifier, measure_samples
from diffusers_ext.evaluation.networks import short_name
from diffusers_ext.evaluation.options import (
    OF_THE_MODEL,
    EvaluateConfig,
    card_of,
    check_reference,
    chosen_metrics,
    kind_of_model,
)
from diffusers_ext.evaluation.report import (
    compare_images,
    compare_points,
    draw_plots,
    write_results_to_card,
    write_tables,
)
from diffusers_ext.evaluation.samples import read_samples
from diffusers_ext.evaluation.sampling import SampleConfig, manifest, process_group, sample
from diffusers_ext.evaluation.sweep import point_name, sweep_points
from diffusers_ext.files import write_atomically


# Options that say how samples were drawn, for tables and cards, where they are not the defaults.
TOLD = ("scheduler", "scheduler_options", *CALL_OPTIONS, "call_options", "class_labels", "prompts", "dtype")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model or samples, and write the report.

    The output folder receives `evaluation.json`, `evaluation.md`, plots, and the samples of every point of the sweep.

    Returns:
        What `evaluation.json` holds; an empty dictionary in all but the first process of a group.

    Raises:
        ValueError: for options, columns, or files that do not fit; about options before anything is drawn.
    """
    group = process_group(config.device)
    kind = kind_of_model(config.model)
    points = sweep_points(config, config.sweep)
    names = chosen_metrics(config, kind)
    has_labels = check_reference(config, names)
    if config.metrics is None and config.judge == "neighbours" and not has_labels:
        names = tuple(name for name in names if name != "accuracy")
    output = Path(config.output or f"runs/evaluate-{short_name(config.model)}")
    device = group.device if config.device == "auto" else torch.device(config.device)
    references = References(config, device)
    pipe, dtype = None, config.dtype
    if kind == "pipeline":
        pipe = open_pipeline(config).to(device)
        for _, point in points:
            with drawing(pipe, point) as (_, ids, _):  # names wrong options before anything is drawn
                if ids is None and "accuracy" in (config.metrics or ()):
                    raise ValueError("`metrics` holds 'accuracy', but the samples are drawn without class labels.")

    result = {
        "model": short_name(config.model) if Path(config.model).exists() else config.model,
        "reference": references.name,
        "reference_split": config.reference_split,
        "seed": config.seed,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        "points": [],
        "model_settings": {"dtype": config.dtype} if config.dtype != "float32" else {},
        "model_metrics": [],
        "noise_levels": None,
    }
    if group.is_main_process:
        if "noise_levels" in names:
            report = measure_classifier(config, pipe, device)
            output.mkdir(parents=True, exist_ok=True)
            report.save(output)
            result["noise_levels"] = report.to_dict()
        if "bpd" in names:
            result["model_metrics"].append(measure_bits_per_dim(config, pipe, references).to_dict())
    pictures = []
    of_samples = [name for name in names if name not in OF_THE_MODEL]
    for settings, point in points if of_samples else ():
        if kind == "pipeline":
            if point.dtype != dtype:
                pipe, dtype = open_pipeline(point).to(device), point.dtype
            folder = output / "samples" / _folder_name(pipe, point, settings)
            shared = {field.name: getattr(point, field.name) for field in fields(DrawingOptions)}
            path = sample(SampleConfig(**shared, output=str(folder)), pipe)
        else:
            folder, path = None, Path(config.model).expanduser()
        if not group.is_main_process:
            continue
        samples = read_samples(path)
        measured = replace(config, prompts=point.prompts)
        metrics = _kept_metrics(folder, measured, of_samples)
        if metrics is None:
            metrics = measure_samples(measured, of_samples, samples, references)
            _keep_metrics(folder, measured, of_samples, metrics)
        swept = {name: _value_told(name, value) for name, value in settings.items()}
        row = {"settings": _told(point) | swept, "swept": swept, "num_samples": len(samples)}
        result["points"].append(row | {"metrics": [metric.to_dict() for metric in metrics]})
        write_tables(result, output)
        references.load(samples)
        compare_images(samples, references.test, (output if folder is None else folder) / "samples_and_references.png")
        pictures.append(samples.images[:10])
        if len(pictures) > 1:
            compare_points(pictures, output / "sweep_samples.png")
    if not group.is_main_process:
        return {}
    write_tables(result, output)
    draw_plots(result, output)
    card = card_of(config, kind)
    if card is not None:
        write_results_to_card(card, result)
    print((output / "evaluation.md").read_text())
    print(f"Written to {output}" + (f" and {card}." if card is not None else "."))
    return result


def _folder_name(pipe: DiffusionPipeline, point: EvaluateConfig, settings: dict[str, Any]) -> str:
    """Of the samples of a point: other weights or options make another folder, and equal ones find theirs again."""
    with drawing(pipe, point) as (_, ids, prompts):
        drawn_as = json.dumps(manifest(pipe, point, ids, prompts), sort_keys=True)
    name = re.sub(r"[^\w=,.:+-]", "_", point_name(settings))
    return "-".join(filter(None, (name, sha256(drawn_as.encode()).hexdigest()[:8])))


def _kept_metrics(folder: Path | None, config: EvaluateConfig, names: Sequence[str]) -> list[Metric] | None:
    """Results of an earlier run, if it measured the same."""
    file = None if folder is None else folder / "metrics.json"
    if file is None or not file.exists():
        return None
    kept = json.loads(file.read_text())
    if kept["options"] != _measuring_options(config, names):
        return None
    return [Metric.from_dict(metric) for metric in kept["metrics"]]


def _keep_metrics(folder: Path | None, config: EvaluateConfig, names: Sequence[str], metrics: list[Metric]) -> None:
    if folder is not None:
        content = {"options": _measuring_options(config, names), "metrics": [metric.to_dict() for metric in metrics]}
        write_atomically(folder / "metrics.json", json.dumps(content, indent=2) + "\n")


def _measuring_options(config: EvaluateConfig, names: Sequence[str]) -> dict[str, Any]:
    drawn = {field.name for field in fields(DrawingOptions)} - {"seed", "prompts"}
    kept = {"sweep", "output", "card", "write_card", "metrics", "bpd_images", "bpd_steps"} | drawn
    options = {key: value for key, value in asdict(config).items() if key not in kept}
    return json.loads(json.dumps(options | {"metrics": list(names)}))


def _told(point: EvaluateConfig) -> dict[str, Any]:
    """How the samples of a point were drawn, where it is not by default."""
    defaults = {field.name: field.default for field in fields(DrawingOptions)}
    varied = [name for name in TOLD if getattr(point, name) != defaults[name]]
    return {name: _value_told(name, getattr(point, name)) for name in varied}


def _value_told(name: str, value: Any) -> Any:
    """Of a file the name alone, since its folder tells about the machine only."""
    return Path(value).name if name == "prompts" and value is not None else value
