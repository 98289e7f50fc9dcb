"""What several test files share: networks, cases with their expected answers, and processes."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

__all__ = ["ROOT", "tomllib"]

ROOT = Path(__file__).parents[2]
