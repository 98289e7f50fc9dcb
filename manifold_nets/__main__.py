"""The command line, as ``python -m manifold_nets``."""

from manifold_nets.cli import main  # type: ignore[import-not-found]  # the folder cli, which mypy checks by itself

if __name__ == "__main__":
    main()
