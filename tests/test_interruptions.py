"""Nothing is lost: kills, signals, full disks and numbers that are not finite."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_training import TINY_CLASSIFIER, TINY_UNET, assert_same_end, lines, untimed, weights_of

from diffusers_ext.training.checkpoints import DiskFullError, checkpoints, damage
from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.data import ImageData
from diffusers_ext.training.interruptions import StopSignals
from diffusers_ext.training.loop import train
from diffusers_ext.training.tasks import ClassifierTask, UNetTask
from diffusers_ext.training.tracking import RunLog


@pytest.fixture(autouse=True)
def isolated():
    """A precision of its own for accelerate, which keeps one per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# Kills. They run in a process of its own that has imported everything once and forks for every run.

KILLED = replace(
    TINY_UNET,
    block_out_channels=(4, 8),
    attention_head_dim=4,
    norm_num_groups=2,
    layers_per_block=1,
    train_batch_size=2,
    max_train_steps=60,
    checkpointing_steps=2,
    checkpoints_total_limit=2,
    validation_steps=9,
    validation_images=1,
    validation_inference_steps=1,
    log_steps=3,
    gradient_accumulation_steps=2,
    ema_decay=(0.9999, 0.5),
    resume_from_checkpoint="latest",
)


def fork(config: TrainingConfig, log: Path) -> int:
    """Start a training in a copy of this process; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        train(config)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def interrupt(config: TrainingConfig, log: Path, number: int, wait: Callable[[int], None]) -> int:
    """Start a training, send it a signal when `wait(child)` returns; returns its exit status."""
    child = fork(config, log)
    wait(child)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(folder: str, seed: int, kills: int) -> None:
    """Compare a run that is killed and stopped at random moments with one that is left alone."""
    torch.set_num_threads(1)
    train(replace(KILLED, max_train_steps=1, output_dir=str(Path(folder) / "warm")))  # imports what is used
    AcceleratorState._reset_state(reset_partial_state=True)
    moments = random.Random(seed)
    once, often = (Path(folder) / name for name in ("once", "often"))
    log = Path(folder) / "log"
    started = time.monotonic()
    _, failed, usage = os.wait4(fork(replace(KILLED, output_dir=str(once)), log), 0)
    if failed:
        raise RuntimeError(log.read_text())
    duration = time.monotonic() - started
    work = min(usage.ru_utime + usage.ru_stime, duration)  # what it takes however busy the machine is meanwhile

    config = replace(KILLED, output_dir=str(often))
    outcomes = Counter()
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM, signal.SIGINT]
    moments.shuffle(signals)
    for index, number in enumerate(signals):
        reached = len(checkpoints(often)) and checkpoints(often)[-1]

        def wait(child: int) -> None:
            """Until a random moment after the next checkpoint, or, every other time, within one."""
            deadline = time.monotonic() + 3 * duration + 5
            while (checkpoints(often) or [0])[-1] == reached and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, work / 20))
            while index % 2 and not (often / "unfinished-checkpoint").exists() and time.monotonic() < deadline:
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    return
            time.sleep(moments.uniform(0, 0.01))

        status = interrupt(config, log, number, wait)
        outcomes["within a checkpoint"] += (often / "unfinished-checkpoint").exists()
        outcomes[signal.Signals(-status).name if status < 0 else f"exit {status}"] += 1
        if any(damage(checkpoint) for checkpoint in checkpoints(often)):
            raise RuntimeError(f"kill {index}: a checkpoint is there, but not complete")
    child = fork(config, log)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(log.read_text())
    print(dict(outcomes), f"uninterrupted in {duration:.1f} s")
    assert_same_end(once, often, KILLED.max_train_steps)
    if sorted(path.name for path in once.rglob("*")) != sorted(path.name for path in often.rglob("*")):
        raise RuntimeError("the run folders hold different files")
    if outcomes["SIGKILL"] != kills:
        raise RuntimeError(f"some kills came after the end of the training: {outcomes}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_a_run_ends_at_the_same_weights(tmp_path, fresh_python, root):
    """Ten times `kill -9`, half of them while a checkpoint is written, then SIGTERM and SIGINT; bit for bit."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moments: {seed}")
    code = f"from test_interruptions import kill_and_resume; kill_and_resume({str(tmp_path)!r}, {seed}, kills=10)"
    print(fresh_python(code, tmp_path, PYTHONPATH=f"{root}{os.pathsep}{root / 'tests'}").stdout)


# Signals


