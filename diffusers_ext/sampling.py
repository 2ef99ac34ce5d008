"""What the sampling loops of the pipelines have in common: class names, texts, checks, timesteps, how to call `step`.

Shapes: B batch, C channels, H and W pixels, P texts, T tokens of each, D their width. This file imports torch,
diffusers and `diffusers_ext.guidance` only, so that it can travel inside an exported pipeline.
"""

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import nn

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.guidance import is_a


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
ANCESTRAL_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler")
MAX_TEXT_LENGTH = 77  # tokens, that of CLIP, where neither tokenizer nor text encoder has a limit

ClassLabels = int | str | Sequence["ClassLabels"] | torch.Tensor
Generators = torch.Generator | list[torch.Generator] | None
Step = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.get_logger(__name__)


class _Models:
    """The models of diffusers, to which diffusers_ext adds ours.

    In place of one that is absent stands any model; and of ours, where this code has travelled in a repository: it has
    brought classes of its own.
    """

    def __getattr__(self, name: str) -> type:
        model_class = getattr(diffusers, name, diffusers.ModelMixin)
        home = model_class.__module__.partition(".")[0]
        return model_class if home in ("diffusers", __name__.partition(".")[0]) else diffusers.ModelMixin


# Pipelines annotate their components with these strings, which are evaluated late, where `models` is imported: their
# files load without our models, and `from_pipe` and the check of types know those that are there.
models = _Models()
DENOISER = (
    "models.UNet2DModel | models.ADMUNet2DModel | models.ComposableUNet2DModel | models.DDPMUNet2DModel"
    " | models.DilatedConvDenoiserModel | models.DiTTransformer2DModel | models.GQADiTTransformer2DModel"
)
OPTIONAL_DENOISER = f"{DENOISER} | models.UNet2DConditionModel | None"


def align_weights(*components: object) -> None:
    """Moves weights on the CPU to where torch itself would have put them, at multiples of 64 bytes; changes no value.

    Loaded weights lie in their mapped file, at any address, and by that some kernels choose the order in which they
    sum: for a single image, a loaded pipeline would give other last bits than the one that was saved.

    Args:
        components: of a pipeline; those that are no networks are passed over.
    """
    for component in components:
        for x in component.parameters() if isinstance(component, nn.Module) else ():
            # Subclasses of `Parameter` are quantised, without an address of their own.
            if type(x) is nn.Parameter and x.device.type == "cpu" and x.data_ptr() % 64 and not x.is_inference():
                x.data = x.data.clone()


class PipelineMixin:
    """What our pipelines do with their components otherwise than diffusers."""

    def register_modules(self, **components) -> None:
        """As in diffusers, and see `align_weights`."""
        align_weights(*components.values())
        super().register_modules(**components)

    def __setattr__(self, name: str, value: object) -> None:
        """As in diffusers, and registers a component that is set where there was none too, so that it is saved."""
        is_known = name in self.__dict__
        super().__setattr__(name, value)
        if is_known and value is not None and isinstance(self.config.get(name), tuple | list):
            if self.config[name][0] is None:
                self.register_modules(**{name: value})
            else:
                align_weights(value)

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **changes,
    ) -> DiffusionPipeline:
        """A pipeline of this class around the components of another, which both share from then on.

        Where diffusers casts what is shared to float32, this leaves it in the dtype that it has, quantised or not.
        Components that this class has no place for are left out, with a warning that names them.

        Args:
            pipeline: any that has the components, one of diffusers' own too. Where this class has no `transformer`,
                that of `pipeline` becomes its `unet`.
            dtype, torch_dtype: what all components are cast to, those that `pipeline` keeps too. None: they stay.
            changes: components and options in place of those of `pipeline`, or besides them, such as `classifier`.

        Raises:
            ValueError: where a component is missing, and where `pipeline` draws latents that this class cannot decode.
        """
        known = inspect.signature(cls.__init__).parameters
        components = dict(pipeline.components)
        if "transformer" not in known and components.get("unet") is None:
            components["unet"] = components.pop("transformer", None)
        if "vae" not in known and components.get("vae") is not None:
            raise ValueError(
                f"`pipeline` {type(pipeline).__name__} has a `vae`, so that its network draws latents, and "
                f"{cls.__name__} decodes none. Construct {cls.__name__} of the components that it is to have, call "
                "it with `output_type='latent'`, and decode those."
            )
        # Options that a class has not wait in the config of its pipeline, under a name with an underscore, for one
        # that has them. A pair (library, class) stands for a component.
        options = {name.removeprefix("_"): value for name, value in pipeline.config.items()}
        options = {name: x for name, x in options.items() if x is not None and not isinstance(x, tuple | list)}
        arguments = {name: value for name, value in {**options, **components}.items() if name in known}
        shared = cls(**{**arguments, **changes})
        shared.register_to_config(**{f"_{name}": value for name, value in options.items() if name not in known})
        left_out = [name for name, component in components.items() if component is not None and name not in known]
        if left_out:
            logger.warning(
                f"{cls.__name__} has no place for {', '.join(f'`{name}`' for name in left_out)} of `pipeline` "
                f"{type(pipeline).__name__}, and goes without. Keep `pipeline`; on the way back, "
                f"`from_pipe(..., {left_out[0]}=pipeline.{left_out[0]})` takes it along again."
            )
        dtype = dtype or torch_dtype
        return shared if dtype is None else shared.to(dtype)


