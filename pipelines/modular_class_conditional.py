"""`ClassConditionalPipeline` as blocks of Modular Diffusers: classes, texts, both or neither, in pixels or in latents.

    pipe = ClassConditionalBlocks().init_pipeline("me/my-model")  # modular, or of the standard pipeline
    pipe.load_components()
    images = pipe(class_labels=[3], guidance_scale=2.0, output="images")

Checks, guidance and images are those of the standard pipeline, whose methods the blocks call on their own components.
Shapes: B batch, C channels of image or latent, H and W its pixels, P texts, T tokens of each, D their width.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers import (
    AutoencoderKL,
    AutoModel,
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
)
from diffusers.guiders import ClassifierFreeGuidance

from diffusers_ext.pipelines.modular_steps import (
    SCHEDULER,
    DenoiseLoop,
    LoopSchedulerStep,
    PipelineBlocks,
    PrepareSampleStep,
    SetTimestepsStep,
    inputs,
    outputs,
    scaled,
)
from diffusers_ext.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_ext.sampling import Prompts, check_arguments, guided_calls, image_channels, with_exact_variance


COMPONENTS = [
    ComponentSpec("unet", AutoModel, description="Denoising network."),
    SCHEDULER,
    ComponentSpec("transformer", AutoModel, description="Denoising network in place of `unet`."),
    ComponentSpec("vae", AutoencoderKL, description="Decoder of the latents that the network draws; None: images."),
    ComponentSpec("guide_model", AutoModel, description="A worse version of the network, for autoguidance."),
    ComponentSpec(
        "guider",
        ClassifierFreeGuidance,
        description="Any guider, which combines both predictions in place of a weighted sum, with a scale of its own.",
    ),
    ComponentSpec("text_encoder", CLIPTextModel, description="Encoder of prompts, any of transformers."),
    ComponentSpec("tokenizer", CLIPTokenizer, description="Its tokenizer."),
]
CONFIGS = [
    ConfigSpec("id2label", None, "Names of the classes; several names of one are separated by commas."),
    ConfigSpec("null_class_label", None, "Label that stands for no class, where the network's config does not say."),
]
PROMPTS = {
    "prompt": (str | list[str], None, "Text, or a list of texts, for a network that attends to them."),
    "negative_prompt": (str | list[str], None, "What the worse prediction is made for; None: the empty text."),
    "prompt_embeds": (torch.Tensor, None, "Hidden states of a text encoder (P, T, D) in place of `prompt`."),
    "prompt_attention_mask": (torch.Tensor, None, "(P, T), nonzero where a token may be seen; None: all."),
    "negative_prompt_embeds": (torch.Tensor, None, "Hidden states (P, T, D) in place of `negative_prompt`."),
    "negative_prompt_attention_mask": (torch.Tensor, None, "(P, T), nonzero where a token may be seen; None: all."),
}
GUIDED_CHANNELS = (int, None, "Guides the first of the channels only, as DiT published it; None: all.")
IMAGES_PER_PROMPT = (int, 1, "Images of each prompt and of each label, one after the other.")
WORDS = (Prompts, "What the call says in words, checked.")
TEXT = (tuple, "Hidden states (B, T, D) of the texts and their mask (B, T); None where the network reads none.")
NEGATIVE_TEXT = (tuple, "The same of what the worse prediction is made for.")
GUIDE = (Callable, "Makes the guided output of the network, see `ClassConditionalPipeline.prepare_guidance`.")


def needed(kind_and_meaning: tuple[Any, str]) -> tuple[Any, None, str]:
    """An output as the input of a later block."""
    return kind_and_meaning[0], None, kind_and_meaning[1]


def as_standard(components: Any) -> ClassConditionalPipeline:
    """The standard pipeline around the same components."""
    parts = {spec.name: getattr(components, spec.name) for spec in COMPONENTS}
    return ClassConditionalPipeline(**parts, **{spec.name: components.config[spec.name] for spec in CONFIGS})


class StandardStep(ModularPipelineBlocks):
    """A block that asks the standard pipeline around its components."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return COMPONENTS

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return CONFIGS


