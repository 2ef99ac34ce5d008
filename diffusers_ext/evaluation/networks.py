"""Frozen networks that look at images, behind feature extractors and losses on features.

Shapes: B batch, C image channels, H and W pixels, F features.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_ext.hub.loading import open_folder
from diffusers_ext.models import ADMClassifierModel


class VisionNetwork(nn.Module):
    """A frozen network that looks at images in [-1, 1]; gradients reach the images, not the weights.

    Attributes:
        name: short, fit for the name of a metric.
        num_features: F.
    """

    def __init__(self, name: str, num_features: int):
        super().__init__()
        self.name, self.num_features = name, num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float images `(B, C, H, W)` in [-1, 1] -> float32 features `(B, F)`, pooled over pixels."""
        raise NotImplementedError

    def layers(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same images -> what every layer sees in them, first layer first: maps `(B, C', H', W')`, or tokens
        `(B, L, C')` of a transformer. For perceptual losses and for discriminators on features."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "VisionNetwork":
        """Stays in evaluation mode: features are not to depend on who trains."""
        return super().train(False)

    def _freeze(self) -> None:
        self.requires_grad_(False).eval().float()


class ClassifierNetwork(VisionNetwork):
    """An [`ADMClassifierModel`] at timestep 0, where images have no noise; its features are what its last linear
    layer turns into logits.

    Images of another size are resized to the classifier's, grey ones repeated if it was trained on colour.

    Args:
        classifier: loses its last layer, and is frozen.
    """

    def __init__(self, classifier: ADMClassifierModel, name: str):
        parent, attribute = _last_linear(classifier.head)
        super().__init__(name, getattr(parent, attribute).in_features)
        setattr(parent, attribute, nn.Identity())
        self.classifier = classifier
        self._freeze()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self._fitted(images), 0).logits

    def layers(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = self._fitted(images)
        return tuple(self.classifier._encode(images, self.classifier._prepare(images, 0)))

    def _fitted(self, images: torch.Tensor) -> torch.Tensor:
        config = self.classifier.config
        return fit(images, config.in_channels, (config.sample_size, config.sample_size), self.name)


class TransformersNetwork(VisionNetwork):
    """A vision model of transformers, or the vision half of one of images and text.

    Its features are the model's own pooled output, or the mean over tokens or pixels of its last hidden state where it
    has no trained pooling. Images are resized to the model's size and normalised as its `preprocessor_config.json`
    says; without that file, with mean and standard deviation 0.5.

    Args:
        model: as transformers loads it; it is frozen.
        processing: content of `preprocessor_config.json`.
        pooled: use the model's own pooling.
    """

    def __init__(self, model: nn.Module, name: str, processing: dict | None = None, pooled: bool = True):
        model = getattr(model, "base_model", model)  # without the head of a classifier
        model = getattr(model, "vision_model", model)
        config, processing = model.config, processing or {}
        channels = getattr(config, "num_channels", 3)
        super().__init__(name, 0)
        self.model, self.pooled, self.channels = model, pooled, channels
        self.size = _pair(getattr(config, "image_size", None) or processing.get("crop_size") or processing.get("size"))
        self.scale = processing.get("rescale_factor", 1 / 255) if processing.get("do_rescale", True) else 1.0
        normalize = processing.get("do_normalize", True)
        for key, default, without in (("image_mean", 0.5, 0.0), ("image_std", 0.5, 1.0)):
            values = torch.as_tensor(processing.get(key) or default if normalize else without, dtype=torch.float32)
            self.register_buffer(key, values.reshape(-1, 1, 1), persistent=False)
        self._freeze()
        size = self.size or (224, 224)
        with torch.no_grad():
            device = next(model.parameters()).device
            self.num_features = self(torch.zeros(1, channels, *size, device=device)).shape[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values=self.pixel_values(images))
        if self.pooled and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))

    def layers(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values=self.pixel_values(images), output_hidden_states=True)
        return tuple(output.hidden_states)

    def pixel_values(self, images: torch.Tensor) -> torch.Tensor:
        """What the model itself takes."""
        images = fit(images, self.channels, self.size or images.shape[-2:], self.name)
        return ((images + 1) * (127.5 * self.scale) - self.image_mean) / self.image_std


