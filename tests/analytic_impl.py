"""Puts the real pipeline on the test bench of analytic networks, `../shared/checks/schedulers_analytic.py`.

PYTHONPATH=tests:. python ../shared/checks/schedulers_analytic.py --impl analytic_impl:sample
"""

import torch

from diffusers import SchedulerMixin

from diffusers_ext.pipelines import ClassifierGuidedPipeline


def sample(
    *,
    scheduler: SchedulerMixin,
    unet: torch.nn.Module,
    classifier: torch.nn.Module | None = None,
    class_label: int | None = None,
    guidance_scale: float = 0.0,
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    shape: tuple[int, ...] = (8, 3, 2, 2),
) -> torch.Tensor:
    """Samples in data space `(B, C, H, W)`; guided where there is a classifier."""
    pipe = ClassifierGuidedPipeline(unet=unet, scheduler=scheduler, classifier=classifier)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        class_labels=class_label,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=generator,
        batch_size=shape[0],
        output_type="latent",
    ).images
