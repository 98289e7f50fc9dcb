"""Networks of many architectures, with inputs for them: `python examples/networks.py` lists them.

torchvision's networks, timm's families in small variants, and tiny random configurations of transformers' models;
nothing is downloaded. Other scripts take them from `SUITES`.

    python examples/networks.py transformers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from networks_timm import TIMM, timm_network
from networks_torchvision import TORCHVISION, torchvision_network
from networks_transformers import TRANSFORMERS, transformers_network
from torch import nn

SUITES: dict[str, tuple[list[str], Callable[[str], tuple[nn.Module, Any]]]] = {
    "torchvision": (TORCHVISION, torchvision_network),
    "timm": (TIMM, timm_network),
    "transformers": (TRANSFORMERS, transformers_network),
}


def main() -> None:
    """List the networks of the suites that are named, or of all."""
    parser = argparse.ArgumentParser(description="List the networks of the coverage table.")
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], metavar="SUITE")
    for suite in parser.parse_args().suites or SUITES:
        names, _ = SUITES[suite]
        print(f"{suite}: {len(names)} networks: {', '.join(names)}")


if __name__ == "__main__":
    main()
