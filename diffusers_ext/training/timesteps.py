"""Which timesteps a network is trained on.

A sampler draws positions u in (0, 1) along the noise sequence, 0 clean and 1 noise: discrete processes round u T down
to a timestep, flows shift u to their sigma. Draws come from torch's global generator on the CPU, so they do not depend
on the device. All computations are in float64.
"""

import math

import torch
import torch.distributed


class UniformSampler:
    """Every position alike."""

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions `(B,)` in (0, 1), float64, and the factors `(B,)` of their losses, float32; both on the CPU."""
        tiny = torch.finfo(torch.float64).eps
        return self.positions(batch_size).clamp(tiny, 1 - tiny), torch.ones(batch_size)

    def positions(self, batch_size: int) -> torch.Tensor:
        return torch.rand(batch_size, dtype=torch.float64)

    def update(self, positions: torch.Tensor, losses: torch.Tensor) -> None:
        """Learn from the losses `(B,)` at positions `(B,)`; called after every forward pass on every process."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


class GaussianSampler(UniformSampler):
    """A normal distribution centred mid-sequence, cut to (0, 1).

    Args:
        std: its standard deviation before the cut, as a share of the sequence.
    """

    def __init__(self, std: float):
        if std <= 0:
            raise ValueError(f"`timestep_std` ({std}) must be positive: it is a share of the timestep sequence.")
        self.std = std

    def positions(self, batch_size: int) -> torch.Tensor:
        below = torch.special.ndtr(torch.tensor(-0.5 / self.std, dtype=torch.float64))  # the part cut off on a side
        quantiles = below + (1 - 2 * below) * super().positions(batch_size)
        return 0.5 + self.std * torch.special.ndtri(quantiles)


class LogitNormalSampler(UniformSampler):
    """u = sigmoid(n), n normal (Esser et al., 2024, https://arxiv.org/abs/2403.03206, Eq. 19).

    Args:
        mean: of n; more than 0 favours noisy images.
        std: of n.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if std <= 0:
            raise ValueError(f"`logit_std` ({std}) must be positive.")
        self.mean, self.std = mean, std

    def positions(self, batch_size: int) -> torch.Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(batch_size, dtype=torch.float64))


class AntitheticSampler(UniformSampler):
    """Pairs u and 1 - u, that is timesteps t and T - 1 - t; the last image of an odd batch has no partner."""

    def positions(self, batch_size: int) -> torch.Tensor:
        first = super().positions(math.ceil(batch_size / 2))
        return torch.cat([first, 1 - first])[:batch_size]


class LossSecondMomentSampler(UniformSampler):
    """Importance sampling: timesteps in proportion to the root mean square of their latest losses.

    Nichol and Dhariwal (2021), Sec. 3.3, Eq. 18. Losses are divided by N p, so that their expectation stays that of
    uniform timesteps. Sampling is uniform until every bin has its full history.

    Args:
        num_bins: N, of equal length; the number of timesteps where these are discrete.
        history_per_bin: latest losses that are kept.
        uniform_prob: share of draws that stay uniform.
    """

    def __init__(self, num_bins: int, history_per_bin: int = 10, uniform_prob: float = 0.001):
        self.num_bins = num_bins
        self.uniform_prob = uniform_prob
        self.history = torch.zeros(num_bins, history_per_bin, dtype=torch.float64)
        self.counts = torch.zeros(num_bins, dtype=torch.int64)

    def probabilities(self) -> torch.Tensor:
        """Of the bins `(N,)`; they sum to one."""
        uniform = torch.full((self.num_bins,), 1 / self.num_bins, dtype=torch.float64)
        root_mean_square = self.history.square().mean(dim=1).sqrt()
        if (self.counts < self.history.shape[1]).any() or root_mean_square.sum() == 0:
            return uniform
        return torch.lerp(root_mean_square / root_mean_square.sum(), uniform, self.uniform_prob)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = self.probabilities()
        bins = torch.multinomial(probabilities, batch_size, replacement=True)
        inside = torch.rand(batch_size, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)  # rounding stays within the bin
        return (bins + inside) / self.num_bins, (1 / (self.num_bins * probabilities[bins])).float()

    def update(self, positions: torch.Tensor, losses: torch.Tensor) -> None:
        """Keep the losses of all processes, in the order of their ranks; batch sizes may differ."""
        bins = (positions * self.num_bins).long().tolist()
        pairs = list(zip(bins, losses.detach().double().tolist(), strict=True))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, pairs)
            pairs = [pair for rank_pairs in gathered for pair in rank_pairs]
        self.keep(pairs)

    def keep(self, pairs: list[tuple[int, float]]) -> None:
        """Add (bin, loss) pairs to the history, the oldest losses leaving; losses that are not finite are left out."""
        for index, loss in pairs:
            if not math.isfinite(loss):
                continue
            count, row = int(self.counts[index]), self.history[index]
            if count == len(row):
                row[:-1] = row[1:].clone()
                row[-1] = loss
            else:
                row[count] = loss
                self.counts[index] += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"history": self.history.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"The loss history has the shape {tuple(state['history'].shape)} instead of "
                f"{tuple(self.history.shape)}: it belongs to another `num_train_timesteps`."
            )
        self.history.copy_(state["history"])
        self.counts.copy_(state["counts"])


FLOW_BINS = 100  # of the continuous sequence of a flow


def build_timestep_sampler(config) -> UniformSampler:
    """The sampler that `config.timestep_sampling` names, with its options (see `UNetTrainingConfig`)."""
    flow = config.prediction_type == "flow_prediction"
    samplers = {
        "uniform": UniformSampler,
        "gaussian": lambda: GaussianSampler(config.timestep_std),
        "logit_normal": lambda: LogitNormalSampler(config.logit_mean, config.logit_std),
        "antithetic": AntitheticSampler,
        "loss_second_moment": lambda: LossSecondMomentSampler(FLOW_BINS if flow else config.num_train_timesteps),
    }
    if config.timestep_sampling not in samplers:
        raise ValueError(
            f"`timestep_sampling` ({config.timestep_sampling!r}) is unknown. Valid: {', '.join(samplers)}."
        )
    return samplers[config.timestep_sampling]()
