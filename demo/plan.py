"""From settings and the description of a model to a call: scheduler, guider, arguments, noise.

The one place where settings become arguments. The demo carries a plan out, and the Python to take away prints it, so
both draw the same pixels.

Shapes: B images, C channels, H and W pixels.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from catalog import Description
from settings import LETTERS, MAX_ENLARGEMENT, MAX_WORK, Column, Comparison, SettingsError, shown

import diffusers

from diffusers_ext.sampling import ANCESTRAL_SCHEDULERS, ClassNames


OWN_PIPELINES = ("ClassConditionalPipeline", "ClassifierGuidedPipeline")
NOISE_UNIT = 32  # pixels; noise is drawn in multiples of it, so that models of similar sizes start alike


@dataclass(frozen=True)
class Plan:
    """How a column is drawn.

    Args:
        scheduler: class name in diffusers.
        scheduler_options: what its `from_config` gets besides the config of the model's scheduler.
        guider: class name in diffusers and arguments, or None.
        call: arguments of the pipeline, but for `generator`, the noise and callbacks.
    """

    scheduler: str
    scheduler_options: dict[str, Any]
    guider: tuple[str, dict[str, Any]] | None
    call: dict[str, Any]


def plan(comparison: Comparison, index: int, description: Description) -> Plan:
    """How the column of this index is drawn by the model that it names.

    Classes and prompts are shared by all columns, and pass by a model that knows none.

    Raises:
        SettingsError: for what does not fit the model, with the letter of the column.
    """
    column = comparison.columns[index]
    try:
        scheduler = _scheduler(column, description)
        _check_precision(column, description)
        call = {**_wanted(comparison, column, description), "num_inference_steps": column.num_inference_steps}
        call |= _size(comparison, column, description)
        guidance, guider = _guidance(column, scheduler, call, description)
        call |= guidance | _eta(column, scheduler, description)
        _check_known(call, description)
    except SettingsError as error:
        raise SettingsError(f"Column {LETTERS[index]}: {error}") from error
    return Plan(scheduler, dict(description.scheduler_options.get(scheduler, {})), guider, call)


def complete(comparison: Comparison, descriptions: list[Description]) -> Comparison:
    """The comparison with the scheduler of every column, after checking that it fits the models.

    Raises:
        SettingsError: as `plan`.
    """
    plans = [plan(comparison, index, description) for index, description in enumerate(descriptions)]
    columns = zip(comparison.columns, plans, strict=True)
    return replace(comparison, columns=tuple(replace(column, scheduler=p.scheduler) for column, p in columns))


def class_ids(comparison: Comparison, description: Description) -> list[int] | None:
    """The wanted class of every image; None for images of any class.

    Raises:
        SettingsError: for a name or an id that this model does not know.
    """
    if not comparison.class_labels or not description.labels:
        return None
    names = ClassNames(dict(enumerate(description.labels)))
    ids = [_class_id(label, names, description) for label in comparison.class_labels]
    return [ids[i % len(ids)] for i in range(comparison.num_images)]


def wanted_labels(comparison: Comparison, description: Description) -> list[str | None]:
    """Name of the wanted class of every image, or None for any."""
    ids = class_ids(comparison, description)
    return [None] * comparison.num_images if ids is None else [description.labels[class_id] for class_id in ids]


def generators(comparison: Comparison) -> list[torch.Generator]:
    """One source of noise per image, on the CPU, so that a GPU draws the same."""
    return [torch.Generator().manual_seed(seed) for seed in seeds(comparison)]


def seeds(comparison: Comparison) -> range:
    """Seed of every image."""
    return range(comparison.seed, comparison.seed + comparison.num_images)


def noise_crop(comparison: Comparison, description: Description) -> tuple[int, int, slice, slice] | None:
    """Height and width of noise that is drawn, and the rows and columns of it that the model gets; None for all.

    Models whose size is no multiple of 32 get the middle of noise on the next one, so that one of 28 pixels starts
    from what one of 32 pixels sees in the middle.
    """
    if description.pipeline not in OWN_PIPELINES or description.latent:
        return None
    size = comparison.height or description.height, comparison.width or description.width
    height, width = (-(-side // NOISE_UNIT) * NOISE_UNIT for side in size)
    if (height, width) == size:
        return None
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return height, width, slice(top, top + size[0]), slice(left, left + size[1])


def initial_noise(
    comparison: Comparison, description: Description, generators: list[torch.Generator]
) -> torch.Tensor | None:
    """Standard normal noise `(B, C, H, W)` to start from; None where the pipeline draws it from the generators."""
    crop = noise_crop(comparison, description)
    if crop is None:
        return None
    height, width, rows, columns = crop
    shape = (1, description.channels, height, width)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return noise[:, :, rows, columns]


def _scheduler(column: Column, description: Description) -> str:
    scheduler = column.scheduler or description.default_scheduler
    if scheduler not in description.schedulers:
        raise SettingsError(
            f"`scheduler` {shown(scheduler)} does not work with {description.name}. Choose one of "
            f"{', '.join(description.schedulers)}."
        )
    return scheduler


def _check_precision(column: Column, description: Description) -> None:
    if column.dtype not in description.dtypes:
        raise SettingsError(
            f"`dtype` {column.dtype} does not work with {description.name} here. Choose one of "
            f"{', '.join(description.dtypes)}."
        )


def _wanted(comparison: Comparison, column: Column, description: Description) -> dict[str, Any]:
    """What the images are to show."""
    ids = class_ids(comparison, description)
    if ids is None and description.labels and column.guidance not in ("none", "autoguidance"):
        if not description.takes_prompt:
            raise SettingsError(
                f"`guidance` {column.guidance} needs a class to guide to. Choose classes, or no guidance."
            )
    wanted = {} if ids is None else {"class_labels": ids}
    if description.takes_prompt:
        wanted["prompt"] = comparison.prompt
        if comparison.negative_prompt:
            wanted["negative_prompt"] = comparison.negative_prompt
        if description.pipeline not in OWN_PIPELINES:
            wanted["num_images_per_prompt"] = comparison.num_images
    return wanted


def _class_id(label: str, names: ClassNames, description: Description) -> int:
    if label in names.unique:
        return names.unique[label]
    if label.isascii() and label.isdigit() and int(label) < len(description.labels):
        return int(label)
    known = description.labels if len(description.labels) <= 20 else (*description.labels[:5], "...")
    raise SettingsError(
        f"`class_labels` holds {shown(label)}, which {description.name} does not know. It knows {', '.join(known)}, "
        f"or ids from 0 to {len(description.labels) - 1}."
    )


def _size(comparison: Comparison, column: Column, description: Description) -> dict[str, int]:
    size = comparison.height, comparison.width
    if size == (None, None) or (not description.resizable and size == (description.height, description.width)):
        return {}
    if not description.resizable:
        raise SettingsError(
            f"`height` and `width` are {size[0]} and {size[1]}, but {description.name} draws {description.height} x "
            f"{description.width} pixels only. Leave them empty."
        )
    own = description.height, description.width
    if any(side > MAX_ENLARGEMENT * own_side for side, own_side in zip(size, own, strict=True)):
        raise SettingsError(
            f"`height` and `width` are {size[0]} and {size[1]}, but {description.name} draws {own[0]} x {own[1]} "
            f"pixels by itself. Ask for at most {MAX_ENLARGEMENT} times as many per side."
        )
    work = comparison.num_images * column.num_inference_steps * size[0] * size[1] / (own[0] * own[1])
    if work > MAX_WORK:
        raise SettingsError(
            f"{comparison.num_images} images of {size[0]} x {size[1]} pixels in {column.num_inference_steps} steps "
            f"are the work of {work:.0f} image steps of the model's own size; at most {MAX_WORK} are drawn at once. "
            "Choose a smaller size, fewer images or fewer steps."
        )
    return {"height": size[0], "width": size[1]}


def _guidance(
    column: Column, scheduler: str, call: dict[str, Any], description: Description
) -> tuple[dict[str, Any], tuple[str, dict[str, Any]] | None]:
    """Arguments of the call, and the guider."""
    kind, scale = column.guidance, float(column.guidance_scale)
    if kind not in description.guidance:
        raise SettingsError(
            f"{description.name} has no `guidance` {kind}. Choose one of {', '.join(description.guidance)}."
        )
    if kind == "classifier-mean" and scheduler not in ANCESTRAL_SCHEDULERS:
        raise SettingsError(
            f"`guidance` classifier-mean moves the mean of an ancestral step, and {scheduler} takes no such steps. "
            f"Choose classifier, or one of {', '.join(ANCESTRAL_SCHEDULERS)}."
        )
    if kind == "none":
        if len(description.guidance) == 1:
            return {}, None
        # 0 leaves the classifier alone, 1 the prediction as it is.
        return {"guidance_scale": 0.0 if description.pipeline == "ClassifierGuidedPipeline" else 1.0}, None
    options = {}
    if column.guidance_interval != (0.0, 1.0):
        if description.pipeline not in OWN_PIPELINES:
            raise SettingsError(
                f"`guidance_interval` is {column.guidance_interval}, which {description.pipeline} does not have. "
                "Leave it from 0 to 1."
            )
        options = {"guidance_interval": tuple(float(end) for end in column.guidance_interval)}
    if kind == "adaptive-projected":
        # Without the part along the prediction, which is what oversaturates (Sadat et al., 2024,
        # https://arxiv.org/abs/2410.02416, Sec. 4); the guider's own default keeps it, as plain guidance does.
        return options, ("AdaptiveProjectedGuidance", {"guidance_scale": scale, "eta": 0.0})
    mode = {"guidance_mode": "mean"} if kind == "classifier-mean" else {}
    return {"guidance_scale": scale, **mode, **options}, None


def _eta(column: Column, scheduler: str, description: Description) -> dict[str, float]:
    if column.eta == 0:
        return {}
    if scheduler not in description.eta_schedulers:
        known = ", ".join(description.eta_schedulers) or "none of this model's schedulers"
        raise SettingsError(f"`eta` is {column.eta}, which {scheduler} does not have; {known} has. Set it to 0.")
    return {"eta": float(column.eta)}


def _check_known(call: dict[str, Any], description: Description) -> None:
    pipeline = getattr(diffusers, description.pipeline, None)
    known = inspect.signature(pipeline.__call__).parameters if pipeline is not None else call
    unknown = [name for name in call if name not in known]
    if unknown:
        raise SettingsError(f"{description.pipeline} has no `{unknown[0]}`. Leave it empty, or choose another model.")
