"""What is left on disk of a checkpoint that did not become whole."""

import contextlib
import threading
import time

from dsjax.train.checkpoints import _remove_partial


def test_partial_checkpoints_are_removed_while_others_still_write(tmp_path):
    """A thread that makes its directory anew, as array stores do, is outlasted."""
    (tmp_path / "7" / "params").mkdir(parents=True)

    def write():
        for number in range(12):
            place = tmp_path / "8.orbax-checkpoint-tmp" / "params"
            place.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (place / str(number)).write_text("bytes")
            time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.02)
    _remove_partial(tmp_path, quiet=0.4)
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["7"]
