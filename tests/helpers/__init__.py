"""What several test files share: networks, cases with their expected answers, and processes."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
