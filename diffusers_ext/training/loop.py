"""The training loop: one for every task, on accelerate.

Every random number of a step (data order, timesteps, noise, dropout) follows from (seed, step, process), as in EDM2
(Karras et al., 2024, https://arxiv.org/abs/2312.02696), so a resumed run takes the path of an uninterrupted one.
"""

import json
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.data import BatchSampler
from diffusers_ext.training.tasks import TASKS


def train(config: TrainingConfig) -> Path:
    """Train a component and save it with `save_pretrained`.

    The run folder receives `checkpoint-STEP/`, `metrics.jsonl` and `samples/`, and at the end the component's folder
    (`unet/`, `transformer/` or `classifier/`, EMA weights) and `scheduler/`. With a denoising network in it, the run
    folder is then a pipeline that `DiffusionPipeline.from_pretrained` loads. SIGTERM and SIGINT end the run with a
    checkpoint.

    Args:
        config: options; its class decides what is trained.

    Returns:
        The folder of the trained component.

    Raises:
        ValueError: when the run folder already holds checkpoints and the run is not asked to resume, when the
            checkpoint to resume does not exist, or about the data.
        FloatingPointError: when the loss is not finite.
        SystemExit: after a signal, with the usual code 128 + signal.
    """
    output_dir = Path(config.output_dir)
    resume = checkpoint_to_resume(config)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=output_dir,
    )
    task = TASKS[type(config)](config, accelerator.device)

    torch.manual_seed(config.seed)
    model = task.build_model().train()
    model.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(
        model.parameters(),
        decay=config.ema_decay if config.use_ema else 0.0,
        use_ema_warmup=True,
        power=config.ema_power,
        foreach=True,
    )
    accelerator.register_for_checkpointing(lr_scheduler, ema)
    if resume is not None:
        accelerator.load_state(str(resume))
        ema.to(accelerator.device)
        lr_scheduler.base_lrs = [config.learning_rate]  # the rate asked for now, not that of the checkpoint
        optimizer.param_groups[0]["lr"] = config.learning_rate * lr_scheduler.lr_lambdas[0](lr_scheduler.last_epoch)
    first_step = step = lr_scheduler.last_epoch  # optimizer steps done

    rank, world, micro_steps = accelerator.process_index, accelerator.num_processes, config.gradient_accumulation_steps
    images_per_step = config.train_batch_size * micro_steps * world
    order = BatchSampler(
        len(task.data), config.train_batch_size, config.seed, first=step * micro_steps * world + rank, stride=world
    )
    # The data set returns whole batches, so there is nothing to collate.
    loader = DataLoader(task.data, batch_sampler=order, num_workers=config.dataloader_num_workers, collate_fn=tuple)
    log = MetricsLog(accelerator, config, step)
    bar = tqdm(
        desc=output_dir.name,
        total=config.max_train_steps * images_per_step,
        initial=step * images_per_step,
        unit="img",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=not accelerator.is_main_process,
    )

    with bar, stop_signals() as received:
        batches = iter(loader)
        while step < config.max_train_steps and not received:
            for micro_step in range(micro_steps):
                images, labels = (x if x is None else x.to(accelerator.device) for x in next(batches))
                torch.manual_seed(mixed_seed(config.seed, step, micro_step, rank))
                with accelerator.accumulate(model):
                    losses = task.losses(model, images, labels)
                    if not torch.isfinite(losses["loss"]):
                        checkpoint = (checkpoints(output_dir) or ["none yet"])[-1]
                        raise FloatingPointError(
                            f"The loss is {losses['loss'].item()} at step {step + 1}. Lower `learning_rate` and "
                            f"resume from the last checkpoint ({checkpoint})."
                        )
                    accelerator.backward(losses["loss"])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                log.add(losses)
            lr_scheduler.step()
            ema.step(model.parameters())
            step += 1
            bar.update(images_per_step)

            last = step == config.max_train_steps
            if step % config.log_steps == 0 or last:
                bar.set_postfix(log.write(step, learning_rate=lr_scheduler.get_last_lr()[0]), refresh=False)
            if (step % config.validation_steps == 0 or last) and accelerator.is_main_process:
                with ema_weights(ema, model):
                    log.write(step, **task.validate(accelerator.unwrap_model(model), step, output_dir))
            if step % config.checkpointing_steps == 0:
                save_checkpoint(accelerator, output_dir, step, config.checkpoints_total_limit)
        if step > first_step and step % config.checkpointing_steps:
            save_checkpoint(accelerator, output_dir, step, config.checkpoints_total_limit)

    accelerator.end_training()
    if step < config.max_train_steps:
        name = signal.Signals(received[0]).name
        accelerator.print(f"Stopped by {name} after step {step}; go on with --resume_from_checkpoint latest")
        raise SystemExit(128 + received[0])
    component = output_dir / task.name
    if accelerator.is_main_process:
        with ema_weights(ema, model):
            task.save(accelerator.unwrap_model(model, keep_fp32_wrapper=False), output_dir)
        print(f"Saved {component}")
    return component


class MetricsLog:
    """Means of metrics since the last line, appended to `metrics.jsonl` and sent to the tracker."""

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, step: int):
        self.accelerator = accelerator
        self.batch_size = config.train_batch_size * accelerator.num_processes
        self.path = Path(config.output_dir) / "metrics.jsonl"
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            # What an interrupted run did after its last checkpoint is done again; its last line may be half a line.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self.path.write_text("".join(kept))
            self.path.with_name("config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        if config.report_to != "none":
            options = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(config).items()}
            accelerator.init_trackers("diffusers_ext", options)
        self._restart()

    def _restart(self) -> None:
        self.sums, self.count, self.started = defaultdict(float), 0, time.perf_counter()

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] += value.item()
        self.count += 1

    def write(self, step: int, **metrics: float) -> dict[str, float]:
        """Write the means, the speed in images per second, and `metrics`; returns all of them."""
        if self.count:
            speed = self.count * self.batch_size / (time.perf_counter() - self.started)
            metrics |= {name: total / self.count for name, total in self.sums.items()} | {"images_per_second": speed}
        if metrics and self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.accelerator.log(metrics, step=step)
        self._restart()
        return metrics


def mixed_seed(*numbers: int) -> int:
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def ema_weights(ema: EMAModel, model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with the averaged weights; afterwards as it was."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        model.train()
        ema.restore(model.parameters())


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list instead of dying from the first one; the second acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield received
        return

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_to_resume(config: TrainingConfig) -> Path | None:
    found = checkpoints(Path(config.output_dir))
    wanted = config.resume_from_checkpoint
    if wanted == "latest":
        return found[-1] if found else None
    if wanted is not None:
        if not Path(wanted).is_dir():
            raise ValueError(f"`resume_from_checkpoint` ({wanted!r}) must be 'latest' or the folder of a checkpoint.")
        return Path(wanted)
    if found:
        raise ValueError(
            f"`output_dir` ({config.output_dir!r}) holds checkpoints up to {found[-1].name}: resume with "
            "`resume_from_checkpoint` 'latest', or choose or empty the folder."
        )
    return None


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int) -> None:
    """Write `checkpoint-STEP` so that it exists complete or not at all, then delete the oldest beyond the limit."""
    unfinished, finished = output_dir / "unfinished-checkpoint", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if finished.exists():
            shutil.rmtree(finished)
        unfinished.replace(finished)
        for old in checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
