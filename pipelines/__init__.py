"""Pipelines of diffusers_ext, one file each."""

from diffusers_ext.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_ext.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline


__all__ = ["ClassConditionalPipeline", "ClassifierGuidedPipeline"]