def load_network(source: str | Path | nn.Module, device: torch.device | str = "cpu") -> VisionNetwork:
    """A frozen network that is differentiable in its images, for losses on features.

    Args:
        source: folder or Hub id of an [`ADMClassifierModel`], of a pipeline that holds one as `classifier`, or of any
            vision model of transformers; or such a model itself, which is copied.
        device: where it shall be.

    Raises:
        ValueError: when there is no such model, or it lacks weights.
    """
    if isinstance(source, VisionNetwork):
        return source.to(device)
    if isinstance(source, nn.Module):
        if not is_known(source):
            raise ValueError(
                f"`source` is a {type(source).__name__}; it must be an ADMClassifierModel or a vision model of "
                "transformers, or a subclass of VisionNetwork."
            )
        name = type(source).__name__
        known = ClassifierNetwork if isinstance(source, ADMClassifierModel) else TransformersNetwork
        return known(copy.deepcopy(source), name).to(device)

    kind, folder = find_model(source)
    name = short_name(source)
    if kind == "adm":
        return ClassifierNetwork(ADMClassifierModel.from_pretrained(folder, use_safetensors=True), name).to(device)
    return _transformers_network(source, folder, name).to(device)


def find_model(source: str | Path) -> tuple[Literal["adm", "transformers"], Path]:
    """What kind of model a folder or Hub repository holds, and its local folder.

    Raises:
        ValueError: when it is neither an [`ADMClassifierModel`], nor a pipeline with one, nor a model of transformers.
    """
    reason = "there is a config.json, but of another kind"
    root = open_folder(source, argument="source")
    for folder in (root, root / "classifier"):
        try:
            config = ADMClassifierModel.load_config(folder)
        except (OSError, ValueError) as error:
            reason = error
            continue
        if config.get("_class_name") == "ADMClassifierModel":
            return "adm", folder
        if "model_type" in config:
            return "transformers", folder
    raise ValueError(
        f"{str(source)!r} holds no network that looks at images: it must be a folder or Hub id of an "
        f"ADMClassifierModel, of a pipeline with one, or of a vision model of transformers ({reason})."
    )


def open_transformers(source: str | Path, auto_class: Any = None) -> tuple[nn.Module, dict | None, bool]:
    """A model of transformers, its preprocessing, and whether its pooling was trained.

    Args:
        source: folder or Hub id.
        auto_class: None is `transformers.AutoModel`.

    Raises:
        ValueError: when weights other than those of a pooling are missing.
    """
    from transformers import AutoModel
    from transformers.image_processing_utils import BaseImageProcessor

    folder = open_folder(source, argument="source")
    # Without a word on code of the repository, transformers asks for consent on the terminal.
    model, info = (auto_class or AutoModel).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    pooling = [key for key in info["missing_keys"] if "pooler" in key]
    lacking = [key for key in info["missing_keys"] if key not in pooling]
    if lacking:
        raise ValueError(
            f"{str(source)!r} lacks the weights of {lacking[0]} ({len(lacking)} in all), which would be random. Take "
            "a checkpoint that holds them."
        )
    try:
        processing, _ = BaseImageProcessor.get_image_processor_dict(folder)
    except OSError:
        processing = None
    return model.eval(), processing, not pooling


def _transformers_network(source: str | Path, folder: Path, name: str) -> TransformersNetwork:
    model, processing, pooled = open_transformers(folder)
    try:
        return TransformersNetwork(model, name, processing, pooled)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{str(source)!r} is a {type(model).__name__}, which is no vision model: it must take "
            f"`pixel_values` alone ({error})."
        ) from error


def is_known(module: nn.Module) -> bool:
    """Whether `load_network` takes this module."""
    from transformers import PreTrainedModel

    return isinstance(module, (VisionNetwork, ADMClassifierModel, PreTrainedModel))


def _last_linear(head: nn.Module) -> tuple[nn.Module, str]:
    """Parent and attribute of the last linear layer."""
    name = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = name.rpartition(".")
    return head.get_submodule(parent), attribute


def short_name(source: str | Path) -> str:
    """`model_cards/adm-mnist/classifier` -> `adm-mnist-classifier`; `org/model` -> `model`."""
    path = Path(source)
    path = path.resolve() if path.is_dir() else path
    return f"{path.parent.name}-{path.name}" if path.name == "classifier" and path.parent.name else path.name


def _pair(size: int | list | tuple | dict | None) -> tuple[int, int] | None:
    """Height and width from the ways in which transformers writes an image size."""
    if isinstance(size, dict):
        short = size.get("shortest_edge")
        size = (size.get("height", short), size.get("width", short))
    return (size, size) if isinstance(size, int) else None if size is None else tuple(size)


def fit(images: torch.Tensor, channels: int, size: tuple[int, int], name: str) -> torch.Tensor:
    """Bring images `(B, C, H, W)` to `channels` and, by an antialiased bicubic filter, to `size`."""
    if images.shape[1] != channels:
        if images.shape[1] != 1:
            raise ValueError(
                f"`images` have {images.shape[1]} channels, but {name} looks at {channels}. Take another extractor, "
                "or convert the images."
            )
        images = images.expand(-1, channels, -1, -1)
    if tuple(images.shape[-2:]) != tuple(size):
        images = F.interpolate(images, tuple(size), mode="bicubic", antialias=True)
    return images
