"""What is to be drawn, and whether a pipeline can draw it: options, scheduler, class labels, prompts."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

import diffusers_ext  # noqa: F401  for `DiffusionPipeline` to find our classes
from diffusers_ext.hub.loading import load_pipeline
from diffusers_ext.sampling import ClassNames, num_classes
from diffusers_ext.training.config import named_values


SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "dpmsolver-sde": "DPMSolverSDEScheduler",
    "dpmsolver-singlestep": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "sa-solver": "SASolverScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
}
# Options that are handed to the pipeline's call; None leaves them to it.
CALL_OPTIONS = ("num_inference_steps", "guidance_scale", "guidance_interval", "guidance_mode", "eta")


@dataclass(frozen=True)
class DrawingOptions:
    """What is drawn by which model, and how."""

    model: tyro.conf.Positional[str]
    """folder or Hub name of a pipeline"""
    num_samples: int = 1000
    """size of the set"""
    scheduler: str | None = None
    """ddpm, ddim, dpmsolver++, euler, heun, unipc, ... or a class of diffusers; None: that of the pipeline"""
    scheduler_options: tuple[str, ...] = ()
    """options of the scheduler, as `name=value` with the value in JSON: `timestep_spacing=trailing`"""
    num_inference_steps: int | None = None
    """steps of the scheduler; this and the next four: None leaves them to the pipeline"""
    guidance_scale: float | None = None
    """strength of the guidance"""
    guidance_interval: tuple[float, float] | None = None
    """part of the steps that is guided, as fractions from the noise (0) to the image (1)"""
    guidance_mode: str | None = None
    """`score` or `mean`, for classifier guidance"""
    eta: float | None = None
    """noise of DDIM: 0 none, 1 as much as DDPM"""
    call_options: tuple[str, ...] = ()
    """any other argument of the pipeline's call, as `name=value` with the value in JSON: `guided_channels=3`"""
    class_labels: tuple[str, ...] | None = ("auto",)
    """ids or names, repeated in turn; `balanced`: every class as often, sample i is of class i mod K; `auto`: balanced
    where the model knows classes; None: no labels"""
    prompts: str | None = None
    """text file with a prompt per line, repeated in turn, for pipelines that take one"""
    batch_size: int = 50
    """images drawn together, and kept in one shard"""
    seed: int = 0
    """sample i starts from the noise of seed + i"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of the networks"""
    device: str = "auto"
    """auto: a GPU for each process where there are any, else the CPU; or cpu, cuda, cuda:1, mps ..."""
    cpu_threads: int = 1
    """of each process where it draws on a CPU. The last bits of an image depend on it, so it is fixed; to use all
    cores start several processes: `torchrun --nproc_per_node 8 -m diffusers_ext.cli sample ...`"""


