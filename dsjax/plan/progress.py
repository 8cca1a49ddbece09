"""One line on stderr while something takes long."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def progress(message: str) -> Iterator[None]:
    """Shows the message and the seconds since, until the block is left; then how long
    it took. Where stderr is no terminal, the two lines alone.
    """
    start, done = time.perf_counter(), threading.Event()
    terminal = sys.stderr.isatty()

    def show() -> None:
        while not done.wait(1.0):
            seconds = time.perf_counter() - start
            print(f"\r{message}: {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    if terminal:
        ticker = threading.Thread(target=show, daemon=True)
        ticker.start()
    else:
        print(f"{message} ...", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        done.set()
        if terminal:
            ticker.join()
        end = f"{message}: {time.perf_counter() - start:.1f} s"
        print(("\r" if terminal else "") + end, file=sys.stderr, flush=True)
