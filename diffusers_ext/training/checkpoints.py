"""Checkpoints of a run: there complete or not at all, found damaged before they are loaded, and few.

A checkpoint is written under another name, brought to the disk, listed in a manifest with the size and CRC-32 of each
file, and renamed. Several machines must share the run folder.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.interruptions import anywhere


MANIFEST = "manifest.json"
UNFINISHED = "unfinished-checkpoint"
DISK_FULL = re.compile(
    r"No space left|File too large|quota exceeded|unexpected pos \d+ vs|file write failed|disk is full", re.IGNORECASE
)


class DiskFullError(OSError):
    """Nothing more can be written; what was complete before still is."""


@dataclass
class Progress:
    """How far a run is; part of its checkpoints."""

    step: int = 0
    """optimizer steps done, skipped ones included"""
    validation_due: bool = False
    """the validation of this step is yet to come, or was interrupted"""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@dataclass
class RunState:
    """Parts of a run as one custom object of accelerate, by name, so that options may change between runs."""

    parts: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = self.parts.keys() - state.keys()
        if missing:
            raise ValueError(
                f"The checkpoint lacks {', '.join(sorted(missing))}: it was written with other options. Resume with "
                "the options of config.json in its run folder, or start anew in another `output_dir`."
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps after which a checkpoint was written, out of its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, None when they are as they were written."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in listed["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
            if _crc32(checkpoint / name) != expected["crc32"]:
                return f"{name} has other content than was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def checkpoint_to_resume(config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """The checkpoint that a run goes on from; None for a new run. Unfinished and damaged ones are removed.

    Raises:
        ValueError: when the run folder already holds checkpoints and the run is not asked to resume, and when what is
            to be resumed does not exist or is damaged.
        OSError: when the run folder cannot be read or changed.
    """
    outcome: list[Any] = [None, None]  # in all processes that of the main one
    if accelerator.is_main_process:
        try:
            outcome[0] = _find(Path(config.output_dir), config.resume_from_checkpoint)
        except (OSError, ValueError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _find(output_dir: Path, wanted: str | None) -> Path | None:
    found = checkpoints(output_dir)
    if wanted is None and found:
        raise ValueError(
            f"`output_dir` ({str(output_dir)!r}) holds checkpoints up to {found[-1].name}: resume with "
            "`resume_from_checkpoint` 'latest', or choose or empty the folder."
        )
    for leftover in output_dir.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if wanted is None or (wanted == "latest" and not found):
        return None
    if wanted == "latest":
        return _newest_whole(found)
    chosen = Path(wanted)
    if not chosen.is_dir() or not re.fullmatch(r"checkpoint-\d+", chosen.name):
        raise ValueError(f"`resume_from_checkpoint` ({wanted!r}) must be 'latest' or the folder of a checkpoint.")
    problem = damage(chosen)
    if problem:
        raise ValueError(f"`resume_from_checkpoint` ({wanted!r}) is damaged: {problem}. Choose another one.")
    for newer in found:  # of a path that is left now; they would be taken for the newest of the new one
        if step_of(newer) > step_of(chosen):
            print(f"Going back to {chosen.name}: {newer.name} is renamed to abandoned-{newer.name}")
            shutil.rmtree(newer.with_name(f"abandoned-{newer.name}"), ignore_errors=True)
            newer.rename(newer.with_name(f"abandoned-{newer.name}"))
    return chosen


def _newest_whole(found: list[Path]) -> Path:
    damaged = {}
    for checkpoint in reversed(found):
        problem = damage(checkpoint)
        if problem is None:
            for other, its_problem in damaged.items():
                print(f"{other.name} is damaged ({its_problem}) and removed; going on from {checkpoint.name}")
                _remove(other)
            return checkpoint
        damaged[checkpoint] = problem
    raise ValueError(
        "`resume_from_checkpoint` is 'latest', but every checkpoint is damaged: "
        + "; ".join(f"{path} ({problem})" for path, problem in damaged.items())
        + ". Remove them to start anew."
    )


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, total_limit: int, num_bytes: int) -> None:
    """Write `checkpoint-STEP` so that it exists complete or not at all, then delete the oldest beyond the limit.

    Args:
        accelerator: holds the state to be saved.
        output_dir: run folder.
        step: optimizer steps done.
        total_limit: number of checkpoints to keep, 0 for all.
        num_bytes: about how large the checkpoint is, for the message when the disk is full.

    Raises:
        DiskFullError: when it cannot be written for lack of space. Earlier checkpoints stay, the unfinished one goes.
    """
    unfinished, finished = output_dir / UNFINISHED, output_dir / f"checkpoint-{step}"

    def clear() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def publish() -> None:
        _seal(unfinished, step)
        if finished.exists():
            _remove(finished)
        unfinished.replace(finished)
        _sync(output_dir)
        for old in checkpoints(output_dir)[:-total_limit]:
            _remove(old)

    main = accelerator.is_main_process
    with explain_full_disk(output_dir, finished.name, num_bytes):
        for stage in (
            clear if main else None,
            lambda: accelerator.save_state(str(unfinished)),
            publish if main else None,
        ):
            error = None
            try:
                if stage is not None:
                    stage()
            except Exception as caught:
                error = caught
            if anywhere(accelerator, error is not None)[0]:  # processes also wait for each other here
                if main:
                    shutil.rmtree(unfinished, ignore_errors=True)
                raise error or RuntimeError(f"Another process could not write {finished.name}, see its error.")


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Bring the state of a run back.

    Raises:
        ValueError: when the checkpoint was written with options that it does not fit.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"`resume_from_checkpoint` ({str(checkpoint)!r}) does not fit the options of this run: {error}\n"
            "Resume with the options of config.json in its run folder, or start anew in another `output_dir`."
        ) from error
    accelerator.step = 0  # forward passes of the next optimizer step are counted from here


def _seal(folder: Path, step: int) -> None:
    """Bring all files to the disk and list them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": listed}, indent=2) + "\n")
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # Windows opens no folders, and syncs no files that are open for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint such that nobody takes what is left of it for one, when that is cut short."""
    leftover = checkpoint.with_name(f"{UNFINISHED}-{checkpoint.name}")
    shutil.rmtree(leftover, ignore_errors=True)
    checkpoint.rename(leftover)
    shutil.rmtree(leftover)


@contextmanager
def explain_full_disk(output_dir: Path, what: str = "the run's files", num_bytes: int | None = None) -> Iterator[None]:
    """Turn the many errors that a full disk causes into one that says what to do.

    Args:
        output_dir: run folder.
        what: is being written.
        num_bytes: about how much that is, None when it is little.

    Raises:
        DiskFullError: in place of them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not DISK_FULL.search(str(error)):
            raise
        kept = checkpoints(output_dir)
        there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
        needed = f"about {num_bytes:,} bytes are needed, " if num_bytes else ""
        last = f"{kept[-1].name} is complete" if kept else "there is no checkpoint yet"
        raise DiskFullError(
            f"{what} cannot be written to {output_dir} ({error}): {needed}{shutil.disk_usage(there).free:,} are "
            f"free, and {last}. Free space, or choose a lower `checkpoints_total_limit`, and go on with "
            "--resume_from_checkpoint latest."
        ) from error
