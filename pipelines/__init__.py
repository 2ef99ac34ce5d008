"""Pipelines of diffusers_ext, one file each."""

from diffusers_ext.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline


__all__ = ["ClassifierGuidedPipeline"]
