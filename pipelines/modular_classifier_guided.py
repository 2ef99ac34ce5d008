"""`ClassifierGuidedPipeline` as blocks of Modular Diffusers: the classifier is the source of the conditional
prediction, and any guider may follow.

    pipe = ClassifierGuidanceBlocks().init_pipeline("me/my-model")  # modular, or of the standard pipeline
    pipe.load_components()
    images = pipe(class_labels=[3], guidance_scale=2.0, output="images")

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), https://arxiv.org/abs/2105.05233, Sec. 4.
Checks, formulas and images are those of the standard pipeline. Shapes: B batch, C image channels, H and W pixels.
"""

from collections.abc import Callable

import torch

from diffusers import AutoModel, ComponentSpec, ConfigSpec, InputParam, ModularPipelineBlocks, OutputParam
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.image_processor import PipelineImageInput

from diffusers_ext.guidance import classifier_guidance_rule
from diffusers_ext.pipelines.modular_steps import (
    IMAGE_PROCESSOR,
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
from diffusers_ext.pipelines.pipeline_classifier_guided import (
    ClassifierGuidedPipeline,
    check_components,
    default_guidance_scale,
    network_inputs,
    number_of_images,
)
from diffusers_ext.sampling import (
    ClassNames,
    align_weights,
    check_arguments,
    guided_calls,
    height_width,
    image_channels,
    predict,
    with_exact_variance,
)


UNET = ComponentSpec("unet", AutoModel, description="Denoising network, a transformer too.")
CLASSIFIER = ComponentSpec(
    "classifier",
    AutoModel,
    description="Maps noisy images and timesteps to logits, such as `ADMClassifierModel`; None: no guidance.",
)
GUIDER = ComponentSpec(
    "guider",
    ClassifierFreeGuidance,
    description="Any guider for classifier-free guidance, which combines the prediction with the one for the class; "
    "None: their sum, the gradient weighted by `guidance_scale`.",
)
ID2LABEL = ConfigSpec("id2label", None, "Names of the classes; several names of one are separated by commas.")
CLASSIFIER_SCHEDULE = ConfigSpec(
    "classifier_schedule",
    None,
    "Config of the `DDPMScheduler` with whose noise the classifier was trained; None: that of `scheduler`.",
)
GUIDANCE_MODE = (str, "score", "'score' shifts what the network predicts, 'mean' the mean of an ancestral step.")
LOW_RES = (PipelineImageInput, None, "Images to enlarge, for a super-resolution network: (B, C, h, w) in [-1, 1].")
GUIDE = (Callable, "Guides one prediction, see `classifier_guidance_rule`; None: no guidance.")
UNET_INPUTS = (dict, "What the network is told in every step: labels, images to enlarge.")


class ClassifierGuidanceInputStep(ModularPipelineBlocks):
    """Arguments of the run, checked."""

    @property
    def description(self) -> str:
        return "Checks all arguments and components before any network is run, and looks up the class ids."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [UNET, SCHEDULER, CLASSIFIER, GUIDER, IMAGE_PROCESSOR]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ID2LABEL]

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
            guidance_mode=GUIDANCE_MODE,
            low_res=LOW_RES,
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("class_ids", "guidance_scale", "batch_size", "sample_shape", unet_inputs=UNET_INPUTS)

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        align_weights(components.unet, components.classifier)
        id2label = {int(class_id): label for class_id, label in (components.config.id2label or {}).items()}
        class_ids, low_res = None, block_state.low_res
        if block_state.class_labels is not None:
            class_ids = ClassNames(id2label).ids(block_state.class_labels)
        if low_res is not None and not isinstance(low_res, torch.Tensor):
            low_res = components.image_processor.preprocess(low_res)
        if block_state.batch_size is None:
            block_state.batch_size = number_of_images(class_ids, block_state.sample, low_res, block_state.generator)
        if block_state.guidance_scale is None:
            block_state.guidance_scale = default_guidance_scale(components)
        channels, batch_size = image_channels(components.unet), block_state.batch_size
        check_arguments(
            components.scheduler,
            guidance_scale=block_state.guidance_scale,
            guidance_interval=block_state.guidance_interval,
            num_inference_steps=block_state.num_inference_steps,
            generator=block_state.generator,
            sample=block_state.sample,
            batch_size=batch_size,
            channels=channels,
            class_ids=class_ids,
            eta=block_state.eta,
            output_type=block_state.output_type,
            callback_on_step_end_tensor_inputs=(),
            callback_tensor_inputs=(),
        )
        check_components(
            components,
            class_ids,
            block_state.guidance_scale,
            block_state.guidance_mode,
            block_state.guidance_interval,
            block_state.num_inference_steps,
            low_res,
            batch_size,
        )

        device = components._execution_device
        block_state.class_ids = None
        if class_ids is not None:
            block_state.class_ids = torch.tensor(class_ids, device=device).expand(batch_size)
        block_state.sample_shape = (batch_size, channels, *height_width(components.unet.config.sample_size))
        block_state.unet_inputs = network_inputs(components.unet, block_state.class_ids, low_res, batch_size, device)
        self.set_block_state(state, block_state)
        return components, state


