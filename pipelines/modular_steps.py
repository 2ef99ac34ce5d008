"""Blocks of Modular Diffusers that both pipelines of this package are made of: timesteps, noise, the loop, its step.

Every block says what it reads (`inputs`), what it adds to the state of a run (`intermediate_outputs`) and which
components it needs, so that blocks can be inserted, swapped and put together anew: a block that outputs `guide`, for
example, takes the place of the one that does so here.

Shapes: B batch, C channels of what the network draws, H and W its pixels.
"""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from diffusers import (
    ComponentsManager,
    ComponentSpec,
    DDPMScheduler,
    DiffusionPipeline,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor

from diffusers_ext.sampling import (
    ClassLabels,
    prepare_sample,
    prepare_timesteps,
    step_rule,
    takes_variance,
    with_exact_variance,
)


SCHEDULER = ComponentSpec(
    "scheduler",
    DDPMScheduler,
    description="Every scheduler of diffusers that samples from such a network, see diffusers_ext's README.",
)
IMAGE_PROCESSOR = ComponentSpec(
    "image_processor",
    VaeImageProcessor,
    description="Makes images of tensors.",
    config=FrozenDict({"vae_scale_factor": 1}),
    default_creation_method="from_config",
)

# What people give to a run, and what its blocks tell each other: type, default and meaning.
VALUES: dict[str, tuple[Any, Any, str]] = {
    "class_labels": (ClassLabels, None, "Class id, name out of `id2label`, or a list or tensor of them."),
    "guidance_scale": (float, None, "How far the prediction is moved to the class; None: what suits the components."),
    "guidance_interval": (tuple, (0.0, 1.0), "Part of the steps that is guided, from the noise (0) to the image (1)."),
    "num_inference_steps": (int, 50, "Steps of the scheduler."),
    "generator": (torch.Generator | list[torch.Generator], None, "Source of all noise, or a list of one per image."),
    "sample": (torch.Tensor, None, "Standard normal noise (B, C, H, W) to start from; None: drawn with `generator`."),
    "batch_size": (int, None, "Number of images; None: as many as other arguments have entries, or 1."),
    "eta": (float, 0.0, "Noise of `DDIMScheduler`: 0 none, 1 as much as an ancestral sampler adds."),
    "output_type": (str, "pil", "'pil', 'np' (B, H, W, C), 'pt' (B, C, H, W), or 'latent', as the scheduler left it."),
    "class_ids": (torch.Tensor, None, "Class ids (B,), int64; None without labels."),
    "sample_shape": (tuple, None, "(B, C, H, W) of what the network draws."),
    "timesteps": (torch.Tensor, None, "Timesteps of all network calls, one row each."),
    "timestep_values": (list, None, "The same as numbers."),
    "latents": (torch.Tensor, None, "The noisy images (B, C, H, W), float32; at the end the clean ones."),
    "guided_steps": (range, None, "Network calls inside `guidance_interval`."),
    "images": (list, None, "The images, as `output_type` says."),
}


def inputs(*names: str, required: Sequence[str] = (), **described: tuple[Any, Any, str]) -> list[InputParam]:
    """Inputs out of `VALUES`, or with type, default and meaning as given; new ones, since blocks change them."""
    table = {name: VALUES[name] for name in (*names, *required)} | described
    return [
        InputParam(name, type_hint=kind, default=default, required=name in required, description=meaning)
        for name, (kind, default, meaning) in table.items()
    ]


def outputs(*names: str, **described: tuple[Any, str]) -> list[OutputParam]:
    """Outputs out of `VALUES`, or with type and meaning as given."""
    table = {name: (VALUES[name][0], VALUES[name][2]) for name in names} | described
    return [OutputParam(name, type_hint=kind, description=meaning) for name, (kind, meaning) in table.items()]


class SetTimestepsStep(ModularPipelineBlocks):
    """Timesteps of the run."""

    @property
    def description(self) -> str:
        return "Sets the scheduler's timesteps."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [SCHEDULER]

    @property
    def inputs(self) -> list[InputParam]:
        return inputs("num_inference_steps", required=["batch_size"])

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("timesteps", "timestep_values")

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.timesteps, block_state.timestep_values = prepare_timesteps(
            components.scheduler, block_state.num_inference_steps, block_state.batch_size, components._execution_device
        )
        self.set_block_state(state, block_state)
        return components, state


class PrepareSampleStep(ModularPipelineBlocks):
    """The noise to start from."""

    @property
    def description(self) -> str:
        return "Draws the noise to start from, or scales the given one as the scheduler starts."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [SCHEDULER]

    @property
    def inputs(self) -> list[InputParam]:
        return inputs("sample", "generator", required=["sample_shape"])

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("latents")

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.latents = prepare_sample(
            block_state.sample,
            block_state.sample_shape,
            components.scheduler,
            block_state.generator,
            components._execution_device,
        )
        self.set_block_state(state, block_state)
        return components, state


class LoopSchedulerStep(ModularPipelineBlocks):
    """One step of the scheduler, inside the loop."""

    @property
    def description(self) -> str:
        return "Takes the scheduler's step from `prediction` and, where it is learned, `variance`; then adds `shift`."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [SCHEDULER]

    @property
    def inputs(self) -> list[InputParam]:
        return inputs(required=["latents"])

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("latents")

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor):
        prediction = block_state.prediction
        if takes_variance(components.scheduler):
            prediction = torch.cat([prediction, block_state.variance], dim=1)
        latents = block_state.step(i, t, block_state.latents, prediction)
        block_state.latents = latents if block_state.shift is None else latents + block_state.shift
        return components, block_state


