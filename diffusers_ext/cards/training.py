"""Cards of training runs: what was trained, on what, and by which command."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

from diffusers_ext.cards.card import compose, read_card, save_card
from diffusers_ext.cards.document import dated
from diffusers_ext.cards.folder import read_folder
from diffusers_ext.training.config import (
    CLASSIFIER_PRESETS,
    UNET_PRESETS,
    TrainingConfig,
    UNetTrainingConfig,
    as_arguments,
)


# Options that are told otherwise, or that another run would choose for itself.
UNTOLD = ("preset", "config", "dry_run", "output_dir", "resume_from_checkpoint")


def write_training_card(
    output_dir: Path,
    config: TrainingConfig,
    *,
    steps: int,
    images_per_step: int,
) -> Path:
    """Fill the README.md of a run folder from the run: its command, options, networks, and last metrics.

    Args:
        output_dir: run folder, with what was trained and its metrics.jsonl.
        config: options of the run.
        steps: optimizer steps done.
        images_per_step: of one of them, over all processes.

    Returns:
        The file, written as a whole or not at all.
    """
    from diffusers_ext.hub.safety import redact  # `hub` imports this package

    told = (
        f"Trained with [diffusers](https://github.com/huggingface/diffusers) and `diffusers_ext` on "
        f"`{_local_name(config.dataset)}` by\n\n```sh\n{training_command(config)}\n```"
    )
    facts = _facts(output_dir, config, steps, images_per_step)
    contents = read_folder(output_dir)
    told = redact("\n\n".join([told, facts, *_noise_levels(output_dir)]))
    given = {"training": dated(told, contents.digest, contents.digest)}
    datasets = config.dataset if _is_hub_name(config.dataset) else None
    metadata = {"datasets": datasets, "license": config.license}
    content = compose(contents, read_card(output_dir), metadata=metadata, given=given)
    return save_card(output_dir, content)


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


def _noise_levels(output_dir: Path) -> list[str]:
    table = output_dir / "noise_levels.md"
    if not table.exists():
        return []
    picture = "![Accuracy by noise level](noise_levels.png)"
    return ["### Accuracy by noise level", table.read_text().strip(), picture]


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _local_name(value: str) -> str:
    """Paths of the machine that trained say nothing to others but their last name."""
    is_path = value.startswith(("/", "~", ".", "file:")) or "\\" in value
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_path else value
