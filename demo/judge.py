"""Reads the digit of an image: a classifier that guides nothing here, and was trained on images of its own choice.

Shapes: B images, C = 1 channel, H and W pixels.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from catalog import LOADING, Description, model_cards
from PIL.Image import Image

from diffusers_ext import ADMClassifierModel


NAME = "judge-mnist"  # of its folder beside the models
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Judge:
    """A classifier of digits, asked about images without noise.

    Args:
        folder: of an `ADMClassifierModel` for ten digits.
        device: where it runs.

    Raises:
        ValueError: for a classifier of something else.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        with LOADING:
            network = ADMClassifierModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        config = network.config
        if (config.in_channels, config.num_classes) != (1, len(DIGITS)):
            raise ValueError(
                f"`folder` has a classifier of {config.num_classes} classes and {config.in_channels} channels; the "
                f"judge must tell {len(DIGITS)} digits in grey images apart."
            )
        self.network, self.size = network.requires_grad_(False).to(device).eval(), config.sample_size

    def reads(self, description: Description) -> bool:
        """Whether this model draws digits: by the names of its classes, or by its own where it knows none."""
        grey = description.channels == 1 and max(description.height, description.width) <= self.size
        if description.labels:
            return grey and description.labels in (DIGITS, tuple(map(str, range(len(DIGITS)))))
        named = re.search(r"(?<![a-z])mnist", description.name.lower()) and "fashion" not in description.name.lower()
        return grey and bool(named)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Probability of every digit `(B, 10)`, on the CPU.

        Args:
            images: `(B, 1, H, W)`, those beyond [-1, 1] are clipped as on their way to the screen. Smaller ones get a
                black margin.
        """
        height, width = images.shape[2:]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        margin = (left, self.size - width - left, top, self.size - height - top)
        images = F.pad(images.to(self.network.device, torch.float32).clamp(-1, 1), margin, value=-1.0)
        return self.network(images, 0).logits.softmax(dim=1).cpu()

    def verdicts(self, images: Sequence[Image], labels: Sequence[str] = ()) -> list[tuple[str, float]]:
        """The digit that each image shows, and its probability.

        Args:
            images: grey ones.
            labels: names of the classes, as the model has them. Empty: in words.
        """
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("L")) for image in images]))[:, None]
        best, digits = self.probabilities(pixels / 127.5 - 1).max(dim=1)
        names = tuple(labels) or DIGITS
        return [(names[digit], probability) for digit, probability in zip(digits.tolist(), best.tolist(), strict=True)]


def load_judge(device: str | torch.device = "cpu") -> Judge | None:
    """The judge that lies beside the shipped models; None where there is none."""
    folder = model_cards() / NAME
    return Judge(folder, device) if (folder / "config.json").is_file() else None
