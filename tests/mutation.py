"""Mutation testing, sampled: `python tests/mutation.py --sample 200`, after `pip install cosmic-ray`.

Plants one fault at a time in a copy of the package (an operator, a number, a comparison or a condition changed by
cosmic-ray), runs the tests of that module, and prints the mutants that no test noticed, each with its change.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Modules, and the tests that are to notice a fault in them.
TARGETS = {
    "manifold_nets/groups.py": "manifolds/partition manifolds/sphere_product",
    "manifold_nets/manifold.py": "manifolds/sphere_product manifolds/sphere_product_gradients",
    "manifold_nets/joint_sphere.py": "manifolds/joint_spheres",
    "manifold_nets/symmetry/rules/*.py": "symmetry/rules symmetry/shifts symmetry/families",
    "manifold_nets/symmetry/propagate.py": "symmetry/rules symmetry/shifts symmetry/families symmetry/diagnose",
    "manifold_nets/symmetry/invariance.py": "symmetry/gradients symmetry/low_variance symmetry/planted_faults",
    "manifold_nets/optim/backends/*.py": "optim/oracle optim/spheres optim/backends",
    "manifold_nets/optim/[as][dgvt]*.py": "optim/oracle optim/state optim/plain_parameters optim/averaging",
    "manifold_nets/optim/schedules.py": "optim/schedules optim/corrected_decay",
    "manifold_nets/optim/variants.py": "optim/variants optim/oracle",
    "manifold_nets/optim/param_groups.py": "optim/optimizer_groups optim/corrected_decay symmetry/learning_rates",
    "manifold_nets/optim/on_spheres.py": "optim/on_spheres",
    "manifold_nets/optim/from_torch.py": "optim/from_torch",
    "manifold_nets/optim/plain_run.py": "optim/from_torch",
    "manifold_nets/constraining.py": "manifolds/constrain",
    "manifold_nets/monitor*.py": "monitor/monitor",
    "manifold_nets/conversion/*.py": "conversion/convert conversion/plain_states conversion/checkpoint",
    "manifold_nets/conversion/remedies/*.py": "conversion/remedies conversion/balance conversion/balance_descent",
}
# In annotations, which are not evaluated, "|" means nothing to a test; `strict` never matters where lengths agree.
SKIPPED = re.compile(r"BitOr|(TrueWithFalse|FalseWithTrue).*strict=")


def planted(module: str, tests: str, folder: Path, timeout: float) -> tuple[Path, list[tuple[str, str]]]:
    """The file of a module's session, and the mutants in it: job and description."""
    session = folder / f"{module.replace('/', '.')}.sqlite"
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -m 'not slow' {tests}"
    config = session.with_suffix(".toml")
    lines = [f"module-path = {json.dumps(module)}", f"timeout = {timeout}", "excluded-modules = []"]
    lines += [f"test-command = {json.dumps(command)}", "distributor.name = 'local'"]
    config.write_text("[cosmic-ray]\n" + "\n".join(lines))
    subprocess.run([sys.executable, "-m", "cosmic_ray.cli", "init", config, session], cwd=folder, check=True)
    source = (folder / module).read_text().splitlines()
    with sqlite3.connect(session) as known:
        rows = known.execute("SELECT job_id, operator_name, definition_name, start_pos_row FROM mutation_specs")
        return session, [
            (job, f"{operator} in {definition}, line {row}")
            for job, operator, definition, row in rows
            if not SKIPPED.search(operator + source[row - 1])
        ]


def main() -> int:
    """Sample, run, report; the exit status is 1 where fewer than the wanted share was noticed."""
    parser = argparse.ArgumentParser(description="Plant faults, and see whether tests notice.")
    parser.add_argument("--sample", type=int, default=200, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each")
    parser.add_argument("--wanted", type=float, default=0.85, help="share that tests should notice")
    parser.add_argument("--only", default="", help="part of the path of the modules")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "results", "docs", "build", "dist"))
        sessions, jobs = {}, []
        for pattern, names in TARGETS.items():
            tests = " ".join("tests/{}/test_{}.py".format(*name.split("/")) for name in names.split())
            for path in sorted(folder.glob(pattern)):
                module = str(path.relative_to(folder))
                if options.only in module and path.name != "__init__.py":
                    sessions[module], found = planted(module, tests, folder, options.timeout)
                    jobs += [(module, job, what) for job, what in found]
        chosen = random.Random(options.seed).sample(jobs, min(options.sample, len(jobs)))
        print(f"{len(chosen)} of {len(jobs)} mutants of {len(sessions)} modules", flush=True)
        survived = [mutant for mutant in chosen if not noticed(sessions[mutant[0]], mutant, folder)]
    share = 1 - len(survived) / max(len(chosen), 1)
    print(f"noticed: {len(chosen) - len(survived)} of {len(chosen)} ({share:.0%})")
    return int(share < options.wanted)


def noticed(session: Path, mutant: tuple[str, str, str], folder: Path) -> bool:
    """Run one mutant; print it with its change where it survives."""
    module, job, what = mutant
    one = session.with_name("one.sqlite")
    shutil.copy(session, one)
    with sqlite3.connect(one) as known:
        for table in ("mutation_specs", "work_items"):
            known.execute(f"DELETE FROM {table} WHERE job_id != ?", [job])
    known.close()
    run = [sys.executable, "-m", "cosmic_ray.cli", "exec", session.with_suffix(".toml"), one]
    subprocess.run(run, cwd=folder, check=True)
    with sqlite3.connect(one) as known:
        outcome, diff = known.execute("SELECT test_outcome, diff FROM work_results").fetchone()
    known.close()
    survives = str(outcome).upper().endswith("SURVIVED")
    print(f"{'SURVIVED' if survives else 'noticed '} {module}: {what}", flush=True)
    if survives:
        print(diff, flush=True)
    return not survives


if __name__ == "__main__":
    raise SystemExit(main())
