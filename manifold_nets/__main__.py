"""The command line, as ``python -m manifold_nets``."""

from manifold_nets.cli import main

if __name__ == "__main__":
    main()
