"""What is evaluated, against what, and by which metrics: options and what can be measured of what."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from diffusers_ext.evaluation.drawing import DrawingOptions
from diffusers_ext.hub.loading import open_folder
from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.sources import open_source


MetricName = Literal["fd", "kid", "prdc", "accuracy", "diversity", "clip_score", "bpd", "noise_levels"]
OF_FEATURES = ("fd", "kid", "prdc", "diversity")
LEAST_SAMPLES = 6  # density and coverage look at five neighbours
OF_THE_MODEL = ("bpd", "noise_levels")  # the others are of samples


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DrawingOptions):
    """Draw samples of a model, or take those that are there, and measure them; or measure a classifier.

    `model` may also be samples (an .npz file as `diffusers-ext sample` writes it, or a folder of images), or the
    folder of a noise-aware classifier.
    """

    reference: str
    """dataset that the samples are compared with: `digits`, a local folder or a Hub name"""
    reference_split: str = "test"
    """its held-out split"""
    train_split: str = "train"
    """split for the judge and for principal components; the samples are not compared with it"""
    reference_name: str | None = None
    """what reports call the dataset; None: its name, or the last part of its path"""
    reference_images: int | None = None
    """so many images of the split, drawn by chance; None: all"""
    train_images: int | None = None
    """so many images of the training split, drawn by chance; None: all"""
    dataset_config_name: str | None = None
    """configuration of a dataset that has several"""
    image_column: str | None = None
    """None: the only column of type Image"""
    label_column: str | None = None
    """None: the only column of type ClassLabel"""
    resize_mode: Literal["fit", "center_crop"] = "fit"
    """how reference images get the size of the samples; as in the training"""

    metrics: tuple[MetricName, ...] | None = None
    """fd (FID with inception), kid, prdc (precision, recall, density, coverage), diversity, accuracy, clip_score, bpd,
    noise_levels; None: those that the model or the samples allow, without bpd, and of a classifier noise_levels"""
    features: str = "pca64"
    """what images are compared by: pca64 (principal components of the training split's pixels), folder or Hub name of
    a classifier of ours or of a vision model of transformers, or inception"""
    judge: str = "neighbours"
    """who reads the classes of samples: neighbours (nearest training images, for small ones), or folder or Hub name of
    a classifier, another one than that which guided"""
    clip_model: str = "openai/clip-vit-base-patch16"
    """folder or Hub name, for clip_score"""
    bpd_images: int = 100
    """reference images for bpd"""
    bpd_steps: int | None = None
    """timesteps for bpd, each a run of the network; None: all of the scheduler"""
    num_bootstrap: int = 1000
    """resamples for the 95% intervals"""

    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """may be given several times: `--sweep guidance_scale=0,1,2,4 --sweep scheduler=ddim,dpmsolver++` measures all
    eight combinations; parts of one value are joined by colons: guidance_interval=0:1,0.2:0.8"""
    output: str | None = None
    """folder for report and samples; a second run goes on where the first stopped. None: runs/evaluate-NAME"""
    card: str | None = None
    """model card to write the results to; None: the README.md of a local model folder"""
    write_card: bool = True
    """write the results to the model card"""


def kind_of_model(model: str) -> Literal["pipeline", "classifier", "samples"]:
    """What `model` is.

    Raises:
        ValueError: for a path that is nothing of the kind.
    """
    path = Path(model).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return "samples"
    if not path.is_dir() and (model.startswith(("/", ".", "~")) or path.suffix == ".npz"):
        raise ValueError(f"`model` ({model!r}) looks like a local file or folder, but there is none.")
    folder = path if path.is_dir() else open_folder(model)
    if (folder / "model_index.json").exists():
        return "pipeline"
    if classifier_folder(folder) is not None:
        return "classifier"
    return "samples" if path.is_dir() else "pipeline"


def classifier_folder(model: Path) -> Path | None:
    """The folder of a noise-aware classifier: this one, or `classifier` in it, as a training leaves it."""
    for folder in (model, model / "classifier"):
        file = folder / "config.json"
        if file.exists() and json.loads(file.read_text()).get("_class_name") == "ADMClassifierModel":
            return folder
    return None


def chosen_metrics(config: EvaluateConfig, kind: str) -> tuple[str, ...]:
    """What is measured.

    Raises:
        ValueError: for metrics that this kind of model does not have, and options that it ignores.
    """
    possible = {
        "pipeline": (*OF_FEATURES, "accuracy", "clip_score", "bpd", "noise_levels"),
        "samples": (*OF_FEATURES, "accuracy", "clip_score"),
        "classifier": ("noise_levels",),
    }[kind]
    if kind != "pipeline":
        kept = ("model", "seed", "device", "prompts", "batch_size", "cpu_threads")
        for field in fields(DrawingOptions):
            if field.name not in kept and getattr(config, field.name) != field.default:
                raise ValueError(f"`{field.name}` is {getattr(config, field.name)}, but {kind} are not drawn anew.")
        if config.sweep:
            raise ValueError(f"`sweep` is {config.sweep}, but `model` is {kind}; give a pipeline to draw from.")
    elif config.num_samples < LEAST_SAMPLES and (config.metrics is None or set(config.metrics) & set(OF_FEATURES)):
        raise ValueError(f"`num_samples` is {config.num_samples}; comparing features needs {LEAST_SAMPLES} or more.")
    has_prompts = config.prompts is not None or any(part.startswith("prompts=") for part in config.sweep)
    if config.metrics is None:
        default = [name for name in possible if name not in ("clip_score", *OF_THE_MODEL)]
        if kind == "classifier":
            default = ["noise_levels"]
        return (*default, "clip_score") if has_prompts else tuple(default)
    wrong = [name for name in config.metrics if name not in possible]
    if wrong:
        raise ValueError(f"`metrics` holds {wrong[0]!r}; of {kind} can be measured {', '.join(possible)}.")
    if "clip_score" in config.metrics and not has_prompts:
        raise ValueError(
            "`metrics` holds 'clip_score', which needs `prompts`: the file that the samples show in turn."
        )
    return tuple(dict.fromkeys(config.metrics))


def check_reference(config: EvaluateConfig, names: Sequence[str]) -> bool:
    """Raises a ValueError for a reference that cannot be opened, before anything is drawn.

    Returns:
        Whether it has labels.
    """
    for name in ("reference_images", "train_images", "bpd_images", "num_bootstrap"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"`{name}` is {getattr(config, name)}; it must be at least 1.")
    splits = ["reference_split"]
    needs_train = "accuracy" in names and config.judge == "neighbours"
    if needs_train or (config.features.startswith("pca") and set(names) & set(OF_FEATURES)):
        splits.append("train_split")
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    options = {"config_name": config.dataset_config_name, **columns}
    sources = [open_source(config.reference, getattr(config, name), split_option=name, **options) for name in splits]
    return all(source.labels is not None for source in sources)


def data_config(config: EvaluateConfig) -> TrainingConfig:
    """The reference as [`open_data`] takes it."""
    return TrainingConfig(
        dataset=config.reference,
        dataset_config_name=config.dataset_config_name,
        image_column=config.image_column,
        label_column=config.label_column,
        resize_mode=config.resize_mode,
        mixed_modes="convert",
    )


def card_of(config: EvaluateConfig, kind: str) -> Path | None:
    """The model card that gets the results: the one asked for, or that of a local model."""
    if not config.write_card:
        return None
    if config.card is not None:
        return Path(config.card)
    folder = Path(config.model).expanduser()
    if kind == "samples" or not folder.is_dir():
        return None
    component = kind == "classifier" and (folder.parent / "model_index.json").exists()
    return (folder.parent if component else folder) / "README.md"
