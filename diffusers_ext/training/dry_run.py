"""What a run would be, without running it: its options, the network's size, the memory of a step, and the steps."""

import os
from dataclasses import asdict

import torch
import yaml

from diffusers_ext.inspection.passes import activation_bytes
from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.data import ImageData
from diffusers_ext.training.preparation import planned_steps
from diffusers_ext.training.tasks import TASKS


def describe(config: TrainingConfig) -> str:
    """The resolved options as YAML that `--config` reads back, and the rest as comments below them.

    The data are opened, as the numbers of classes and of epochs follow from them, so that wrong ones are found here;
    they are not turned into latents.

    Raises:
        ValueError: for options and data that the training would refuse.
    """
    task = TASKS[type(config)](config, dry_run=True)
    with torch.device("meta"):
        model = task.build_model(pretrained_weights=False)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    for name in ("config", "dry_run"):
        del options[name]
    lines = [yaml.safe_dump(options, sort_keys=False, allow_unicode=True).rstrip()]
    parameters = sum(p.numel() for p in model.parameters())
    lines += [f"# network: {type(model).__name__}, {parameters:,} parameters"]
    lines += ["# memory: " + _memory(config, model, task.data.sample_size)]
    lines += ["# steps: " + _steps(config, task.data)]
    return "\n".join(lines) + "\n"


def _memory(config: TrainingConfig, model: torch.nn.Module, size: int) -> str:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = activation_bytes(model, size, config.train_batch_size)
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights // (4 if config.use_8bit_adam else 1),
        "EMA": len(config.ema_decay) * weights if config.use_ema else 0,
        # With 16 bits nearly all of them are.
        "activations": activations // (1 if config.mixed_precision == "no" else 2),
    }
    told = ", ".join(f"{name} {value / 1e6:,.0f}" for name, value in parts.items() if value)
    return f"about {sum(parts.values()) / 1e6:,.0f} MB per process ({told}), and what the framework itself takes"


def _steps(config: TrainingConfig, data: ImageData) -> str:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    per_step = config.train_batch_size * config.gradient_accumulation_steps * processes
    steps, _ = planned_steps(config, data, processes)
    told = f"{steps:,} of {per_step} images on {processes} process{'es' * (processes > 1)}"
    try:
        rows = len(data)
    except TypeError:  # streamed
        return told
    return f"{told}: {steps * per_step:,} images, {steps * per_step / rows:.1f} times the {rows:,} of the data"