def raises(number: int, wrapped: Callable, call: int) -> Callable:
    """A function that raises a signal when it is called for the given time, and otherwise does what it did."""
    calls = iter(range(1, 1000))

    def wrapper(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(number)
        return wrapped(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "owner, name, call, step",
    [
        pytest.param(UNetTask, "losses", 3, 3, id="in a step"),
        pytest.param(ImageData, "__getitem__", 3, 2, id="while data are loaded"),
        pytest.param(UNetTask, "validate", 1, 4, id="in a validation"),
        pytest.param(Accelerator, "save_state", 1, 3, id="in a checkpoint"),
        pytest.param(UNetTask, "validate", 2, 6, id="in the last validation"),
    ],
)
def test_a_signal_ends_in_a_resumable_state(owner, name, call, step, number, tmp_path, monkeypatch, capsys):
    config = replace(TINY_UNET, resume_from_checkpoint="latest", checkpointing_steps=3)
    once, twice = (replace(config, output_dir=str(tmp_path / run)) for run in ("once", "twice"))
    train(once)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raises(number, getattr(owner, name), call))
        with pytest.raises(SystemExit) as stopped:
            train(twice)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    told = [line for line in capsys.readouterr().out.splitlines() if "Stopped" in line]
    assert told == [f"Stopped by {number.name} after step {step}; go on with --resume_from_checkpoint latest"]
    assert checkpoints(tmp_path / "twice")[-1].name == f"checkpoint-{step}"
    train(twice)
    assert_same_end(tmp_path / "once", tmp_path / "twice", step=6)


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_signals_that_arrive_together_are_one(first, second, tmp_path, monkeypatch):
    """As when a scheduler signals all processes, and torchrun too passes it on to them."""
    monkeypatch.setattr(UNetTask, "losses", raises(first, raises(second, UNetTask.losses, call=2), call=2))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the tests would end here if it fails
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            train(replace(TINY_UNET, output_dir=str(tmp_path)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.type is SystemExit and stopped.value.code == 128 + first
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_second_signal_acts_as_usual(monkeypatch):
    monkeypatch.setattr("diffusers_ext.training.interruptions.ONE_REQUEST", 0.05)
    with StopSignals(Accelerator(cpu=True)) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed() == signal.SIGINT
        time.sleep(0.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# Validations that fail


@pytest.mark.parametrize(
    "owner, name, call, step",
    [
        pytest.param(ClassifierTask, "validate", 1, 4, id="between two checkpoints"),
        pytest.param(ClassifierTask, "validate", 2, 6, id="the last one, at a checkpoint"),
        pytest.param(RunLog, "write_images", 1, 4, id="after its line is written"),
    ],
)
def test_a_validation_that_fails_ends_in_a_resumable_state(owner, name, call, step, tmp_path, monkeypatch):
    config = replace(TINY_CLASSIFIER, resume_from_checkpoint="latest", checkpointing_steps=3)
    once, twice = (replace(config, output_dir=str(tmp_path / run)) for run in ("once", "twice"))
    train(once)
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def failing(*args):
        if next(calls) == call:
            raise RuntimeError("out of memory")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(twice)
    assert checkpoints(tmp_path / "twice")[-1].name == f"checkpoint-{step}"
    train(twice)
    assert_same_end(tmp_path / "once", tmp_path / "twice", step=6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_in_a_validation_goes_on_from_there(tmp_path, monkeypatch):
    config = replace(TINY_CLASSIFIER, checkpointing_steps=4, resume_from_checkpoint="latest")
    once, twice = (replace(config, output_dir=str(tmp_path / run)) for run in ("once", "twice"))
    train(once)
    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTask, "validate", raises(signal.SIGKILL, ClassifierTask.validate, call=1))
        child = fork(twice, tmp_path / "log")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "twice")] == ["checkpoint-4"]
    train(twice)
    assert_same_end(tmp_path / "once", tmp_path / "twice", step=6)


# Full disks


def assert_resumable(config: TrainingConfig, reference: TrainingConfig, last: str) -> None:
    folder = Path(config.output_dir)
    assert [path.name for path in checkpoints(folder)][-1:] == [last] and damage(folder / last) is None
    assert not list(folder.glob("unfinished*"))
    train(replace(config, resume_from_checkpoint="latest"))
    assert_same_end(Path(reference.output_dir), folder, step=config.max_train_steps)


def test_a_file_too_large_for_the_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """The limit of the operating system on files stands for a disk that is full: the same calls fail."""
    reference, config = (replace(TINY_UNET, output_dir=str(tmp_path / name)) for name in ("once", "twice"))
    train(reference)
    save_state, limits = Accelerator.save_state, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_with_little_space(self, folder: str, *args):
        if (tmp_path / "twice" / "checkpoint-3").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        return save_state(self, folder, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", save_with_little_space)
        try:
            with pytest.raises(DiskFullError) as full:
                train(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = str(full.value)
    assert "\n" not in told and str(tmp_path / "twice") in told and "checkpoint-3 is complete" in told
    assert "bytes are needed" in told and "are free" in told and "--resume_from_checkpoint latest" in told
    assert_resumable(config, reference, "checkpoint-3")


def test_a_disk_that_is_full_from_the_start_is_told(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=f"cannot be written to {tmp_path}.*there is no checkpoint yet"):
            train(replace(TINY_UNET, output_dir=str(tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if not done or done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "samples", "component"])
def test_a_full_disk_leaves_the_checkpoint_before(what, small_disk, tmp_path, monkeypatch):
    reference, config = (replace(TINY_UNET, output_dir=str(path / "run")) for path in (tmp_path, small_disk))
    train(reference)
    filler = small_disk / "filler"

    def fill(*args, **kwargs):
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1024)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC

    owner, name, call = {
        "checkpoint": (Accelerator, "save_state", 2),
        "metrics": (UNetTask, "losses", 6),
        "samples": (UNetTask, "validate", 2),
        "component": (UNetTask, "save", 1),
    }[what]
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def filling(*args, **kwargs):
        if next(calls) == call:
            fill()
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, filling)
        with pytest.raises(DiskFullError, match=f"cannot be written to {small_disk}.* are free, and checkpoint-"):
            train(config)
    filler.unlink()
    assert_resumable(config, reference, "checkpoint-6" if what in ("samples", "component") else "checkpoint-3")


# Numbers that are not finite


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of chosen forward passes, counted from 1, another one: `poisoned({3: nan})`."""

    def poison(losses: dict[int, float]) -> None:
        original, calls = UNetTask.losses, iter(range(1, 1000))

        def wrapper(self, model, batch):
            found, call = original(self, model, batch), next(calls)
            return found | {"loss": found["loss"] * losses[call]} if call in losses else found

        monkeypatch.setattr(UNetTask, "losses", wrapper)

    return poison


@pytest.mark.parametrize("value, told", [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_ends_the_run(value, told, poisoned, tmp_path):
    config = replace(TINY_UNET, gradient_accumulation_steps=2, output_dir=str(tmp_path))
    rows = []
    poisoned({10: value})  # the second half of step 5
    batches = iter(UNetTask(config).data.batches(8, config.seed))
    for _ in range(10):
        rows = next(batches).rows
    with pytest.raises(FloatingPointError) as stopped:
        train(config)
    message = str(stopped.value)
    assert f"The loss is {told} at step 5, in the batch of rows {', '.join(map(str, rows))}." in message
    assert f"the last good checkpoint ({tmp_path / 'checkpoint-3'})" in message


def test_weights_that_explode_end_the_run(tmp_path):
    config = replace(TINY_UNET, learning_rate=1e30, lr_warmup_steps=0, checkpointing_steps=1, output_dir=str(tmp_path))
    with pytest.raises(FloatingPointError, match="The loss is (nan|inf) at step [23].*checkpoint-[12]"):
        train(config)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    original = UNetTask.losses

    def losses(self, model, batch):
        weight = next(model.parameters())
        return original(self, model, batch) | {"loss": (weight - weight.detach()).abs().sqrt().sum()}  # 0 * inf

    monkeypatch.setattr(UNetTask, "losses", losses)
    with pytest.raises(FloatingPointError, match="The norm of the gradient is nan at step 1, in the batch of rows"):
        train(replace(TINY_UNET, output_dir=str(tmp_path)))


def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(poisoned, tmp_path, capsys):
    config = replace(TINY_UNET, on_nonfinite="skip", lr_scheduler="constant", checkpointing_steps=1)
    poisoned({3: float("nan"), 4: float("inf")})
    path = train(replace(config, output_dir=str(tmp_path)))
    assert "Skipped 2 steps" in capsys.readouterr().out
    counted = [(line["step"], line["nonfinite_steps"]) for line in lines(tmp_path) if "nonfinite_steps" in line]
    assert counted == [(2, 0), (4, 2), (6, 2)]
    assert "loss" not in next(line for line in untimed(tmp_path) if line["step"] == 4)
    before, after = (torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.bin") for step in (2, 4))
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert all(value.isfinite().all() for value in weights_of(path).values())


def test_too_many_steps_that_are_not_finite_end_the_run(poisoned, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_ext.training.nonfinite.MAX_IN_A_ROW", 3)
    poisoned(dict.fromkeys((2, 4, 5, 6), float("nan")))
    with pytest.raises(FloatingPointError, match="The loss is nan at step 6 for the 3th time in a row"):
        train(replace(TINY_UNET, on_nonfinite="skip", output_dir=str(tmp_path)))
