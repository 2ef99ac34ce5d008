"""What is known of a released checkpoint."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A released checkpoint: the network in it, and how its authors sample from it.

    Args:
        architecture: name of the architecture for `load_original`.
        flags: the original's flags under the original's names, with the `builder` that takes them; flags left out have
            the original's defaults.
        url: where the authors put the file; None if they did not.
        licence: of the weights, by its SPDX identifier in lower case; None if it is not stated.
        num_inference_steps: sampling steps that the authors name.
        guidance_scale: strength that the authors name, of classifier guidance for a UNet of guided-diffusion, of
            classifier-free guidance elsewhere.
    """

    architecture: str
    flags: dict[str, Any]
    url: str | None
    licence: str | None = "mit"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