class ClassNames:
    """Class ids of names.

    Args:
        id2label: names of the classes; several names of one class are separated by commas.
    """

    def __init__(self, id2label: dict[int, str] | None):
        self._ids: dict[str, list[int]] = {}
        for class_id, label in (id2label or {}).items():
            for name in {label, *(part.strip() for part in label.split(","))}:
                self._ids.setdefault(name, []).append(class_id)

    @property
    def unique(self) -> dict[str, int]:
        """Class id of every name that means one class only, in alphabetical order."""
        return {name: ids[0] for name, ids in sorted(self._ids.items()) if len(ids) == 1}

    def ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of ids and names, in order; lists and tensors are flattened.

        Raises:
            ValueError: for an unknown or ambiguous name, for what is neither id nor name, and when there is none.
        """
        class_ids = [self._id(label) for label in _flatten(class_labels)]
        if not class_ids:
            raise ValueError("`class_labels` is empty; give one label per image, or None for samples of any class.")
        return class_ids

    def _id(self, label: int | str) -> int:
        if isinstance(label, Integral) and not isinstance(label, bool):
            return int(label)
        if not isinstance(label, str):
            raise ValueError(f"`class_labels` holds {label!r}; a label is a class id (int) or a name (str).")
        ids = self._ids.get(label, [])
        if len(ids) == 1:
            return ids[0]
        if ids:
            raise ValueError(f"`class_labels` holds {label!r}, which names the classes {ids}; give the id of one.")
        if not self._ids:
            raise ValueError(
                f"`class_labels` holds {label!r}, but this pipeline has no names of classes; give ids, or construct "
                "it with `id2label`."
            )
        names = sorted(self._ids)
        known = ", ".join(map(repr, names)) if len(names) <= 20 else f"{len(names)} names, see `pipe.labels`"
        raise ValueError(f"`class_labels` holds {label!r}, which is not a name of a class. Known: {known}.")


def _flatten(labels: ClassLabels) -> Iterator[int | str]:
    if hasattr(labels, "tolist"):  # tensors and arrays
        labels = labels.tolist()
    if isinstance(labels, list | tuple | range):
        for label in labels:
            yield from _flatten(label)
    else:
        yield labels


def num_classes(model: nn.Module) -> int | None:
    """Number of classes that a denoising network knows, without the null class; None for an unconditional one."""
    return model.config.get("num_class_embeds", model.config.get("num_embeds_ada_norm"))


def null_label(model: nn.Module) -> int | None:
    """Label that stands for no class: the row behind those of the classes, where the network has it; else None."""
    if model.config.get("null_class"):
        return model.config.num_class_embeds
    return model.config.get("num_embeds_ada_norm")  # DiTTransformer2DModel always has one


def image_channels(model: nn.Module) -> int:
    """C of what a denoising network draws; a low-resolution image beside it does not count."""
    return model.config.in_channels - model.config.get("low_res_channels", 0)


def output_channels(model: nn.Module) -> int:
    """Channels that a denoising network predicts: C, or 2C with a learned variance."""
    return model.config.get("out_channels") or model.config.in_channels


def context_dim(model: nn.Module) -> int | None:
    """Width D of the `encoder_hidden_states` that a denoising network attends to; None where it takes none."""
    dim = model.config.get("encoder_hid_dim") or model.config.get("cross_attention_dim")
    return dim if dim is None or isinstance(dim, int) else dim[0]  # UNet2DConditionModel may name one per level


def text_dim(text_encoder: nn.Module) -> int:
    """Width D of what a text encoder of transformers puts out."""
    return text_encoder.config.get_text_config().hidden_size


def max_text_length(tokenizer, text_encoder: nn.Module) -> int:
    """Most tokens T of a text that both tokenizer and text encoder of transformers take, or 77 if neither says."""
    positions = getattr(text_encoder.config.get_text_config(), "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, positions or math.inf)
    return limit if limit < 1e6 else MAX_TEXT_LENGTH  # tokenizers say 1e30 for none


def encode_text(
    tokenizer, text_encoder: nn.Module, texts: Sequence[str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states of texts, all of one length: longer ones are cut, shorter ones padded with masked zeros.

    Args:
        tokenizer: any of transformers, with or without a padding token.
        text_encoder: any of transformers that returns `last_hidden_state`.
        texts: P of them.
        device: where the text encoder runs.

    Returns:
        States `(P, T, D)` and int64 mask `(P, T)`, 1 where there is a token, T being `max_text_length`.
    """
    length = max_text_length(tokenizer, text_encoder)
    rows = tokenizer(list(texts), truncation=True, max_length=length, return_attention_mask=False).input_ids
    # Padded here, since tokenizers do it on either side or not at all; the padding's id is never seen.
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return states.masked_fill(mask[..., None] == 0, 0), mask


