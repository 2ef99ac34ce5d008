"""Accuracy of guided digits: samples at several guidance scales and schedulers, read by a judge that is no network.

The judge is scikit-learn's nearest-neighbour classifier on the pixels of MNIST's training images; it shares nothing
with the models. Scales are those of the pipeline: classifier guidance is off at 0, where about one sample in ten
agrees, classifier-free guidance at 1. FD-PCA64 is the Frechet distance to MNIST's test images in the space of the
first 64 principal components of the training images' pixels; the more samples, the smaller its bias. A model without
classes draws without labels, and only the distance is told.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm.auto import tqdm

from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

import diffusers_ext  # noqa: F401, for DiffusionPipeline to find our classes
from diffusers_ext.evaluation.features import extract, load_features
from diffusers_ext.evaluation.judge import NeighbourJudge, judge_accuracy, read_split
from diffusers_ext.evaluation.metrics import frechet


ROOT = Path(__file__).resolve().parents[1]
LOCAL_MNIST = ROOT.parent / "shared" / "data" / "mnist"
MNIST = str(LOCAL_MNIST) if LOCAL_MNIST.is_dir() else "ylecun/mnist"
SCHEDULERS = {
    "ddpm": (DDPMScheduler, 250),
    "ddim": (DDIMScheduler, 50),
    "dpmsolver++": (DPMSolverMultistepScheduler, 20),
}
NUM_CLASSES = 10


@dataclass(frozen=True)
class Options:
    model: str = str(ROOT / "model_cards" / "adm-mnist")
    """folder or Hub repository of a ClassifierGuidedPipeline or ClassConditionalPipeline"""
    dataset: str = MNIST
    """MNIST, for the judge: folder or Hub name"""
    schedulers: tuple[Literal["ddpm", "ddim", "dpmsolver++"], ...] = tuple(SCHEDULERS)
    """DDPM with 250 steps, DDIM with 50, DPM-Solver++ with 20"""
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """0 is without classifier guidance, 1 without classifier-free guidance"""
    num_samples: int = 500
    """per row of the table; sample i is to be the digit i mod 10"""
    batch_size: int = 50
    """images sampled together; no image depends on it"""
    guidance_mode: Literal["score", "mean"] = "score"
    """mean: for DDPM only"""
    seed: int = 0
    """sample i of every row starts from the noise of seed + i"""
    device: str = "cpu"
    """where to sample"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of both networks"""
    threads: int | None = None
    """CPU threads of torch; None leaves the number alone"""
    neighbours: int = 3
    """that the judge asks, weighted by distance"""
    json: Path | None = None
    """file for the results, written after every row of the table"""
    picture: Path | None = None
    """file for a picture: the first ten samples of every row of the table"""


def main(options: Options) -> None:
    """Print a table of accuracies."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pipe = DiffusionPipeline.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    pipe.to(options.device).set_progress_bar_config(disable=True)

    network = pipe.components.get("transformer") or pipe.unet
    train, held_out = (
        read_split(options.dataset, split, sample_size=network.config.sample_size) for split in ("train", "test")
    )
    judge = NeighbourJudge(train.images, train.labels, options.neighbours)
    features = load_features("pca64", reference=train.images)
    reference = extract(features, held_out.images)
    held_out_accuracy = judge_accuracy(judge, held_out.images, held_out.labels).value
    print(f"The judge reads {held_out_accuracy:.2%} of MNIST's test images right.\n")
    print(f"| scheduler | steps | guidance scale | accuracy of {options.num_samples} samples | FD-PCA64 | images/s |")
    print("|---|---|---|---|---|---|")

    knows_classes = pipe.components.get("classifier") is not None or network.config.num_class_embeds is not None
    labels = np.arange(options.num_samples) % NUM_CLASSES if knows_classes else None
    scheduler_config = pipe.scheduler.config
    rows, pictures = [], []
    for name in options.schedulers:
        scheduler_class, steps = SCHEDULERS[name]
        pipe.scheduler = scheduler_class.from_config(scheduler_config)
        for scale in options.guidance_scales if knows_classes else (None,):
            start = time.perf_counter()
            images = draw(pipe, labels, scale, steps, options)
            speed = len(images) / (time.perf_counter() - start)
            accuracy = None if labels is None else judge_accuracy(judge, images, labels).value
            distance = frechet(extract(features, images), reference).value
            told = ["–", "–"] if labels is None else [f"{scale:g}", f"{accuracy:.1%}"]
            print(
                f"| {scheduler_class.__name__} | {steps} | {' | '.join(told)} | {distance:.2f} | {speed:.2f} |",
                flush=True,
            )
            row = {"scheduler": scheduler_class.__name__, "steps": steps, "guidance_scale": scale}
            rows.append(row | {"accuracy": accuracy, "frechet_distance": distance, "images_per_second": speed})
            pictures.append(np.concatenate(images[:NUM_CLASSES, 0].numpy(), axis=1))
            if options.json is not None:
                result = {"judge_accuracy": held_out_accuracy, "rows": rows, "options": asdict(options)}
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
            if options.picture is not None:
                options.picture.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.concatenate(pictures)).save(options.picture)


def draw(
    pipe: DiffusionPipeline, labels: np.ndarray | None, scale: float | None, steps: int, options: Options
) -> torch.Tensor:
    """Samples `(N, C, H, W)`, uint8, one per label if there are labels."""
    images, arguments = [], {"guidance_scale": scale, "num_inference_steps": steps, "output_type": "pt"}
    if options.guidance_mode != "score":
        arguments["guidance_mode"] = options.guidance_mode
    total = options.num_samples
    name = type(pipe.scheduler).__name__
    with tqdm(total=total, unit="img", desc=name if scale is None else f"{name} {scale:g}", leave=False) as bar:
        for start in range(0, total, options.batch_size):
            seeds = range(options.seed + start, options.seed + min(start + options.batch_size, total))
            arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
            if labels is not None:
                arguments["class_labels"] = labels[start : start + len(seeds)].tolist()
            images.append(pipe(**arguments).images.float().cpu())
            bar.update(len(seeds))
    return (torch.cat(images) * 255).round().to(torch.uint8)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
