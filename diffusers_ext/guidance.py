"""The mathematics of guidance by a noise-aware classifier, for every family of diffusers schedulers.

The sample of a scheduler is x = a x_0 + b eps. The classifier p(y | z) was trained on the variance-preserving input
z = x / sqrt(a^2 + b^2), whose signal share is abar = a^2 / (a^2 + b^2). With g = grad_z sum_i log p(y_i | z_i) and the
guidance scale s, Tweedie's formula (Efron, 2011) and Bayes' rule move the expected clean image by

    d_x0 = s (1 - abar) / sqrt(abar) g

Every parameterisation of a denoising network is linear in x_0 at fixed x, so `prediction_gain` times d_x0 is what its
output moves by: -s sqrt(1 - abar) g for a network that predicts eps, which is Algorithm 2 of Dhariwal and Nichol
(2021), https://arxiv.org/abs/2105.05233. Their Algorithm 1 shifts the mean of an ancestral step by its variance times
s g instead.

Shapes: B batch, C channels, H and W pixels. This file imports torch and diffusers only, so that it can travel inside
an exported pipeline.
"""

import bisect
import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.guiders import BaseGuidance


GUIDANCE_MODES = ("score", "mean")

GuidanceRule = Callable[
    [int, float, torch.Tensor, torch.Tensor, torch.Tensor | None, float], tuple[torch.Tensor, torch.Tensor | None]
]

# A gradient that passes through float16 layers is multiplied by this before and divided by it after, so that what is
# small does not become zero, and what is large still fits.
HALF_PRECISION_SCALE = 2.0**7

FLOW_SCHEDULERS = (
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeliosScheduler",
    "LTXEulerAncestralRFScheduler",
)

_CONSISTENCY = (
    "its networks are distilled to jump to the clean image, and the noise added after each jump assumes that; the "
    "expected clean image that a denoising network predicts comes out blurred",
    "`DPMSolverMultistepScheduler` with 20 steps",
)
_INVERSION = ("it runs from images to noise", "`DDIMScheduler` or `DPMSolverMultistepScheduler`")
_DISCRETE = ("it samples discrete tokens, not continuous images", "a scheduler for continuous images")
_DISTILLED = ("it needs the distilled network it was made for", "`FlowMatchEulerDiscreteScheduler`")
_OWN_LOOP = "it corrects its steps in a loop of its own"

# Schedulers that cannot sample from a denoising network, with guidance or without: the reason, and what to use.
REFUSED_SCHEDULERS: dict[str, tuple[str, str]] = {
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "CMStochasticIterativeScheduler": _CONSISTENCY,
    "ConsistencyDecoderScheduler": _CONSISTENCY,
    "DDIMInverseScheduler": _INVERSION,
    "DPMSolverMultistepInverseScheduler": _INVERSION,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
    "FlowMatchLCMScheduler": (_CONSISTENCY[0], "`FlowMatchEulerDiscreteScheduler`"),
    "HeliosDMDScheduler": _DISTILLED,
    "KarrasVeScheduler": (_OWN_LOOP, "`EulerAncestralDiscreteScheduler`"),
    "LCMScheduler": _CONSISTENCY,
    "PiflowScheduler": _DISTILLED,
    "RFD4ProteinaScheduler": ("it diffuses protein structures", "a scheduler for images"),
    "RePaintScheduler": ("it fills in a masked image, in a loop of its own", "`DDPMScheduler`"),
    "SCMScheduler": _CONSISTENCY,
    "ScoreSdeVeScheduler": (_OWN_LOOP, "`EulerAncestralDiscreteScheduler`"),
    "ScoreSdeVpScheduler": (_OWN_LOOP, "`DDPMScheduler`"),
    "VQDiffusionScheduler": _DISCRETE,
}

# Prediction types that `step` of some schedulers would refuse after the network has run.
UNKNOWN_PREDICTIONS: dict[str, tuple[str, ...]] = {
    "sample": (
        "DPMSolverSDEScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "PNDMScheduler",
    ),
    "v_prediction": ("UnCLIPScheduler",),
}


def is_a(scheduler: SchedulerMixin, *names: str) -> bool:
    """Whether `scheduler` is of a class of one of these names, or of a subclass."""
    return any(cls.__name__ in names for cls in type(scheduler).__mro__)


