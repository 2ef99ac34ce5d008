"""Pipelines of diffusers_ext, one file each, and their blocks for Modular Diffusers."""

from diffusers_ext.pipelines.modular_class_conditional import ClassConditionalBlocks
from diffusers_ext.pipelines.modular_classifier_guided import ClassifierGuidanceBlocks
from diffusers_ext.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_ext.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline


__all__ = [
    "ClassConditionalBlocks",
    "ClassifierGuidanceBlocks",
    "ClassConditionalPipeline",
    "ClassifierGuidedPipeline",
]
