"""How good must a noisy classifier be? Guided accuracy and Frechet distance against the quality of the classifier.

    diffusers-ext train classifier --preset mnist --checkpointing_steps 100 --checkpoints_total_limit 0
    python benchmarks/classifier_quality.py runs/mnist-classifier --update diffusers_ext/training/README.md

The classifiers are the checkpoints of one training, with the raw weights of that step, not their running average:
averages of different steps overlap. Each guides the same UNet from the same noise, at several scales.
Its own accuracy is measured on noisy held-out images, at eight noise levels. A judge that is no network reads the
samples; FD-pca64 compares them with the test images.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from mnist import MNIST, ROOT
from safetensors.torch import load_file
from sections import write_section
from tqdm.auto import tqdm

from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from diffusers_ext import ADMClassifierModel, ClassifierGuidedPipeline
from diffusers_ext.evaluation.features import extract, load_features
from diffusers_ext.evaluation.judge import judge_accuracy, load_judge, read_split
from diffusers_ext.evaluation.metrics import frechet
from diffusers_ext.evaluation.networks import short_name
from diffusers_ext.evaluation.noise_levels import NoiseLevelReport, accuracy_by_noise_level
from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.data import open_data


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """run folder of a classifier's training, with its checkpoints"""
    model: str = str(ROOT / "model_cards" / "adm-mnist")
    """folder or Hub name of the pipeline that is guided; its own classifier is left out"""
    dataset: str = MNIST
    """folder or Hub name, with splits train and test and labels"""
    steps: tuple[int, ...] = (100, 200, 400, 800, 1600, 3000, 5000)
    """checkpoints, by training step; those that are not there are left out"""
    guidance_scales: tuple[float, ...] = (2.0, 6.0)
    """one curve each"""
    num_samples: int = 300
    """drawn at every point; sample i is to be of class i mod K"""
    num_images: int = 1000
    """held-out images that the classifiers read at every noise level"""
    num_inference_steps: int = 20
    """of DPM-Solver++"""
    batch_size: int = 50
    """images sampled together"""
    seed: int = 0
    """sample i starts from the noise of seed + i; also of the choice of held-out images and of their noise"""
    dtype: str = "bfloat16"
    """of both networks while sampling"""
    output: Path | None = None
    """JSON file of results, which a later run with the same options, apart from steps and scales, goes on with; by
    default in the run folder"""
    update: Path | None = None
    """Markdown file to write the table and the picture into"""


def main(options: Options) -> None:
    """Measure what is missing in the results, then print and draw them.

    Raises:
        ValueError: when the results that are there were measured with other options.
    """
    path = options.output or options.run / "classifier_quality.json"
    kept = read_results(path, options)
    results = kept["checkpoints"]
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    splits = {
        name: read_split(options.dataset, name, sample_size=size, channels=channels) for name in ("train", "test")
    }
    judge = load_judge("neighbours", splits["train"])
    extractor = load_features("pca64", reference=splits["train"].images)
    reference = extract(extractor, splits["test"].images)
    held_out = open_data(TrainingConfig(dataset=options.dataset), "test", sample_size=size, channels=channels)

    labels = np.arange(options.num_samples) % held_out.num_classes
    for step in tqdm(options.steps, desc="checkpoints"):
        folder = options.run / f"checkpoint-{step}"
        if not folder.is_dir():
            continue
        classifier = ADMClassifierModel.from_config(ADMClassifierModel.load_config(options.run / "classifier"))
        classifier.load_state_dict(load_file(folder / "model.safetensors"))
        if str(step) not in results:
            report = accuracy_by_noise_level(
                classifier, _schedule(pipe), held_out, num_images=options.num_images, seed=options.seed
            )
            results[str(step)] = {"levels": report.to_dict(), "guided": {}}
        for scale in options.guidance_scales:
            if f"{scale:g}" not in results[str(step)]["guided"]:
                images = draw(pipe, classifier, labels, scale, options)
                distance = frechet(extract(extractor, images), reference).value
                accuracy = judge_accuracy(judge, images, labels).value
                results[str(step)]["guided"][f"{scale:g}"] = {"accuracy": accuracy, "frechet": distance}
                _write(path, json.dumps(kept, indent=2) + "\n")
    scales = {f"{scale:g}" for scale in options.guidance_scales}
    steps = [str(step) for step in sorted(options.steps) if str(step) in results]
    results = {step: results[step] for step in steps if scales <= results[step]["guided"].keys()}
    text = table(results, options)
    print(text)
    picture = (
        path.with_suffix(".png") if options.update is None else options.update.with_name("classifier_quality.png")
    )
    draw_curves(results, options).savefig(picture, dpi=100)
    if options.update is not None:
        write_section(options.update, "classifier-quality", f"{text}\n\n![Both curves]({picture.name})")