def check_scheduler(
    scheduler: SchedulerMixin, sigma_data: float | None = None, task: str = "be guided by a classifier"
) -> None:
    """Raises a ValueError with the reason and an alternative for a scheduler that cannot sample from such a network.

    Args:
        scheduler: any scheduler of diffusers.
        sigma_data: of a network with the preconditioning of EDM, whose schedulers no other network fits; else None.
        task: what the message says that it cannot do.
    """
    name = type(scheduler).__name__
    for refused, (reason, alternative) in REFUSED_SCHEDULERS.items():
        if is_a(scheduler, refused):
            raise ValueError(f"`scheduler` {name} cannot {task}: {reason}. Use {alternative}.")
    config = scheduler.config
    if hasattr(scheduler, "precondition_outputs") and sigma_data != config.sigma_data:
        raise ValueError(
            f"`scheduler` {name} needs a network with EDM's preconditioning (Karras et al., 2022, Table 1) and "
            f"sigma_data {config.sigma_data}; the config of this one has `sigma_data` {sigma_data}. Use "
            "`EulerDiscreteScheduler` for networks that predict epsilon or v, or, if the network was trained so, "
            f"declare it with `register_to_config(sigma_data={config.sigma_data})` of the network."
        )
    if is_a(scheduler, *FLOW_SCHEDULERS) and config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise ValueError(
            f"`scheduler` {name} needs a network trained on the velocity of a flow, but it was configured from a "
            f"scheduler with `prediction_type` {config.prediction_type!r}. Use `EulerDiscreteScheduler` or "
            "`DPMSolverMultistepScheduler` with this network."
        )
    if is_a(scheduler, *UNKNOWN_PREDICTIONS.get(prediction_type(scheduler), ())):
        raise ValueError(
            f"`scheduler` {name} does not know `prediction_type` {config.prediction_type!r}. Use "
            "`EulerDiscreteScheduler`, `DDPMScheduler` or `DPMSolverMultistepScheduler`."
        )
    if config.get("stages", 1) != 1:
        raise ValueError(f"`scheduler` {name} has {config.stages} stages of growing images; configure `stages=1`.")


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What the network predicts, as `prediction_gain` names it. Most schedulers say so, the others mean one thing."""
    configured = scheduler.config.get("prediction_type")
    if hasattr(scheduler, "precondition_outputs"):
        return f"edm_{configured}"
    if is_a(scheduler, *FLOW_SCHEDULERS):
        return "flow_prediction"
    if is_a(scheduler, "MiniMaxH3Scheduler"):
        return "reversed_flow_prediction"
    if is_a(scheduler, "IPNDMScheduler"):
        return "v_prediction"
    if is_a(scheduler, "DDPMWuerstchenScheduler"):
        return "epsilon"
    return "sample" if configured == "original_sample" else configured


def prediction_gain(prediction_type: str, alpha: float, sigma: float, sigma_data: float | None = None) -> float:
    """d prediction / d x_0 at fixed x = alpha x_0 + sigma eps.

    Args:
        prediction_type: "sample" (x_0), "epsilon", "v_prediction" (Salimans and Ho, 2022), "flow_prediction"
            (eps - x_0), "reversed_flow_prediction" (x_0 - eps), or EDM's F with the sign of c_out as diffusers has it
            under "edm_epsilon" (plus) and "edm_v_prediction" (minus).
        alpha, sigma: noise level of the scheduler's sample; sigma > 0.
        sigma_data: standard deviation of the data, for EDM's F alone.

    Raises:
        ValueError: for another prediction type.
    """
    if prediction_type == "sample":
        return 1.0
    if prediction_type == "epsilon":
        return -alpha / sigma
    if prediction_type == "v_prediction":
        return -math.hypot(alpha, sigma) / sigma
    if prediction_type == "flow_prediction":
        return -(alpha + sigma) / sigma
    if prediction_type == "reversed_flow_prediction":
        return (alpha + sigma) / sigma
    if prediction_type in ("edm_epsilon", "edm_v_prediction"):
        reciprocal_c_out = math.hypot(sigma, sigma_data) / (sigma * sigma_data)
        return reciprocal_c_out if prediction_type == "edm_epsilon" else -reciprocal_c_out
    raise ValueError(f"`prediction_type` {prediction_type!r} is not one that guidance knows.")


def noise_level_rule(scheduler: SchedulerMixin) -> Callable[[float, int], tuple[float, float]]:
    """How to read the noise level of this scheduler's sample; to be chosen once per run, after `set_timesteps`.

    Returns:
        A function from `timestep` and `step_index`, the number of network calls so far, to (a, b) of the sample
        x = a x_0 + b eps that the network is about to see. It is to be called after this step's `scale_model_input`
        and before its `step`, and moves nothing between devices where the scheduler keeps its sigmas on the CPU.

    Raises:
        ValueError: for a scheduler of which no rule is known.
    """
    if is_a(scheduler, "DDPMWuerstchenScheduler"):
        return lambda timestep, step_index: _vp_level(
            float(scheduler._alpha_cumprod(torch.tensor([timestep]), torch.device("cpu")))
        )
    if is_a(scheduler, "IPNDMScheduler"):
        levels = list(zip(scheduler.alphas.tolist(), scheduler.betas.tolist(), strict=True))
    elif hasattr(scheduler, "precondition_outputs"):
        levels = [(1.0, sigma) for sigma in scheduler.sigmas.tolist()]
    elif is_a(scheduler, *FLOW_SCHEDULERS, "MiniMaxH3Scheduler"):
        levels = [(1 - sigma, sigma) for sigma in scheduler.sigmas.tolist()]
    elif hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        # Multistep solvers round the timestep for the network; the level comes from the sigma.
        alphas, sigmas = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas.double())
        levels = list(zip(alphas.tolist(), sigmas.tolist(), strict=True))
    elif not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"`scheduler` {type(scheduler).__name__} says in no known way how noisy its sample is, which a classifier "
            "has to be told. Use one of the schedulers in the table of the README."
        )
    else:
        one = torch.ones((), dtype=torch.float64)
        if float(scheduler.scale_model_input(one, scheduler.timesteps[0])) != 1:
            # The sample is x_0 + sigma eps, and the network sees it divided by sqrt(1 + sigma^2); asking the scheduler
            # for that factor holds in the half steps of second-order solvers too.
            def level(timestep: float, step_index: int) -> tuple[float, float]:
                scale = float(scheduler.scale_model_input(one, timestep))
                return 1.0, math.sqrt(1 / scale**2 - 1)

            return level
        alphas_cumprod = scheduler.alphas_cumprod.tolist()
        return lambda timestep, step_index: _vp_level(alphas_cumprod[int(timestep)])
    return lambda timestep, step_index: levels[step_index]


def noise_level(scheduler: SchedulerMixin, timestep: float, step_index: int) -> tuple[float, float]:
    """(a, b) of the scheduler's sample x = a x_0 + b eps at one step. In a loop, use `noise_level_rule`."""
    return noise_level_rule(scheduler)(timestep, step_index)


