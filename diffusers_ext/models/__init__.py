"""Backbones: one file per architecture family, each importing only torch and diffusers."""

from diffusers import ModelMixin

from diffusers_ext.models import denoiser_dilated, transformer_dit_gqa, unet_adm, unet_composable, unet_ddpm
from diffusers_ext.models.denoiser_dilated import DilatedConvDenoiserModel
from diffusers_ext.models.transformer_dit_gqa import GQADiTTransformer2DModel
from diffusers_ext.models.unet_adm import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.models.unet_composable import ComposableUNet2DModel
from diffusers_ext.models.unet_ddpm import DDPMUNet2DModel


__all__ = [
    "ADMClassifierModel",
    "ADMUNet2DModel",
    "ComposableUNet2DModel",
    "DDPMUNet2DModel",
    "DilatedConvDenoiserModel",
    "GQADiTTransformer2DModel",
]

_FAMILIES = {
    "adm": (ADMUNet2DModel, unet_adm.PRESETS),
    "ddpm": (DDPMUNet2DModel, unet_ddpm.PRESETS),
    "composable": (ComposableUNet2DModel, unet_composable.PRESETS),
    "dilated": (DilatedConvDenoiserModel, denoiser_dilated.PRESETS),
    "dit": (GQADiTTransformer2DModel, transformer_dit_gqa.PRESETS),
    "adm-classifier": (ADMClassifierModel, unet_adm.CLASSIFIER_PRESETS),
}

# Named sizes of every backbone, "family/name": its class, and the options to build it with.
PRESETS: dict[str, tuple[type[ModelMixin], dict]] = {
    f"{family}/{name}": (model_class, options)
    for family, (model_class, sizes) in _FAMILIES.items()
    for name, options in sizes.items()
}
