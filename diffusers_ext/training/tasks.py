"""The tasks: each builds its network, opens its data, and turns a batch into a loss. The loop knows nothing else."""

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
)

from diffusers_ext.cards import write_training_card
from diffusers_ext.evaluation.noise_levels import accuracy_by_noise_level
from diffusers_ext.hub.export import forget_folders, read_json
from diffusers_ext.hub.flattening import our_class
from diffusers_ext.hub.loading import load_pipeline, open_folder
from diffusers_ext.hub.remote import create_repository, push
from diffusers_ext.hub.safety import UnsafeRepositoryError, redact
from diffusers_ext.models import PRESETS
from diffusers_ext.pipelines import ClassConditionalPipeline, ClassifierGuidedPipeline
from diffusers_ext.training.captions import CaptionEncoder
from diffusers_ext.training.config import ClassifierTrainingConfig, TrainingConfig, UNetTrainingConfig, named_values
from diffusers_ext.training.critics import Critics
from diffusers_ext.training.data import Batch, ImageData, open_data
from diffusers_ext.training.objectives import Objective, build_scheduler
from diffusers_ext.training.process import ForwardProcess, exact_betas


class Task:
    """A network to train, its data, and the loss of a batch.

    Args:
        config: options.
        device: where batches will be.
        dry_run: open only what tells the size of the run.
    """

    name: str  # of the component in a pipeline, and of its folder
    components: tuple[str, ...]  # what the network may be called in a pipeline that it is taken from
    data: ImageData
    scheduler: SchedulerMixin  # saved with the network

    def __init__(self, config: TrainingConfig, device: torch.device | str):
        self.config = config
        self.device = torch.device(device)
        self.pretrained: ModelMixin | None = None
        if config.pretrained_model_name_or_path is None:
            self.model_class, self.model_options = network(config)
            return
        given = [*given_options(config), *(["model_options"] if config.model_options else [])]
        if given:
            raise ValueError(
                f"`{given[0]}` is given, but `pretrained_model_name_or_path` "
                f"({config.pretrained_model_name_or_path!r}) has a shape of its own; leave one of them out."
            )
        self.pretrained = load_network(config.pretrained_model_name_or_path, self.components)
        self.model_class = type(self.pretrained)
        self.model_options = {key: value for key, value in self.pretrained.config.items() if not key.startswith("_")}

    def _check_class(self, option: str, kind: str) -> None:
        if option not in inspect.signature(self.model_class).parameters:
            config = self.config
            name = config.pretrained_model_name_or_path or config.model
            raise ValueError(
                f"`model` ({name!r}) is of the class {self.model_class.__name__}, which is no {kind}. `train unet` "
                "trains what removes noise, `train classifier` what recognises classes."
            )

    def build_model(self, pretrained_weights: bool = True) -> ModelMixin:
        """The network, with random weights or those of the pretrained one.

        Args:
            pretrained_weights: False leaves the weights random in any case.

        Raises:
            ValueError: when the data or the objective need another network than the pretrained one.
        """
        learned = self.learned_options()
        if self.pretrained is not None:
            for name, value in learned.items():
                if name in self.model_options and self.model_options[name] != value:
                    raise ValueError(
                        f"`pretrained_model_name_or_path` ({self.config.pretrained_model_name_or_path!r}) has "
                        f"{name}={self.model_options[name]}, but this training needs {value}. Change the options of "
                        "the training (`learned_variance`, `class_conditional`, `class_dropout_prob`), or train anew."
                    )
        model = self.model_class(**self.model_options | learned)
        if self.pretrained is not None and pretrained_weights:
            model.load_state_dict(self.pretrained.state_dict())
        return model

    def learned_options(self) -> dict[str, Any]:
        """Options of the network that follow from the data and the objective."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Means over a batch: `loss` is minimised, the others are logged. Noise comes from the global generator.

        Args:
            model: the network, possibly wrapped.
            batch: on the device.
        """
        raise NotImplementedError

    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Judge a network in evaluation mode, the same way at every step; may write files into `output_dir`.

        May seed the global generator: the loop seeds it before every batch.
        """
        raise NotImplementedError

    def pipeline(self, model: nn.Module) -> DiffusionPipeline | None:
        """The complete pipeline around the trained network, if there is one."""
        raise NotImplementedError

    def save(self, model: nn.Module, output_dir: Path, steps: int, images_per_step: int) -> None:
        """Write the trained pipeline, or network and scheduler, and a model card filled from the run.

        Args:
            model: the trained network.
            output_dir: run folder.
            steps: optimizer steps done.
            images_per_step: of one of them, over all processes.
        """
        pipeline = self.pipeline(model)
        if pipeline is None:
            model.save_pretrained(output_dir / self.name)
            self.scheduler.save_pretrained(output_dir / "scheduler")
        else:
            pipeline.save_pretrained(output_dir)
        forget_folders(output_dir)
        write_training_card(output_dir, self.config, steps=steps, images_per_step=images_per_step)

    def create_repository(self) -> str:
        """Make the repository to publish to, if it is not there, and return its full name.

        Raises:
            ValueError: when that fails; asked before the training, it costs nothing.
        """
        name = self.config.hub_model_id or Path(self.config.output_dir).resolve().name
        try:
            return create_repository(name, private=self.config.hub_private_repo)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`push_to_hub`: the repository {redact(repr(name))} cannot be made ({error}). Log in with "
                "`hf auth login`, choose another `hub_model_id`, or leave `push_to_hub` out and upload later."
            ) from error

    def publish(self, output_dir: Path) -> str:
        """Upload the finished run folder without its checkpoints; returns the address.

        Raises:
            ValueError: when that fails; the run is saved all the same.
        """
        name = self.config.hub_model_id or output_dir.resolve().name
        try:
            info = push(
                output_dir,
                name,
                private=self.config.hub_private_repo,
                commit_message=f"Train {self.model_class.__name__} with diffusers_ext",
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`push_to_hub`: {error} The run is saved in {output_dir}; `diffusers-ext push {output_dir} {name}` "
                "uploads it."
            ) from error
        return str(info.repo_url)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the task beside its network."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def _open_data(self, split: str, streaming: bool | None = None, **options: Any) -> ImageData:
        config = self.config if streaming is None else replace(self.config, streaming=streaming)
        size, channels = self._option("sample_size"), self._option("in_channels")
        return open_data(config, split, sample_size=size, channels=channels, **options)

    def _draw(self, pipeline: DiffusionPipeline, count: int, arguments: dict[str, Any], path: Path) -> None:
        """A grid of `count` samples, each from a seed of its own, by DDIM, or Euler's method for a flow.

        Lists among `arguments` have an entry for each sample.
        """
        if isinstance(pipeline.scheduler, DDPMScheduler):
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.to(self.device).set_progress_bar_config(disable=True)
        images = []
        for start in range(0, count, self.config.train_batch_size):
            rows = slice(start, min(start + self.config.train_batch_size, count))
            generators = [
                torch.Generator().manual_seed(self.config.seed + row) for row in range(rows.start, rows.stop)
            ]
            own = {name: value[rows] if isinstance(value, list) else value for name, value in arguments.items()}
            images.append(pipeline(**own, generator=generators, output_type="pt").images.float().cpu())
        images = torch.cat(images)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        image_grid(images * 2 - 1).save(unfinished, format="png")
        unfinished.replace(path)

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


def given_options(config: TrainingConfig) -> dict[str, Any]:
    """Options of the network that were given by name."""
    given = {name: getattr(config, name, None) for name in NETWORK_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def network(config: TrainingConfig) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Class of the network to train, and the options it is built with.

    Raises:
        ValueError: for an unknown `model`, and for options that its class does not have.
    """
    if config.model not in PRESETS:
        raise ValueError(f"`model` ({config.model!r}) is unknown. Valid: {', '.join(PRESETS)}.")
    model_class, options = PRESETS[config.model]
    given = given_options(config) | named_values("model_options", config.model_options)
    valid = inspect.signature(model_class).parameters
    unknown = [name for name in given if name not in valid]
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is not an option of {model_class.__name__} (`model` {config.model!r}). "
            f"Valid: {', '.join(valid)}."
        )
    return model_class, {**options, **given}


