"""Analyse and convert many networks, one line for each: `python examples/coverage_table.py --suite all`.

Every network gets random running statistics and random affine parameters in its batch normalizations, as a trained one
has them. Differences are the largest relative ones of the outputs. `--write DIR` stores the table as CSV and Markdown
with the versions and the machine; a run that was stopped goes on with the networks that are left, and rows of other
suites stay as they are; `--missing` adds the networks that the table lacks. Where the analysis in float64 would not fit
in memory, the network is analysed with `memory="small"`, which does not search for groups that the structure does not
explain; where not even that would, it is listed as not tried, with what it needs.

    python examples/coverage_table.py --suite torchvision --models resnet18 vgg16_bn
    python examples/coverage_table.py --suite all --write examples/results
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from coverage_markdown import page
from networks import SUITES
from networks_torchvision import SEGMENTATION, VIDEO
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import FunctionChangedError, ManifoldNetsError

# Bytes a parameter at the peak: of the analysis, as vit_l_16 takes them; of networks in float32 with their gradients.
BYTES_PER_PARAMETER = 48
BYTES_WHERE_SMALL = 16
SMALL = "float64 for one weight at a time: groups that the structure does not explain were not searched for"


@dataclass(frozen=True)
class Row:
    """One network; differences are relative and the largest over the outputs."""

    suite: str
    network: str
    dtype: str
    parameters: int
    weights: int = 0
    found: int = 0
    certified: int = 0
    groups_certified: int = 0
    groups_unexplained: int = 0
    shifts: int = 0
    shifts_unexplained: int = 0
    contradictions: int = 0
    converted: int = 0
    kept_radius: int = 0
    worst_certificate: float = 0.0
    layer_train_deviation: float = 0.0
    eval_difference: float = 0.0
    train_difference: float = 0.0
    keep_train_difference: float = 0.0
    reverted_eval_difference: float = 0.0
    diagnose_seconds: float = 0.0
    convert_seconds: float = 0.0
    remark: str = ""


def suite_of(suite: str, network: str) -> str:
    """The suite that a row is counted in: torchvision's tasks are counted one by one."""
    if suite != "torchvision":
        return suite
    return f"torchvision, {'video' if network in VIDEO else 'segmentation' if network in SEGMENTATION else 'images'}"


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Give batch normalizations random statistics and affine parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(values: Tensor | None, low: float, high: float) -> None:
        if values is not None:
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


def measure(suite: str, network: str, dtype: torch.dtype, seed: int = 0) -> Row:
    """Diagnose, convert at both radii, revert, and compare."""
    torch.manual_seed(seed)
    facts: dict[str, Any] = {"suite": suite_of(suite, network), "network": network, "dtype": str(dtype)[6:]}
    parameters = _size(suite, network)
    fits = parameters * BYTES_PER_PARAMETER <= _free_memory()
    if parameters * BYTES_WHERE_SMALL > _free_memory():
        needed = parameters * BYTES_WHERE_SMALL / 2**30
        return Row(**facts, parameters=parameters, remark=f"not tried: it needs about {needed:.0f} GiB of memory")
    torch.manual_seed(seed)
    model, inputs = SUITES[suite][1](network)
    model = randomize(model, seed).to(dtype)
    inputs = _cast(inputs, dtype)
    start = time.perf_counter()
    try:
        report = mn.diagnose(model, inputs, memory="full" if fits else "small")
    except ManifoldNetsError as error:
        return Row(**facts, parameters=parameters, remark=f"refused: {error}")
    facts |= {"parameters": parameters, "diagnose_seconds": time.perf_counter() - start, **_findings(report)}
    if report.invariant:
        facts |= _conversion(model, inputs, report)
    if not fits:
        facts["remark"] = "; ".join(filter(None, (facts["remark"], SMALL)))
    return Row(**facts)


def _findings(report: mn.SymmetryReport) -> dict[str, Any]:
    claimed = [w for w in report.weights if w.partition is not None]
    refuted = sum(w.certificate.verdict == "not invariant" for w in claimed)
    return {
        "weights": len(report.weights),
        "found": len(claimed),
        "certified": sum(w.certificate.verdict == "invariant" for w in report.weights),
        "groups_certified": sum(w.certificate.groups_certified for w in report.weights),
        "groups_unexplained": report.unexplained_groups,
        "shifts": sum(shift.count for shift in report.shifts if shift.certificate.verdict == "invariant"),
        "shifts_unexplained": report.unexplained_shifts,
        "contradictions": refuted + len(report.refuted_families) + len(report.refuted_shifts),
        "worst_certificate": max((w.certificate.value or 0.0 for w in claimed), default=0.0),
        "remark": _unknown(report),
    }


def _unknown(report: mn.SymmetryReport) -> str:
    """How many weights the rules could not follow, and why the first one of them."""
    unknown = [w for w in report.weights if w.status == "unknown"]
    return f"{len(unknown)} of its weights unknown ({unknown[0].name}: {unknown[0].broken_by})" if unknown else ""


