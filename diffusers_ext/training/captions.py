"""Captions of images, encoded by a frozen text encoder of transformers for networks that attend to them.

Shapes: B captions, T tokens of each, D their width.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from diffusers_ext.hub.loading import open_folder
from diffusers_ext.sampling import MAX_TEXT_LENGTH, encode_text, max_text_length, text_dim


class CaptionEncoder:
    """Hidden states of captions, all of one length T, as `ClassConditionalPipeline` makes them of prompts.

    Args:
        tokenizer: any of transformers; kept as a copy that knows T, so that a pipeline saved with it cuts alike.
        text_encoder: any of transformers that returns `last_hidden_state`; it is frozen, in evaluation mode.
        max_length: T, in tokens; longer captions are cut. None: 77, as CLIP, or less where the encoder takes less.

    Raises:
        ValueError: for a `max_length` that the encoder does not take.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, max_length: int | None = None
    ):
        limit = max_text_length(tokenizer, text_encoder)
        if max_length is not None and not 1 <= max_length <= limit:
            raise ValueError(
                f"`max_length` is {max_length}; {type(text_encoder).__name__} and its tokenizer take 1 to {limit} "
                "tokens."
            )
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.model_max_length = max_length or min(limit, MAX_TEXT_LENGTH)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self._empty: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_pretrained(cls, name_or_path: str, max_length: int | None = None, **options) -> "CaptionEncoder":
        """Loads tokenizer and text encoder, of CLIP, T5 and their like the part that reads text, in float32.

        Args:
            name_or_path: folder or Hub name of a model of transformers, or of a pipeline that has both.
            max_length: see [`CaptionEncoder`].
            options: `revision` and `token` of a repository.

        Raises:
            ValueError: when nothing loads, or what loads is no text encoder.
        """
        folder = open_folder(name_or_path, argument="text_encoder", **options)
        in_pipeline = (folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir()
        encoder = folder / "text_encoder" if in_pipeline else folder
        tokenizer = folder / "tokenizer" if in_pipeline else folder
        try:
            # Without a word on code of the repository, transformers asks for consent on the terminal.
            config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            model_class = _text_model_class(config)
            text_encoder = model_class.from_pretrained(encoder, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`text_encoder` {name_or_path!r} did not load: {error} Give the folder or Hub name of a text encoder "
                "of transformers, such as CLIP, T5 or BERT, together with its tokenizer."
            ) from error
        return cls(tokenizer, text_encoder, max_length)

    @property
    def max_length(self) -> int:
        """T, in tokens."""
        return self.tokenizer.model_max_length

    @property
    def dim(self) -> int:
        """D, which the network has to have as `cross_attention_dim`."""
        return text_dim(self.text_encoder)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "CaptionEncoder":
        """Moves the text encoder; returns this."""
        self.text_encoder.to(device=device, dtype=dtype)
        self._empty = None
        return self

    def components(self) -> dict[str, PreTrainedModel | PreTrainedTokenizerBase]:
        """What a `ClassConditionalPipeline` needs to encode prompts as these captions."""
        return {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer}

    def check_network(self, model_class: type[nn.Module], options: Mapping[str, Any]) -> None:
        """Raises a ValueError unless a denoising network built so takes `encoder_hidden_states` of this width.

        Args:
            model_class: its class.
            options: of its constructor.
        """
        name, parameters = model_class.__name__, inspect.signature(model_class).parameters
        remedy = f"`--model_options cross_attention_dim={self.dim}`"
        if "cross_attention_dim" not in parameters:
            raise ValueError(
                f"`caption_column` is set, but {name} takes no `encoder_hidden_states`. Use one that does, such as "
                f"`--model composable/film` with {remedy}, or leave `caption_column` None."
            )
        dim = options.get("cross_attention_dim", parameters["cross_attention_dim"].default)
        if dim is None:
            raise ValueError(
                f"`caption_column` is set, but this {name} takes no `encoder_hidden_states` (`cross_attention_dim` is "
                f"None). Give it {remedy}, the width of `text_encoder` {type(self.text_encoder).__name__}, or leave "
                "`caption_column` None."
            )
        if dim != self.dim:
            raise ValueError(
                f"`text_encoder` {type(self.text_encoder).__name__} puts out tokens {self.dim} wide, but {name} has "
                f"`cross_attention_dim` {dim}. Use {remedy}, or a text encoder of width {dim}."
            )

    def conditions(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """[`encode`], under the names that networks give to it."""
        states, mask = self.encode(captions)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `(B, T, D)` and int64 mask `(B, T)`, 1 where there is a token, on the encoder's device.

        Args:
            captions: B of them. The empty one is encoded once only.

        Raises:
            ValueError: for what is no list of texts.
        """
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            wrong = captions if isinstance(captions, str) else [c for c in captions if not isinstance(c, str)][0]
            raise ValueError(f"`captions` is or holds {wrong!r}; it must be a list of texts (str), one per image.")
        if self._empty is None:
            self._empty = self._encode([""])
        states, mask = (values.repeat(len(captions), *[1] * (values.ndim - 1)) for values in self._empty)
        rows = [row for row, caption in enumerate(captions) if caption]
        if rows:
            states[rows], mask[rows] = self._encode([captions[row] for row in rows])
        return states, mask

    def _encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return encode_text(self.tokenizer, self.text_encoder, captions, self.text_encoder.device)


def _text_model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that encodes texts with this config, or with the text part of it."""
    for part in (config, getattr(config, "text_config", None)):
        if type(part) in MODEL_FOR_TEXT_ENCODING_MAPPING:
            return MODEL_FOR_TEXT_ENCODING_MAPPING[type(part)]
    part = getattr(config, "text_config", None) or config
    if type(part) not in MODEL_MAPPING or getattr(part, "is_encoder_decoder", False):
        raise ValueError(f"it is a {config.model_type!r}, of which transformers has no text encoder by itself.")
    return MODEL_MAPPING[type(part)]
