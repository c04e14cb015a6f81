"""The command's first moment: SIGINT and SIGTERM are answered before anything that takes long is imported."""

import os
import signal
from types import FrameType


def main() -> None:
    """The command ``peer-jax``."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    from peer_jax import cli

    cli.main()


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends a command that has nothing to save; a run or a sweep in progress handles the signal itself."""
    # An exception would be lost or become another one in the code of libraries that are being imported.
    name = signal.Signals(number).name
    os.write(2, f"peer-jax: stopped by {name}; what was saved is kept, and the same command goes on from it\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
