"""`python -m quintet`, which torchrun's `-m` starts on every rank."""

import sys

from quintet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
