"""What to do when a loss, a gradient or a weight is NaN or infinite."""

import math
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from diffusers_ext.training.averaging import whole
from diffusers_ext.training.checkpoints import checkpoints
from diffusers_ext.training.interruptions import anywhere


# A run that skips this many steps in a row learns nothing any more.
MAX_IN_A_ROW = 100


class NonfiniteGuard:
    """Lets a step be taken, or skipped and counted, or stops the run; the same in all processes.

    A skipped step counts as a step: the next one has the next batch and learning rate, but weights, moments of the
    optimizer and averages stay as they were.

    Args:
        accelerator: of the run.
        policy: `stop` or `skip`.
        output_dir: run folder, to name its last checkpoint.
    """

    def __init__(self, accelerator: Accelerator, policy: Literal["stop", "skip"], output_dir: Path):
        self.accelerator, self.policy, self.output_dir = accelerator, policy, output_dir
        self.skipped = self.in_a_row = 0

    def allows(self, step: int, losses: list[float], norm: float, rows: list[list[int]]) -> bool:
        """Whether a step can be taken; all processes must ask.

        In float16 gradients overflow now and then until their scale is found. That is no error and not counted.

        Args:
            step: its number, from 1.
            losses: of each forward pass.
            norm: of the gradient.
            rows: of the dataset, for each forward pass.

        Raises:
            FloatingPointError: when the policy is to stop, or steps could not be taken too many times in a row.
        """
        bad = [not math.isfinite(loss) for loss in losses]
        bad_loss, bad_norm = anywhere(self.accelerator, any(bad), not math.isfinite(norm))
        if not bad_loss and not bad_norm:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        overflow = self.accelerator.scaler is not None and not bad_loss
        if self.in_a_row >= MAX_IN_A_ROW or (self.policy == "stop" and not overflow):
            batches = [batch for batch in zip(losses, rows, bad) if batch[2] or not bad_loss]
            batches = gather_object(batches)
            found = f"The loss is {batches[0][0]}" if bad_loss else f"The norm of the gradient is {norm}"
            again = f" for the {self.in_a_row}th time in a row" if self.in_a_row > 1 else ""
            numbers = ", ".join(str(row) for _, batch, _ in batches for row in batch)
            self._stop(f"{found} at step {step}{again}, in the batch of rows {numbers}. Look at them,")
        self.skipped += not overflow
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        return False

    def check_weights(self, step: int, model: nn.Module) -> None:
        """Called before a checkpoint, so that it is good.

        Raises:
            FloatingPointError: when a weight is not finite.
        """
        for name, weight in model.named_parameters():
            if not whole(weight.detach()).isfinite().all():
                self._stop(f"The weight {name} is not finite after step {step}, though gradients were. So")

    def _stop(self, problem: str) -> None:
        found = checkpoints(self.output_dir)
        last = f"the last good checkpoint ({found[-1]})" if found else "the start, as there is no checkpoint yet"
        raise FloatingPointError(
            f"{problem} lower `learning_rate` or set `on_nonfinite` to 'skip', and go on from {last}, with "
            "--resume_from_checkpoint latest."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
