"""Checkpoints of original codebases, converted to models of this package and back."""

from diffusers_ext.conversion.original import (
    architectures,
    from_single_file,
    load_original,
    original_state_dict,
    presets,
    save_original,
)


__all__ = ["architectures", "from_single_file", "load_original", "original_state_dict", "presets", "save_original"]
