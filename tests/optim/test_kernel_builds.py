"""The kernel as other compilers, processors and systems build it, and what holds where it has no build."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.optim_cases import LAYOUTS, Layout
from test_kernel_cache import stepped
from test_oracle import OPTIONS, check

import manifold_nets as mn
from manifold_nets.errors import NativeKernelError
from manifold_nets.optim.backends import build, dispatch, native
from manifold_nets.optim.backends.build import Platform

TASKS = ("spheres_step", "spheres_measure", "spheres_write")
BUFFERS = ("w", "g", "b", "v", "v_max", "square", "products", "written", "far", "norms")
PER_ENTRY = [native._KINDS[kind] for kind in ("angular-adam", "adam-entries", "plain-adam")]


class Program:
    """A kernel in a program of its own, in place of a library that this process has loaded."""

    def __init__(self, *command):
        self.process, self.calls = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE), 0

    def __getattr__(self, name):
        return lambda *given: self.call(TASKS.index(name), *given)

    def spheres_know(self, dtype):
        rule = np.zeros(1, native.RULE)
        rule["dtype"] = dtype
        return self.ask(3, 0, 1, rule.tobytes())

    def call(self, task, rule, jobs, count, threads):
        rule = ctypes.string_at(rule, native.RULE.itemsize)
        jobs = np.frombuffer(ctypes.string_at(jobs, count * native.JOB.itemsize), native.JOB).copy()
        places, sizes = jobs[list(BUFFERS)].copy(), self.sizes(np.frombuffer(rule, native.RULE)[0], jobs, task)
        for name in BUFFERS:
            jobs[name] = sizes[name]
        pairs = [(int(places[name][k]), int(sizes[name][k])) for k in range(count) for name in BUFFERS]
        answer = self.ask(task, count, threads, rule, jobs.tobytes(), *(ctypes.string_at(*pair) for pair in pairs))
        for place, size in pairs:
            ctypes.memmove(place, self.process.stdout.read(size), size)
        return answer

    def ask(self, task, count, threads, *data):
        self.calls += 1
        self.process.stdin.write(b"".join([np.array([task, count, threads], np.int64).tobytes(), *data]))
        self.process.stdin.flush()
        return int.from_bytes(self.process.stdout.read(8), "little")

    def close(self):
        with self.process:
            self.process.stdin.close()

    @staticmethod
    def sizes(rule, jobs, task):
        """How many bytes each buffer of each job has."""
        rows, entries = jobs["rows"], jobs["rows"] * jobs["size"]
        width = np.array([4, 8, 2, 2])[rule["dtype"]]
        seconds = (entries if rule["kind"] in PER_ENTRY else rows) * max(width, 4)
        sizes = dict.fromkeys("wgb", entries * width) | dict.fromkeys(("v", "v_max"), seconds)
        sizes |= {"square": jobs["squares"] * 8, "norms": rows * 8, "far": rows, "products": 48 * rows}
        sizes["written"] = sizes["products"]
        used = {"products": task == 1, "written": task == 2, "far": task == 2}
        return {name: np.where(jobs[name] != 0, size, 0) * used.get(name, 1) for name, size in sizes.items()}


ARM = Platform.of("linux", "aarch64").choices
BUILDS = {
    "clang": ("clang", ()),
    "clang with OpenMP": ("clang", ("-fopenmp",)),
    "clang as on macOS": ("clang", Platform.of("darwin", "x86_64").choices[0]),
    "ARM": ("aarch64-linux-gnu-gcc", ARM[1]),
    "ARM as on macOS": ("aarch64-linux-gnu-gcc", Platform.of("darwin", "arm64").choices[1]),
}
KNOWN = [dtype for dtype in native._DTYPES if dtype != torch.float16]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Programs by compiler and options, each built once."""
    built = {}

    def program(compiler, *options):
        if (compiler, options) not in built:
            built[compiler, options] = built_by(tmp_path_factory.mktemp("kernel"), compiler, *options)
        return built[compiler, options]

    yield program
    for started in built.values():
        started.close()


def built_by(folder, compiler, *options):
    emulator = ["qemu-aarch64"] if compiler.startswith("aarch64") else []
    for needed in (compiler, *emulator):
        if shutil.which(needed) is None:
            pytest.skip(f"no {needed}")
    static = ["-static"] if emulator else []
    sources = f"-I{Path(build.__file__).parent}"
    command = [compiler, *build._OPTIONS, *options, *static, sources, ROOT / "tests/helpers/kernel_steps.c"]
    done = subprocess.run([*command, "-o", folder / "steps", "-lm"], capture_output=True, text=True, check=False)
    if "-lomp" in done.stderr:
        pytest.skip("this clang has no OpenMP")
    assert done.returncode == 0, done.stderr
    return Program(*emulator, folder / "steps")


@pytest.fixture
def steps_by(monkeypatch, programs):
    """Let the optimizers step by a kernel that a compiler has built."""

    def use(*build):
        program = programs(*build)
        monkeypatch.setattr(native, "_library", lambda: program)
        native.know.cache_clear()
        return program

    yield use
    native.know.cache_clear()


