"""The tasks: each builds its network, opens its data, and turns a batch into a loss. The loop knows nothing else."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from diffusers import DDIMScheduler, DDPMScheduler, ModelMixin

from diffusers_ext.models import PRESETS
from diffusers_ext.pipelines import ClassConditionalPipeline
from diffusers_ext.training.config import ClassifierTrainingConfig, TrainingConfig, UNetTrainingConfig
from diffusers_ext.training.data import ImageDataset, load_images
from diffusers_ext.training.objectives import ForwardProcess, denoising_losses


class Task:
    """A network to train, its data, and the loss of a batch.

    Args:
        config: options.
        device: where batches will be.
        variance_type, prediction_type: of the scheduler that is saved with the network.
    """

    name: str  # of the component in a pipeline, and of its folder
    data: ImageDataset

    def __init__(
        self,
        config: TrainingConfig,
        device: torch.device | str,
        variance_type: str = "fixed_small",
        prediction_type: str = "epsilon",
    ):
        self.config = config
        self.device = device
        self.model_class, self.model_options = network(config)
        self.scheduler = DDPMScheduler(
            config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            variance_type=variance_type,
            prediction_type=prediction_type,
            clip_sample=True,
        )
        self.process = ForwardProcess(self.scheduler.betas, device)

    def build_model(self) -> nn.Module:
        raise NotImplementedError

    def losses(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Means over a batch: `loss` is minimised, the others are logged. Noise comes from the global generator.

        Args:
            model: the network, possibly wrapped.
            images: uint8 `(B, C, H, W)` on the device.
            labels: class ids `(B,)` on the device, or None when the data have none.
        """
        raise NotImplementedError

    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Judge a network in evaluation mode, the same way at every step; may write files into `output_dir`.

        May seed the global generator: the loop seeds it before every batch.
        """
        raise NotImplementedError

    def save(self, model: nn.Module, output_dir: Path) -> None:
        """Write the trained network and its scheduler into their folders."""
        model.save_pretrained(output_dir / self.name)
        self.scheduler.save_pretrained(output_dir / "scheduler")

    def _load_images(self, split: str, need_labels: bool) -> ImageDataset:
        config = self.config
        return load_images(
            config.dataset,
            split,
            sample_size=self._option("sample_size"),
            channels=self._option("in_channels"),
            image_column=config.image_column,
            label_column=config.label_column,
            need_labels=need_labels,
        )

    def _option(self, name: str) -> Any:
        """What the network is built with, its constructor's defaults included."""
        return self.model_options.get(name, inspect.signature(self.model_class).parameters[name].default)


# Options of a training that are options of its network, where they are given.
NETWORK_OPTIONS = (
    "sample_size",
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "attention_resolutions",
    "attention_head_dim",
    "norm_num_groups",
    "resample_type",
    "resnet_time_scale_shift",
    "dropout",
    "pool",
)


