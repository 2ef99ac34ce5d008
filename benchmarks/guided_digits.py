"""Accuracy of guided digits: samples at several guidance scales and schedulers, read by a judge that is no network.

The judge is scikit-learn's nearest-neighbour classifier on the pixels of MNIST's training images; it shares nothing
with the classifier that guides. At scale 0 the label has no influence on the image: about one sample in ten agrees.
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
from sklearn.neighbors import KNeighborsClassifier
from tqdm.auto import tqdm

from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

import diffusers_ext  # noqa: F401, for DiffusionPipeline to find our classes
from diffusers_ext.training.data import load_images


ROOT = Path(__file__).resolve().parents[1]
LOCAL_MNIST = ROOT.parent / "shared" / "data" / "mnist"
SCHEDULERS = {
    "ddpm": (DDPMScheduler, 250),
    "ddim": (DDIMScheduler, 50),
    "dpmsolver++": (DPMSolverMultistepScheduler, 20),
}
NUM_CLASSES = 10


@dataclass(frozen=True)
class Options:
    model: str = str(ROOT / "model_cards" / "adm-mnist")
    """folder or Hub repository of a ClassifierGuidedPipeline"""
    dataset: str = str(LOCAL_MNIST) if LOCAL_MNIST.is_dir() else "ylecun/mnist"
    """MNIST, for the judge: folder or Hub name"""
    schedulers: tuple[Literal["ddpm", "ddim", "dpmsolver++"], ...] = tuple(SCHEDULERS)
    """DDPM with 250 steps, DDIM with 50, DPM-Solver++ with 20"""
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    """0 samples without guidance"""
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

    judge, judge_accuracy = fit_judge(options, pipe.unet.config.sample_size)
    print(f"The judge reads {judge_accuracy:.2%} of MNIST's test images right.\n")
    print(f"| scheduler | steps | guidance scale | accuracy of {options.num_samples} samples | images/s |")
    print("|---|---|---|---|---|")

    labels = np.arange(options.num_samples) % NUM_CLASSES
    scheduler_config = pipe.scheduler.config
    rows, pictures = [], []
    for name in options.schedulers:
        scheduler_class, steps = SCHEDULERS[name]
        pipe.scheduler = scheduler_class.from_config(scheduler_config)
        for scale in options.guidance_scales:
            start = time.perf_counter()
            images = draw(pipe, labels, scale, steps, options)
            speed = len(images) / (time.perf_counter() - start)
            accuracy = float((judge.predict(images.reshape(len(images), -1)) == labels).mean())
            print(f"| {scheduler_class.__name__} | {steps} | {scale:g} | {accuracy:.1%} | {speed:.2f} |", flush=True)
            row = {"scheduler": scheduler_class.__name__, "steps": steps, "guidance_scale": scale}
            rows.append(row | {"accuracy": accuracy, "images_per_second": speed})
            pictures.append(np.concatenate(images[:NUM_CLASSES], axis=1))
            if options.json is not None:
                result = {"judge_accuracy": judge_accuracy, "rows": rows, "options": asdict(options)}
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
            if options.picture is not None:
                options.picture.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((np.concatenate(pictures) * 255).round().astype(np.uint8)).save(options.picture)


def fit_judge(options: Options, sample_size: int, channels: int = 1) -> tuple[KNeighborsClassifier, float]:
    """The judge of images `(N, channels * sample_size ** 2)` in [0, 1], and its accuracy on MNIST's test images."""
    pixels, labels = {}, {}
    for split in ("train", "test"):
        data = load_images(options.dataset, split, sample_size=sample_size, channels=channels, need_labels=True)
        pixels[split], labels[split] = data.decoded.flatten(1).numpy().astype(np.float32) / 255, data.labels
    judge = KNeighborsClassifier(options.neighbours, weights="distance", algorithm="brute")
    judge.fit(pixels["train"], labels["train"])
    return judge, float(judge.score(pixels["test"], labels["test"]))


def draw(pipe: DiffusionPipeline, labels: np.ndarray, scale: float, steps: int, options: Options) -> np.ndarray:
    """Grey samples `(N, H, W)` in [0, 1], one per label."""
    images = []
    with tqdm(total=len(labels), unit="img", desc=f"{type(pipe.scheduler).__name__} {scale:g}", leave=False) as bar:
        for start in range(0, len(labels), options.batch_size):
            batch = labels[start : start + options.batch_size]
            seeds = range(options.seed + start, options.seed + start + len(batch))
            output = pipe(
                class_labels=batch.tolist(),
                guidance_scale=scale,
                guidance_mode=options.guidance_mode,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            )
            images.append(output.images[..., 0])
            bar.update(len(batch))
    return np.concatenate(images)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
