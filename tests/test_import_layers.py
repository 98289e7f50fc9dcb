"""The layers of the package: each imports only from layers below it, and no modules import each other in a circle."""

from __future__ import annotations

import graphlib
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

import manifold_nets

grimp = pytest.importorskip("grimp")

# From top to bottom; those on one line import nothing of each other. All that is not named lies below symmetry.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("comparison",),
    ("pymanopt_bridge", "sources", "monitor"),
    ("weights", "monitor_page"),
    ("conversion", "optim"),
    ("symmetry",),
)
BASE = (("layers",), ("constraints",), ("manifolds", "manifold", "joint_sphere"), ("partition", "groups"), ("errors",))


def graph() -> Any:
    return grimp.build_graph("manifold_nets", exclude_type_checking_imports=True, cache_dir=None)


def broken(imports: Any, *extra: tuple[str, str]) -> list[str]:
    """Chains of imports from a lower layer to a higher one, or across a layer."""
    for importer, imported in extra:
        imports.add_import(importer=f"manifold_nets.{importer}", imported=f"manifold_nets.{imported}")
    present = {name.rpartition(".")[2] for name in imports.find_children("manifold_nets")}
    rest = present - {name for layer in LAYERS for name in layer}
    orders = [(*LAYERS, tuple(rest)), BASE]
    found = set()
    for order in orders:
        layers = [
            grimp.Layer(*(set(layer) & present), independent=layer in LAYERS) for layer in order if set(layer) & present
        ]
        found |= set(imports.find_illegal_dependencies_for_layers(layers=layers, containers={"manifold_nets"}))
    return sorted(f"{chain.importer} → {chain.imported}" for chain in found)


def test_lower_layers_import_nothing_from_higher_ones() -> None:
    assert broken(graph()) == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("symmetry", "conversion"),
        ("errors", "symmetry"),
        ("conversion", "optim"),
        ("optim", "conversion"),
        ("optim", "comparison"),
        ("comparison", "cli"),
        ("errors", "constraints"),
    ],
)
def test_an_import_upwards_is_found(importer: str, imported: str) -> None:
    imports = graph()
    if (
        f"manifold_nets.{imported}" not in imports.modules
    ):  # the folder of the command line lies elsewhere in a checkout
        imports.add_module(f"manifold_nets.{imported}")
    assert f"manifold_nets.{importer} → manifold_nets.{imported}" in broken(imports, (importer, imported))


def order(imports: Any) -> list[str]:
    """The modules, each after those that it imports; raises graphlib.CycleError where there is a circle."""
    return list(
        graphlib.TopologicalSorter(
            {name: imports.find_modules_directly_imported_by(name) for name in imports.modules}
        ).static_order()
    )


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = graph()
    assert len(order(imports)) == len(imports.modules) > 100
    # Sabotage: the first module imports the last.
    first, *_, last = order(imports)
    imports.add_import(importer=first, imported=last)
    imports.add_import(importer=last, imported=first)
    with pytest.raises(graphlib.CycleError):
        order(imports)


def differences(page: str) -> list[object]:
    """Where the two tables of the map, ordered rows and the rest, are not the layers above and what is in the tree."""
    tables = re.findall(r"\n\n\| modules \|.*\n.*\n((?:\|.*\n)+)", page)
    ordered, rest = ([tuple(re.findall(r"`(\w+)`", row.split("|")[1])) for row in t.splitlines()] for t in tables)
    package = Path(manifold_nets.__file__).parent
    present = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    present = present - {"__init__"} | {"cli"}
    rows = [tuple(name for name in row if name in present) for row in (*LAYERS, *BASE)]
    named = [name for row in (*ordered, *rest) for name in row]
    wrong: list[object] = [pair for pair in zip(ordered, rows, strict=True) if sorted(pair[0]) != sorted(pair[1])]
    return wrong + sorted(present ^ set(named)) + [name for name in present if named.count(name) > 1]


def test_the_map_for_contributors_shows_the_package_as_it_is() -> None:
    path = ROOT / "docs" / "contributing.md"
    if not path.is_file():
        pytest.skip("the documentation is not beside the tests")
    page = path.read_text(encoding="utf-8")
    assert differences(page) == []
    # Sabotage: a module that is gone, one that is missing, one in another row, one in two.
    assert differences(page.replace("`documents`, ", "`documents`, `gone`, ")) == ["gone"]
    assert differences(page.replace("`documents`, ", "")) == ["documents"]
    assert differences(page.replace("| `symmetry` |", "| `symmetry`, `files` |")) != []
    assert differences(page.replace("`documents`, ", "`documents`, `page`, ")) == ["page"]