def network(config: TrainingConfig) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Class of the network to train, and the options it is built with.

    Raises:
        ValueError: for an unknown `model`, and for options that its class does not have.
    """
    if config.model not in PRESETS:
        raise ValueError(f"`model` ({config.model!r}) is unknown. Valid: {', '.join(PRESETS)}.")
    model_class, options = PRESETS[config.model]
    given = {name: getattr(config, name, None) for name in NETWORK_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    for item in config.model_options:
        name, separator, value = item.partition("=")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value  # a word needs no quotation marks
        if not separator:
            raise ValueError(f"`model_options` holds {item!r}; write name=value.")
    valid = inspect.signature(model_class).parameters
    unknown = [name for name in given if name not in valid]
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is not an option of {model_class.__name__} (`model` {config.model!r}). "
            f"Valid: {', '.join(valid)}."
        )
    return model_class, {**options, **given}


class UNetTask(Task):
    """Predict the noise of an image, or what it follows from, and with learned variance how certain each step is."""

    def __init__(self, config: UNetTrainingConfig, device: torch.device | str = "cpu"):
        variance_type = "learned_range" if config.learned_variance else "fixed_small"
        super().__init__(config, device, variance_type, config.prediction_type)
        if config.learned_variance and config.prediction_type != "epsilon":
            raise ValueError(
                f"`prediction_type` is {config.prediction_type!r}, but the variance is learned beside the noise only. "
                'Use "epsilon", or leave the variance fixed with `learned_variance=False`.'
            )
        if not 0 <= config.class_dropout_prob < 1 or (config.class_dropout_prob and not config.class_conditional):
            raise ValueError(
                f"`class_dropout_prob` ({config.class_dropout_prob}) must lie in [0, 1), and be 0 unless "
                "`class_conditional` is set: it is the share of labels that the network does not see."
            )
        self.data = self._load_images(config.dataset_split, need_labels=config.class_conditional)
        self.name = "transformer" if "Transformer" in self.model_class.__name__ else "unet"

    def build_model(self) -> ModelMixin:
        config = self.config
        learned = {
            "out_channels": self._option("in_channels") * (2 if config.learned_variance else 1),
            "num_class_embeds": self.data.num_classes if config.class_conditional else None,
            "null_class": config.class_dropout_prob > 0,
        }
        return self.model_class(**self.model_options | learned)

    def save(self, model: nn.Module, output_dir: Path) -> None:
        ClassConditionalPipeline(**{self.name: model}, scheduler=self.scheduler).save_pretrained(output_dir)

    def losses(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        x_start = to_unit_range(images)
        noise = torch.randn_like(x_start)
        timesteps = torch.randint(self.process.num_timesteps, (len(images),), device=images.device)
        x_t = self.process.add_noise(x_start, noise, timesteps)
        if not self.config.class_conditional:
            labels = None
        elif self.config.class_dropout_prob:
            dropped = torch.rand(len(labels), device=labels.device) < self.config.class_dropout_prob
            labels = labels.masked_fill(dropped, self.data.num_classes)
        model_output = model(x_t, timesteps, labels).sample
        losses = denoising_losses(
            self.process, model_output, x_start, x_t, noise, timesteps, self.config.prediction_type
        )
        return {name: values.mean() for name, values in losses.items()}

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Draw images from fixed noise into `output_dir/samples/STEP.png`."""
        config = self.config
        count, channels, size = config.validation_images, self.data.channels, self.data.sample_size
        generator = torch.Generator().manual_seed(config.seed)
        sample = torch.randn(count, channels, size, size, generator=generator)
        sample = sample.to(self.device)
        labels = None
        if config.class_conditional:
            labels = torch.arange(count, device=self.device) % self.data.num_classes
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(config.validation_inference_steps)
        for timestep in scheduler.timesteps:
            epsilon = model(sample, timestep.to(self.device), labels).sample[:, :channels]
            sample = scheduler.step(epsilon, timestep, sample).prev_sample
        path = output_dir / "samples" / f"{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(sample).save(path)
        return {}


class ClassifierTask(Task):
    """Recognise the class of an image under any amount of noise."""

    name = "classifier"

    def __init__(self, config: ClassifierTrainingConfig, device: torch.device | str = "cpu"):
        super().__init__(config, device)
        self.data = self._load_images(config.dataset_split, need_labels=True)
        self.validation_data = self._load_images(config.validation_split, need_labels=True)

    def build_model(self) -> ModelMixin:
        return self.model_class(**self.model_options | {"num_classes": self.data.num_classes})

    def losses(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        timesteps = torch.randint(self.process.num_timesteps, (len(images),), device=images.device)
        logits = self._logits_of_noisy(model, images, timesteps)
        return {
            "loss": F.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean(),
        }

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Accuracy on held-out images in each quarter of the timesteps, from the cleanest to the noisiest."""
        config, quarter = self.config, self.process.num_timesteps // 4
        count = min(config.validation_images, len(self.validation_data))
        torch.manual_seed(config.seed)
        metrics = {}
        for index in range(4):
            correct = 0
            for start in range(0, count, config.train_batch_size):
                rows = list(range(start, min(start + config.train_batch_size, count)))
                images, labels = (x.to(self.device) for x in self.validation_data.__getitems__(rows))
                timesteps = torch.randint(quarter * index, quarter * (index + 1), (len(rows),), device=self.device)
                logits = self._logits_of_noisy(model, images, timesteps)
                correct += (logits.argmax(dim=1) == labels).sum().item()
            metrics[f"accuracy_quarter{index + 1}"] = correct / count
        return metrics

    def _logits_of_noisy(self, model: nn.Module, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        x_start = to_unit_range(images)
        x_t = self.process.add_noise(x_start, torch.randn_like(x_start), timesteps)
        return model(x_t, timesteps).logits.float()


TASKS: dict[type[TrainingConfig], type[Task]] = {
    UNetTrainingConfig: UNetTask,
    ClassifierTrainingConfig: ClassifierTask,
}


def image_grid(images: torch.Tensor) -> Image.Image:
    """Images `(B, C, H, W)` in [-1, 1], C = 1 or 3, as one picture of about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))
    pixels = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # rows, H, columns, W, C
    pixels = pixels.flatten(2, 3).flatten(0, 1).numpy()
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 `(B, C, H, W)` to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
