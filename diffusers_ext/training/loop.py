"""The training loop: one for every task, on accelerate.

Every random number of a forward pass (data, timesteps, noise, dropout) follows from (seed, number of the batch), where
batches are counted over steps, forward passes and processes; EDM2 (Karras et al., 2024,
https://arxiv.org/abs/2312.02696) reseeds in this way. So a resumed run takes the path of an uninterrupted one, and two
processes that of one with twice the forward passes per step.
"""

import traceback
from collections import defaultdict
from pathlib import Path
from signal import Signals

import numpy as np
import torch

from diffusers_ext.training.averaging import (
    Averages,
    PosthocAverages,
    averaged_network,
    ema_variant,
    posthoc_variant,
    whole,
)
from diffusers_ext.training.checkpoints import (
    Progress,
    RunState,
    checkpoint_to_resume,
    explain_full_disk,
    load_checkpoint,
    save_checkpoint,
)
from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.interruptions import Interrupted, StopSignals, anywhere
from diffusers_ext.training.nonfinite import NonfiniteGuard
from diffusers_ext.training.preparation import (
    build_network,
    build_optimizer,
    learning_rates,
    planned_steps,
    start_accelerator,
)
from diffusers_ext.training.tasks import TASKS
from diffusers_ext.training.tracking import RunLog


def train(config: TrainingConfig) -> Path:
    """Train a component and save it with `save_pretrained`.

    The run folder receives `config.json`, `checkpoint-STEP/`, `metrics.jsonl`, `metrics.png` and `samples/`, and at
    the end the component's folder (`unet/`, `transformer/` or `classifier/`; the average of the first `ema_decay`, the
    others as variants such as `ema-0_99`), its scheduler, and what makes a pipeline of them that
    `DiffusionPipeline.from_pretrained` loads. SIGTERM and SIGINT end the run with a checkpoint, and so does an error
    in a validation, which a resumed run repeats.

    Args:
        config: options; its class decides what is trained.

    Returns:
        The folder of the trained component.

    Raises:
        ValueError: about options, data, and checkpoints that cannot be resumed.
        ImportError: when an option needs a package that is missing.
        FloatingPointError: when a loss or gradient is not finite, unless `on_nonfinite` is `skip`, and after 100 such
            steps in a row.
        DiskFullError: an OSError, when something cannot be written; earlier checkpoints stay.
        SystemExit: after a signal, with the usual code 128 + signal.
    """
    with explain_full_disk(Path(config.output_dir), "the run's files or latents"):
        run = Run(config)
    with explain_full_disk(run.output_dir), run.log.bar, StopSignals(run.accelerator) as stop:
        signal = run.train(stop)
        if run.progress.step > run.saved_step:
            run.save_checkpoint()
    if signal is None:
        with explain_full_disk(run.output_dir, f"the trained {run.task.name}"):
            run.save_component()
    run.accelerator.end_training()
    if signal is not None:
        run.accelerator.print(
            f"Stopped by {Signals(signal).name} after step {run.progress.step}; "
            "go on with --resume_from_checkpoint latest"
        )
        raise SystemExit(128 + signal)
    return run.output_dir / run.task.name


