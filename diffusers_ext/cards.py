"""Model cards of training runs: what was trained, on what, by which command, and how it is used."""

import json
import os
import shlex
from dataclasses import fields
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from diffusers import DiffusionPipeline, ModelMixin

from diffusers_ext.training.config import (
    CLASSIFIER_PRESETS,
    UNET_PRESETS,
    TrainingConfig,
    UNetTrainingConfig,
    as_arguments,
)


LIMITS = """## Limits

This card was written by the training run; nobody has judged the images yet. `diffusers-ext evaluate` adds measured
results. The model knows its data only, with their biases."""


# Options that are told otherwise, or that another run would choose for itself.
UNTOLD = ("preset", "config", "dry_run", "output_dir", "resume_from_checkpoint")


def write_training_card(
    output_dir: Path,
    config: TrainingConfig,
    networks: dict[str, ModelMixin],
    pipeline: DiffusionPipeline | None,
    *,
    steps: int,
    images_per_step: int,
) -> Path:
    """Fill the README.md of a run folder from the run: its command, options, networks, and last metrics.

    Args:
        output_dir: run folder, with its metrics.jsonl.
        config: options of the run.
        networks: trained, by the name of the component.
        pipeline: what the folder holds besides checkpoints; None for a component alone.
        steps: optimizer steps done.
        images_per_step: of one of them, over all processes.

    Returns:
        The file, written as a whole or not at all.
    """
    name = output_dir.resolve().name
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_pipeline_tag(pipeline),
        tags=["diffusers_ext", *sorted({type(network).__name__ for network in networks.values()})],
        datasets=[config.dataset] if _is_hub_name(config.dataset) else None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}",
        _introduction(config, networks, pipeline),
        _picture(output_dir),
        "```python\n" + _snippet(pipeline, networks) + "\n```",
        "## Training\n\n```sh\n"
        + training_command(config)
        + "\n```\n\n"
        + _facts(output_dir, config, steps, images_per_step),
        _noise_levels(output_dir),
        LIMITS,
    ]
    path = output_dir / "README.md"
    unfinished = path.with_name(".README.md.unfinished")
    unfinished.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    ModelCard.load(unfinished)  # its metadata can be read back
    os.replace(unfinished, path)
    return path


def _pipeline_tag(pipeline: DiffusionPipeline | None) -> str:
    if pipeline is None:
        return "image-classification"
    reads = pipeline.components.get("text_encoder") is not None
    return "text-to-image" if reads else "unconditional-image-generation"


def training_command(config: TrainingConfig) -> str:
    """The command that trains with these options, those of the preset left out."""
    presets = UNET_PRESETS if isinstance(config, UNetTrainingConfig) else CLASSIFIER_PRESETS
    preset = presets[config.preset]
    words = ["diffusers-ext", "train", "unet" if isinstance(config, UNetTrainingConfig) else "classifier"]
    words += ["--preset", config.preset]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == getattr(preset, field.name) or field.name in UNTOLD:
            continue
        words += as_arguments({field.name: _local_name(value) if isinstance(value, str) else value})
    return shlex.join(words)


def _introduction(config: TrainingConfig, networks: dict[str, ModelMixin], pipeline: DiffusionPipeline | None) -> str:
    names = {name: type(network).__name__ for name, network in networks.items()}
    told = " and ".join(
        f"{'an' if names[name][0] in 'AEIOU' else 'a'} `{names[name]}` of {network.num_parameters():,} parameters"
        for name, network in networks.items()
    )
    what = "A classifier of noisy images" if pipeline is None else f"A `{type(pipeline).__name__}` with {told}"
    if pipeline is None:
        what += f", {told}"
    library = "[diffusers](https://github.com/huggingface/diffusers)"
    return f"{what}, trained with {library} and `diffusers_ext` on `{_local_name(config.dataset)}`."


def _picture(output_dir: Path) -> str:
    pictures = sorted((output_dir / "samples").glob("*.png"))
    return f"![Samples at the end of the training](samples/{pictures[-1].name})" if pictures else ""


def _snippet(pipeline: DiffusionPipeline | None, networks: dict[str, ModelMixin]) -> str:
    if pipeline is None:
        (name, network), *_ = networks.items()
        return (
            f"import diffusers_ext\nfrom diffusers import AutoModel\n\n"
            f'{name} = AutoModel.from_pretrained(".", subfolder="{name}")  # this folder, or its repository\n'
            f"logits = {name}(images, timesteps).logits  # images in [-1, 1] with the noise of their timesteps"
        )
    arguments = ""
    if pipeline.components.get("text_encoder") is not None:
        arguments = 'prompt="...", '
    elif "classifier" in networks or networks[next(iter(networks))].config.get("num_class_embeds"):
        arguments = "class_labels=[0], guidance_scale=2.0, "
    return (
        "import diffusers_ext\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained(".")  # this folder, or the name of its repository\n'
        f'images = pipe({arguments}num_inference_steps=50).images\nimages[0].save("sample.png")'
    )


def _facts(output_dir: Path, config: TrainingConfig, steps: int, images_per_step: int) -> str:
    rows = {
        "optimizer steps": f"{steps:,}",
        "images per step": str(images_per_step),
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler}",
        "precision": {"no": "float32"}.get(config.mixed_precision, config.mixed_precision),
        "EMA": ", ".join(map(str, config.ema_decay)) if config.use_ema else "none",
        "seed": str(config.seed),
    }
    if isinstance(config, UNetTrainingConfig):
        rows |= {"prediction": config.prediction_type, "sampling of timesteps": config.timestep_sampling}
    metrics: dict[str, float] = {}
    if (output_dir / "metrics.jsonl").exists():
        for line in (output_dir / "metrics.jsonl").read_text().splitlines():
            metrics |= json.loads(line)
    losses = {name: value for name, value in metrics.items() if "loss" in name or name in ("mse", "vb")}
    rows |= {f"last {name}": f"{value:.4g}" for name, value in losses.items()}
    if metrics.get("nonfinite_steps"):
        rows["steps left out, as loss or gradient was not finite"] = f"{metrics['nonfinite_steps']:g}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{table}"


def _noise_levels(output_dir: Path) -> str:
    table = output_dir / "noise_levels.md"
    if not table.exists():
        return ""
    return f"## Accuracy by noise level\n\n{table.read_text().strip()}\n\n![Accuracy by noise level](noise_levels.png)"


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _local_name(value: str) -> str:
    """Paths of the machine that trained say nothing to others but their last name."""
    return Path(value).name if value.startswith(("/", "~")) else value
