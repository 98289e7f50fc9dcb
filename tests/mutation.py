"""Mutation testing, sampled: `python tests/mutation.py --sample 200`, after `pip install cosmic-ray`.

Plants one fault at a time in a copy of the package (an operator, a number, a comparison or a condition changed by
cosmic-ray), runs the tests of that module, and prints the mutants that no test noticed, each with its change.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Modules, and the tests that are to notice a fault in them.
TARGETS = {
    "manifold_nets/groups.py": "test_groups.py test_manifold.py",
    "manifold_nets/manifold.py": "test_manifold.py test_manifold_gradients.py test_manifold_objects.py",
    "manifold_nets/joint_sphere.py": "test_joint_spheres.py",
    "manifold_nets/symmetry/rules/*.py": "test_rules.py test_shifts.py test_invariance.py test_joint.py",
    "manifold_nets/symmetry/propagate.py": "test_rules.py test_shifts.py test_joint.py test_diagnose.py",
    "manifold_nets/symmetry/invariance.py": "test_gradient_test.py test_evidence.py test_blunt_channels.py",
    "manifold_nets/optim/backends/*.py": "test_optim_oracle.py test_optim_spheres.py test_optim_executions.py",
    "manifold_nets/optim/[as]*.py": "test_optim_oracle.py test_optim_state.py test_optim_plain.py test_averaging.py",
    "manifold_nets/conversion/*.py": "test_convert.py test_plain_states.py test_checkpoint.py test_revert.py",
}
# In annotations, which are not evaluated, "|" means nothing to a test.
SKIPPED = ("BitOr",)


def planted(module: str, tests: str, folder: Path, timeout: float) -> tuple[Path, list[tuple[str, str]]]:
    """The file of a module's session, and the mutants in it: job and description."""
    session = folder / f"{module.replace('/', '.')}.sqlite"
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -m 'not slow' {tests}"
    config = session.with_suffix(".toml")
    lines = [f"module-path = {json.dumps(module)}", f"timeout = {timeout}", "excluded-modules = []"]
    lines += [f"test-command = {json.dumps(command)}", "distributor.name = 'local'"]
    config.write_text("[cosmic-ray]\n" + "\n".join(lines))
    subprocess.run([sys.executable, "-m", "cosmic_ray.cli", "init", config, session], cwd=folder, check=True)
    with sqlite3.connect(session) as known:
        rows = known.execute("SELECT job_id, operator_name, definition_name, start_pos_row FROM mutation_specs")
        return session, [
            (job, f"{o} in {d}, line {row}") for job, o, d, row in rows if not any(s in o for s in SKIPPED)
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
            tests = " ".join(f"tests/{name}" for name in names.split())
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