def load_network(name: str, components: tuple[str, ...]) -> ModelMixin:
    """A network by itself, or one of the components of a pipeline, in float32.

    Args:
        name: folder or Hub name.
        components: what the network may be called in a pipeline.

    Raises:
        ValueError: when there is none.
    """
    rule = (
        f"`pretrained_model_name_or_path` ({name!r}) must be the folder or Hub name of a network, or of a pipeline "
        f"that has one of {', '.join(components)}"
    )
    reasons = []
    try:
        folder = str(open_folder(name, argument="pretrained_model_name_or_path"))
    except UnsafeRepositoryError:
        raise
    except ValueError as error:
        raise ValueError(f"{rule}: {error}") from error
    for subfolder in (*(name for name in components if Path(folder, name).is_dir()), None):
        try:
            loader = _loader(Path(folder, subfolder or ""))
            return loader.from_pretrained(folder, subfolder=subfolder, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            reasons.append(str(error).strip().splitlines()[0])
    raise ValueError(f"{rule}: {reasons[-1]}")


def _loader(folder: Path) -> type:
    """The class of ours that the config names, whose code the folder may carry, or else `AutoModel`."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    return our_class(config.get("_class_name")) or AutoModel


class UNetTask(Task):
    """Predict the noise of an image, or what it follows from, and with learned variance how certain each step is."""

    components = ("unet", "transformer")

    def __init__(self, config: UNetTrainingConfig, device: torch.device | str = "cpu", dry_run: bool = False):
        super().__init__(config, device)
        self._check_class("num_class_embeds", "denoiser")
        if not 0 <= config.class_dropout_prob < 1 or (config.class_dropout_prob and not config.class_conditional):
            raise ValueError(
                f"`class_dropout_prob` ({config.class_dropout_prob}) must lie in [0, 1), and be 0 unless "
                "`class_conditional` is set: it is the share of labels that the network does not see."
            )
        self.objective = Objective(config, self.device)
        self.scheduler = self.objective.scheduler
        self.name = "transformer" if "Transformer" in self.model_class.__name__ else "unet"
        self.captions = None
        if config.caption_column is not None:
            self.captions = CaptionEncoder.from_pretrained(config.text_encoder).to(self.device)
            if self.pretrained is None and "cross_attention_dim" in inspect.signature(self.model_class).parameters:
                self.model_options = {"cross_attention_dim": self.captions.dim} | self.model_options
            self.captions.check_network(self.model_class, self.model_options)
        needs = {"need_labels": config.class_conditional, "need_captions": self.captions is not None}
        if dry_run:  # without the latents, which take long to make, and the networks of further losses
            size = self._option("sample_size")
            channels = self._option("in_channels") if config.vae is None else 3
            data_config = replace(config, vae=None)
            self.data = open_data(data_config, config.dataset_split, sample_size=size, channels=channels, **needs)
            return
        self.data = self._open_data(config.dataset_split, **needs)
        self.vae = None
        if config.vae is not None:
            vae = open_folder(config.vae, argument="vae")
            self.vae = AutoencoderKL.from_pretrained(vae, use_safetensors=True)
        self.critics = Critics(
            config, channels=self._option("in_channels"), sample_size=self._option("sample_size"), device=self.device
        )

    def learned_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "out_channels": self._option("in_channels") * (2 if config.learned_variance else 1),
            "num_class_embeds": self.data.num_classes if config.class_conditional else None,
            "null_class": config.class_dropout_prob > 0,
        }

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        x_start = batch.images if self.data.latents else to_unit_range(batch.images)
        conditions: dict[str, Any] = {}
        # Images lose class and caption together, as guidance asks for the prediction without either.
        chance = torch.rand(len(x_start))
        if self.config.class_conditional:
            dropped = (chance < self.config.class_dropout_prob).to(self.device)
            conditions["class_labels"] = batch.labels.masked_fill(dropped, self.data.num_classes)
        if self.captions is not None:
            dropped = (chance < self.config.caption_dropout_prob).tolist()
            captions = ["" if drop else caption for drop, caption in zip(dropped, batch.captions)]
            conditions |= self.captions.conditions(captions)
        step = self.objective.step(lambda x_t, timesteps: model(x_t, timesteps, **conditions).sample, x_start)
        return {name: values.mean() for name, values in self.critics.losses(step, x_start).items()}

    def pipeline(self, model: nn.Module) -> ClassConditionalPipeline:
        names = self.data.class_names if self.config.class_conditional else None
        text = {} if self.captions is None else self.captions.components()
        return ClassConditionalPipeline(
            **{self.name: model},
            scheduler=self.scheduler,
            vae=self.vae,
            id2label=None if names is None else dict(enumerate(names)),
            **text,
        )

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Draw images from fixed noise into `output_dir/samples/STEP.png`."""
        config, count = self.config, self.config.validation_images
        arguments: dict[str, Any] = {"guidance_scale": config.validation_guidance_scale}
        if config.class_conditional:
            arguments["class_labels"] = [index % self.data.num_classes for index in range(count)]
        if self.captions is not None:
            prompts = config.validation_prompts or self._first_captions(count)
            arguments["prompt"] = [prompts[index % len(prompts)] for index in range(count)]
        arguments["num_inference_steps"] = config.validation_inference_steps
        self._draw(self.pipeline(model), count, arguments, output_dir / "samples" / f"{step:07d}.png")
        return {}

    def _first_captions(self, count: int) -> list[str]:
        try:
            count = min(count, len(self.data))
        except TypeError:  # streamed
            pass
        return self.data.rows(list(range(count))).captions

    def state_dict(self) -> dict[str, Any]:
        return {"objective": self.objective.state_dict(), "critics": self.critics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.critics.load_state_dict(state["critics"])


class ClassifierTask(Task):
    """Recognise the class of an image under any amount of noise."""

    name = "classifier"
    components = ("classifier",)

    def __init__(self, config: ClassifierTrainingConfig, device: torch.device | str = "cpu", dry_run: bool = False):
        super().__init__(config, device)
        self._check_class("num_classes", "classifier")
        self.guided = None if config.unet is None else self._open_guided(config.unet)
        self.scheduler = build_scheduler(config)
        self.process = ForwardProcess(exact_betas(self.scheduler), self.device)
        self.data = self._open_data(config.dataset_split, need_labels=True)
        self.validation_data = self._open_data(
            config.validation_split,
            need_labels=True,
            streaming=False,
            num_classes=self.data.num_classes,
            split_option="validation_split",
        )

    def learned_options(self) -> dict[str, Any]:
        return {"num_classes": self.data.num_classes}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        x_start = to_unit_range(batch.images)
        timesteps = torch.randint(self.process.num_timesteps, (len(x_start),), device=self.device)
        x_t = self.process.add_noise(x_start, torch.randn_like(x_start), timesteps)
        logits = model(x_t, timesteps).logits.float()
        return {
            "loss": F.cross_entropy(logits, batch.labels),
            "accuracy": (logits.argmax(dim=1) == batch.labels).float().mean(),
        }

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int, output_dir: Path) -> dict[str, float]:
        """Accuracy and calibration on held-out images at eight noise levels, as table and plot in `output_dir`, and
        guided samples where there is a denoiser to guide."""
        report = accuracy_by_noise_level(
            model,
            self.scheduler,
            self.validation_data,
            num_images=self.config.validation_images,
            batch_size=self.config.train_batch_size,
            seed=self.config.seed,
            device=self.device,
        )
        report.save(output_dir)
        pipeline = self.pipeline(model)
        if pipeline is not None:
            count = min(self.data.num_classes, self.config.validation_images, 64)
            arguments = {"class_labels": list(range(count)), "num_inference_steps": 25}
            self._draw(pipeline, count, arguments, output_dir / "samples" / f"{step:07d}.png")
        return report.metrics()

    def _open_guided(self, name: str) -> DiffusionPipeline:
        """The pipeline whose denoiser is to be guided."""
        try:
            pipeline = load_pipeline(name, argument="unet")
        except (OSError, ValueError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"`unet` ({name!r}) must be the folder or Hub name of a pipeline: {reason}") from error
        network = pipeline.components.get("transformer") or pipeline.components.get("unet")
        if network is None or pipeline.components.get("vae") is not None:
            raise ValueError(
                f"`unet` ({name!r}) is a {type(pipeline).__name__} without a network that draws images; a classifier "
                "of images cannot guide it."
            )
        for option in ("sample_size", "in_channels"):
            drawn, read = network.config[option], self._option(option)
            if drawn != read:
                raise ValueError(
                    f"`unet` ({name!r}) has {option}={drawn}, but the classifier {read}: give `{option}` {drawn}, so "
                    "that both see the same images."
                )
        return pipeline

    def pipeline(self, model: nn.Module) -> ClassifierGuidedPipeline | None:
        if self.guided is None:
            return None
        names, config = self.data.class_names, self.scheduler.config
        keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
        keys += ("rescale_betas_zero_snr",)
        return ClassifierGuidedPipeline(
            unet=self.guided.components.get("transformer") or self.guided.unet,
            classifier=model,
            scheduler=self.guided.scheduler,
            id2label=None if names is None else dict(enumerate(names)),
            classifier_schedule={key: config[key] for key in keys if config[key] not in (None, False)},
        )


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