def pad_text(states: torch.Tensor, mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States `(P, T, D)` and mask `(P, T)` with masked zeros up to T = `length`."""
    missing = length - states.shape[1]
    return F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a call of a pipeline says in words, or already encoded. The arguments have the names of diffusers.

    Raises:
        ValueError: for what is no text, is given twice, or does not fit what it belongs to.
    """

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    negative_prompt_attention_mask: torch.Tensor | None = None

    def __post_init__(self):
        for name, texts, embeds, mask in self._sides():
            if texts is not None and embeds is not None:
                raise ValueError(f"`{name}` and `{name}_embeds` are both given; give one of them.")
            if texts is not None and not isinstance(texts, str):
                if not isinstance(texts, list | tuple) or not texts or not all(isinstance(x, str) for x in texts):
                    raise ValueError(f"`{name}` is {texts!r}; it must be a text (str), or a list of at least one.")
            if embeds is not None and (not isinstance(embeds, torch.Tensor) or embeds.ndim != 3):
                shape = tuple(getattr(embeds, "shape", ()))
                raise ValueError(f"`{name}_embeds` has shape {shape}; it must be a tensor (texts, tokens, width).")
            if mask is not None and embeds is None:
                raise ValueError(f"`{name}_attention_mask` was given without `{name}_embeds`, which it masks.")
            if mask is not None and getattr(mask, "shape", None) != embeds.shape[:2]:
                raise ValueError(
                    f"`{name}_attention_mask` has shape {tuple(getattr(mask, 'shape', ()))}; it must be a tensor "
                    f"{tuple(embeds.shape[:2])}, one entry per token of `{name}_embeds`."
                )
        if self.negative_prompt_embeds is not None and self.prompt is None and self.prompt_embeds is None:
            raise ValueError("`negative_prompt_embeds` were given alone; give `prompt` or `prompt_embeds` too.")

    @property
    def given(self) -> bool:
        """Whether the call says anything."""
        return any(value is not None for value in vars(self).values())

    @property
    def lengths(self) -> dict[str, int]:
        """Number of texts, by argument."""
        lengths = {}
        for name, texts, embeds, _ in self._sides():
            if texts is not None:
                lengths[name] = 1 if isinstance(texts, str) else len(texts)
            if embeds is not None:
                lengths[f"{name}_embeds"] = len(embeds)
        return lengths

    def check(self, name: str, model: nn.Module, tokenizer, text_encoder: nn.Module | None) -> None:
        """Raises a ValueError unless the denoising network `model`, the component `name`, can be told this."""
        dim = context_dim(model)
        if dim is None:
            if self.given:
                raise ValueError(
                    f"`{next(iter(self.lengths))}` was given, but `{name}` attends to no text (`cross_attention_dim` "
                    "is None). Leave it None, or train a network with captions, such as ComposableUNet2DModel with "
                    "`cross_attention_dim`."
                )
            return
        words = [word for word in ("prompt", "negative_prompt") if getattr(self, word) is not None]
        for missing, component in (("text_encoder", text_encoder), ("tokenizer", tokenizer)):
            if words and component is None:
                raise ValueError(
                    f"`{words[0]}` was given, but the pipeline has no `{missing}`. Load one (`pipe.{missing} = ...`), "
                    f"or encode the text elsewhere and give `{words[0]}_embeds`."
                )
        for argument in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(self, argument)
            if embeds is not None and embeds.shape[2] != dim:
                raise ValueError(
                    f"`{argument}` is {embeds.shape[2]} wide, but `{name}` attends to {dim} (`cross_attention_dim`). "
                    "Encode the text with the encoder that the network was trained with."
                )
        reads = text_encoder is not None and tokenizer is not None
        encodes = self.prompt_embeds is None or self.negative_prompt_embeds is None
        if reads and encodes and text_dim(text_encoder) != dim:
            raise ValueError(
                f"`text_encoder` {type(text_encoder).__name__} puts out {text_dim(text_encoder)} wide tokens, but "
                f"`{name}` attends to {dim} (`cross_attention_dim`). Use the encoder that it was trained with."
            )
        argument = inspect.signature(model.forward).parameters.get("encoder_hidden_states")
        required = argument is not None and argument.default is argument.empty
        if required and self.prompt_embeds is None and not reads:
            raise ValueError(
                f"`prompt_embeds` is None, but `{name}` {type(model).__name__} has to be told something, and there is "
                "no `text_encoder`. Give `prompt_embeds`, or the pipeline a `text_encoder` and `tokenizer`."
            )

    def _sides(self) -> list[tuple]:
        return [
            ("prompt", self.prompt, self.prompt_embeds, self.prompt_attention_mask),
            (
                "negative_prompt",
                self.negative_prompt,
                self.negative_prompt_embeds,
                self.negative_prompt_attention_mask,
            ),
        ]


def height_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """Both sizes, of which a config gives one where they are equal."""
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether `step` wants the learned variance behind the prediction; other schedulers know none."""
    return scheduler.config.get("variance_type") in ("learned", "learned_range") and (
        is_a(scheduler, *ANCESTRAL_SCHEDULERS, "UnCLIPScheduler")
    )


def check_channels(name: str, model: nn.Module, scheduler: SchedulerMixin) -> None:
    """Raises a ValueError where the network's output is neither C nor 2C channels, or not what the scheduler takes.

    Args:
        name: of the component that `model` is.
    """
    channels, outputs = image_channels(model), output_channels(model)
    if takes_variance(scheduler) and outputs != 2 * channels:
        raise ValueError(
            f"`scheduler` {type(scheduler).__name__} has `variance_type` {scheduler.config.variance_type!r}, but "
            f"`{name}` has {outputs} output channels and would need {2 * channels} for a learned variance. "
            "Configure the scheduler with `variance_type='fixed_small'`."
        )
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"`{name}` has {outputs} output channels; for {channels} image channels it must have {channels}, or "
            f"{2 * channels} with a learned variance."
        )


def check_arguments(
    scheduler: SchedulerMixin,
    *,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
    num_inference_steps: int,
    generator: Generators,
    sample: torch.Tensor | None,
    batch_size: int,
    channels: int,
    class_ids: list[int] | None,
    eta: float,
    output_type: str,
    callback_on_step_end_tensor_inputs: Sequence[str],
    callback_tensor_inputs: Sequence[str],
) -> None:
    """Raises a ValueError for arguments of a call that no pipeline can work with."""
    if not isinstance(num_inference_steps, Integral) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}; it must be an integer of at least 1.")
    if eta != 0 and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(
            f"`eta` is {eta}, which `scheduler` {type(scheduler).__name__} does not have. Leave it 0, or use "
            "DDIMScheduler."
        )
    interval = tuple(guidance_interval)
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"`guidance_interval` is {guidance_interval}; it must be a pair with 0 <= start <= stop <= 1, the "
            "part of the steps, counted from the noise, that is guided."
        )
    if not math.isfinite(guidance_scale):
        raise ValueError(f"`guidance_scale` is {guidance_scale}; it must be finite.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}.")
    unknown = [name for name in callback_on_step_end_tensor_inputs if name not in callback_tensor_inputs]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}; possible are {callback_tensor_inputs}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for {batch_size} images; give one for all, or one each."
        )
    if sample is not None and (sample.ndim != 4 or sample.shape[:2] != (batch_size, channels)):
        raise ValueError(
            f"`sample` has shape {tuple(sample.shape)}; it must be ({batch_size}, {channels}, height, width)."
        )
    if class_ids is not None and len(class_ids) not in (1, batch_size):
        raise ValueError(
            f"`class_labels` has {len(class_ids)} labels for {batch_size} images; give one for all, or one each."
        )


def check_class_ids(class_ids: list[int], limit: int) -> None:
    """Raises a ValueError unless all ids lie in `[0, limit)`."""
    unknown = [class_id for class_id in class_ids if not 0 <= class_id < limit]
    if unknown:
        raise ValueError(f"`class_labels` holds {unknown}; ids of classes go from 0 to {limit - 1}.")


def check_num_images(num_images_per_prompt: int, batch_size: int | None) -> None:
    """Raises a ValueError unless both can hold."""
    if not isinstance(num_images_per_prompt, Integral) or num_images_per_prompt < 1:
        raise ValueError(f"`num_images_per_prompt` is {num_images_per_prompt!r}; it must be an integer of at least 1.")
    if num_images_per_prompt > 1 and batch_size is not None:
        raise ValueError(
            f"`num_images_per_prompt` is {num_images_per_prompt} and `batch_size` {batch_size}; give one of them."
        )


def prepare_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, list[float]]:
    """Timesteps of all network calls: one row each as scheduler and network want them, and as numbers."""
    scheduler.set_timesteps(num_inference_steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    timesteps = scheduler.timesteps
    values = timesteps.tolist()
    if is_a(scheduler, "DDPMWuerstchenScheduler"):  # it lists the end too, and takes a timestep per image
        return timesteps[:-1, None].expand(-1, batch_size), values[:-1]
    return timesteps, values


def prepare_sample(
    sample: torch.Tensor | None,
    shape: tuple[int, ...],
    scheduler: SchedulerMixin,
    generator: Generators,
    device: torch.device,
) -> torch.Tensor:
    """Noise `(B, C, H, W)` as strong as the scheduler starts with, float32; drawn where `sample` is None."""
    if sample is None:
        sample = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    return sample.to(device, torch.float32) * float(getattr(scheduler, "init_noise_sigma", 1.0))


def guided_calls(scheduler: SchedulerMixin, interval: tuple[float, float], num_calls: int) -> range:
    """Network calls inside `interval`; the calls of one step of a second-order scheduler are not parted."""
    order = getattr(scheduler, "order", 1)
    num_steps = math.ceil(num_calls / order)
    start, stop = (order * round(end * num_steps) for end in interval)
    return range(start, stop)


def predict(
    model: nn.Module,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    class_ids: torch.Tensor | None = None,
    cache: str = "cond",
    **inputs,
) -> torch.Tensor:
    """Output of a denoising network, float32 as `sample` is whatever the network computes in.

    Args:
        model: any denoising network of ours, `UNet2DModel` or `DiTTransformer2DModel`.
        sample: scaled for the network, `(B, C, H, W)`.
        timestep: one for all images, 0-d or a row of equal ones.
        class_ids: `(B,)`, or None for an unconditional network.
        cache: under which name `enable_cache` keeps what the steps share; predictions of one step differ in it.
        inputs: further inputs of this network, such as `encoder_hidden_states`.
    """
    if class_ids is not None:
        inputs["class_labels"] = class_ids
    timestep = timestep.reshape(-1)[:1].expand(len(sample))  # `DiTTransformer2DModel` wants one per image
    with model.cache_context(cache) if hasattr(model, "cache_context") else contextlib.nullcontext():
        return model(sample.to(model.dtype), timestep, **inputs, return_dict=False)[0].to(sample.dtype)


def with_exact_variance(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, or for a learned variance a copy with its schedule in float64, as the original code has it.

    In float32, 1 - abar of the first timesteps keeps three digits, and so does the lower bound of the variance, which
    networks leave by some powers. Other steps forgive that.
    """
    if scheduler.config.get("variance_type") != "learned_range" or not is_a(scheduler, *ANCESTRAL_SCHEDULERS):
        return scheduler
    scheduler = copy.copy(scheduler)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return scheduler


def step_rule(scheduler: SchedulerMixin, timestep_values: list[float], generator: Generators, eta: float) -> Step:
    """How to call this scheduler's `step`: a function of index, timestep, image and prediction to the next image.

    DDIM takes eps anew from the clipped image, as the original code does; without clipping that changes nothing.
    """
    known = inspect.signature(scheduler.step).parameters
    options = {"generator": generator, "eta": eta, "use_clipped_model_output": True, "return_dict": False}
    options = {name: value for name, value in options.items() if name in known}

    if "old_pred_original_sample" in known:  # CogVideoXDPMScheduler
        old_x0 = None

        def step(i: int, t: torch.Tensor, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
            nonlocal old_x0
            back = timestep_values[i - 1] if i > 0 else None
            sample, old_x0 = scheduler.step(prediction, old_x0, t, back, sample, **options)
            return sample

    elif "prev_timestep" in known:  # UnCLIPScheduler
        following = [*timestep_values[1:], None]

        def step(i: int, t: torch.Tensor, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
            return scheduler.step(prediction, t, sample, prev_timestep=following[i], **options)[0]

    else:

        def step(i: int, t: torch.Tensor, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
            return scheduler.step(prediction, t, sample, **options)[0]

    return step