def read_results(path: Path, options: Options) -> dict:
    """`options` that change every figure, and `checkpoints`: step -> results; without any where there is no file.

    Raises:
        ValueError: when the file's options are others; it names the first one.
    """
    names = ("num_samples", "num_images", "num_inference_steps", "seed", "dtype")
    # Folders may lie elsewhere on another machine.
    asked = {name: short_name(getattr(options, name)) for name in ("model", "dataset")}
    asked |= {name: getattr(options, name) for name in names}
    if not path.exists():
        return {"options": asked, "checkpoints": {}}
    results = json.loads(path.read_text())
    old = results.get("options", {})
    for name, value in asked.items():
        if old.get(name) != value:
            raise ValueError(
                f"`{name}` is {value!r}, but the results in {path} were measured with {old.get(name)!r}. Remove the "
                "file or choose another `output`."
            )
    return results


def _schedule(pipe: DiffusionPipeline) -> DDPMScheduler:
    """The process whose noise the classifier knows."""
    return DDPMScheduler.from_config(pipe.config.get("classifier_schedule") or pipe.scheduler.config)


def draw(
    pipe: DiffusionPipeline, classifier: ADMClassifierModel, labels: np.ndarray, scale: float, options: Options
) -> torch.Tensor:
    """uint8 samples `(N, C, H, W)`, one for each label."""
    guided = ClassifierGuidedPipeline(
        unet=pipe.unet,
        classifier=classifier.to(pipe.unet.dtype),
        scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler.config),
        classifier_schedule=pipe.config.get("classifier_schedule"),
    )
    guided.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(labels), options.batch_size):
        batch = labels[start : start + options.batch_size].tolist()
        seeds = range(options.seed + start, options.seed + start + len(batch))
        images.append(
            guided(
                batch,
                guidance_scale=scale,
                num_inference_steps=options.num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
            ).images.float()
        )
    return (torch.cat(images) * 255).round().to(torch.uint8)


def table(results: dict, options: Options) -> str:
    """Markdown: one row per classifier."""
    scales = [f"{scale:g}" for scale in options.guidance_scales]
    heading = ["steps", "accuracy, mean of levels", *(f"level {n}" for n in range(1, 9)), "calibration error"]
    heading += [f"{kind} at scale {scale}" for scale in scales for kind in ("right digits", "FD-pca64")]
    rows = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for step in results:
        report = NoiseLevelReport.from_dict(results[step]["levels"])
        cells = [f"{int(step):,}", f"{report.metrics()['accuracy']:.1%}", *(f"{x.top1:.0%}" for x in report.levels)]
        cells.append(f"{np.mean([level.calibration_error for level in report.levels]):.3f}")
        for scale in scales:
            point = results[step]["guided"][scale]
            cells += [f"{point['accuracy']:.1%}", f"{point['frechet']:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    told = (
        f"Each row: a checkpoint's raw weights, not averaged ones; {options.num_images} test images per noise level; "
        f"{options.num_samples} samples per scale, DPM-Solver++ in {options.num_inference_steps} steps, seed "
        f"{options.seed}, {options.dtype}; FD-pca64 against the test images. Level 1 is the "
        "cleanest eighth of the timesteps."
    )
    return "\n".join(rows) + f"\n\n{told}"


def draw_curves(results: dict, options: Options) -> Figure:
    """Guided accuracy and Frechet distance over the classifier's own accuracy."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    quality = [NoiseLevelReport.from_dict(kept["levels"]).metrics()["accuracy"] for kept in results.values()]
    for axes, kind, label in zip(
        figure.subplots(1, 2), ("accuracy", "frechet"), ("samples of the wanted class", "FD-pca64, lower is better")
    ):
        for scale in options.guidance_scales:
            values = [kept["guided"][f"{scale:g}"][kind] for kept in results.values()]
            axes.plot(quality, values, marker="o", label=f"guidance scale {scale:g}")
        axes.set(xlabel="accuracy of the noisy classifier, mean of eight levels", ylabel=label)
        axes.legend()
    return figure


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
