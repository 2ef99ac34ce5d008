"""Images of a wanted class, of a text, or of any, from one diffusion model, in pixels or in latents.

Classifier-free guidance: Ho and Salimans (2022), https://arxiv.org/abs/2207.12598. Autoguidance: Karras et al. (2024),
https://arxiv.org/abs/2406.02507. Both move the prediction for the class and the text away from a worse one,

    guided = worse + s (prediction - worse)

which every parameterisation of a denoising network allows, since all are linear in the expected clean image.

Shapes: B batch, C channels of image or latent, H and W its pixels, P texts, T tokens of each, D their width.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.guiders import AutoGuidance, BaseGuidance
from diffusers.image_processor import VaeImageProcessor

from diffusers_ext.guidance import check_scheduler, rehearse
from diffusers_ext.sampling import (
    OPTIONAL_DENOISER,
    ClassLabels,
    ClassNames,
    Generators,
    PipelineMixin,
    Prompts,
    check_arguments,
    check_channels,
    check_class_ids,
    check_num_images,
    context_dim,
    encode_text,
    guided_calls,
    height_width,
    image_channels,
    logger,
    max_text_length,
    models,  # noqa: F401  the annotations are evaluated here
    null_label,
    num_classes,
    output_channels,
    pad_text,
    predict,
    prepare_sample,
    prepare_timesteps,
    step_rule,
    takes_variance,
    with_exact_variance,
)


DEFAULT_GUIDANCE_SCALE = 4.0  # that of `DiTPipeline`
DEFAULT_AUTOGUIDANCE_SCALE = 2.0  # about what Karras et al. (2024) found best
# Names that guiders give to predictions; the last is of the network for the class, with layers skipped.
BOTH = ["pred_cond", "pred_uncond"]
KNOWN_PREDICTIONS = (*BOTH, "pred_cond_skip")

Prediction = Callable[[int, torch.Tensor, torch.Tensor, float], torch.Tensor]
Text = tuple[torch.Tensor, torch.Tensor]  # hidden states (P, T, D) of texts and their mask (P, T)


class ClassConditionalPipeline(PipelineMixin, DiffusionPipeline):
    """Samples images of a class, a text, or any, with classifier-free guidance, autoguidance or a guider of diffusers.

    Args:
        unet: denoising network: any of this package, `UNet2DModel` or `UNet2DConditionModel`. Twice the image channels
            at the output are a prediction and a learned variance.
        scheduler: every scheduler of diffusers that samples from such a network, see the table in the README.
        transformer: denoising network in place of `unet`: `GQADiTTransformer2DModel` or `DiTTransformer2DModel`.
        vae: decoder of the latents that the network draws. None: it draws images.
        guide_model: a worse version of the network, smaller or trained for less long, whose prediction for the same
            class takes the place of the one for no class (autoguidance). A network without classes will do too.
        guider: a guider of diffusers (`ClassifierFreeGuidance`, `AdaptiveProjectedGuidance`, ...) that combines both
            predictions in place of a plain weighted sum, with a scale and an interval of its own.
        id2label: names of the classes; several names of one class are separated by commas.
        null_class_label: label that stands for no class, where the network's config does not say so: `UNet2DModel` has
            no word for it, but can be trained with one more class.
        text_encoder: encoder of prompts for a network with `cross_attention_dim`: any of transformers that is as wide,
            such as `CLIPTextModel`, `T5EncoderModel` or `BertModel`; the one that the network was trained with.
        tokenizer: its tokenizer.

    Raises:
        ValueError: unless exactly one of `unet` and `transformer` is given, and a scheduler.
    """

    # `guide_model` runs in every step too, and takes no turns
    model_cpu_offload_seq = "text_encoder->unet->transformer->vae"
    _optional_components = [
        "unet",
        "scheduler",
        "transformer",
        "vae",
        "guide_model",
        "guider",
        "text_encoder",
        "tokenizer",
    ]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: OPTIONAL_DENOISER = None,
        scheduler: SchedulerMixin | None = None,
        transformer: OPTIONAL_DENOISER = None,
        vae: AutoencoderKL | None = None,
        guide_model: OPTIONAL_DENOISER = None,
        guider: BaseGuidance | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        null_class_label: int | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError(
                "`unet` and `transformer` are both "
                + ("missing; give the one that denoises." if unet is None else "given; give the one that denoises.")
            )
        if scheduler is None:
            raise ValueError("`scheduler` is missing; give the one to sample with, such as `DDPMScheduler()`.")
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            transformer=transformer,
            vae=vae,
            guide_model=guide_model,
            guider=guider,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        if id2label is not None:
            id2label = {int(class_id): label for class_id, label in id2label.items()}  # JSON made strings of the ids
        self.register_to_config(id2label=id2label, null_class_label=null_class_label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._names = ClassNames(id2label)

    @property
    def labels(self) -> dict[str, int]:
        """Class id of every name that means one class only, in alphabetical order."""
        return self._names.unique

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call; a callback may change `_guidance_scale`, which every step reads."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network calls of the last run, those for both predictions counted once."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the running network call, for `PyramidAttentionBroadcastConfig`; None between runs."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` makes this step the last."""
        return self._interrupt

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image per pixel of what the network draws, along each side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of ids and names, in order; lists and tensors are flattened.

        Raises:
            ValueError: for an unknown or ambiguous name, for what is neither id nor name, and when there is none.
        """
        return self._names.ids(class_labels)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guided_channels: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws images of classes, of prompts, of both, or of neither.

        Args:
            class_labels: class id, name out of `id2label`, or a list or tensor of them, nested or not. A single one is
                for all images of the batch. None: images of any class, from a network that has a null class or none.
            guidance_scale: s of the formula above: 1 is the prediction for class and prompt as it is, 0 the worse one,
                more than 1 trades diversity for certainty. None: 2 with `guide_model`; else 4 where a prompt is given
                and something to compare it with, or labels and the network has a null class; else 1. With a `guider`
                the scale is the guider's.
            guidance_interval: part of the steps that is guided, as fractions of their number from the noise (0) to the
                image (1); elsewhere the network runs for the class alone (Kynkäänniemi et al., 2024,
                https://arxiv.org/abs/2404.07724).
            guided_channels: guides the first of the C channels only, the others stay as they are predicted for the
                class: 3 is what DiT's published code does to its four latent channels. None: all.
            num_inference_steps: steps of the scheduler. Second-order ones call the network twice per step.
            generator: source of all noise; with a list of one per image, no image depends on the rest of its batch.
            sample: standard normal noise `(B, C, H, W)` to start from. None: drawn with `generator`.
            height, width: size of the images in pixels. None: `sample_size` of the network, which with a `vae` counts
                pixels of the latent.
            batch_size: number of images. None: as many as there are labels or prompts, times `num_images_per_prompt`,
                or other arguments per image, or 1.
            eta: noise of `DDIMScheduler` and its like: 0 none, 1 as much as an ancestral sampler adds.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W), both in [0, 1], or "latent": (B, C, H, W) as
                the scheduler left it, not decoded.
            return_dict: False returns a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after every step; returns the
                dict `tensors`, changed or not.
            callback_on_step_end_tensor_inputs: what `tensors` holds. "latents", the name that callbacks of diffusers
                use, is the noisy image or latent after the step, float32.
            prompt: text, or a list of texts, for a network that attends to them (`cross_attention_dim`). A single one
                is for all images. Longer ones than the text encoder takes are cut, with a warning. None: the empty
                text where there is a `text_encoder`, as in training without a caption.
            negative_prompt: what the worse prediction is made for, together with the null class where the network has
                one. None: the empty text. Not used by autoguidance, whose worse network sees the same prompt.
            num_images_per_prompt: images of each prompt and of each label, one after the other.
            prompt_embeds, negative_prompt_embeds: hidden states of a text encoder `(P, T, D)`, in place of texts.
            prompt_attention_mask, negative_prompt_attention_mask: `(P, T)`, nonzero where a token may be seen. None:
                all of them.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for arguments that do not fit each other or the components, before any network is run.
        """
        # 1. Check
        prompts = Prompts(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        class_ids, batch_size = self.count_images(
            class_labels, prompts, num_images_per_prompt, batch_size, sample, generator
        )
        self._guidance_scale = guidance_scale
        if guidance_scale is None:
            self._guidance_scale = self.default_guidance_scale(class_ids, prompts)
        self._interrupt = False
        check_arguments(
            self.scheduler,
            guidance_scale=self._guidance_scale,
            guidance_interval=guidance_interval,
            num_inference_steps=num_inference_steps,
            generator=generator,
            sample=sample,
            batch_size=batch_size,
            channels=image_channels(self._denoiser),
            class_ids=class_ids,
            eta=eta,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            callback_tensor_inputs=self._callback_tensor_inputs,
        )
        num_texts = batch_size // num_images_per_prompt
        self.check_inputs(
            class_ids,
            prompts,
            num_texts,
            guidance_scale,
            guidance_interval,
            guided_channels,
            num_inference_steps,
            sample,
            height,
            width,
        )

        # 2. Prepare texts, labels, timesteps and noise
        device = self._execution_device
        text, negative_text = self.prepare_text(prompts, batch_size, num_images_per_prompt)
        if class_ids is not None:
            class_ids = torch.tensor(class_ids, device=device).expand(batch_size)
        timesteps, timestep_values = prepare_timesteps(self.scheduler, num_inference_steps, batch_size, device)
        self._num_timesteps = len(timesteps)
        shape = self.sample_shape(batch_size, sample, height, width)
        sample = prepare_sample(sample, shape, self.scheduler, generator, device)

        # 3. Choose what the steps have in common
        channels = sample.shape[1]
        scheduler = with_exact_variance(self.scheduler)
        num_outputs = 2 * channels if takes_variance(scheduler) else channels
        guided_steps = guided_calls(scheduler, guidance_interval, len(timesteps))
        guide = self.prepare_guidance(
            class_ids,
            prompts,
            text,
            negative_text,
            batch_size,
            timestep_values,
            guided_steps,
            guided_channels or channels,
        )
        step = step_rule(scheduler, timestep_values, generator, eta)
        scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)

        # 4. Denoise, in float32 outside the networks
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self._interrupt:
                break
            self._current_timestep = t
            prediction = guide(i, t, scale_model_input(sample, t), self._guidance_scale)[:, :num_outputs]
            sample = step(i, t, sample, prediction)

            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, sample)
                sample = callback_on_step_end(self, i, t, tensors).pop("latents", sample)

        self._current_timestep = None

        # 5. Decode and post-process
        images = sample if output_type == "latent" else self.decode(sample)
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _denoiser(self) -> torch.nn.Module:
        return self.transformer if self.unet is None else self.unet

    @property
    def _denoiser_name(self) -> str:
        return "transformer" if self.unet is None else "unet"

    def _null_label(self, model: torch.nn.Module) -> int | None:
        if num_classes(model) is None:
            return None
        label = null_label(model)
        return self.config.null_class_label if label is None else label

    @property
    def _reads_text(self) -> bool:
        return self.text_encoder is not None and self.tokenizer is not None

    def _knows_negative(self, prompts: Prompts) -> bool:
        """Whether there is a text to compare that of the call with."""
        return prompts.negative_prompt_embeds is not None or self._reads_text

    def count_images(
        self,
        class_labels: ClassLabels | None,
        prompts: Prompts,
        num_images_per_prompt: int,
        batch_size: int | None,
        sample: torch.Tensor | None,
        generator: Generators,
    ) -> tuple[list[int] | None, int]:
        """Class ids of a call, one for all images or one each, and the number of images."""
        class_ids = None if class_labels is None else self.get_label_ids(class_labels)
        check_num_images(num_images_per_prompt, batch_size)
        if class_ids is not None and (len(class_ids) > 1 or not prompts.given):
            class_ids = [class_id for class_id in class_ids for _ in range(num_images_per_prompt)]
        if batch_size is None:
            num_texts = max(prompts.lengths.values(), default=1)
            batch_size = max(num_texts * num_images_per_prompt, len(class_ids or ()))
            if num_images_per_prompt == 1:
                per_image = [x for x in (sample, generator) if isinstance(x, list | torch.Tensor)]
                batch_size = max(batch_size, *map(len, per_image), 1)
        return class_ids, batch_size

    def default_guidance_scale(self, class_ids: list[int] | None, prompts: Prompts) -> float:
        """Guidance scale of a call that names none."""
        if self.guider is not None:
            return getattr(self.guider, "guidance_scale", 1.0)
        if self.guide_model is not None:
            return DEFAULT_AUTOGUIDANCE_SCALE
        if prompts.given:
            return DEFAULT_GUIDANCE_SCALE if self._knows_negative(prompts) else 1.0
        return 1.0 if class_ids is None or self._null_label(self._denoiser) is None else DEFAULT_GUIDANCE_SCALE

    def check_inputs(
        self,
        class_ids: list[int] | None,
        prompts: Prompts,
        num_texts: int,
        guidance_scale: float | None,
        guidance_interval: tuple[float, float],
        guided_channels: int | None,
        num_inference_steps: int,
        sample: torch.Tensor | None,
        height: int | None,
        width: int | None,
    ) -> None:
        """Raises a ValueError for what `__call__` cannot work with; `check_arguments` looks at the rest."""
        name, model, guide_model = self._denoiser_name, self._denoiser, self.guide_model
        channels = image_channels(model)

        check_scheduler(self.scheduler, model.config.get("sigma_data"), task="sample from a denoising network")
        check_channels(name, model, self.scheduler)
        if model.config.get("low_res_channels"):
            raise ValueError(f"`{name}` enlarges images, for which `ClassifierGuidedPipeline` takes `low_res`.")
        if self.vae is not None and self.vae.config.latent_channels != channels:
            raise ValueError(
                f"`vae` decodes {self.vae.config.latent_channels} channels, but `{name}` draws {channels}; the "
                "network must be trained on latents of this `vae`."
            )
        if guide_model is not None and min(image_channels(guide_model), output_channels(guide_model)) != channels:
            raise ValueError(
                f"`guide_model` draws {image_channels(guide_model)} channels, but `{name}` draws {channels}; the two "
                "must be trained on the same images."
            )
        if guided_channels is not None and not 1 <= guided_channels <= channels:
            raise ValueError(
                f"`guided_channels` is {guided_channels}; `{name}` draws {channels} channels, of which it guides the "
                f"first 1 to {channels}."
            )
        for argument, length in prompts.lengths.items():
            if length not in (1, num_texts):
                raise ValueError(
                    f"`{argument}` has {length} texts, but there are {num_texts} to draw; give one for all, or one "
                    "each. Every text has `num_images_per_prompt` images."
                )
        self._check_size(sample, height, width)
        self._check_labels(name, model, class_ids)
        prompts.check(name, model, self.tokenizer, self.text_encoder)
        if guide_model is not None:
            self._check_labels("guide_model", guide_model, class_ids)
            if context_dim(guide_model) is not None:
                prompts.check("guide_model", guide_model, self.tokenizer, self.text_encoder)
        if self.guider is not None:
            if guidance_scale is not None:
                raise ValueError(
                    f"`guidance_scale` is {guidance_scale}, but `guider` {type(self.guider).__name__} has a scale of "
                    "its own. Change that one, or set `pipe.guider = None`."
                )
            shape = (1, guided_channels or channels, *self.sample_shape(1, sample, height, width)[2:])
            self._check_guider(prompts, guidance_interval, num_inference_steps, shape)
            return
        scale = self.default_guidance_scale(class_ids, prompts) if guidance_scale is None else guidance_scale
        if scale > 1 or (scale != 1 and (class_ids is not None or prompts.given)):
            self._check_null(f"`guidance_scale` {scale}", prompts)

    def _check_size(self, sample: torch.Tensor | None, height: int | None, width: int | None) -> None:
        if (height is None) != (width is None):
            raise ValueError(f"`height` is {height} and `width` is {width}; give both, or neither.")
        if height is None:
            if sample is None and self._denoiser.config.get("sample_size") is None:
                raise ValueError(
                    f"`{self._denoiser_name}` was made for no size (`sample_size` is None); give `height` and `width`."
                )
            return
        factor = self.vae_scale_factor
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(
                f"`height` and `width` are {height} and {width}; they must be positive multiples of {factor}, the "
                "pixels of an image per pixel of what the network draws."
            )
        if sample is not None and sample.shape[2:] != (height // factor, width // factor):
            raise ValueError(
                f"`sample` has {sample.shape[2]}x{sample.shape[3]} pixels, but `height` and `width` ask for "
                f"{height // factor}x{width // factor}; give one or the other."
            )

    def _check_labels(self, name: str, model: torch.nn.Module, class_ids: list[int] | None) -> None:
        classes, null = num_classes(model), self._null_label(model)
        if classes is None:
            if class_ids is not None and model is self._denoiser:
                raise ValueError(
                    f"`class_labels` were given, but `{name}` knows no classes (`num_class_embeds` is None). Leave "
                    "them None, or guide it by a classifier: `ClassifierGuidedPipeline`."
                )
            return
        if null_label(model) is None and null is not None and not 0 <= null < classes:
            raise ValueError(
                f"`null_class_label` of the pipeline is {null}; labels of `{name}` go from 0 to {classes - 1}."
            )
        if class_ids is not None:
            check_class_ids(class_ids, classes)
        elif null is None:
            raise ValueError(
                f"`class_labels` is None, but `{name}` is class-conditional, without a null class, and has to be told "
                f"what to draw. Give ids from 0 to {classes - 1}."
            )

    def _check_null(self, asker: str, prompts: Prompts) -> None:
        """Raises a ValueError unless there is a worse prediction, which `asker` needs."""
        if self.guide_model is not None:
            return
        if prompts.given:
            if not self._knows_negative(prompts):
                raise ValueError(
                    f"`negative_prompt_embeds` is None, for whose prediction {asker} asks, and there is no "
                    "`text_encoder` to encode the empty text. Give both embeddings, or use `guidance_scale=1` "
                    "without a `guider`."
                )
        elif self._null_label(self._denoiser) is None:
            raise ValueError(
                f"`{self._denoiser_name}` has no null class, whose prediction {asker} needs. Train it with "
                "`null_class=True`, say which label stands for no class (`null_class_label` of the pipeline), give a "
                "weaker `guide_model`, or use `guidance_scale=1` without a `guider`."
            )

    def sample_shape(
        self, batch_size: int, sample: torch.Tensor | None, height: int | None, width: int | None
    ) -> tuple[int, int, int, int]:
        """(B, C, H, W) of what the network draws for these arguments of a call."""
        if sample is not None:
            size = sample.shape[2:]
        elif height is None:
            size = height_width(self._denoiser.config.sample_size)
        else:
            size = height // self.vae_scale_factor, width // self.vae_scale_factor
        return batch_size, image_channels(self._denoiser), *size

    def encode_prompt(self, prompt: str | list[str]) -> Text:
        """Hidden states of texts `(P, T, D)` and their mask `(P, T)`: `prompt_embeds` and `prompt_attention_mask`.

        T is the limit of the tokenizer (`model_max_length`) or text encoder: longer texts are cut, with a warning.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        limit = max_text_length(self.tokenizer, self.text_encoder)
        for text in texts:
            length = len(self.tokenizer(text).input_ids)
            if length > limit:
                logger.warning(f"`prompt` {text!r} has {length} tokens; the text encoder sees the first {limit} only.")
        return encode_text(self.tokenizer, self.text_encoder, texts, self._execution_device)

    def prepare_text(
        self, prompts: Prompts, batch_size: int, num_images_per_prompt: int
    ) -> tuple[Text | None, Text | None]:
        """What the network is told of texts, and what its worse prediction is made for: states `(B, T, D)` and mask
        `(B, T)` each; None where there is nothing to tell."""
        if context_dim(self._denoiser) is None:
            return None, None
        text = self._encoded(prompts.prompt, prompts.prompt_embeds, prompts.prompt_attention_mask)
        negative = self._encoded(
            prompts.negative_prompt, prompts.negative_prompt_embeds, prompts.negative_prompt_attention_mask
        )
        length = max((states.shape[1] for states, _ in filter(None, (text, negative))), default=0)

        def per_image(values: torch.Tensor) -> torch.Tensor:
            if len(values) == 1:
                return values.expand(batch_size, *values.shape[1:])
            return values.repeat_interleave(num_images_per_prompt, dim=0)

        text, negative = (
            side and tuple(per_image(values) for values in pad_text(*side, length)) for side in (text, negative)
        )
        return text, negative

    def _encoded(
        self, texts: str | list[str] | None, embeds: torch.Tensor | None, mask: torch.Tensor | None
    ) -> Text | None:
        if embeds is None:
            return self.encode_prompt("" if texts is None else texts) if self._reads_text else None
        device = self._execution_device
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask
        return embeds.to(device), mask.to(device)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents `(B, C, H, W)`, about [-1, 1]; without a `vae` they are images already."""
        if self.vae is None:
            return latents
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].to(torch.float32)

    def prepare_guidance(
        self,
        class_ids: torch.Tensor | None,
        prompts: Prompts,
        text: Text | None,
        negative_text: Text | None,
        batch_size: int,
        timestep_values: list[float],
        guided_steps: range,
        guided_channels: int,
    ) -> Prediction:
        """Chooses, once per run, which predictions are made and how they are combined.

        Returns:
            A function of the index of the network call, its timestep, the network's input and the guidance scale. It
            returns the network's output for class and text, of which the first `guided_channels` are guided.
        """
        guide_model = self.guide_model
        guider = copy.deepcopy(self.guider)  # a run leaves its state there
        weakens = guider is not None and type(guider).prepare_models is not BaseGuidance.prepare_models
        conditional = self._told(self._denoiser, class_ids, text, batch_size)
        if guide_model is not None:
            worse = self._told(guide_model, class_ids, text, batch_size)
        elif isinstance(guider, AutoGuidance):  # the network itself, weakened, for the same class and text
            worse = conditional
        else:
            null_ids = class_ids if self._null_label(self._denoiser) is None else None
            worse = self._told(self._denoiser, null_ids, negative_text, batch_size)

        def run(names: list[str], timestep: torch.Tensor, sample: torch.Tensor) -> Sequence[torch.Tensor]:
            if names == BOTH and guide_model is None and not weakens:
                (model, inputs), (_, worse_inputs) = conditional, worse
                inputs = {name: torch.cat([values, worse_inputs[name]]) for name, values in inputs.items()}
                return predict(model, torch.cat([sample, sample]), timestep, cache="cond_uncond", **inputs).chunk(2)
            outputs = []
            for name in names:
                model, inputs = worse if name == "pred_uncond" else conditional
                with _prepared(model, guider, name):
                    outputs.append(predict(model, sample, timestep, cache=name.removeprefix("pred_"), **inputs))
            return outputs

        if guider is None:

            def begin(i: int, scale: float) -> list[str]:
                if scale == 1:
                    return BOTH[:1]
                # A callback may have changed it.
                self._check_null(f"`guidance_scale` {scale}", prompts)
                return BOTH

            def combine(scale: float, *predictions: torch.Tensor) -> torch.Tensor:
                prediction, worse_prediction = predictions[0], predictions[-1]
                return prediction if scale == 1 else worse_prediction + scale * (prediction - worse_prediction)

        else:
            batches = []

            def begin(i: int, scale: float) -> list[str]:
                guider.set_state(step=i, num_inference_steps=len(timestep_values), timestep=timestep_values[i])
                batches[:] = guider.prepare_inputs({})
                return [getattr(batch, guider._identifier_key) for batch in batches]

            def combine(scale: float, *predictions: torch.Tensor) -> torch.Tensor:
                for batch, prediction in zip(batches, predictions, strict=True):
                    batch.noise_pred = prediction
                return guider(batches).pred

            begin(0, 1.0)  # in which some begin their state; it need not be a guided step
        has_worse = class_ids is not None or prompts.given or guide_model is not None or weakens

        def guide(i: int, timestep: torch.Tensor, sample: torch.Tensor, scale: float) -> torch.Tensor:
            if not has_worse or i not in guided_steps:
                model, inputs = conditional
                return predict(model, sample, timestep, **inputs)
            outputs = run(begin(i, scale), timestep, sample)
            guided = combine(scale, *(output[:, :guided_channels] for output in outputs))
            return torch.cat([guided, outputs[0][:, guided_channels:]], dim=1)

        return guide

    def _told(
        self, model: torch.nn.Module, class_ids: torch.Tensor | None, text: Text | None, batch_size: int
    ) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        """A network and what to tell it: the classes, or its null class where there are none, and the texts."""
        null, inputs = self._null_label(model), {}
        if class_ids is None and null is not None:
            class_ids = torch.full((batch_size,), null, device=self._execution_device)
        if class_ids is not None and num_classes(model) is not None:
            inputs["class_ids"] = class_ids
        if text is not None and context_dim(model) is not None:
            inputs["encoder_hidden_states"], inputs["encoder_attention_mask"] = text[0].to(model.dtype), text[1]
        return model, inputs

    def _check_guider(
        self,
        prompts: Prompts,
        guidance_interval: tuple[float, float],
        num_inference_steps: int,
        shape: tuple[int, int, int, int],
    ) -> None:
        """Raises a ValueError unless all predictions can be made that the guider asks for, and it can combine them."""
        _, timestep_values = prepare_timesteps(self.scheduler, num_inference_steps, 1, torch.device("cpu"))
        guided_steps = guided_calls(self.scheduler, guidance_interval, len(timestep_values))
        for guider, names in rehearse(self.guider, shape, timestep_values, guided_steps):
            unknown = [name for name in names if name not in KNOWN_PREDICTIONS]
            if unknown:
                raise ValueError(
                    f"`guider` {type(guider).__name__} asks for {', '.join(unknown)}, which this pipeline cannot "
                    "make. Use one for classifier-free guidance, such as `ClassifierFreeGuidance`, or "
                    "`SkipLayerGuidance`."
                )
            if "pred_uncond" in names and not isinstance(guider, AutoGuidance):
                self._check_null(f"`guider` {type(guider).__name__}", prompts)
            for name in names:
                try:
                    with _prepared(self._denoiser, guider, name):
                        pass
                except ValueError as error:
                    raise ValueError(
                        f"`guider` {type(guider).__name__} finds nothing to weaken in `{self._denoiser_name}`: {error}"
                    ) from error


@contextlib.contextmanager
def _prepared(model: torch.nn.Module, guider: BaseGuidance | None, prediction: str) -> Iterator[None]:
    """The network as the guider wants it for this prediction: some skip layers of it meanwhile."""
    if guider is not None:
        if prediction == "pred_cond_skip":
            guider._count_prepared = 2  # those that skip layers do so for the third, also where there is no second
        guider.prepare_models(model)
    try:
        yield
    finally:
        if guider is not None:
            guider.cleanup_models(model)