def _vp_level(abar: float) -> tuple[float, float]:
    return math.sqrt(abar), math.sqrt(1 - abar)


def noise_table(scheduler: SchedulerMixin) -> list[float]:
    """abar of every training timestep, falling; without a last one of zero (Lin et al., 2023), whose sample holds
    nothing to classify."""
    return [abar for abar in scheduler.alphas_cumprod.tolist() if abar > 0]


def timestep_of_abar(abar: float, table: Sequence[float]) -> float:
    """The timestep in [0, len(table) - 1] at which a training schedule has this abar, as a fraction where it falls
    between two: log(sigma / alpha) is linear in the timestep there, as in k-diffusion (Karras et al., 2022).

    Args:
        abar: signal share alpha^2 / (alpha^2 + sigma^2) of the sample.
        table: abar of every training timestep, falling, all positive.
    """
    if abar >= table[0]:
        return 0.0
    if abar <= table[-1]:
        return float(len(table) - 1)
    upper = bisect.bisect_left(table, -abar, key=lambda value: -value)
    low, high = _log_sigma(table[upper - 1]), _log_sigma(table[upper])
    return upper - 1 + (_log_sigma(abar) - low) / (high - low)


def clip_abar(abar: float, table: Sequence[float]) -> float:
    """abar within what the classifier was trained on; elsewhere `timestep_of_abar` is that of the nearest end."""
    return min(max(abar, table[-1]), table[0])


def _log_sigma(abar: float) -> float:
    return 0.5 * (math.log1p(-abar) - math.log(abar))


def x0_gain(abar: float) -> float:
    """d x_0 / d g: the expected clean image moves by (1 - abar) / sqrt(abar) times the guidance scale and gradient g.

    Args:
        abar: signal share of z, in (0, 1).
    """
    return (1 - abar) / math.sqrt(abar)


