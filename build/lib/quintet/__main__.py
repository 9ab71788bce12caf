"""`python -m quintet`, which torchrun's `-m` starts on every rank."""

import os
import sys

from quintet.cli.main import main


def end(code: int) -> None:
    """End the process; one of several ranks without the interpreter's teardown, in which a thread of torch's process groups that lets go of
    a last tensor finds no interpreter lock and aborts, so that a launcher would see another exit code."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
