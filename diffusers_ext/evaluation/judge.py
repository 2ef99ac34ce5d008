"""Judges of drawn images: do they show the class that was asked for?"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_ext.evaluation.estimates import Estimate, proportion
from diffusers_ext.evaluation.features import unit_rows
from diffusers_ext.evaluation.networks import TransformersNetwork, find_model, fit, open_transformers, short_name
from diffusers_ext.models import ADMClassifierModel
from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.data import Batch, open_data


class Judge:
    """Reads the class of an image.

    Attributes:
        name: for tables.
        num_classes: how many it tells apart.
    """

    name: str
    num_classes: int

    def predict(self, images: torch.Tensor) -> np.ndarray:
        """uint8 images `(N, C, H, W)` -> class ids `(N,)`."""
        raise NotImplementedError


class NeighbourJudge(Judge):
    """Reads images by their nearest neighbours among training images, pixel by pixel. It is no network, and shares
    nothing with the models that it judges; for small images of digits and the like.

    Args:
        images: uint8 `(N, C, H, W)`, training images, not those that accuracy is measured on.
        labels: class ids `(N,)`.
        neighbours: how many are asked, weighted by distance.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor | np.ndarray, neighbours: int = 3):
        try:
            from sklearn.neighbors import KNeighborsClassifier
        except ImportError as error:
            raise ImportError('This judge needs scikit-learn: pip install "diffusers_ext[eval]"') from error
        labels = np.asarray(labels)
        self.name, self.num_classes = f"{neighbours}-nearest-neighbours", int(labels.max()) + 1
        self.shape = tuple(images.shape[1:])
        self.classifier = KNeighborsClassifier(neighbours, weights="distance", algorithm="brute")
        self.classifier.fit(unit_rows(images), labels)

    def predict(self, images: torch.Tensor) -> np.ndarray:
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"`images` are of shape {tuple(images.shape[1:])}, but this judge knows images of {self.shape}: give "
                "both the same channels and size."
            )
        return self.classifier.predict(unit_rows(images))


class ClassifierJudge(Judge):
    """A trained network that reads images: an [`ADMClassifierModel`], asked at timestep 0, or an image classifier of
    transformers. It must be another one than the classifier that guided the samples.

    Args:
        source: folder or Hub id.
        batch_size: images at a time.
        device: where it runs.

    Raises:
        ValueError: when there is no such network, or it lacks weights.
    """

    def __init__(self, source: str | Path, batch_size: int = 64, device: torch.device | str = "cpu"):
        kind, folder = find_model(source)
        self.name, self.batch_size, self.device = short_name(source), batch_size, device
        if kind == "adm":
            network = ADMClassifierModel.from_pretrained(folder, use_safetensors=True)
            self.num_classes, size = network.config.num_classes, (network.config.sample_size,) * 2
            self.read = lambda x: network(fit(x, network.config.in_channels, size, self.name), 0).logits
        else:
            from transformers import AutoModelForImageClassification

            network, processing, _ = open_transformers(folder, AutoModelForImageClassification)
            self.num_classes = network.config.num_labels
            vision = TransformersNetwork(network.base_model, self.name, processing).to(device)
            self.read = lambda x: network(pixel_values=vision.pixel_values(x)).logits
        network.to(device).eval()

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> np.ndarray:
        batches = images.split(self.batch_size)
        logits = [self.read(batch.to(self.device).float() / 127.5 - 1).cpu() for batch in batches]
        return torch.cat(logits).argmax(dim=1).numpy()


def load_judge(source: str | Path | Judge, train: Batch | None = None, device: torch.device | str = "cpu") -> Judge:
    """Open a judge.

    Args:
        source: `neighbours`, which reads images by those of `train`, or a folder or Hub id for [`ClassifierJudge`].
        train: labelled training images.
        device: of a network.
    """
    if isinstance(source, Judge):
        return source
    if source != "neighbours":
        return ClassifierJudge(source, device=device)
    if train is None or train.labels is None:
        raise ValueError("`train` must be given for the judge `neighbours`: training images with labels.")
    return NeighbourJudge(train.images, train.labels)


def judge_accuracy(judge: Judge, images: torch.Tensor, labels: Any) -> Estimate:
    """Share of uint8 images `(N, C, H, W)` that a judge reads as `labels` `(N,)`; `details` hold `per_class`.

    Raises:
        ValueError: when the numbers of images and labels differ, or the judge does not know a label.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not len(images):
        raise ValueError(f"`labels` has shape {labels.shape} for {len(images)} images; there must be one for each.")
    if labels.min() < 0 or labels.max() >= judge.num_classes:
        raise ValueError(
            f"`labels` reach from {labels.min()} to {labels.max()}, but {judge.name} tells {judge.num_classes} "
            "classes apart: take a judge of the same classes."
        )
    right = judge.predict(images) == labels
    details = {"per_class": {str(c): float(right[labels == c].mean()) for c in np.unique(labels)}}
    return proportion(right, len(images), details=details)


def read_split(dataset: str, split: str, *, sample_size: int, channels: int = 1, need_labels: bool = True) -> Batch:
    """All images of a split, decoded, with their labels.

    Args:
        dataset, split: as [`open_data`] takes them.
        sample_size: height and width in pixels.
        channels: 1 (greyscale) or 3 (colour).
        need_labels: fail when there are none.
    """
    options = {"sample_size": sample_size, "channels": channels, "need_labels": need_labels}
    data = open_data(TrainingConfig(dataset=dataset), split, **options)
    return data.rows(list(range(len(data))))