class Run:
    """All that a training consists of, new or as a checkpoint left it.

    Args:
        config: options.
    """

    def __init__(self, config: TrainingConfig):
        self.config, self.output_dir = config, Path(config.output_dir)
        self.accelerator = start_accelerator(config)
        resume = checkpoint_to_resume(config, self.accelerator)
        self.task = TASKS[type(config)](config, self.accelerator.device)
        if config.push_to_hub and self.accelerator.is_main_process:
            self.task.create_repository()
        processes = self.accelerator.num_processes
        self.steps, self.validation_steps = planned_steps(config, self.task.data, processes)

        torch.manual_seed(config.seed)
        network = build_network(self.task, config)
        optimizer = build_optimizer(network, config, self.accelerator.device)
        self.learning_rate = learning_rates(optimizer, config, self.steps)
        self.posthoc = None
        if config.posthoc_ema_sigma_rels:
            folder = self.output_dir / "posthoc_ema"
            self.posthoc = PosthocAverages(
                network, config.posthoc_ema_sigma_rels, folder, self.accelerator, self.steps
            )
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        decays = config.ema_decay if config.use_ema else ()
        self.averages = Averages(self.model.parameters(), decays, config.ema_power)

        images_per_step = config.train_batch_size * config.gradient_accumulation_steps * processes
        self.log = RunLog(self.accelerator, config, self.steps, images_per_step)
        self.guard = NonfiniteGuard(self.accelerator, config.on_nonfinite, self.output_dir)
        self.progress = Progress()
        parts = ("progress", "log", "guard", "task", "averages", "posthoc")
        state = RunState({name: getattr(self, name) for name in parts if getattr(self, name) is not None})
        self.accelerator.register_for_checkpointing(state)
        if resume is not None:
            load_checkpoint(self.accelerator, resume)
            if self.progress.step > self.steps:
                raise ValueError(
                    f"`max_train_steps` ({self.steps}) is less than the {self.progress.step} steps that {resume.name} "
                    "has done; give at least as many, or resume from an earlier checkpoint."
                )
        if self.posthoc is not None:
            self.posthoc.discard_later()
        self.log.start(self.progress.step)
        self.saved_step = self.progress.step

    def train(self, stop: StopSignals) -> int | None:
        """The loop.

        Returns:
            The signal that stopped it, None at its end.
        """
        config, accelerator, model, progress = self.config, self.accelerator, self.model, self.progress
        rank, processes = accelerator.process_index, accelerator.num_processes
        number = progress.step * config.gradient_accumulation_steps * processes + rank  # of the next batch
        batches = self.task.data.batches(
            config.train_batch_size, config.seed, number, processes, config.dataloader_num_workers
        )
        if progress.validation_due:
            self.validate(stop)
        while not (signal := stop.agreed()) and progress.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(progress.step)
            metrics, rows = defaultdict(list), []
            for _ in range(config.gradient_accumulation_steps):
                try:
                    with stop.droppable(processes == 1 and not rows):  # else they stop between two steps
                        batch = next(batches)
                except Interrupted:
                    return stop.agreed()
                torch.manual_seed(mixed_seed(config.seed, number))
                with accelerator.accumulate(model):
                    losses = self.task.losses(model, batch.to(accelerator.device))
                    accelerator.backward(losses["loss"])
                for name, value in losses.items():
                    metrics[name].append(value.detach())
                rows.append(batch.rows)
                number += processes
            metrics["grad_norm"] = [accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)]
            metrics = floats(metrics)

            progress.step += 1
            if self.guard.allows(progress.step, metrics["loss"], metrics["grad_norm"][0], rows):
                self.optimizer.step()
                self.averages.step()
                if self.posthoc is not None:
                    self.posthoc.step()
                self.log.add(metrics)
            self.optimizer.zero_grad()
            self.after_step(stop)
        return signal

    def after_step(self, stop: StopSignals) -> None:
        """Log, save and validate, each at its time.

        What is saved says that the validation is due: a run that is killed in it goes on from there.
        """
        config, step = self.config, self.progress.step
        last = step == self.steps
        self.log.advance()
        if step % config.log_steps == 0 or last:
            skipped = {"nonfinite_steps": self.guard.skipped} if config.on_nonfinite == "skip" else {}
            self.log.write_means(step, learning_rate=self.optimizer.param_groups[0]["lr"], **skipped)
        self.progress.validation_due = step % self.validation_steps == 0 or last
        if self.posthoc is not None:
            self.posthoc.snapshot(step)
        if step % config.checkpointing_steps == 0 or last:
            self.save_checkpoint()
        if self.progress.validation_due:
            self.validate(stop)

    def validate(self, stop: StopSignals) -> None:
        """Judge the averaged network in the main process; after a signal, when the run is resumed.

        Raises:
            Exception: any of the task's, when the run can be resumed; a RuntimeError in the other processes.
        """
        step, lines = self.progress.step, self.log.lines
        interrupted, error = False, None
        try:
            with self.averaged_network(self.averages.decays[0]) as network:
                if network is not None:
                    with stop.droppable():
                        metrics = self.task.validate(network, step, self.output_dir)
                    self.log.write(step, **metrics)
                    self.log.write_images(step)
                    self.log.draw()
        except Interrupted:
            interrupted = True
        except Exception as caught:
            error = caught
        interrupted, failed = anywhere(self.accelerator, interrupted, error is not None)
        if failed:
            self.log.lines = lines  # of what comes again
            try:
                raise error or RuntimeError("The validation failed in the main process, see its error.")
            finally:
                if step > self.saved_step:
                    traceback.clear_frames(getattr(error, "__traceback__", None))  # frees what filled the memory
                    self.save_checkpoint()
        self.progress.validation_due = interrupted
        self.log.restart_clock()

    def save_checkpoint(self) -> None:
        self.guard.check_weights(self.progress.step, self.model)
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        tensors += [*self.model.parameters()] * (1 + len(self.averages.averages))
        num_bytes = sum(t.numel() * t.element_size() for t in tensors)
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, self.progress.step, limit, num_bytes)
        self.saved_step = self.progress.step

    def save_component(self) -> None:
        """Write the network with each average, and publish it when that is asked for."""
        component = self.output_dir / self.task.name
        first, *others = self.averages.decays
        with self.averaged_network(first) as network:
            if network is not None:
                self.task.save(network, self.output_dir, self.steps, self.log.images_per_step)
        for decay in others:
            with self.averaged_network(decay) as network:
                if network is not None:
                    network.save_pretrained(component, variant=ema_variant(decay))
        if not self.accelerator.is_main_process:
            return
        if self.posthoc is not None:
            for sigma_rel in self.posthoc.sigma_rels:
                network = self.posthoc.synthesized(sigma_rel)
                network.save_pretrained(component, variant=posthoc_variant(sigma_rel))
        if self.guard.skipped:
            print(f"Skipped {self.guard.skipped} steps whose loss or gradient was not finite")
        print(f"Saved {component}")
        if self.config.push_to_hub:
            print(f"Published {self.task.publish(self.output_dir)}")

    def averaged_network(self, decay: float | None):
        return averaged_network(
            self.accelerator, self.model, self.averages, decay, lambda: self.task.build_model(pretrained_weights=False)
        )


def mixed_seed(*numbers: int) -> int:
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def floats(metrics: dict[str, list[torch.Tensor]]) -> dict[str, list[float]]:
    """Numbers out of 0-d tensors, in one transfer from the device."""
    tensors = [whole(torch.as_tensor(value)).float() for values in metrics.values() for value in values]
    numbers = iter(torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist())
    return {name: [next(numbers) for _ in values] for name, values in metrics.items()}
