"""The compiled kernel on disk: damaged and foreign files are not loaded, and what is missing is said once."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import manifold_nets as mn
from manifold_nets.optim import RiemannianSGD
from manifold_nets.optim.backends import build, dispatch, native

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not build.PLATFORM.choices, reason="no C compiler, or no build for this system"
)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder of its own, and a build that is quick."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(build, "_OPTIONS", ("-O0", *build._OPTIONS[1:]))
    monkeypatch.setattr(build, "PLATFORM", replace(build.PLATFORM, choices=((),)))
    return tmp_path / "manifold_nets"


def library(cache):
    (found,) = cache.glob(f"*{build.PLATFORM.suffix}")
    return found


def built(cache):
    """A library that is built and not loaded: a process would see the damage of what it has in memory."""
    command = build.compiler()
    folder, _ = build.cache_folder()
    build.compile_to(folder / build.file_name(command, ()), command, ())
    return library(cache)


def foreign(path):
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", path], input=b"int x;", check=True)


DAMAGES = {
    "cut short": lambda path: os.truncate(path, 9000),
    "empty": lambda path: os.truncate(path, 0),
    "one byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    "another library": foreign,
    "no checksum": lambda path: build._beside(path).unlink(),
    "a checksum that is none": lambda path: build._beside(path).write_text("many bytes"),
    "for others to write": lambda path: path.chmod(0o777),
    "a link": lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_is_not_sound_is_built_again(cache, damage):
    path = built(cache)
    assert build.is_sound(path)
    DAMAGES[damage](path)
    assert not build.is_sound(path)
    assert native._load().spheres_know(0) == 1
    assert build.is_sound(path)
    assert not path.is_symlink()


def test_a_sound_library_is_not_built_again(cache, monkeypatch):
    built(cache)
    monkeypatch.setattr(build, "compile_to", None)
    native._load()


def test_sabotage_without_the_check_a_damaged_library_is_opened(cache, monkeypatch):
    path, opened = built(cache), []
    os.truncate(path, 9000)
    monkeypatch.setattr(build, "is_sound", Path.exists)
    monkeypatch.setattr(native, "_opened", lambda path: opened.append(path.stat().st_size))
    native._load()
    assert opened == [9000]


def test_a_library_without_our_functions_is_built_again(cache, monkeypatch):
    path = built(cache)
    # This process keeps what it has opened under a name.
    monkeypatch.setattr(build, "PLATFORM", replace(build.PLATFORM, choices=((), ("-g0",))))
    foreign(path)
    path.chmod(0o700)
    build._beside(path).write_text(build._seal(path))
    assert build.is_sound(path)
    assert native._load().spheres_know(0) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_others_is_not_loaded(cache, what):
    path = built(cache)
    os.chown(path if what == "file" else cache, 12345, -1)
    number = path.stat().st_ino
    if what == "file":
        native._load()
        assert path.stat().st_ino != number
    else:
        with pytest.warns(UserWarning, match="can be changed by other users"):
            native._load()
        assert path.stat().st_ino == number


def test_a_folder_that_others_can_write_to_is_not_used(cache, monkeypatch, tmp_path):
    cache.mkdir()
    cache.chmod(0o777)
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(own))
    with pytest.warns(UserWarning, match=rf"chmod 700 {cache}") as caught:
        assert native._load().spheres_know(0) == 1
    assert len(caught) == 1
    assert list(cache.iterdir()) == list(own.iterdir()) == []
    cache.chmod(0o700)  # the remedy
    assert native._load().spheres_know(0) == 1
    assert build.is_sound(library(cache))


def test_files_that_a_killed_build_left_are_swept(cache):
    cache.mkdir(mode=0o700)
    old, young = cache / "tmpold.so", cache / "tmpyoung.so"
    for path in (old, young):
        path.touch()
    os.utime(old, (time.time() - 10_000,) * 2)
    native._load()
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.slow
def test_several_processes_build_at_once(cache, tmp_path):
    code = (
        "from dataclasses import replace; from manifold_nets.optim.backends import build, native;"
        "build.PLATFORM = replace(build.PLATFORM, choices=((),));"
        "assert native.available() is None, native.available()"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(300) for process in running] == [0] * 4
    assert [path.suffix for path in sorted(cache.iterdir())] == [build.PLATFORM.suffix, ".sha256"]


@pytest.fixture
def unnoticed(monkeypatch):
    """Nothing has been said of a missing kernel."""
    monkeypatch.setattr(dispatch, "_has_warned", False)
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def stepped(**options):
    layer = mn.layers.UnitNormLinear(4, 3)
    layer.weight.grad = torch.randn(3, 4)
    RiemannianSGD([layer.weight], lr=0.1, **options).step()
    return float(layer.weight.manifold.deviations(layer.weight).max())


@pytest.mark.parametrize(
    ("value", "what"),
    [('gcc "', r'CC=gcc " cannot be read \(No closing quotation\)'), ("no-such", "CC=no-such names no program")],
)
def test_a_missing_compiler_is_said_once(monkeypatch, unnoticed, value, what):
    monkeypatch.setenv("CC", value)
    with pytest.warns(UserWarning, match=rf"not available \(no C compiler: {what}\).*Install gcc or clang") as caught:
        assert stepped() <= 4 * torch.finfo(torch.float32).eps
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped()


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
def test_who_chose_other_steps_is_told_nothing(monkeypatch, unnoticed, options):
    monkeypatch.setenv("CC", "no-such")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(**options)
