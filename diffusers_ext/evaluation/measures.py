"""The metrics of one evaluation: samples, a network or a classifier against the references."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers import DDPMScheduler, DiffusionPipeline

from diffusers_ext.evaluation.bits_per_dim import bits_per_dim
from diffusers_ext.evaluation.clip_score import clip_score
from diffusers_ext.evaluation.drawing import prompt_lines
from diffusers_ext.evaluation.estimates import Metric, proportion
from diffusers_ext.evaluation.features import FeatureExtractor, extract, load_features
from diffusers_ext.evaluation.judge import Judge, judge_accuracy, load_judge
from diffusers_ext.evaluation.metrics import (
    density_coverage,
    frechet,
    kernel_distance,
    pairwise_distance,
    precision_recall,
)
from diffusers_ext.evaluation.networks import short_name
from diffusers_ext.evaluation.noise_levels import NoiseLevelReport, accuracy_by_noise_level, some_rows
from diffusers_ext.evaluation.options import OF_FEATURES, EvaluateConfig, classifier_folder, data_config
from diffusers_ext.evaluation.samples import Samples
from diffusers_ext.hub.loading import open_folder
from diffusers_ext.models import ADMClassifierModel
from diffusers_ext.sampling import height_width, image_channels, num_classes
from diffusers_ext.training.data import Batch, ImageData, open_data


class References:
    """The dataset that samples are compared with, in their size, and what is learned from its training split."""

    def __init__(self, config: EvaluateConfig, device: torch.device):
        self.config, self.device = config, device
        dataset = Path(config.reference).expanduser()
        self.name = config.reference_name or (dataset.name if dataset.exists() else config.reference)
        self.shape: tuple[int, int, int] | None = None
        if config.features != "inception" and not re.fullmatch(r"pca\d+", config.features):
            self.extractor  # noqa: B018  a wrong name is to fail before samples are drawn

    def load(self, samples: Samples) -> None:
        """Bring the references to the shape of these samples.

        Raises:
            ValueError: for samples of another shape than before, or that are no squares.
        """
        shape = samples.images.shape[1:]
        if shape[1] != shape[2]:
            raise ValueError(f"The samples have {shape[1]}x{shape[2]} pixels; they must be squares.")
        if self.shape not in (None, shape):
            raise ValueError(f"The samples have the shape {shape}, but others of this evaluation {self.shape}.")
        self.shape = shape

    @cached_property
    def test(self) -> Batch:
        """The held-out images, and their labels where there are any."""
        return self._read(self.config.reference_split, self.config.reference_images)

    @cached_property
    def train(self) -> Batch:
        """Images that the samples are not compared with."""
        return self._read(self.config.train_split, self.config.train_images)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """Of features."""
        pca = re.fullmatch(r"pca\d+", self.config.features)
        return load_features(self.config.features, reference=self.train.images if pca else None, device=self.device)

    @cached_property
    def features(self) -> torch.Tensor:
        """Of the held-out images, `(N, F)`."""
        return extract(self.extractor, self.test.images, device=self.device)

    @cached_property
    def judge(self) -> Judge:
        """Who reads the classes of samples."""
        return load_judge(
            self.config.judge, self.train if self.config.judge == "neighbours" else None, device=self.device
        )

    @cached_property
    def judge_on_reference(self) -> float | None:
        """How often the judge is right about held-out images."""
        if self.test.labels is None:
            return None
        return judge_accuracy(self.judge, self.test.images, self.test.labels).value

    def facts(self, **more: Any) -> dict[str, Any]:
        """What every figure says about itself."""
        return {"seed": self.config.seed, "num_bootstrap": self.config.num_bootstrap, **more}

    @property
    def title(self) -> str:
        return f"{self.name} {self.config.reference_split}"

    def open(self, split: str, size: int, channels: int, need_labels: bool = False) -> ImageData:
        return open_data(data_config(self.config), split, sample_size=size, channels=channels, need_labels=need_labels)

    def _read(self, split: str, limit: int | None) -> Batch:
        data = self.open(split, self.shape[1], self.shape[0])
        return data.rows(some_rows(len(data), limit, self.config.seed))


def measure_samples(
    config: EvaluateConfig, names: Sequence[str], samples: Samples, references: References
) -> list[Metric]:
    """The metrics `names` of samples, with their intervals."""
    references.load(samples)
    images, metrics = torch.from_numpy(samples.images), []
    if set(names) & set(OF_FEATURES):
        extractor = references.extractor
        name, features = extractor.name, extract(extractor, images, device=references.device)
        facts = references.facts(extractor=name, reference=references.title)
        if "fd" in names:
            metrics.append(frechet(features, references.features).metric(extractor.frechet_name, **facts))
        if "kid" in names:
            estimate = kernel_distance(features, references.features, seed=config.seed)
            metrics.append(estimate.metric(extractor.kernel_name, **facts))
        if "prdc" in names:
            estimates = (
                *precision_recall(features, references.features),
                *density_coverage(features, references.features),
            )
            words = ("precision", "recall", "density", "coverage")
            metrics += [estimate.metric(f"{word}-{name}", **facts) for word, estimate in zip(words, estimates)]
        if "diversity" in names:
            facts = references.facts(extractor=name, reference=None)
            metrics.append(pairwise_distance(features, samples.labels).metric(f"pairwise-distance-{name}", **facts))
    if "accuracy" in names and (samples.labels is not None or config.metrics is not None):
        if samples.labels is None:
            raise ValueError("`metrics` holds 'accuracy', but the samples have no labels to be judged by.")
        estimate = judge_accuracy(references.judge, images, samples.labels)
        estimate.details["judge_on_reference"] = references.judge_on_reference
        facts = references.facts(extractor=references.judge.name, reference=references.title)
        metrics.append(estimate.metric("accuracy", **facts))
    if "clip_score" in names:
        prompts = prompt_lines(config.prompts)
        captions = [prompts[index % len(prompts)] for index in range(len(images))]
        estimate = clip_score(images, captions, config.clip_model, device=references.device)
        metrics.append(estimate.metric("CLIP-score", **references.facts(extractor=short_name(config.clip_model))))
    return metrics


def measure_bits_per_dim(config: EvaluateConfig, pipe: DiffusionPipeline, references: References) -> Metric:
    """The variational bound of reference images under the pipeline's network."""
    network = pipe.components.get("transformer") or pipe.components.get("unet")
    if network is None or pipe.components.get("vae") is not None:
        raise ValueError("`metrics` holds 'bpd', which needs a network that draws pixels, not latents.")
    height, width = height_width(network.config.sample_size)
    classes = num_classes(network)
    data = references.open(config.reference_split, height, image_channels(network), need_labels=classes is not None)
    rows = some_rows(len(data), config.bpd_images, config.seed)
    totals = []
    for start in range(0, len(rows), config.batch_size):
        batch = data.rows(rows[start : start + config.batch_size]).to(pipe.device)
        numbers = range(start, start + len(batch.images))
        result = bits_per_dim(
            network,
            batch.images,
            pipe.scheduler,
            num_steps=config.bpd_steps,
            generator=[torch.Generator().manual_seed(config.seed + number) for number in numbers],
            class_labels=batch.labels if classes is not None else None,
        )
        totals += result["total"].tolist()
    steps = config.bpd_steps or pipe.scheduler.config.num_train_timesteps
    estimate = proportion(np.array(totals), len(totals), details={"num_steps": steps})
    return estimate.metric("bits-per-dim", **references.facts(reference=references.title))