def classifier_log_prob_grad(
    classifier: nn.Module,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    class_labels: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Gradient of sum_i log p(y_i | z_i) with respect to the noisy images z.

    Guidance direction of Dhariwal and Nichol (2021), Algorithms 1 and 2, before the guidance scale is applied. A sum,
    so that the images of a batch do not depend on each other. Works inside `torch.no_grad()` and
    `torch.inference_mode()`.

    Args:
        classifier: maps `(sample, timestep)` to logits `(B, num_classes)`, or to an output that has them as `logits`.
        sample: noisy images z `(B, C, H, W)` of the variance-preserving process; clean images lie in [-1, 1].
        timestep: their noise level in the classifier's training timesteps; 0-d or `(B,)`, may be fractional.
        class_labels: class ids y `(B,)`, int64, in `[0, num_classes)`.
        dtype: of the classifier's input. None: that of `sample`.

    Returns:
        `(B, C, H, W)` in the dtype of `sample`; unit: nats per unit of `sample`.

    Raises:
        ValueError: when there is not exactly one label per image.
    """
    if class_labels.shape != sample.shape[:1]:
        raise ValueError(
            f"`class_labels` has shape {tuple(class_labels.shape)}, expected ({len(sample)},): one label per image."
        )
    with torch.inference_mode(False), torch.enable_grad():
        # Clones, since autograd cannot save tensors that were made in inference mode.
        noisy = sample.detach().clone().requires_grad_()
        output = classifier(noisy.to(dtype or noisy.dtype), timestep.clone())
        logits = getattr(output, "logits", output)
        scale = HALF_PRECISION_SCALE if logits.dtype == torch.float16 else 1.0
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_prob = -scale * F.cross_entropy(logits, class_labels.clone(), reduction="sum")
        (gradient,) = torch.autograd.grad(log_prob, noisy)
    return gradient if scale == 1 else gradient / scale


def ancestral_variance_rule(
    scheduler: SchedulerMixin, timesteps: Sequence[int]
) -> Callable[[int, torch.Tensor | None], torch.Tensor | float]:
    """Variance of each ancestral step, which Algorithm 1 of Dhariwal and Nichol (2021) multiplies the gradient by.

    That of the scheduler's own step. The last one adds no noise; where a variance of zero would not do, the original
    takes the posterior variance of the step before it. "learned_range" interpolates between the logarithms of both
    bounds (Nichol and Dhariwal, 2021, https://arxiv.org/abs/2102.09672, Eq. 15).

    Args:
        scheduler: a `DDPMScheduler` or `DDPMParallelScheduler`.
        timesteps: those of the run, falling.

    Returns:
        A function from the index of the step and the variance half v of the network's output, `(B, C, H, W)` or None,
        to the variance: a number, or `(B, C, H, W)` where it is learned.
    """
    abars = [scheduler.alphas_cumprod[timestep].item() for timestep in timesteps] + [1.0]
    betas = [1 - abar / previous for abar, previous in zip(abars, abars[1:], strict=False)]
    posterior = [
        beta * (1 - previous) / (1 - abar) for beta, abar, previous in zip(betas, abars, abars[1:], strict=False)
    ]
    clipped = posterior[:-1] + (posterior[-2:-1] or [betas[-1]])
    variance_type = scheduler.config.variance_type

    def variance(step_index: int, values: torch.Tensor | None) -> torch.Tensor | float:
        if variance_type == "learned_range":
            low, high = math.log(clipped[step_index]), math.log(betas[step_index])
            return torch.exp(low + (values + 1) / 2 * (high - low))
        if variance_type == "learned":
            return values
        if variance_type in ("fixed_large", "fixed_large_log"):
            return betas[step_index] if step_index < len(timesteps) - 1 else clipped[-1]
        return posterior[step_index]

    return variance


def ddim_step_gain(scheduler: SchedulerMixin, timestep: int, eta: float) -> float:
    """d x_prev / d x_0 at fixed x of one step of DDIM (Song et al., 2021, https://arxiv.org/abs/2010.02502, Eq. 12).

    Moves the result of a step as guidance of the clipped prediction would have, which is the order of Dhariwal and
    Nichol's sampler; `DDIMScheduler.step` itself can only clip what guidance has moved.

    Args:
        scheduler: a `DDIMScheduler` or `DDIMParallelScheduler` after `set_timesteps`.
        timestep: of the step.
        eta: 0 for the deterministic process, 1 for the ancestral one.
    """
    previous = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    abar = scheduler.alphas_cumprod[timestep].item()
    abar_previous = (scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod).item()
    variance = eta**2 * (1 - abar_previous) / (1 - abar) * (1 - abar / abar_previous)  # Eq. 16
    return math.sqrt(abar_previous) - math.sqrt(max(1 - abar_previous - variance, 0.0)) * math.sqrt(abar / (1 - abar))


def rehearse(
    guider: BaseGuidance, shape: tuple[int, ...], timestep_values: Sequence[float], guided_steps: range
) -> Iterator[tuple[BaseGuidance, list[str]]]:
    """Goes through a run without networks: what a guider of diffusers asks for, and whether it can combine that.

    Args:
        guider: stays as it is.
        shape: of a prediction, `(B, C, H, W)`; those of the rehearsal are all ones.
        timestep_values: timesteps of all network calls.
        guided_steps: those of them that are guided.

    Returns:
        For every combination of predictions, a copy of the guider in the state of the first step that asks for it, and
        their names; the same for the last of the guided steps, since some guiders change on the way.

    Raises:
        ValueError: where the guider fails.
    """
    guider, known = copy.deepcopy(guider), []
    for i, timestep in enumerate(timestep_values):  # all steps: some guiders begin their state in the first
        guider.set_state(step=i, num_inference_steps=len(timestep_values), timestep=timestep)
        batches = guider.prepare_inputs({})
        names = [getattr(batch, guider._identifier_key) for batch in batches]
        if i not in guided_steps or (names in known and i != guided_steps[-1]):
            continue
        known.append(names)
        for batch in batches:
            batch.noise_pred = torch.ones(shape)
        try:
            guider(batches)
        except Exception as error:  # theirs, of whatever kind
            raise ValueError(
                f"`guider` {type(guider).__name__} cannot combine predictions of shape {tuple(shape)} "
                f"({type(error).__name__}: {error}). Use another, such as `ClassifierFreeGuidance`."
            ) from error
        yield guider, names


def classifier_guidance_rule(
    scheduler: SchedulerMixin,
    classifier: nn.Module,
    class_ids: torch.Tensor,
    timestep_values: Sequence[float],
    *,
    mode: str = "score",
    eta: float = 0.0,
    guider: BaseGuidance | None = None,
    classifier_schedule: dict | None = None,
) -> GuidanceRule:
    """Chooses, once per run, how the steps of this scheduler are guided.

    Args:
        scheduler: after `set_timesteps`.
        classifier: maps `(sample, timestep)` to logits, as `classifier_log_prob_grad` has it.
        class_ids: wanted classes `(B,)`, int64.
        timestep_values: timesteps of all network calls.
        mode: "score" shifts what the network predicts (Algorithm 2), "mean" the result of an ancestral step
            (Algorithm 1).
        eta: of `DDIMScheduler`.
        guider: a guider of diffusers that combines the prediction with the one for the class.
        classifier_schedule: config of the `DDPMScheduler` with whose noise the classifier was trained. None: that of
            `scheduler`, or `DDPMScheduler()` where that one has no `alphas_cumprod`.

    Returns:
        A function of the index of the network call, its timestep, the noisy image, both halves of the network's output
        (the second None where it learned no variance), and the guidance scale. It returns the guided prediction, and
        what is to be added to the result of the scheduler's step, or None.
    """
    level = noise_level_rule(scheduler)
    if classifier_schedule is not None:
        table = noise_table(DDPMScheduler(**classifier_schedule))
    else:
        table = noise_table(scheduler if hasattr(scheduler, "alphas_cumprod") else DDPMScheduler())
    kind, sigma_data = prediction_type(scheduler), scheduler.config.get("sigma_data")
    variance_of_step = ancestral_variance_rule(scheduler, timestep_values) if mode == "mean" else None
    # The original clips the prediction of DDIM before it is guided, and not again.
    clips_first = (
        guider is None
        and is_a(scheduler, "DDIMScheduler", "DDIMParallelScheduler")
        and (scheduler.config.clip_sample or scheduler.config.thresholding)
    )
    dtype = classifier.dtype
    if guider is not None:
        guider = copy.deepcopy(guider)  # a run leaves its state there
        # Some begin it in the first step, which need not be a guided one.
        guider.set_state(step=0, num_inference_steps=len(timestep_values), timestep=timestep_values[0])
        guider.prepare_inputs({})

    def guide(
        i: int,
        timestep: float,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        variance: torch.Tensor | None,
        guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        alpha, sigma = level(timestep, i)
        norm = math.hypot(alpha, sigma)
        abar = clip_abar((alpha / norm) ** 2, table)
        classifier_timestep = torch.full((), timestep_of_abar(abar, table), device=sample.device)
        gradient = classifier_log_prob_grad(classifier, sample / norm, classifier_timestep, class_ids, dtype)
        if variance_of_step is not None:
            return prediction, guidance_scale * variance_of_step(i, variance) * gradient
        scale = guidance_scale * x0_gain(abar)
        if clips_first:
            return prediction, scale * ddim_step_gain(scheduler, timestep, eta) * gradient
        conditional = prediction + scale * prediction_gain(kind, alpha, sigma, sigma_data) * gradient
        if guider is None:
            return conditional, None
        guider.set_state(step=i, num_inference_steps=len(timestep_values), timestep=timestep)
        return guider(guider.prepare_inputs({"noise_pred": (conditional, prediction)})).pred, None

    return guide
