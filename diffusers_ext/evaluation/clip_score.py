"""Whether images show what their captions say."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_ext.evaluation.estimates import Estimate, proportion
from diffusers_ext.evaluation.networks import TransformersNetwork, open_transformers
from diffusers_ext.hub.loading import open_folder


@torch.no_grad()
def clip_score(
    images: torch.Tensor,
    captions: Sequence[str],
    model: str | Path = "openai/clip-vit-base-patch16",
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Estimate:
    """CLIP score: 100 times the cosine between image and caption, at least 0 (Hessel et al., 2021,
    https://arxiv.org/abs/2104.08718, Eq. 1, with weight 100 as torchmetrics has it).

    Args:
        images: uint8 `(N, C, H, W)`.
        captions: one per image; what exceeds the text encoder's length is cut off.
        model: folder or Hub id of a `transformers.CLIPModel`, or of another that has its methods, with its tokenizer.
        batch_size: images at a time.
        device: where the model runs.

    Returns:
        The mean, with the scores of single images as its contributions.

    Raises:
        ValueError: when the numbers of images and captions differ, or `model` does not compare images with text.
    """
    from transformers import AutoTokenizer

    if len(images) != len(captions) or not len(images):
        raise ValueError(f"`captions` holds {len(captions)} for {len(images)} images; there must be one for each.")
    folder = open_folder(model)
    clip, processing, _ = open_transformers(folder)
    if not (hasattr(clip, "get_image_features") and hasattr(clip, "get_text_features")):
        raise ValueError(
            f"`model` ({str(model)!r}) is a {type(clip).__name__}; it must compare images with text, as "
            "CLIPModel does."
        )
    clip, tokenizer = clip.to(device), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    vision = TransformersNetwork(clip, "clip", processing).to(device)
    length = clip.config.text_config.max_position_embeddings
    scores = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(device).float() / 127.5 - 1
        text = list(captions[start : start + batch_size])
        tokens = tokenizer(text, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        seen = clip.get_image_features(pixel_values=vision.pixel_values(batch)).pooler_output
        read = clip.get_text_features(**tokens).pooler_output
        scores.append(100 * F.cosine_similarity(seen, read).clamp(min=0).cpu())
    return proportion(torch.cat(scores).numpy(), len(images))