def measure_classifier(
    config: EvaluateConfig, pipe: DiffusionPipeline | None, device: torch.device
) -> NoiseLevelReport:
    """Accuracy by noise level of a classifier, or of that of a pipeline."""
    if pipe is not None:
        classifier = pipe.components.get("classifier")
        if classifier is None:
            raise ValueError("`metrics` holds 'noise_levels', but the pipeline has no `classifier`.")
        schedule = pipe.config.get("classifier_schedule")
        process = pipe.scheduler if schedule is None else DDPMScheduler(**schedule)
        if getattr(process, "betas", None) is None:
            process = DDPMScheduler()
    else:
        folder = classifier_folder(open_folder(config.model))
        classifier = ADMClassifierModel.from_pretrained(folder, use_safetensors=True).to(device)
        beside = folder.parent / "scheduler"
        process = DDPMScheduler.from_pretrained(open_folder(beside)) if beside.is_dir() else DDPMScheduler()
    size, channels = classifier.config.sample_size, classifier.config.in_channels
    options = {"sample_size": size, "channels": channels, "need_labels": True}
    data = open_data(data_config(config), config.reference_split, **options)
    limits = {"num_images": config.reference_images, "batch_size": config.batch_size, "seed": config.seed}
    return accuracy_by_noise_level(classifier, process, data, device=device, **limits)
