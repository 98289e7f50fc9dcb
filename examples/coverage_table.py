"""Analyse and convert many networks and print one line for each: `python examples/coverage_table.py`.

Every network gets random running statistics and random affine parameters, as a trained one has them. The differences
are the largest relative ones of the outputs. `--write DIR` stores the table as CSV and Markdown with the versions and
the machine.

    python examples/coverage_table.py --models resnet18 vgg16_bn
    python examples/coverage_table.py --write examples/results
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import NothingToConvertError

TORCHVISION = (
    "alexnet resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg16_bn densenet121 mobilenet_v2 mobilenet_v3_small "
    "efficientnet_b0 googlenet inception_v3 regnet_y_400mf shufflenet_v2_x1_0 mnasnet1_0 fcn_resnet50 "
    "deeplabv3_resnet50 r2plus1d_18"
).split()
KWARGS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
SHAPES = {"inception_v3": (4, 3, 299, 299), "r2plus1d_18": (2, 3, 8, 64, 64)}


@dataclass(frozen=True)
class Row:
    """One line of the table; differences are relative and the largest over the outputs."""

    model: str
    dtype: str
    weights: int
    by_structure: int
    certified: int
    unexplained: int
    converted: int
    kept_radius: int
    worst_certificate: float
    layer_train_deviation: float
    eval_difference: float
    train_difference: float
    keep_train_difference: float
    reverted_eval_difference: float
    diagnose_seconds: float
    convert_seconds: float


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Give batch normalizations random statistics and affine parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(values: Tensor, low: float, high: float) -> None:
        random = torch.rand(values.shape, generator=generator, dtype=torch.float64)
        values.copy_(low + (high - low) * random)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.3, 2.0)
    return model


def example_inputs(name: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random images (or clips) of the size that the network is tried with."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES.get(name, (4, 3, 96, 96)), generator=generator, dtype=torch.float64).to(dtype)


def measure(name: str, dtype: torch.dtype, seed: int = 0) -> Row:
    """Diagnose, convert at both radii, revert, and compare."""
    torch.manual_seed(seed)
    model = randomize(mn.sources.load_model(f"torchvision:{name}", kwargs=KWARGS.get(name, {})), seed).to(dtype)
    inputs = example_inputs(name, dtype, seed)
    start = time.perf_counter()
    report = mn.diagnose(model, inputs)
    diagnosed = time.perf_counter()
    claimed = [w for w in report.weights if w.partition is not None]
    certified = [w for w in report.weights if w.certificate.verdict == "invariant"]
    facts: dict[str, Any] = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": len(report.weights),
        "by_structure": len(claimed),
        "certified": len(certified),
        "unexplained": sum(w.partition is None for w in certified),
        "worst_certificate": max((w.certificate.value or 0.0 for w in claimed), default=0.0),
        "diagnose_seconds": diagnosed - start,
    }
    try:
        converted = mn.convert(model, report)
    except NothingToConvertError:
        zero = {f.name: 0.0 if f.type == "float" else 0 for f in fields(Row)}
        return Row(**{**zero, **facts})
    facts["convert_seconds"] = time.perf_counter() - diagnosed
    record = mn.conversion_record(converted)
    if record is None:
        raise RuntimeError(f"{name}: the converted model carries no record")
    spheres = record.plan.spheres
    kept = mn.convert(model, report, radius="keep", inplace=False)
    facts |= {
        "converted": len(spheres),
        "kept_radius": sum(action.radius == "keep" for action in spheres),
        "layer_train_deviation": max(action.train_deviation or 0.0 for action in spheres),
        "eval_difference": record.verification.eval_difference,
        "train_difference": record.verification.train_difference,
        "keep_train_difference": mn.verify(model, kept, inputs).train_difference,
        "reverted_eval_difference": mn.verify(model, mn.revert(converted), inputs).eval_difference,
    }
    return Row(**facts)


def markdown(rows: list[Row]) -> str:
    """The table for a README: one line a network, both precisions side by side."""
    columns = (
        "network", "weights", "found", "certified", "converted", "of these keep their norms", "largest certificate",
        "evaluation, float32", "evaluation, float64", "training, float32", "training, own norms, float64",
        "diagnose", "convert",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row.model, {})[row.dtype] = row
    for name, pair in by_name.items():
        single, double = pair["float32"], pair["float64"]
        cells = [
            name, single.weights, single.by_structure, single.certified, single.converted, single.kept_radius,
            f"{max(single.worst_certificate, double.worst_certificate):.0e}",
            f"{single.eval_difference:.0e}", f"{double.eval_difference:.0e}", f"{single.train_difference:.0e}",
            f"{double.keep_train_difference:.0e}",
            f"{single.diagnose_seconds:.1f} s", f"{single.convert_seconds:.1f} s",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(rows: list[Row], folder: Path) -> None:
    """Store the table as CSV and Markdown; each file is renamed into place."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    command = "python examples/coverage_table.py --write examples/results"
    page = f"Command: `{command}`. Machine: {machine}.\n\n{markdown(rows)}\n"
    for name, content in (("coverage.csv", text.getvalue()), ("coverage.md", page)):
        temporary = folder / f".{name}.part"
        temporary.write_text(content)
        temporary.replace(folder / name)


def main() -> None:
    """Measure the networks that were asked for."""
    parser = argparse.ArgumentParser(description="Analyse and convert torchvision's networks.")
    parser.add_argument("--models", nargs="+", default=TORCHVISION, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="DIR", help="store coverage.csv and coverage.md in this folder")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for dtype in (torch.float32, torch.float64):
            row = measure(name, dtype, options.seed)
            rows.append(row)
            print(
                f"{name} {row.dtype}: {row.certified}/{row.weights} certified, {row.converted} converted, "
                f"eval {row.eval_difference:.1e}, train {row.train_difference:.1e}, {row.diagnose_seconds:.1f} s",
                flush=True,
            )
    print(markdown(rows))
    if options.write:
        write(rows, options.write)


if __name__ == "__main__":
    main()