class ClassConditionalInputStep(StandardStep):
    """Arguments of the run, checked."""

    @property
    def description(self) -> str:
        return "Checks all arguments and components before any network is run, and looks up the class ids."

    @property
    def inputs(self) -> list[InputParam]:
        return inputs(
            "class_labels",
            "guidance_scale",
            "guidance_interval",
            "num_inference_steps",
            "generator",
            "sample",
            "batch_size",
            "eta",
            "output_type",
            guided_channels=GUIDED_CHANNELS,
            height=(int, None, "Height of the images in pixels; None: `sample_size` of the network."),
            width=(int, None, "Width of the images in pixels; None: `sample_size` of the network."),
            num_images_per_prompt=IMAGES_PER_PROMPT,
            **PROMPTS,
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("class_ids", "guidance_scale", "batch_size", "sample_shape", prompts=WORDS)

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        pipe = as_standard(components)
        prompts = Prompts(**{name: block_state[name] for name in PROMPTS})
        given_scale, sample = block_state.guidance_scale, block_state.sample
        size = (block_state.height, block_state.width)
        class_ids, batch_size = pipe.count_images(
            block_state.class_labels,
            prompts,
            block_state.num_images_per_prompt,
            block_state.batch_size,
            sample,
            block_state.generator,
        )
        block_state.batch_size, block_state.prompts = batch_size, prompts
        if given_scale is None:
            block_state.guidance_scale = pipe.default_guidance_scale(class_ids, prompts)
        check_arguments(
            components.scheduler,
            guidance_scale=block_state.guidance_scale,
            guidance_interval=block_state.guidance_interval,
            num_inference_steps=block_state.num_inference_steps,
            generator=block_state.generator,
            sample=sample,
            batch_size=batch_size,
            channels=image_channels(components.transformer if components.unet is None else components.unet),
            class_ids=class_ids,
            eta=block_state.eta,
            output_type=block_state.output_type,
            callback_on_step_end_tensor_inputs=(),
            callback_tensor_inputs=(),
        )
        num_texts = batch_size // block_state.num_images_per_prompt
        pipe.check_inputs(
            class_ids,
            prompts,
            num_texts,
            given_scale,
            block_state.guidance_interval,
            block_state.guided_channels,
            block_state.num_inference_steps,
            sample,
            *size,
        )

        block_state.class_ids = None
        if class_ids is not None:
            block_state.class_ids = torch.tensor(class_ids, device=components._execution_device).expand(batch_size)
        block_state.sample_shape = pipe.sample_shape(batch_size, sample, *size)
        self.set_block_state(state, block_state)
        return components, state


class TextStep(StandardStep):
    """Texts for the network."""

    @property
    def description(self) -> str:
        return "Encodes the prompts, one per image, where the network attends to text."

    @property
    def inputs(self) -> list[InputParam]:
        return inputs(required=["batch_size"], prompts=needed(WORDS), num_images_per_prompt=IMAGES_PER_PROMPT)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs(text=TEXT, negative_text=NEGATIVE_TEXT)

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.text, block_state.negative_text = as_standard(components).prepare_text(
            block_state.prompts, block_state.batch_size, block_state.num_images_per_prompt
        )
        self.set_block_state(state, block_state)
        return components, state


class PrepareGuidanceStep(StandardStep):
    """What the guided steps of the run have in common."""

    @property
    def description(self) -> str:
        return "Chooses which predictions are made in every step, and how they are combined."

    @property
    def inputs(self) -> list[InputParam]:
        return inputs(
            "guidance_interval",
            "class_ids",
            required=["batch_size", "sample_shape", "timestep_values"],
            guided_channels=GUIDED_CHANNELS,
            prompts=needed(WORDS),
            text=needed(TEXT),
            negative_text=needed(NEGATIVE_TEXT),
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("guided_steps", guide=GUIDE)

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.guided_steps = guided_calls(
            with_exact_variance(components.scheduler), block_state.guidance_interval, len(block_state.timestep_values)
        )
        block_state.guide = as_standard(components).prepare_guidance(
            block_state.class_ids,
            block_state.prompts,
            block_state.text,
            block_state.negative_text,
            block_state.batch_size,
            block_state.timestep_values,
            block_state.guided_steps,
            block_state.guided_channels or block_state.sample_shape[1],
        )
        self.set_block_state(state, block_state)
        return components, state


class LoopGuidedDenoiser(ModularPipelineBlocks):
    """The guided prediction, inside the loop."""

    @property
    def description(self) -> str:
        return "Runs the network, once or for both predictions: `prediction` and, where it learned one, `variance`."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [SCHEDULER]

    @property
    def inputs(self) -> list[InputParam]:
        return inputs("guidance_scale", required=["latents"], guide=needed(GUIDE))

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor):
        latents = block_state.latents
        output = block_state.guide(i, t, scaled(components.scheduler, latents, t), block_state.guidance_scale)
        same = output.shape[1] == latents.shape[1]
        block_state.prediction, block_state.variance = (output, None) if same else output.chunk(2, dim=1)
        return components, block_state


class ClassConditionalDenoiseStep(DenoiseLoop):
    """The sampling loop: guided prediction, scheduler."""

    block_classes = [LoopGuidedDenoiser, LoopSchedulerStep]
    block_names = ["denoiser", "scheduler_step"]

    @property
    def description(self) -> str:
        return "Denoises step by step: the network predicts, guided, and the scheduler steps."


class DecodeStep(StandardStep):
    """Images of the denoised tensors."""

    @property
    def description(self) -> str:
        return "Decodes what the loop left where there is a `vae`, and makes images of it."

    @property
    def inputs(self) -> list[InputParam]:
        return inputs("output_type", required=["latents"])

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("images")

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        pipe, images = as_standard(components), block_state.latents
        if block_state.output_type != "latent":
            images = pipe.decode(images)
        block_state.images = pipe.image_processor.postprocess(images, output_type=block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state


class ClassConditionalBlocks(PipelineBlocks):
    """Images of a class, a text, both or neither from one diffusion model: `ClassConditionalPipeline` as blocks, with
    its arguments, checks and images."""

    standard_pipeline = ClassConditionalPipeline
    block_classes = [
        ClassConditionalInputStep,
        TextStep,
        SetTimestepsStep,
        PrepareSampleStep,
        PrepareGuidanceStep,
        ClassConditionalDenoiseStep,
        DecodeStep,
    ]
    block_names = ["input", "text", "set_timesteps", "prepare_sample", "prepare_guidance", "denoise", "decode"]

    @property
    def description(self) -> str:
        return (
            "Samples images of a class, a text, both or neither, in pixels or latents, with classifier-free guidance "
            "(Ho and Salimans, 2022), autoguidance (Karras et al., 2024), or a guider."
        )

    @property
    def outputs(self) -> list[OutputParam]:
        return outputs("images")
