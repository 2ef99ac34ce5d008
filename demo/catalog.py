"""Which models the demo has, what each can do, and at most so many of them in memory.

Visitors name models, so nothing here trusts a name: a folder must lie below one that the operator allows, a repository
of the Hub is bounded in size, holds safetensors and is checked before it is loaded, and its code is run only where the
operator says so.
"""

import copy
import gc
import importlib
import inspect
import itertools
import logging
import os
import re
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import EnumMeta
from pathlib import Path
from typing import Any, get_args

import accelerate
import torch
from huggingface_hub import constants
from schedulers import scheduler_classes, takes_eta, working_schedulers
from settings import ENVIRONMENT, SettingsError, operators_number
from transformers import PreTrainedModel

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance

from diffusers_ext import ClassConditionalPipeline, ClassifierGuidedPipeline
from diffusers_ext.evaluation.drawing import SCHEDULERS, class_ids_of
from diffusers_ext.guidance import check_scheduler
from diffusers_ext.hub.flattening import plain_index
from diffusers_ext.hub.loading import load_pipeline
from diffusers_ext.hub.remote import pull
from diffusers_ext.hub.safety import INDEX, LIBRARIES, check_folder, parse_json, redact, show
from diffusers_ext.sampling import height_width, image_channels, null_label, num_classes


logger = logging.getLogger(__name__)

SHIPPED = ("film-mnist", "dit-gqa-mnist", "adm-mnist", "dilated-mnist")  # the order in which they are shown
MAX_BYTES = 6 << 30  # of a repository that a visitor names; Stable Diffusion 1.5 has 5.5 GB
FREE_BYTES = 2 << 30  # of the disk, which downloads leave
MAX_DESCRIPTIONS = 64  # that are remembered, besides those of the operator's models
POLL = 0.1  # seconds between two looks at `stop`
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)

# Of this machine: no address, no user/name, no fraction.
PATH = re.compile(r"(?:file://|(?<![\w:/.~]))~?(?:/[^\s/'\"`,;:()]+){2,}/?")

# Arguments of the call that make a pipeline of diffusers one that draws images of a text, and those that make it
# another kind: it changes images, or draws videos or sounds.
TEXT_TO_IMAGE = {"prompt", "num_inference_steps", "guidance_scale", "generator", "height", "width", "output_type"}
OTHER_KINDS = {"image", "mask_image", "control_image", "video", "num_frames", "audio_length_in_s"}

DEFAULT_SCHEDULER = "DPMSolverMultistepScheduler"
COMMON_SCHEDULERS = frozenset(SCHEDULERS.values())  # come first in lists
# Good scales, by the evaluations in the cards of the shipped models; that of latents and texts is `DiTPipeline`'s.
CLASSIFIER_SCALE, PIXEL_SCALE, LATENT_SCALE, AUTOGUIDANCE_SCALE = 6.0, 2.0, 4.0, 2.0

# diffusers and transformers change torch for the whole process while they load a model: how parameters are made, and
# the default dtype. Whoever loads holds this. ZeroGPU forks the process, which waits until nobody holds it: in the new
# process nobody could release it.
LOADING = threading.RLock()
os.register_at_fork(before=LOADING.acquire, after_in_parent=LOADING.release, after_in_child=LOADING.release)


class Stopped(Exception):
    """The visitor stopped a run, or what it waited for."""


