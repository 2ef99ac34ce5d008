"""Signals that end a run early, and agreement on them among processes."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator


STOPPING = (signal.SIGTERM, signal.SIGINT)

# Seconds within which signals are one request: a scheduler signals all processes, and torchrun passes it on to them.
ONE_REQUEST = 2.0


class Interrupted(BaseException):
    """A signal arrived while something ran that can be dropped. Like KeyboardInterrupt it is no `Exception`, so that
    libraries do not swallow it."""


class StopSignals:
    """Collects SIGTERM and SIGINT instead of dying from the first one; a second, after a while, acts as usual.

    Used as a context, within which `received` holds the numbers of the signals of this process.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: list[int] = []
        self._previous: dict[int, object] = {}
        self._droppable = False

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self._previous = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if not self.received:
            self.received.append(number)
            self._first = time.monotonic()
            if self._droppable:
                raise Interrupted
        elif time.monotonic() > self._first + ONE_REQUEST:
            self.__exit__()
            signal.raise_signal(number)

    @contextmanager
    def droppable(self, wanted: bool = True) -> Iterator[None]:
        """Run something that a signal ends at once with [`Interrupted`], unless `wanted` is false.

        An error after a signal counts as its consequence: Ctrl-C also reaches processes that load data.
        """
        try:
            self._droppable = wanted
            if wanted and self.received:
                raise Interrupted
            yield
        except Exception as error:
            if wanted and self.received:
                raise Interrupted from error
            raise
        finally:
            self._droppable = False

    def agreed(self) -> int | None:
        """The signal to stop for, the same in all processes, which must all ask; None to go on."""
        flags = anywhere(self.accelerator, *(number in self.received for number in STOPPING))
        return next((number for number, flag in zip(STOPPING, flags) if flag), None)


def anywhere(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Whether each flag is true in any process; all processes must ask."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device), "sum")
    return [count > 0 for count in counts.tolist()]
