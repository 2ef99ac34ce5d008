"""Backbones side by side: the same data in the same order, about the same parameters, the same budget of compute.

Every backbone is trained class-conditionally, with a null class, until its forward passes have cost the same number of
floating-point operations, and then draws digits with classifier-free guidance. A judge that is no network (nearest
neighbours among the training images) reads them; their distribution is compared with held-out images by the Frechet
distance in the space of the first 64 principal components of the training images' pixels (FD-pca64).

Interrupted, the command goes on where it was. The table is printed, and written to a file with `--results`.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from mnist import MNIST
from sections import write_section
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ModelMixin

from diffusers_ext import ClassConditionalPipeline
from diffusers_ext.evaluation.features import FeatureExtractor, extract, load_features
from diffusers_ext.evaluation.judge import NeighbourJudge, judge_accuracy, read_split
from diffusers_ext.evaluation.metrics import frechet
from diffusers_ext.training.config import UNetTrainingConfig
from diffusers_ext.training.data import Batch
from diffusers_ext.training.loop import train
from diffusers_ext.training.tasks import UNetTask, image_grid, to_unit_range


# Sizes of about two million parameters.
BACKBONES = {
    "dilated": ("dilated/mnist", ("hidden_channels=[160,160,160,160,160,160,160,160]", "time_embedding_dim=160")),
    "composable-film": ("composable/film-mnist", ()),
    "dit-gqa-adaln": ("dit/mnist", ()),
    "dit-gqa-additive": ("dit/mnist", ("conditioning=additive", "num_layers=11")),
    "ddpm": ("ddpm/mnist-32", ("block_out_channels=[16,32,64,112]", "layers_per_block=1")),
    "adm": ("adm/mnist-32", ("block_out_channels=[16,32,64,96]", "layers_per_block=1", "attention_head_dim=16")),
}


@dataclass(frozen=True)
class Options:
    dataset: str = MNIST
    """`digits`, a folder or a Hub name; with a column of labels"""
    in_channels: int = 1
    """1 greyscale, 3 colour"""
    sample_size: int = 32
    """pixels"""
    backbones: tuple[
        Literal["dilated", "composable-film", "dit-gqa-adaln", "dit-gqa-additive", "ddpm", "adm"], ...
    ] = tuple(BACKBONES)
    """rows of the table"""
    forward_tflops: float = 6.0
    """compute of one backbone's forward passes in training, in 1e12 floating-point operations"""
    train_batch_size: int = 64
    """images per step"""
    learning_rate: float = 1e-3
    """of every backbone, after warm-up"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """of training and sampling"""
    num_samples: int = 300
    """images drawn by each backbone; image i is to be of class i mod number of classes"""
    num_inference_steps: int = 20
    """of DDIM"""
    guidance_scale: float = 2.0
    """of classifier-free guidance; 1 is none"""
    rounds: int = 5
    """measurements of speed, in turns, of which the median counts"""
    seed: int = 0
    """of weights, data order, noise and samples"""
    output_dir: Path = Path("runs/backbones")
    """a run folder per backbone"""
    results: Path | None = None
    """Markdown file in which the section of this dataset is replaced or added"""


@dataclass(frozen=True)
class Yardstick:
    """What samples are measured by: training images make the judge and the features, held-out ones the reference."""

    judge: NeighbourJudge
    features: FeatureExtractor
    held_out: Batch
    reference: torch.Tensor
    """features of the held-out images"""

    @classmethod
    def of(cls, options: Options) -> "Yardstick":
        size, channels = options.sample_size, options.in_channels
        train, held_out = (
            read_split(options.dataset, split, sample_size=size, channels=channels) for split in ("train", "test")
        )
        features = load_features("pca64", reference=train.images)
        judge = NeighbourJudge(train.images, train.labels)
        return cls(judge, features, held_out, extract(features, held_out.images))


def main(options: Options) -> None:
    """Train what is not trained yet, measure, print the table."""
    configs = {name: training_config(name, options) for name in options.backbones}
    for name, config in tqdm(configs.items(), desc="backbones", unit="backbone"):
        if not (Path(config.output_dir) / "model_index.json").exists():
            train(config)
    pipes = {name: load(Path(config.output_dir)) for name, config in configs.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]

    yardstick = Yardstick.of(options)
    rows = {}
    for name, pipe in pipes.items():
        path = Path(configs[name].output_dir) / "result.json"
        if not path.exists():
            pipe.to(device, dtype)
            result = evaluate(pipe, yardstick, options, path.with_name("samples.png"))
            path.write_text(json.dumps(result, indent=2) + "\n")
        rows[name] = json.loads(path.read_text())
    speeds = measure_speed(configs, pipes, device, dtype, options)

    lines = [
        "| backbone | class | parameters | GFLOPs | images trained on | images/s, training | images/s, network call | "
        "test loss | right digits | FD-pca64 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        model, config = denoiser(pipes[name]), configs[name]
        lines.append(
            f"| {name} | `{type(model).__name__}` | {model.num_parameters():,} | "
            f"{forward_flops(model) / 1e9:.3f} | {config.max_train_steps * config.train_batch_size:,} | "
            f"{speeds[name]['training']:.0f} | {speeds[name]['sampling']:.0f} | {row['test_loss']:.4f} | "
            f"{row['accuracy']:.1%} | {row['frechet_distance']:.2f} |"
        )
    table = "\n".join(lines)
    print(table)
    if options.results is not None:
        name = Path(options.dataset).name
        text = f"## {name}\n\n{description(options, yardstick, device)}\n\n{table}"
        write_section(options.results, name, text, title="Results")


def training_config(name: str, options: Options) -> UNetTrainingConfig:
    """The training of a backbone that spends the budget."""
    model, model_options = BACKBONES[name]
    config = UNetTrainingConfig(
        output_dir=str(options.output_dir / name),
        dataset=options.dataset,
        model=model,
        model_options=model_options,
        in_channels=options.in_channels,
        sample_size=options.sample_size,
        learned_variance=False,
        class_conditional=True,
        class_dropout_prob=0.1,
        train_batch_size=options.train_batch_size,
        learning_rate=options.learning_rate,
        mixed_precision=options.mixed_precision,
        seed=options.seed,
        checkpointing_steps=250,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        validation_steps=10**9,  # only at the end
    )
    task = UNetTask(config)
    with torch.device("meta"):
        model = task.build_model()
    steps = max(1, round(options.forward_tflops * 1e12 / (forward_flops(model) * options.train_batch_size)))
    return replace(config, max_train_steps=steps, lr_warmup_steps=min(config.lr_warmup_steps, steps // 10))


def forward_flops(model: ModelMixin) -> int:
    """Floating-point operations of one image's forward pass; a multiplication and an addition are two."""
    config = model.config
    model = type(model).from_config(config).to("meta")
    sample = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(sample, torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def denoiser(pipe: ClassConditionalPipeline) -> ModelMixin:
    return pipe.unet if pipe.transformer is None else pipe.transformer


def load(folder: Path) -> ClassConditionalPipeline:
    """A trained pipeline with DDIM, which clips the predicted image: networks trained as briefly as here need it."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluate(
    pipe: ClassConditionalPipeline, yardstick: Yardstick, options: Options, picture: Path
) -> dict[str, float]:
    """Loss on held-out images; accuracy and Frechet distance of samples, which are drawn into `picture` as well."""
    count = options.num_samples
    labels = np.arange(count) % yardstick.judge.num_classes
    samples = []
    for start in tqdm(range(0, count, 100), desc=f"{type(denoiser(pipe)).__name__} samples", unit_scale=100):
        batch = labels[start : start + 100]
        generators = [torch.Generator().manual_seed(options.seed + start + i) for i in range(len(batch))]
        samples.append(
            pipe(
                class_labels=batch.tolist(),
                guidance_scale=options.guidance_scale,
                num_inference_steps=options.num_inference_steps,
                generator=generators,
                output_type="pt",
            ).images
        )
    pixels = (torch.cat(samples).float().cpu() * 255).round().to(torch.uint8)
    image_grid(to_unit_range(pixels[:100])).save(picture)

    return {
        "test_loss": test_loss(pipe, yardstick.held_out, options),
        "accuracy": judge_accuracy(yardstick.judge, pixels, labels).value,
        "frechet_distance": frechet(extract(yardstick.features, pixels), yardstick.reference).value,
    }


@torch.no_grad()
def test_loss(pipe: ClassConditionalPipeline, held_out: Batch, options: Options) -> float:
    """Mean squared error of the predicted noise over the first 1000 held-out images, each at one random timestep."""
    model, generator = denoiser(pipe), torch.Generator().manual_seed(options.seed)
    process = DDPMScheduler.from_config(pipe.scheduler.config)  # others know the noise of their own steps only
    losses = []
    for images, labels in zip(held_out.images[:1000].split(100), held_out.labels[:1000].split(100)):
        clean = to_unit_range(images)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (len(clean),), generator=generator)
        noisy = process.add_noise(clean, noise, timesteps)
        inputs = noisy.to(model.device, model.dtype), timesteps.to(model.device), labels.to(model.device)
        losses.append((model(*inputs).sample.float().cpu() - noise).square().flatten(1).mean(1))
    return torch.cat(losses).mean().item()


def measure_speed(
    configs: dict[str, UNetTrainingConfig],
    pipes: dict[str, ClassConditionalPipeline],
    device: str,
    dtype: torch.dtype,
    options: Options,
) -> dict[str, dict[str, float]]:
    """Images per second of a training step and of a network call, all backbones in turns."""
    batch, times = options.train_batch_size, {name: {"training": [], "sampling": []} for name in pipes}
    size = (batch, options.in_channels, options.sample_size, options.sample_size)
    images, timesteps = torch.randn(size, device=device), torch.randint(1000, (batch,), device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)

    def timed(action: Callable[[], None]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        return batch / (time.perf_counter() - start)

    def train_step(model: ModelMixin) -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            output = model(images, timesteps, labels).sample
        output.float().square().mean().backward()

    @torch.no_grad()
    def call(model: ModelMixin) -> None:
        model(images.to(dtype), timesteps, labels)

    for _ in tqdm(range(options.rounds + 1), desc="speed", unit="round"):  # the first one warms up
        for name, pipe in pipes.items():
            model = denoiser(pipe)
            times[name]["training"].append(timed(lambda: train_step(model.float().to(device).train())))
            model.zero_grad(set_to_none=True)
            model.to(dtype).eval()
            times[name]["sampling"].append(timed(lambda: call(model)))
    return {name: {k: statistics.median(v[1:]) for k, v in kinds.items()} for name, kinds in times.items()}


def description(options: Options, yardstick: Yardstick, device: str) -> str:
    """What was done, where and when."""
    defaults = asdict(Options())
    places = ("dataset", "output_dir", "results")
    changed = {k: v for k, v in asdict(options).items() if v != defaults[k] and k not in places}
    arguments = "".join(f" --{k} {' '.join(v) if isinstance(v, tuple) else v}" for k, v in changed.items())
    held_out = yardstick.held_out
    accuracy = judge_accuracy(yardstick.judge, held_out.images, held_out.labels).value
    hardware = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return (
        f"`python benchmarks/backbones.py{arguments}`, {date.today()}, {hardware}, "
        f"CPU threads: {torch.get_num_threads()}, torch {torch.__version__}.\n\n"
        f"Each backbone: {options.forward_tflops:g} TFLOPs of forward passes, batches of {options.train_batch_size}, "
        f"the same order of images. Samples: {options.num_samples}, by DDIM in {options.num_inference_steps} "
        f"steps, guidance scale {options.guidance_scale:g}. The judge reads {accuracy:.1%} of the "
        "test images right."
    )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
