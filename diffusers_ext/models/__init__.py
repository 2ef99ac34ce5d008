"""Backbones: one file per architecture family, each importing only torch and diffusers."""

from diffusers_ext.models.unet_adm import ADMClassifierModel, ADMUNet2DModel


__all__ = ["ADMClassifierModel", "ADMUNet2DModel"]