@dataclass(frozen=True)
class Description:
    """What a model is and what it can do.

    Args:
        name: in the catalog.
        source: what `from_pretrained` takes in pasted code.
        pipeline: class that draws.
        wrapped: the folder is of another class, and goes through `ClassConditionalPipeline.from_pipe`.
        network: class of the network that denoises.
        parameters: of that network.
        channels, height, width: of the images.
        latent: a VAE decodes what the network draws.
        labels: name of every class, by its id; the id itself where it has no name of its own. Empty: no classes.
        takes_prompt: draws from text.
        resizable: draws other sizes too.
        guidance: kinds of guidance that it has, each with a good scale.
        schedulers: names of the classes that work with it.
        default_scheduler: one of them.
        eta_schedulers: those in which eta means something.
        dtypes: precisions.
        scheduler_options: by class name, options of `from_config` besides the config of the model's own scheduler.
    """

    name: str
    source: str
    pipeline: str
    wrapped: bool
    network: str
    parameters: int
    channels: int
    height: int
    width: int
    latent: bool
    labels: tuple[str, ...]
    takes_prompt: bool
    resizable: bool
    guidance: dict[str, float]
    schedulers: tuple[str, ...]
    default_scheduler: str
    eta_schedulers: tuple[str, ...]
    dtypes: tuple[str, ...]
    scheduler_options: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """Where a model lies. `folder` is None for a repository of the Hub, which `text` names."""

    name: str
    text: str
    folder: Path | None
    is_operators: bool


@dataclass
class _Place:
    """A place in memory. While a pipeline is loaded into it, both `pipe` and `error` are None."""

    pipe: DiffusionPipeline | None = None
    error: SettingsError | None = None
    users: int = 0