class DenoiseLoop(LoopSequentialPipelineBlocks):
    """The loop over the timesteps; a subclass names what runs in each.

    What runs in it finds `latents` (B, C, H, W) and `timestep_values` in its state, gets the index `i` of the network
    call and the timestep `t`, and leaves `prediction` and `variance`, both (B, C, H, W), the second None where none is
    learned, and `shift`, what is to be added to the result of the scheduler's step, or None.
    """

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        return [SCHEDULER]

    @property
    def loop_inputs(self) -> list[InputParam]:
        return inputs("generator", "eta", required=["timesteps", "timestep_values", "latents"])

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.step = step_rule(
            with_exact_variance(components.scheduler),
            block_state.timestep_values,
            block_state.generator,
            block_state.eta,
        )
        block_state.shift = None
        for i, t in enumerate(self.progress_bar(block_state.timesteps)):
            components, block_state = self.loop_step(components, block_state, i=i, t=t)
        self.set_block_state(state, block_state)
        return components, state


def scaled(scheduler: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The network's input for the noisy image."""
    return scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents


class ModularIndex(ModularPipeline):
    """Reads the index of a modular repository; `import diffusers_ext` lets it be checked meanwhile."""


def _reason(error: OSError) -> BaseException:
    """What stood in the way of a config, where diffusers tells of a missing file also when the Hub gave no answer."""
    reason = error.__context__ or error
    return reason.__cause__ or reason if isinstance(reason, LocalEntryNotFoundError) else reason


class PipelineBlocks(SequentialPipelineBlocks):
    """All blocks of a pipeline."""

    standard_pipeline: type[DiffusionPipeline]

    def init_pipeline(
        self,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
    ) -> ModularPipeline:
        """A pipeline of these blocks, whose components `load_components` loads.

        Args:
            pretrained_model_name_or_path: folder or Hub name of a modular repository or one of the standard pipeline,
                self-contained or not. None: components are given by `update_components`.
            components_manager, collection: as diffusers has them.

        Raises:
            OSError: when neither `modular_model_index.json` nor `model_index.json` can be read, with the reasons.
        """
        source, index, standard_index = pretrained_model_name_or_path, None, None
        if source is not None:
            source = os.fspath(source)  # diffusers keeps it in the index, where it must be a text
            index, standard_index = self._read_index(source)
        return ModularPipeline(
            blocks=copy.deepcopy(self),
            pretrained_model_name_or_path=source,
            components_manager=components_manager,
            collection=collection,
            modular_config_dict=index,
            config_dict=standard_index,
        )

    def _read_index(self, source: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The modular index of a repository, or else that of a standard pipeline."""
        reasons = {}
        try:
            return ModularIndex.load_config(source), None
        except OSError as error:
            reasons[ModularIndex.config_name] = _reason(error)
        try:  # by the standard class, which knows its repositories
            index = self.standard_pipeline.load_config(source)
        except OSError as error:
            reasons[self.standard_pipeline.config_name] = _reason(error)
            raise OSError(
                f"`pretrained_model_name_or_path` {source!r} could not be read. "
                + " ".join(f"{name}: {' '.join(str(reason).split())}" for name, reason in reasons.items())
            ) from error
        return None, {name: value for name, value in index.items() if value != [None, None]}  # nothing to load there
