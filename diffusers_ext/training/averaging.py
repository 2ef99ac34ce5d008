"""Averages of a network's weights: exponential ones kept while it trains, and ones of a width chosen later."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusers.training_utils import EMAModel


# Widths that are kept during the training, from which others follow (Karras et al., 2024, Sec. 3.2).
KEPT_SIGMA_RELS = (0.05, 0.10)
SNAPSHOTS = 32  # of each during a run; fewer cannot be combined to wide averages

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class Averages:
    """Exponential moving averages of parameters, one for each decay, by diffusers' `EMAModel`.

    Args:
        parameters: of the network, as the optimizer has them; sharded ones (`DTensor`) have sharded averages.
        decays: largest decays per step, in (0, 1); none is valid.
        power: of the warm-up: the decay at step n is min(decay, 1 - (1 + n) ** -power).

    Raises:
        ValueError: for a decay outside (0, 1), or twice the same.
    """

    def __init__(self, parameters: Iterator[nn.Parameter], decays: tuple[float, ...], power: float):
        if not all(0 < decay < 1 for decay in decays) or len(set(decays)) < len(decays):
            raise ValueError(f"`ema_decay` {decays} must be different numbers between 0 and 1, such as 0.999 0.9999.")
        self.parameters = list(parameters)
        self.averages = {
            decay: EMAModel(self.parameters, decay=decay, use_ema_warmup=True, power=power, foreach=True)
            for decay in decays
        }

    def step(self) -> None:
        for average in self.averages.values():
            average.step(self.parameters)

    @contextmanager
    def applied(self, decay: float | None) -> Iterator[None]:
        """The network has the averaged weights inside, and its own afterwards; with None it keeps its own."""
        if decay is None:
            yield
            return
        average = self.averages[decay]
        average.store(self.parameters)
        try:
            average.copy_to(self.parameters)
            yield
        finally:
            average.restore(self.parameters)

    @property
    def decays(self) -> tuple[float | None, ...]:
        """The decay whose weights are the result, then the others; None stands for the weights themselves."""
        return tuple(self.averages) or (None,)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, gathered from all processes, which must all ask."""
        return {
            str(decay): average.state_dict() | {"shadow_params": [whole(p) for p in average.shadow_params]}
            for decay, average in self.averages.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for decay, average in self.averages.items():
            if str(decay) not in state:
                raise ValueError(
                    f"`ema_decay` ({decay}) is not in the checkpoint ({', '.join(state) or 'none'}), and "
                    "an average cannot begin in the middle of a training. Leave it out, or start anew."
                )
            average.load_state_dict({k: v for k, v in state[str(decay)].items() if k not in ("decay", "power")})
            saved = zip(average.shadow_params, self.parameters, strict=True)
            average.shadow_params = [_like(value, parameter) for value, parameter in saved]


@contextmanager
def averaged_network(
    accelerator: Accelerator, model: nn.Module, averages: Averages, decay: float | None, build: Callable[[], nn.Module]
) -> Iterator[nn.Module | None]:
    """The unwrapped network with averaged weights, in evaluation mode in the main process, None in others.

    All processes must ask: a network that is sharded over them is gathered.

    Args:
        accelerator: of the run.
        model: the network as prepared by it.
        averages: of its parameters.
        decay: which average, see [`Averages.decays`].
        build: makes a network of the same shape, to gather a sharded one in.
    """
    if accelerator.distributed_type not in SHARDING:
        with averages.applied(decay):
            model.eval()
            try:
                yield accelerator.unwrap_model(model) if accelerator.is_main_process else None
            finally:
                model.train()
        return
    with averages.applied(decay):
        weights = accelerator.get_state_dict(model)
    network = None
    if accelerator.is_main_process:
        network = build().to(accelerator.device).eval()
        network.load_state_dict(weights)
    yield network


class PosthocAverages:
    """Averages of any width, made after the training out of snapshots of two, by ema-pytorch's `PostHocEMA`.

    Karras et al., 2024, https://arxiv.org/abs/2312.02696, Sec. 3.

    Args:
        model: the network, before it is wrapped.
        sigma_rels: wanted widths, as a share of the training's length, in (0, 0.28).
        folder: for the snapshots, `INDEX.STEP.pt` in float32, two of them about 32 times during the run.
        accelerator: snapshots are written by its main process.
        steps: optimizer steps of the run.

    Raises:
        ImportError: without ema-pytorch.
        ValueError: for a width outside that range, and for a network that is to be sharded.
    """

    def __init__(
        self, model: nn.Module, sigma_rels: tuple[float, ...], folder: Path, accelerator: Accelerator, steps: int
    ):
        try:
            from ema_pytorch import PostHocEMA
        except ImportError as error:
            raise ImportError(
                '`posthoc_ema_sigma_rels` needs ema-pytorch: pip install "diffusers_ext[posthoc-ema]"'
            ) from error
        if not all(0 < sigma_rel < 0.28 for sigma_rel in sigma_rels):  # 0.289 is that of a plain mean
            raise ValueError(f"`posthoc_ema_sigma_rels` {sigma_rels} must lie between 0 and 0.28, such as 0.1.")
        if accelerator.distributed_type in SHARDING:
            raise ValueError("`posthoc_ema_sigma_rels` works with whole networks only, not with FSDP or DeepSpeed.")
        self.sigma_rels, self.folder, self.is_main_process = sigma_rels, folder, accelerator.is_main_process
        self.steps, self.interval = steps, max(1, steps // SNAPSHOTS)
        self.averages = PostHocEMA(
            model,
            sigma_rels=KEPT_SIGMA_RELS,
            checkpoint_every_num_steps="manual",
            checkpoint_folder=str(folder),
            checkpoint_dtype=torch.float32,
            update_every=1,
        )

    def step(self) -> None:
        self.averages.update()

    def snapshot(self, step: int) -> None:
        """Write one when it is time for it at this step."""
        if self.is_main_process and (step % self.interval == 0 or step == self.steps):
            self.averages.checkpoint()

    def discard_later(self) -> None:
        """Delete snapshots of a path that is left, among them one that was cut short."""
        if self.is_main_process:
            for path in self.folder.glob("*.pt"):
                if int(path.stem.split(".")[1]) > self.averages.step.item():
                    path.unlink()

    @torch.no_grad()
    def synthesized(self, sigma_rel: float) -> nn.Module:
        """The network averaged with a width.

        The snapshots are combined by least squares (Karras et al., Alg. 3), whose coefficients sum to one only nearly;
        so the result is divided by their sum.
        """
        network = self.averages.synthesize_ema_model(sigma_rel=sigma_rel).ema_model
        total = self._sum_of_coefficients(sigma_rel)
        for parameter in network.parameters():
            parameter /= total
        return network

    def _sum_of_coefficients(self, sigma_rel: float) -> float:
        from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma, solve_weights

        indices, steps = zip(*(map(int, path.stem.split(".")) for path in self.folder.glob("*.pt")))
        gammas = torch.tensor([self.averages.gammas[index] for index in indices])
        wanted = torch.tensor([max(steps)]), torch.tensor([sigma_rel_to_gamma(sigma_rel)])
        return solve_weights(torch.tensor(steps), gammas, *wanted).sum().item()

    def state_dict(self) -> dict[str, Any]:
        return self.averages.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages.load_state_dict(state)


def ema_variant(decay: float) -> str:
    """Variant of the files with an average, for `from_pretrained(variant=...)`: `ema-0_99`, for 0.99. A pipeline of
    diffusers does not find files whose variant has a dot in it."""
    return f"ema-{decay}".replace(".", "_")


def posthoc_variant(sigma_rel: float) -> str:
    """As [`ema_variant`], of an average made afterwards, with two decimals or more: `posthoc-0_10`."""
    return f"posthoc-{max(f'{sigma_rel:.2f}', str(sigma_rel), key=len)}".replace(".", "_")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from the processes over which it is sharded, which must all ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of a parameter, sharded as it is."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