class Catalog:
    """The models by name, what they can do, and those in memory.

    Args:
        models: folder or Hub id by name, given by the operator.
        capacity: most pipelines in memory, those in use included.
        device: of the networks. None: a GPU if there is one, else the CPU.
        folders: below which visitors may name folders.
        allow_hub: whether visitors may name repositories of the Hub; public ones, since the operator's token is not
            used for them.
        trust_remote_code: run the code that a model brings, where it needs it.
        max_bytes: most bytes of a repository that a visitor names.
    """

    def __init__(
        self,
        models: dict[str, str | Path],
        *,
        capacity: int = 4,
        device: str | None = None,
        folders: Sequence[Path] = (),
        allow_hub: bool = True,
        trust_remote_code: bool = False,
        max_bytes: int = MAX_BYTES,
    ):
        if capacity < 1:
            raise ValueError(f"`capacity` is {capacity}; it must be at least 1, since a model in use is in memory.")
        self.capacity = capacity
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.allow_hub = allow_hub
        self.trust_remote_code = trust_remote_code
        self.max_bytes = max_bytes
        self._folders = [Path(folder).resolve() for folder in folders]
        self._models = {name: _operators_source(name, os.fspath(source)) for name, source in models.items()}
        self._descriptions: dict[str, Description] = {}
        self._downloading = threading.Lock()
        self._changed = threading.Condition()  # its lock guards what follows, and the descriptions
        self._places: OrderedDict[tuple[str, str], _Place] = OrderedDict()  # the one used longest ago first
        self._tickets = itertools.count()
        self._queue: list[int] = []  # tickets of those who wait for a place, in order of arrival

    @classmethod
    def shipped(cls, extra: Sequence[str] = ()) -> "Catalog":
        """The models in `model_cards`, and folders or Hub ids of the operator; the rest is read from the environment.

        Raises:
            ValueError: for a variable of the environment that holds something else than it should.
        """
        root = model_cards()
        found = [folder.name for folder in sorted(root.iterdir()) if (folder / INDEX).is_file()]
        models = {name: str(root / name) for name in (*SHIPPED, *found) if name in found}
        for source in extra:
            is_folder = Path(source).is_dir()
            if not ((Path(source) / INDEX).is_file() if is_folder else HUB_ID.fullmatch(source)):
                raise ValueError(
                    f"`models` holds {source!r}, which is neither the folder of a pipeline, with its {INDEX}, nor a "
                    "Hub id such as google/ddpm-cifar10-32."
                )
            name = Path(source).resolve().name if is_folder else source
            models[source if name in models else name] = source
        folders = [folder for folder in os.environ.get(f"{ENVIRONMENT}FOLDERS", "").split(os.pathsep) if folder]
        for folder in folders:
            if not Path(folder).expanduser().is_dir():
                raise ValueError(f"`{ENVIRONMENT}FOLDERS` holds {folder!r}; there is no such folder.")
        return cls(
            models,
            capacity=operators_number("CAPACITY", 4),
            device=_device(),
            folders=[root, *(Path(folder).expanduser() for folder in folders)],
            allow_hub=_flag("HUB", True),
            trust_remote_code=_flag("TRUST_REMOTE_CODE", False),
            max_bytes=operators_number("MAX_BYTES", MAX_BYTES),
        )

    @property
    def names(self) -> list[str]:
        """Names of the operator's models."""
        return list(self._models)

    @property
    def loaded(self) -> list[tuple[str, str]]:
        """Name and dtype of the pipelines in memory, the one used longest ago first."""
        with self._changed:
            return [key for key, place in self._places.items() if place.pipe is not None]

    def describe(self, model: str) -> Description:
        """What a model is and can do. Its weights are not read; those on the Hub are fetched.

        Raises:
            SettingsError: for a name that is unknown or refused, and for a model that cannot draw here.
        """
        source = self._resolve(model)
        with self._changed:
            found = self._descriptions.get(source.name)
        if found is None:
            with _for_visitors(source):
                folder = self._folder(source)
                with LOADING:
                    found = _describe(source, self._skeleton(source, folder), self.device)
            with self._changed:
                self._descriptions[source.name] = found
                of_visitors = [name for name in self._descriptions if name not in self._models]
                for name in of_visitors[:-MAX_DESCRIPTIONS]:
                    del self._descriptions[name]
        return found

    def described(self, model: str) -> Description | None:
        """The description of a model that was looked up before; None for one that may have to be fetched first."""
        with suppress(SettingsError):
            return self._descriptions.get(self._resolve(model).name)
        return None

    @contextmanager
    def borrow(self, model: str, dtype: str, stop: Callable[[], bool] = lambda: False) -> Iterator[DiffusionPipeline]:
        """The pipeline that all who borrow it share; not to be changed, see `new_pipeline`.

        Waits for a place in the order of arrival, and takes the one of the pipeline that nobody uses and that was used
        longest ago. A thread may have one pipeline at a time, or two threads could wait for each other.

        Args:
            model: name, as of `describe`.
            dtype: of its networks.
            stop: asked while waiting; true gives up.

        Raises:
            SettingsError: as of `describe`, for a precision that there is not, and where loading fails, which is tried
                anew the next time.
            Stopped: when `stop` said so.
        """
        description = self.describe(model)
        if dtype not in description.dtypes:
            raise SettingsError(
                f"`dtype` is {show(dtype)}; on {self.device} it must be one of {', '.join(description.dtypes)}."
            )
        source = self._resolve(model)
        place, is_new = self._enter((source.name, dtype), stop)
        try:
            if is_new:
                self._fill((source.name, dtype), place, source)
            self._wait(lambda: place.pipe is not None or place.error is not None, stop)
            if place.error is not None:
                raise SettingsError(str(place.error)) from place.error
            yield place.pipe
        finally:
            with self._changed:
                place.users -= 1
                if self._places.get((source.name, dtype)) is place:
                    self._places.move_to_end((source.name, dtype))
                self._changed.notify_all()

    def _enter(self, key: tuple[str, str], stop: Callable[[], bool]) -> tuple[_Place, bool]:
        """The place of a pipeline, with one user more, and whether it is new and still empty."""
        with self._changed:
            ticket = next(self._tickets)
            self._queue.append(ticket)
            try:
                self._wait(lambda: self._queue[0] == ticket and self._make_room(key), stop)
                is_new = key not in self._places
                place = self._places.setdefault(key, _Place())
                place.users += 1
                self._places.move_to_end(key)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        return place, is_new

    def _make_room(self, key: tuple[str, str]) -> bool:
        """Whether there is a place for this pipeline; the one used longest ago leaves, if nobody uses it."""
        if key in self._places or len(self._places) < self.capacity:
            return True
        idle = next((key for key, place in self._places.items() if place.users == 0), None)
        if idle is None:
            return False
        del self._places[idle]
        gc.collect()  # a pipeline may hold cycles, and its memory is needed now
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _fill(self, key: tuple[str, str], place: _Place, source: _Source) -> None:
        pipe, error = None, SettingsError(f"`model` {show(source.name)} is not loaded: that was interrupted.")
        try:
            with _for_visitors(source):
                folder = self._folder(source)
                with LOADING:
                    pipe, error = self._load(folder, getattr(torch, key[1])), None
        except SettingsError as raised:
            error = raised
        finally:
            with self._changed:
                place.pipe, place.error = pipe, error
                if pipe is None:
                    del self._places[key]
                self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], stop: Callable[[], bool]) -> None:
        with self._changed:
            while not ready():
                if stop():
                    raise Stopped
                self._changed.wait(POLL)

    def _resolve(self, model: str) -> _Source:
        """Where a model lies that a visitor has named.

        Raises:
            SettingsError: for a name of none, with one text for folders that are not there and that are not allowed.
        """
        if isinstance(model, str) and model in self._models:
            return self._models[model]
        if not isinstance(model, str) or not re.fullmatch(r"[\x21-\x7e]{1,200}", model):
            raise SettingsError(
                f"`model` is {show(model)}; it must be one of {', '.join(self._models)}, a Hub id such as "
                "google/ddpm-cifar10-32, or a folder, in at most 200 ASCII characters without spaces."
            )
        folder = None if ".." in model else self._allowed_folder(model)
        if folder is not None:
            return self._folder_source(folder)
        if HUB_ID.fullmatch(model) and ".." not in model:
            if self.allow_hub:
                return _Source(model, model, None, is_operators=False)
            raise SettingsError(
                f"`model` is {show(model)}, but models of the Hub are switched off here. Choose one of "
                f"{', '.join(self._models)}."
            )
        raise SettingsError(
            f"`model` is {show(model)}, which is no model of this demo: neither one of {', '.join(self._models)}, nor "
            f"a folder that its operator allows (--models, {ENVIRONMENT}FOLDERS), nor a Hub id such as "
            "google/ddpm-cifar10-32."
        )

    def _allowed_folder(self, model: str) -> Path | None:
        """The folder of a pipeline of that name below one of those allowed, links followed."""
        for base in (Path.cwd(), *self._folders):
            folder = (base / model).resolve()
            if any(folder.is_relative_to(allowed) for allowed in self._folders) and (folder / INDEX).is_file():
                return folder
        return None

    def _folder_source(self, folder: Path) -> _Source:
        """The same for every way of naming an allowed folder, so that it has one place in memory."""
        operators = next((source for source in self._models.values() if source.folder == folder), None)
        if operators is not None:
            return operators
        allowed = next(allowed for allowed in self._folders if folder.is_relative_to(allowed))
        name = str(folder.relative_to(allowed))
        if name in self._models or self._allowed_folder(name) != folder:  # it would mean another one
            name = str(folder)
        return _Source(name, str(folder), folder, is_operators=False)

    def _folder(self, source: _Source) -> Path:
        """The folder of a model, checked; from the Hub or its cache where it lies there."""
        if source.folder is not None:
            check_folder(source.folder, source.name)
            return source.folder
        with self._downloading:
            if source.is_operators:
                return pull(source.text)
            return pull(source.text, token=False, max_bytes=min(self.max_bytes, _free_bytes()))

    def _skeleton(self, source: _Source, folder: Path) -> DiffusionPipeline:
        """The pipeline in a folder with networks that have shapes and no weights."""
        if not (folder / INDEX).is_file():
            raise SettingsError(f"`model` {show(source.name)} is no pipeline: it has no {INDEX}.")
        index = plain_index(parse_json(folder / INDEX, f"{source.name}: {INDEX}"))
        if isinstance(index["_class_name"], list) and not self.trust_remote_code:
            raise SettingsError(
                f"`model` {show(source.name)} brings a pipeline as code of its own, which this demo does not run. Its "
                f"operator may allow that by {ENVIRONMENT}TRUST_REMOTE_CODE=1."
            )
        networks = {}
        for name, entry in index.items():
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
                # The first pipelines of diffusers, such as google/ddpm-cifar10-32, have theirs beside the index.
                part = folder / name if (folder / name).is_dir() else folder
                network = _without_weights(part, *entry)
                networks |= {} if network is None else {name: network}
        pipe = load_pipeline(folder, **self._options, **networks)
        if isinstance(index.get("id2label"), dict):  # `DiTPipeline` reads it and does not keep it
            pipe.register_to_config(id2label=index["id2label"])
        return pipe

    def _load(self, folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
        # Asked for another dtype, diffusers would make it the default of torch meanwhile, also for those who draw.
        pipe = _drawing(load_pipeline(folder, dtype=torch.float32, **self._options))
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                _cast(component, dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    @property
    def _options(self) -> dict[str, Any]:
        return {"trust_remote_code": True} if self.trust_remote_code else {}


def new_pipeline(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, guider: BaseGuidance | None = None
) -> DiffusionPipeline:
    """A pipeline for one run: scheduler, guider, config and state of its own around the networks of `pipe`."""
    own = copy.copy(pipe)
    own.scheduler = scheduler
    if guider is not None:
        own.guider = guider
    return own


def _operators_source(name: str, text: str) -> _Source:
    folder = Path(text).expanduser()
    if not folder.is_dir():
        return _Source(name, text, None, is_operators=True)
    is_shipped = folder.resolve().parent == model_cards()
    return _Source(name, f"model_cards/{folder.name}" if is_shipped else text, folder.resolve(), is_operators=True)


def model_cards() -> Path:
    """The folder of the shipped models: beside the app in a Space, one above it in the repository."""
    here = Path(__file__).resolve().parent
    return here / "model_cards" if (here / "model_cards").is_dir() else here.parent / "model_cards"


def _free_bytes() -> int:
    """What downloads may take of the disk that the cache of the Hub lies on."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return max(0, shutil.disk_usage(there).free - FREE_BYTES)


def _device() -> str | None:
    device = os.environ.get(f"{ENVIRONMENT}DEVICE") or None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise ValueError(f"`{ENVIRONMENT}DEVICE` is {device!r}, which is not here: {error}") from error
    return device


def _flag(name: str, default: bool) -> bool:
    text = os.environ.get(f"{ENVIRONMENT}{name}") or str(int(default))
    if text not in ("0", "1"):
        raise ValueError(f"`{ENVIRONMENT}{name}` is {text!r}; it must be 0 or 1.")
    return text == "1"


@contextmanager
def _for_visitors(source: _Source) -> Iterator[None]:
    """Turns every error into a `SettingsError` that names no folder of this machine and no token."""
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        logger.warning("%s could not be loaded.", show(source.name), exc_info=True)
        reason = harmless(error)[:500] or type(error).__name__
        raise SettingsError(f"`model` {show(source.name)} cannot be used: {reason}") from error


def harmless(error: Exception) -> str:
    """What a visitor may read of an error, on one line: no tokens, and of paths on this machine the last name."""
    return PATH.sub(lambda path: path[0].rstrip("/").rpartition("/")[2], redact(" ".join(str(error).split())))


def _without_weights(folder: Path, library: str, class_name: str) -> torch.nn.Module | None:
    """The network whose config is in a folder, on the meta device; None for what is no network."""
    # Some parts of pipelines of diffusers, such as safety checkers, are at home in the folder of the pipeline.
    home = importlib.import_module(library) if library in LIBRARIES else getattr(diffusers.pipelines, library, None)
    network_class = getattr(home, class_name, None)
    if not isinstance(network_class, type) or not issubclass(network_class, (ModelMixin, PreTrainedModel)):
        return None
    with accelerate.init_empty_weights():
        if issubclass(network_class, ModelMixin):
            return network_class.from_config(network_class.load_config(folder))
        return network_class(network_class.config_class.from_pretrained(folder))


def _cast(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts what loading in that dtype casts: all that is saved, without what the class wants to stay in float32."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    if isinstance(network, PreTrainedModel):
        kept = kept if dtype == torch.float16 else set()
        kept |= set(network._keep_in_fp32_modules_strict or ())
    for name, values in network.state_dict(keep_vars=True).items():
        if values.is_floating_point() and not kept & set(name.split(".")):
            values.data = values.data.to(dtype)


def _drawing(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline that draws: this one, or ours around its networks.

    Raises:
        SettingsError: for a pipeline that does something else than drawing images of a class, a text or any.
    """
    if isinstance(pipe, (ClassConditionalPipeline, ClassifierGuidedPipeline)):
        network = pipe.components.get("unet") or pipe.components.get("transformer")
        if network.config.get("low_res_channels"):
            raise SettingsError("its network enlarges images, which this demo has none of.")
        check_scheduler(pipe.scheduler, network.config.get("sigma_data"), task="sample from this network")
        return pipe
    parameters = inspect.signature(pipe.__call__).parameters
    needed = {name for name, x in parameters.items() if x.default is x.empty and x.kind is not x.VAR_KEYWORD}
    components = {name for name, component in pipe.components.items() if component is not None}
    if "scheduler" in components and components & {"unet", "transformer"}:
        if TEXT_TO_IMAGE <= set(parameters) and not OTHER_KINDS & set(parameters) and needed <= {"prompt"}:
            return pipe
        if "prompt" not in parameters and components <= {"unet", "transformer", "vae", "scheduler"}:
            return _drawing(ClassConditionalPipeline.from_pipe(pipe))
    raise SettingsError(
        f"{type(pipe).__name__} draws no images of a class or a text alone. This demo takes the pipelines of "
        "diffusers_ext, and of diffusers the unconditional ones (DDPMPipeline, DDIMPipeline, PNDMPipeline), "
        "DiTPipeline, and text-to-image pipelines such as those of Stable Diffusion and Flux."
    )


def _describe(source: _Source, loaded: DiffusionPipeline, device: str) -> Description:
    """What can be said of a pipeline by its configs."""
    pipe = _drawing(loaded)
    network = pipe.components.get("unet") or pipe.components.get("transformer")
    vae = pipe.components.get("vae") or pipe.components.get("vqvae")
    is_ours = isinstance(pipe, (ClassConditionalPipeline, ClassifierGuidedPipeline))
    height, width = _image_size(pipe, network)
    schedulers = _schedulers(pipe, is_ours)
    takes_eta_too = is_ours or "eta" in inspect.signature(pipe.__call__).parameters
    return Description(
        name=source.name,
        source=source.text,
        pipeline=type(pipe).__name__,
        wrapped=pipe is not loaded,
        network=type(network).__name__,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        channels=image_channels(network) if vae is None else vae.config.get("out_channels", 3),
        height=height,
        width=width,
        latent=vae is not None,
        labels=_labels(pipe) if is_ours else (),
        takes_prompt=_takes_prompt(pipe) if is_ours else True,
        resizable="height" in inspect.signature(pipe.__call__).parameters
        and not (is_ours and pipe.components.get("transformer") is not None),
        guidance=_guidance(pipe, network, schedulers),
        schedulers=tuple(sorted(schedulers, key=lambda name: name not in COMMON_SCHEDULERS)),
        default_scheduler=DEFAULT_SCHEDULER if DEFAULT_SCHEDULER in schedulers else type(pipe.scheduler).__name__,
        eta_schedulers=tuple(name for name in schedulers if takes_eta_too and takes_eta(getattr(diffusers, name))),
        dtypes=("float32", "bfloat16") + (("float16",) if device.startswith("cuda") else ()),
        scheduler_options={name: options for name, options in schedulers.items() if options},
    )


def _image_size(pipe: DiffusionPipeline, network: torch.nn.Module) -> tuple[int, int]:
    """Height and width of the images, in pixels."""
    sample_size = getattr(pipe, "default_sample_size", None) or network.config.get("sample_size") or 32
    factor = getattr(pipe, "vae_scale_factor", 1)
    height, width = height_width(sample_size)
    return factor * height, factor * width


def _schedulers(pipe: DiffusionPipeline, is_ours: bool) -> dict[str, dict[str, Any]]:
    """Options of `from_config` by the name of every scheduler that works with this pipeline."""
    if is_ours:
        return working_schedulers(pipe, scheduler_classes())
    # The loops of the others are not ours: they get what diffusers itself calls compatible.
    own, name = pipe.scheduler, type(pipe.scheduler).__name__
    compatible = {found.__name__ for found in own.compatibles}
    annotation = inspect.signature(type(pipe).__init__).parameters["scheduler"].annotation
    try:
        working = working_schedulers(
            pipe,
            {
                other: scheduler_class
                for other, scheduler_class in scheduler_classes().items()
                if other in compatible and _is_annotated(scheduler_class, annotation)
            },
        )
    except Exception:  # its runs need more than steps, such as the shift of the pipeline
        working = {}
    return {name: {}} | working


def _is_annotated(scheduler_class: type[SchedulerMixin], annotation: Any) -> bool:
    """Whether a pipeline says of its scheduler that it may be of this class."""
    if isinstance(annotation, EnumMeta):  # `KarrasDiffusionSchedulers` lists names
        return scheduler_class.__name__ in annotation.__members__
    classes = get_args(annotation) or (annotation,)
    return any(isinstance(x, type) and issubclass(scheduler_class, x) for x in classes)


def _labels(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """A name for every class: the first of those in `id2label` that no other class has, else its id."""
    ids = class_ids_of(pipe)
    if ids is None:
        return ()
    known = {int(class_id): label for class_id, label in (pipe.config.get("id2label") or {}).items()}
    names = {
        class_id: list(dict.fromkeys([*(part.strip() for part in label.split(",")), label]))
        for class_id, label in known.items()
    }
    count = Counter(name for of_class in names.values() for name in of_class)
    return tuple(
        next((name for name in names.get(class_id, ()) if name and count[name] == 1), str(class_id))
        for class_id in range(max(ids) + 1)
    )


def _takes_prompt(pipe: DiffusionPipeline) -> bool:
    components = pipe.components
    return components.get("text_encoder") is not None and components.get("tokenizer") is not None


def _guidance(
    pipe: DiffusionPipeline, network: torch.nn.Module, schedulers: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """Kinds of guidance and good scales for them."""
    kinds = {"none": 1.0}
    if isinstance(pipe, ClassifierGuidedPipeline):
        if pipe.classifier is not None:
            kinds |= {"classifier": CLASSIFIER_SCALE, "adaptive-projected": CLASSIFIER_SCALE}
            kinds |= {"classifier-mean": CLASSIFIER_SCALE} if "DDPMScheduler" in schedulers else {}
    elif isinstance(pipe, ClassConditionalPipeline):
        has_null = num_classes(network) is not None and (
            null_label(network) is not None or pipe.config.null_class_label is not None
        )
        scale = PIXEL_SCALE if pipe.vae is None and not _takes_prompt(pipe) else LATENT_SCALE
        if pipe.guide_model is not None:
            kinds |= {"autoguidance": AUTOGUIDANCE_SCALE, "adaptive-projected": AUTOGUIDANCE_SCALE}
        elif has_null or _takes_prompt(pipe):
            kinds |= {"classifier-free": scale, "adaptive-projected": scale}
    else:
        config = network.config
        scale = inspect.signature(pipe.__call__).parameters["guidance_scale"].default or LATENT_SCALE
        if config.get("guidance_embeds") or config.get("time_cond_proj_dim") is not None:
            kinds["embedded"] = float(scale)
        elif config.get("guidance_embeds") is None:
            kinds["classifier-free"] = float(scale)
    return kinds