def check_options(config: DrawingOptions) -> None:
    """Raises a ValueError for options that no pipeline can work with."""
    for name in ("num_samples", "batch_size", "cpu_threads", "num_inference_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    if config.seed < 0:
        raise ValueError(f"`seed` is {config.seed}; it must be at least 0.")
    if config.guidance_scale is not None and not math.isfinite(config.guidance_scale):
        raise ValueError(f"`guidance_scale` is {config.guidance_scale}; it must be finite.")
    if (
        config.guidance_interval is not None
        and not 0 <= config.guidance_interval[0] <= config.guidance_interval[1] <= 1
    ):
        raise ValueError(f"`guidance_interval` is {config.guidance_interval}; it must hold 0 <= start <= stop <= 1.")
    if config.class_labels is not None and len(config.class_labels) == 0:
        raise ValueError("`class_labels` is empty; give ids or names, `balanced`, `auto` or None.")
    if config.prompts is not None and not Path(config.prompts).is_file():
        raise ValueError(f"`prompts` ({config.prompts!r}) must be a text file with a prompt per line.")
    if config.scheduler is not None:
        scheduler_class(config.scheduler)
    named_values("scheduler_options", config.scheduler_options)
    named_values("call_options", config.call_options)


def open_pipeline(config: DrawingOptions) -> DiffusionPipeline:
    """Load the pipeline.

    Raises:
        ValueError: when it is neither a folder of a pipeline nor on the Hub.
    """
    try:
        pipe = load_pipeline(config.model, dtype=getattr(torch, config.dtype))
    except OSError as error:
        raise ValueError(
            f"`model` ({config.model!r}) must be the folder of a pipeline or its name on the Hub: {error}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The scheduler of diffusers of this short name or class name.

    Raises:
        ValueError: for an unknown name.
    """
    found = getattr(diffusers, SCHEDULERS.get(name, name), None)
    backends = getattr(found, "_backends", ())  # of the stand-in for a class whose packages are missing
    if "torchsde" in backends:
        raise ImportError(f"`scheduler` ({name!r}) needs a package that is missing: pip install torchsde")
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(
            f"`scheduler` ({name!r}) must be one of {', '.join(SCHEDULERS)}, or a class of diffusers, such as "
            "DDIMScheduler."
        )
    return found


@contextmanager
def drawing(
    pipe: DiffusionPipeline, config: DrawingOptions
) -> Iterator[tuple[dict[str, Any], list[int] | None, list[str] | None]]:
    """The pipeline with the scheduler asked for, and torch with its number of threads; both as before afterwards.

    Yields:
        Arguments of all calls, class ids and prompts that the samples have in turn.

    Raises:
        ValueError: for options that this pipeline does not have.
    """
    scheduler, threads = pipe.scheduler, torch.get_num_threads()
    options = named_values("scheduler_options", config.scheduler_options)
    wanted = type(scheduler) if config.scheduler is None else scheduler_class(config.scheduler)
    unknown = [name for name in options if name not in inspect.signature(wanted.__init__).parameters]
    if unknown:
        raise ValueError(f"`scheduler_options` holds {unknown[0]!r}, which {wanted.__name__} does not have.")
    try:
        if config.scheduler is not None:
            options = path_options(scheduler, wanted, config.scheduler) | options
        if config.scheduler is not None or options:
            pipe.scheduler = wanted.from_config(scheduler.config, **options)
        if torch.device(pipe.device).type == "cpu":
            torch.set_num_threads(config.cpu_threads)
        yield call_arguments(pipe, config), label_cycle(pipe, config), prompt_cycle(pipe, config)
    finally:
        pipe.scheduler = scheduler
        torch.set_num_threads(threads)


def path_options(own: SchedulerMixin, wanted: type[SchedulerMixin], name: str) -> dict[str, Any]:
    """Options that let a class of schedulers follow the path that the model was trained on: noise or a flow.

    Raises:
        ValueError: when it cannot.
    """
    flow = "FlowMatch" in type(own).__name__ or own.config.get("prediction_type") == "flow_prediction"
    if ("FlowMatch" in wanted.__name__) == flow:
        return {}
    if not flow:
        raise ValueError(
            f"`scheduler` ({name!r}) follows a flow, but the model was trained on a diffusion process "
            f"({type(own).__name__}). Use ddim, dpmsolver++, unipc, euler, heun, ..."
        )
    if "use_flow_sigmas" not in inspect.signature(wanted.__init__).parameters:
        raise ValueError(
            f"`scheduler` ({name!r}) follows a diffusion process, but the model predicts the velocity of a flow "
            f"({type(own).__name__}). Use flow-euler, flow-heun, dpmsolver++, deis, unipc or sa-solver."
        )
    shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}


def call_arguments(pipe: DiffusionPipeline, config: DrawingOptions) -> dict[str, Any]:
    """Arguments of the pipeline's call that all batches have in common.

    Raises:
        ValueError: for an option that this pipeline's call does not have.
    """
    known = inspect.signature(pipe.__call__).parameters
    given = {name: getattr(config, name) for name in CALL_OPTIONS if getattr(config, name) is not None}
    for name, value in (given | (extra := named_values("call_options", config.call_options))).items():
        if name not in known:
            asked = f"`{name}`" if name in given else f"`{name}` (of `call_options`)"
            options = ", ".join(option for option in known if option not in ("callback_on_step_end", "return_dict"))
            raise ValueError(f"{asked} is {value!r}, but {type(pipe).__name__} does not have it; it has {options}.")
    if config.eta and "eta" not in inspect.signature(pipe.scheduler.step).parameters:
        name = type(pipe.scheduler).__name__
        raise ValueError(f"`eta` is {config.eta}, which `scheduler` {name} does not have. Leave it, or use ddim.")
    if not {"batch_size", "class_labels", "prompt"} & set(known):
        raise ValueError(f"{type(pipe).__name__} takes neither `batch_size`, `class_labels` nor `prompt`.")
    return given | extra


def class_ids_of(pipe: DiffusionPipeline) -> list[int] | None:
    """Ids of the classes that a pipeline can be asked for, the null class apart; None where it knows none."""
    if "class_labels" not in inspect.signature(pipe.__call__).parameters:
        return None
    network, classifier = pipe.components.get("transformer"), pipe.components.get("classifier")
    network = pipe.components.get("unet") if network is None else network
    classes = num_classes(network)
    if classes is None:
        return None if classifier is None else list(range(classifier.config.num_classes))
    return [class_id for class_id in range(classes) if class_id != pipe.config.get("null_class_label")]


def label_cycle(pipe: DiffusionPipeline, config: DrawingOptions) -> list[int] | None:
    """Class ids that the samples have in turn; None for samples without labels.

    Raises:
        ValueError: for labels that the pipeline does not know.
    """
    labels = None if config.class_labels is None else tuple(config.class_labels)
    known = class_ids_of(pipe)
    if labels is None or labels == ("none",) or (labels == ("auto",) and known is None):
        return None
    if known is None:
        raise ValueError(
            f"`class_labels` is {labels}, but {type(pipe).__name__} with these networks knows no classes."
        )
    if labels in (("auto",), ("balanced",)):
        return known
    given = [int(label) if str(label).isdigit() else label for label in labels]
    if hasattr(pipe, "get_label_ids") and not any(isinstance(label, int) for label in given):
        ids = pipe.get_label_ids(given)
    else:
        names = pipe.config.get("id2label") or {}
        ids = ClassNames({int(class_id): label for class_id, label in names.items()}).ids(given)
    wrong = [class_id for class_id in ids if class_id not in known]
    if wrong:
        raise ValueError(f"`class_labels` holds {wrong}; the model knows {len(known)} classes, from {known[0]} on.")
    return ids


def prompt_cycle(pipe: DiffusionPipeline, config: DrawingOptions) -> list[str] | None:
    """Texts that the samples have in turn; None for a pipeline without.

    Raises:
        ValueError: when a pipeline needs prompts and has none, or the other way round.
    """
    known = inspect.signature(pipe.__call__).parameters
    takes = "prompt" in known and ("class_labels" not in known or pipe.components.get("text_encoder") is not None)
    if config.prompts is None:
        if takes:
            raise ValueError(f"{type(pipe).__name__} draws from text: give `prompts`, a file with a prompt per line.")
        return None
    if not takes:
        raise ValueError(f"`prompts` is {config.prompts!r}, but this {type(pipe).__name__} takes no prompt.")
    return prompt_lines(config.prompts)


def prompt_lines(file: str) -> list[str]:
    """The prompts of a text file, one per line.

    Raises:
        ValueError: when there is none.
    """
    lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"`prompts` ({file!r}) is empty.")
    return lines
