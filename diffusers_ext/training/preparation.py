"""What a run is made of, out of its options: accelerator, network, optimizer, learning rates, number of steps."""

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from torch import nn

from diffusers.optimization import get_scheduler

from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.data import ImageData
from diffusers_ext.training.tasks import Task
from diffusers_ext.training.tracking import LOGS, trackers


def start_accelerator(config: TrainingConfig) -> Accelerator:
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError(
            "`mixed_precision` is 'fp16', but float16 on a CPU is emulated and a thousand times slower; use 'bf16'."
        )
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes that `torchrun` starts there do not find each other
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=trackers(config.report_to) or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir) / LOGS)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # the others wait for a validation
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        adapt_deepspeed(accelerator.state.deepspeed_plugin, config)
    return accelerator


def adapt_deepspeed(plugin: DeepSpeedPlugin, config: TrainingConfig) -> None:
    """Give DeepSpeed, which takes the steps itself, the options of the training.

    Raises:
        ValueError: for what does not work with it.
    """
    if plugin.zero_stage == 3:
        raise ValueError(
            "`zero_stage` is 3 in the configuration of DeepSpeed, which leaves no weights to average and check; use "
            "FSDP2 (accelerate/fsdp2.yaml) to shard the weights, or ZeRO-2 (accelerate/deepspeed_zero2.yaml)."
        )
    if config.on_nonfinite == "skip":
        raise ValueError("`on_nonfinite` is 'skip', but DeepSpeed takes the step itself; use 'stop' with it.")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.train_batch_size  # it knows no loader of ours
    plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm


def build_network(task: Task, config: TrainingConfig) -> nn.Module:
    network = task.build_model().train()
    if config.gradient_checkpointing:
        if not network._supports_gradient_checkpointing:
            raise ValueError(
                f"`gradient_checkpointing` is set, but {type(network).__name__} has none; leave it out, or choose "
                "another `model`."
            )
        network.enable_gradient_checkpointing()
    return network.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)


def build_optimizer(network: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(network.parameters(), **options, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError('`use_8bit_adam` needs bitsandbytes: pip install "diffusers_ext[8bit]"') from error
    if device.type == "cpu":
        raise ValueError("`use_8bit_adam` needs a GPU: bitsandbytes has no optimizer for the CPU. Leave it out here.")
    return AdamW8bit(network.parameters(), **options)


def learning_rates(optimizer: torch.optim.Optimizer, config: TrainingConfig, steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer steps done, so that nothing about it needs to be saved."""
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps
    ).lr_lambdas[0]
    return lambda step: config.learning_rate * schedule(step)


def planned_steps(config: TrainingConfig, data: ImageData, processes: int) -> tuple[int, int]:
    """Optimizer steps of a run, and between its validations.

    Raises:
        ValueError: when they are given in epochs, and the length of the data is unknown.
    """

    def steps(epochs_name: str, otherwise: int) -> int:
        epochs = getattr(config, epochs_name)
        if epochs is None:
            return otherwise
        try:
            rows = len(data)
        except TypeError as error:
            raise ValueError(
                f"`{epochs_name}` ({epochs}) needs data of known length, which streamed data are not; give "
                f"`{epochs_name.replace('epochs', 'steps').replace('num_', 'max_')}` instead."
            ) from error
        return math.ceil(epochs * rows / (config.train_batch_size * config.gradient_accumulation_steps * processes))

    return steps("num_train_epochs", config.max_train_steps), steps("validation_epochs", config.validation_steps)