def _conversion(model: nn.Module, inputs: Any, report: mn.SymmetryReport) -> dict[str, Any]:
    """Convert at unit radius, at the norms that the filters have, and give the first one back."""
    start = time.perf_counter()
    remark = {}
    try:
        converted = mn.convert(model, report)
    except FunctionChangedError as error:
        remark = {"remark": f"converted with radius='keep', as unit radius was refused: {error}"}
        converted = mn.convert(model, report, radius="keep")
    seconds = time.perf_counter() - start
    record = mn.conversion_record(converted)
    if record is None:
        raise RuntimeError(f"{type(model).__name__}: the converted model carries no record")
    reverted = mn.verify(model, mn.revert(converted), inputs).eval_difference
    spheres = record.plan.spheres
    del converted
    kept = mn.convert(model, report, radius="keep")
    return {
        "converted": len(spheres),
        "kept_radius": sum(action.radius == "keep" for action in spheres),
        "layer_train_deviation": max((action.train_deviation or 0.0 for action in spheres), default=0.0),
        "eval_difference": record.verification.eval_difference,
        "train_difference": record.verification.train_difference,
        "keep_train_difference": mn.verify(model, kept, inputs).train_difference,
        "reverted_eval_difference": reverted,
        "convert_seconds": seconds,
        **remark,
    }


def _size(suite: str, network: str) -> int:
    """Number of parameters, counted without their memory where the network can be built so."""
    try:
        with torch.device("meta"):
            model, _ = SUITES[suite][1](network)
    except (ManifoldNetsError, RuntimeError, NotImplementedError):
        model, _ = SUITES[suite][1](network)
    return sum(parameter.numel() for parameter in model.parameters())


def _free_memory() -> int:
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").is_file() else ""
    found = [int(line.split()[1]) * 2**10 for line in text.splitlines() if line.startswith("MemAvailable")]
    return found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    if isinstance(inputs, dict):
        return {name: _cast(value, dtype) for name, value in inputs.items()}
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


class Store:
    """The rows of a folder: finished ones in coverage.csv, those of the run that is under way in a file beside it."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.fresh: dict[tuple[str, str], Row] = {}
        self.stored: dict[tuple[str, str], Row] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.table = folder / "coverage.csv"
            self.stored = {key(row): row for row in stored_rows(self.table)} if self.table.is_file() else {}
            self.partial = folder / ".coverage.partial.jsonl"
            lines = self.partial.read_text().splitlines() if self.partial.is_file() else []
            # A run that was killed while it wrote leaves half a line behind.
            self.fresh = {key(row): row for line in lines if line.endswith("}") for row in [Row(**json.loads(line))]}

    def add(self, row: Row) -> None:
        """Keep a row, on disk as well where there is a folder."""
        self.fresh[key(row)] = row
        if self.folder is not None:
            with self.partial.open("a") as stream:
                stream.write(json.dumps(asdict(row)) + "\n")

    def finish(self) -> None:
        """Write the table with the new rows in place of the old ones; each file is renamed into place."""
        if self.folder is None:
            return
        rows = self.stored | self.fresh
        order = {(suite_of(suite, name), name): i for i, (suite, name) in enumerate(_networks("all", None))}
        chosen = sorted((row for k, row in rows.items() if k in order), key=lambda row: order[key(row)])
        for path, text in ((self.table, _csv(chosen)), (self.folder / "coverage.md", page(chosen, sizes()))):
            temporary = path.with_name(f".{path.name}.part")
            temporary.write_text(text)
            temporary.replace(path)
        self.partial.unlink(missing_ok=True)


def sizes() -> Counter[str]:
    """How many networks each suite has."""
    return Counter(suite_of(suite, name) for suite, name in _networks("all", None))


def key(row: Row) -> tuple[str, str]:
    """What a row is found by."""
    return row.suite, row.network


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    return text.getvalue()


def stored_rows(table: Path) -> Iterator[Row]:
    """The rows of a CSV file with these columns; none of another one."""
    types = {"int": int, "float": float, "str": str}
    names = [f.name for f in fields(Row)]
    with table.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames == names:
            for entry in reader:
                yield Row(**{f.name: types[str(f.type)](entry[f.name]) for f in fields(Row)})


def _networks(suite: str, only: list[str] | None) -> list[tuple[str, str]]:
    suites = SUITES if suite == "all" else {suite: SUITES[suite]}
    found = [(s, name) for s, (names, _) in suites.items() for name in names]
    missing = sorted(set(only or ()) - {name for _, name in found})
    if missing:
        sys.exit(f"--models: no such network: {', '.join(missing)}; python examples/networks.py lists them")
    return [(s, name) for s, name in found if only is None or name in only]


def main() -> None:
    """Measure the networks that were asked for."""
    parser = argparse.ArgumentParser(description="Analyse and convert networks of many architectures.")
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these networks of the suite")
    parser.add_argument("--missing", action="store_true", help="only networks that the table in DIR lacks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="DIR", help="store coverage.csv and coverage.md in this folder")
    options = parser.parse_args()
    store = Store(options.write)
    networks = _networks(options.suite, options.models)
    if options.missing:
        networks = [(suite, name) for suite, name in networks if (suite_of(suite, name), name) not in store.stored]
    for number, (suite, name) in enumerate(networks, 1):
        row = store.fresh.get((suite_of(suite, name), name))
        if row is None:
            row = measure(suite, name, torch.float32, options.seed)
            store.add(row)
        print(
            f"{number}/{len(networks)} {suite}, {name}: {row.certified}/{row.weights} certified, {row.converted} "
            f"converted, eval {row.eval_difference:.1e}, train {row.train_difference:.1e}, "
            f"{row.diagnose_seconds:.1f} + {row.convert_seconds:.1f} s {row.remark}",
            file=sys.stderr,
            flush=True,
        )
    chosen = [store.fresh[suite_of(suite, name), name] for suite, name in networks]
    store.finish()
    print(page(chosen, sizes()))


if __name__ == "__main__":
    main()