class PrepareClassifierGuidanceStep(ModularPipelineBlocks):
    """What the guided steps of the run have in common."""

    @property
    def description(self) -> str:
        return "Chooses how the steps of this scheduler are guided by the classifier, and the guider behind it."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [SCHEDULER, CLASSIFIER, GUIDER]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [CLASSIFIER_SCHEDULE]

    @property
    def inputs(self) -> list[InputParam]:
        return inputs(
            "guidance_interval",
            "eta",
            "class_ids",
            required=["timesteps", "timestep_values"],
            guidance_mode=GUIDANCE_MODE,
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("guided_steps", guide=GUIDE)

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        scheduler = with_exact_variance(components.scheduler)
        block_state.guided_steps = guided_calls(scheduler, block_state.guidance_interval, len(block_state.timesteps))
        block_state.guide = None
        if block_state.class_ids is not None and components.classifier is not None:
            block_state.guide = classifier_guidance_rule(
                scheduler,
                components.classifier,
                block_state.class_ids,
                block_state.timestep_values,
                mode=block_state.guidance_mode,
                eta=block_state.eta,
                guider=components.guider,
                classifier_schedule=components.config.classifier_schedule,
            )
        self.set_block_state(state, block_state)
        return components, state


class LoopDenoiser(ModularPipelineBlocks):
    """The network's prediction, inside the loop."""

    @property
    def description(self) -> str:
        return "Runs the network: `prediction` and, where it learned one, `variance`."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [UNET, SCHEDULER]

    @property
    def inputs(self) -> list[InputParam]:
        return inputs(required=["latents"], unet_inputs=(dict, None, UNET_INPUTS[1]))

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor):
        latents = block_state.latents
        sample = scaled(components.scheduler, latents, t)
        output = predict(components.unet, sample, t, **(block_state.unet_inputs or {}))
        same = output.shape[1] == latents.shape[1]
        block_state.prediction, block_state.variance = (output, None) if same else output.chunk(2, dim=1)
        return components, block_state


class LoopClassifierGuidance(ModularPipelineBlocks):
    """Guidance of the prediction, inside the loop."""

    @property
    def description(self) -> str:
        return "Moves `prediction` towards the class, or leaves in `shift` what is to be added to the step's result."

    @property
    def inputs(self) -> list[InputParam]:
        return inputs(
            "guidance_scale", required=["latents", "guided_steps", "timestep_values"], guide=(Callable, None, GUIDE[1])
        )

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor):
        block_state.shift = None
        if block_state.guide is not None and i in block_state.guided_steps and block_state.guidance_scale != 0:
            block_state.prediction, block_state.shift = block_state.guide(
                i,
                block_state.timestep_values[i],
                block_state.latents,
                block_state.prediction,
                block_state.variance,
                block_state.guidance_scale,
            )
        return components, block_state


class ClassifierGuidanceDenoiseStep(DenoiseLoop):
    """The sampling loop: network, guidance, scheduler."""

    block_classes = [LoopDenoiser, LoopClassifierGuidance, LoopSchedulerStep]
    block_names = ["denoiser", "guidance", "scheduler_step"]

    @property
    def description(self) -> str:
        return "Denoises step by step: the network predicts, the classifier guides, the scheduler steps."


class PostprocessStep(ModularPipelineBlocks):
    """Images of the denoised tensors."""

    @property
    def description(self) -> str:
        return "Makes images of what the loop left."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [IMAGE_PROCESSOR]

    @property
    def inputs(self) -> list[InputParam]:
        return inputs("output_type", required=["latents"])

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return outputs("images")

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.images = components.image_processor.postprocess(
            block_state.latents, output_type=block_state.output_type
        )
        self.set_block_state(state, block_state)
        return components, state


class ClassifierGuidanceBlocks(PipelineBlocks):
    """Images of a wanted class from a diffusion model and a noise-aware classifier: `ClassifierGuidedPipeline` as
    blocks, with its arguments, checks and images."""

    standard_pipeline = ClassifierGuidedPipeline
    block_classes = [
        ClassifierGuidanceInputStep,
        SetTimestepsStep,
        PrepareSampleStep,
        PrepareClassifierGuidanceStep,
        ClassifierGuidanceDenoiseStep,
        PostprocessStep,
    ]
    block_names = ["input", "set_timesteps", "prepare_sample", "prepare_guidance", "denoise", "postprocess"]

    @property
    def description(self) -> str:
        return (
            "Samples images and draws them towards a class by the gradient of a classifier that knows noisy images "
            "(Dhariwal and Nichol, 2021), which makes the conditional prediction; a guider may combine it with the "
            "network's own."
        )

    @property
    def outputs(self) -> list[OutputParam]:
        return outputs("images")