def test_steps_of_another_build_are_those_of_the_formulas(steps_by):
    program = steps_by("clang", "-O0")
    for optimizer in ("rsgd", "radam", "angular-adam", "sgd-g"):
        check(optimizer, OPTIONS[optimizer][-1], LAYOUTS[1], torch.float32, fused=True)
    assert program.calls > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_steps_of_every_build_are_those_of_the_formulas(name, steps_by):
    compiler, options = BUILDS[name]
    steps_by(compiler, *options)
    assert all(map(native.know, KNOWN))
    assert native.know(torch.float16) or "ARM" not in name
    for optimizer, choices in OPTIONS.items():
        for dtype in native._DTYPES:
            check(optimizer, choices[-1], LAYOUTS[1], dtype, fused=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clang with OpenMP", "ARM"])
def test_long_rows_and_several_threads_in_other_builds(name, steps_by, monkeypatch):
    compiler, options = BUILDS[name]
    steps_by(compiler, *options)
    monkeypatch.setattr(native, "_threads", lambda jobs: 3)
    long = Layout("long", mn.Partition.filters((2, native.SHORT + 1)), lambda i, j: i)
    for optimizer in ("rsgd", "radam"):
        check(optimizer, OPTIONS[optimizer][-1], long, torch.float32, fused=True)


@pytest.mark.parametrize("name", ["clang", "ARM"])
def test_sabotage_a_wrong_build_is_noticed(name, steps_by):
    compiler, options = BUILDS[name]
    steps_by(compiler, *options, "-O0", "-DWRONG")
    with pytest.raises(AssertionError, match="is off by"):
        check("rsgd", OPTIONS["rsgd"][-1], LAYOUTS[1], torch.float64, fused=True)


# ---- which build is chosen -------------------------------------------------------------------------------------------


def test_each_platform_has_its_options():
    linux, arm = Platform.of("linux", "x86_64"), Platform.of("linux", "aarch64")
    mac, windows = Platform.of("darwin", "arm64"), Platform.of("win32", "AMD64")
    assert Platform.of(sys.platform, platform.machine()) == build.PLATFORM
    assert (linux.shared, linux.suffix, linux.choices[0]) == ("-shared", ".so", ("-march=native", "-fopenmp"))
    assert arm.choices[0] == ("-mcpu=native", "-fopenmp")
    assert (mac.shared, mac.suffix, mac.choices[0]) == ("-dynamiclib", ".dylib", ("-mcpu=native", "-fopenmp-simd"))
    assert "-march=native" in Platform.of("darwin", "x86_64").choices[0]
    assert windows.choices == ()
    for system in (linux, arm, mac):
        assert system.choices[-1] == ()  # what every compiler understands
    assert "-fopenmp" not in {option for options in mac.choices for option in options}


# Like Apple's clang of some releases: no OpenMP, no -mcpu=native, and its own name for a shared library.
APPLE = """#!/bin/sh
echo "$@" >> "$0.log"
arguments=
for argument in "$@"; do
    case $argument in
        -fopenmp|-mcpu=native|-shared) echo "clang: error: unsupported option '$argument'" >&2; exit 1 ;;
        -dynamiclib) argument=-shared ;;
    esac
    arguments="$arguments $argument"
done
exec gcc $arguments
"""


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Pretend that this is another system, on which nothing has been built or said yet."""

    def pretend(system, machine, compiler="gcc"):
        monkeypatch.setattr(build, "PLATFORM", Platform.of(system, machine))
        monkeypatch.setattr(dispatch, "_has_warned", False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CC", str(compiler))
        native._library.cache_clear()
        native.know.cache_clear()

    yield pretend
    native._library.cache_clear()
    native.know.cache_clear()


@pytest.mark.skipif(shutil.which("gcc") is None or os.name != "posix", reason="no gcc")
def test_macos_gets_a_library_without_openmp(on, monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(APPLE)
    compiler.chmod(0o755)
    on("darwin", "arm64", compiler)
    monkeypatch.setattr(build, "_OPTIONS", ("-O0", *build._OPTIONS[1:]))
    stepped(fused=True)
    assert sorted(path.suffix for path in (tmp_path / "manifold_nets").iterdir()) == [".dylib", ".sha256"]
    first, second = (tmp_path / "cc.log").read_text().splitlines()
    assert "-dynamiclib -mcpu=native -fopenmp-simd" in first
    assert "-dynamiclib -fopenmp-simd" in second


def test_windows_runs_no_compiler_and_one_line_says_what_to_do(on, monkeypatch):
    on("win32", "AMD64", "no-such")
    monkeypatch.setattr(subprocess, "run", None)
    text = r"\(no build for this system\).*several times longer\. Run in WSL"
    with pytest.warns(UserWarning, match=text):
        stepped()
    stepped()  # nothing is said again
    with pytest.raises(NativeKernelError, match="Run in WSL to have it, or leave fused out"):
        stepped(fused=True)


def test_on_macos_the_remedy_is_that_of_macos(on):
    on("darwin", "arm64", "no-such")
    with pytest.warns(UserWarning, match=r"CC=no-such names no program.*xcode-select --install"):
        stepped()
