"""Research backbones and guided sampling as a plugin of Hugging Face diffusers.

Importing this package is all that `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` need in order to
load repositories whose `model_index.json` names `diffusers_ext`.
"""

from pathlib import Path

# diffusers looks for these base classes in the namespace of every library that it loads components from.
from diffusers import ModelMixin, SchedulerMixin


__version__ = "0.1.0"

# A checkout keeps `pipelines/` beside the package, an installation inside it.
if not (Path(__file__).parent / "pipelines").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from diffusers_ext.models import (
    ADMClassifierModel,
    ADMUNet2DModel,
    ComposableUNet2DModel,
    DDPMUNet2DModel,
    DilatedConvDenoiserModel,
    GQADiTTransformer2DModel,
)
from diffusers_ext.pipelines import (
    ClassConditionalBlocks,
    ClassConditionalPipeline,
    ClassifierGuidanceBlocks,
    ClassifierGuidedPipeline,
)
from diffusers_ext.registration import register


# The public classes: exactly these are made known to diffusers.
__all__ = [
    "ADMClassifierModel",
    "ADMUNet2DModel",
    "ClassConditionalBlocks",
    "ClassConditionalPipeline",
    "ClassifierGuidanceBlocks",
    "ClassifierGuidedPipeline",
    "ComposableUNet2DModel",
    "DDPMUNet2DModel",
    "DilatedConvDenoiserModel",
    "GQADiTTransformer2DModel",
]

register()
