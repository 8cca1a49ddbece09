"""Asked to stop: SIGTERM, as a scheduler sends it, and Ctrl-C.

A step that is running is finished, the run saved and the process left with 0 (Ctrl-C:
130). A signal that Python cannot see for long, because XLA compiles, ends the process
from a thread: at once before the first step, else after `PATIENCE` seconds, unless a
checkpoint is being written. What was saved before is whole in every case.
"""

import enum
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

PATIENCE = 20.0  # seconds for the end of a step; schedulers kill after 30
CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Phase(enum.Enum):
    """What a run is doing, and so how it can be left."""

    STARTING = "starting"  # nothing to save: leave at once
    STEPPING = "stepping"
    SAVING = "saving"  # wait for it, however long it takes


class Stop:
    """Whether the run shall end, to be asked after each step."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.signal: signal.Signals | None = None
        self._together = jax.process_count() > 1

    def at(self, step: int) -> bool:
        """Whether to save and leave after `step`. Processes of one job agree: JAX
        passes the first one's SIGTERM on and finds a step that none has begun.
        """
        if self._together and reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def started(self) -> None:
        """The first step is done: from here on there is something to save."""
        if self.phase is Phase.STARTING:
            self.phase = Phase.STEPPING

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of a checkpoint that shall not be cut short."""
        self.phase = Phase.SAVING
        yield
        self.phase = Phase.STEPPING

    def _seen(self, number: int, _frame: object) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C
        self.signal = signal.Signals(number)

    def _watch(self, wakes: socket.socket) -> None:
        """Reads signals in a thread: C code in the main thread cannot delay them."""
        while numbers := wakes.recv(16):
            for number in {*numbers} & {*CODES}:
                if self.phase is Phase.STARTING:
                    _leave(number)
                threading.Thread(
                    target=self._expire, args=[number], daemon=True
                ).start()

    def _expire(self, number: int) -> None:
        wait = threading.Event()
        wait.wait(PATIENCE)
        while self.phase is Phase.SAVING:
            wait.wait(0.1)
        _leave(number)


def _leave(number: int) -> None:
    name = signal.Signals(number).name
    print(f"dsjax: {name}: leaving with what is saved", file=sys.stderr, flush=True)
    os._exit(CODES[number])


@contextmanager
def stopping() -> Iterator[Stop]:
    """Handles the two signals inside, as the module says. Outside the main thread, and
    for SIGTERM where JAX itself passes it on among several processes, nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = [signal.SIGINT] if stop._together else [*CODES]
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = {number: signal.signal(number, stop._seen) for number in signals}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=stop._watch, args=[ours], daemon=True).start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()  # ends the thread
