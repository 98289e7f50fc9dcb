"""What files are written to: ordinary ones are replaced, streams stay what they are, anything else is refused."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import manifold_nets as mn
from manifold_nets.cli import main
from manifold_nets.conversion import write_plan
from manifold_nets.errors import OutputFileError
from manifold_nets.files import atomic_file, is_stream

TEXT = "all or nothing\n" * 20_000  # more than a pipe holds

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are those of POSIX")


class Reader:
    """Reads a named pipe to its end, in a thread."""

    def __init__(self, path: Path) -> None:
        self.data = b""
        self._path, self._thread = path, threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self.data = self._path.read_bytes()

    def text(self) -> str:
        self._thread.join(timeout=60)
        return self.data.decode()


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def write(path: Path, text: str = TEXT) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def test_a_named_pipe_receives_the_content_and_stays_one(pipe: Path) -> None:
    link = pipe.with_name("link")
    link.symlink_to(pipe.name)
    for path in (pipe, link):
        reader = Reader(pipe)
        write(path)
        assert reader.text() == TEXT
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(path.name for path in pipe.parent.iterdir()) == ["link", "pipe"]


def test_a_block_that_fails_writes_nothing_into_a_pipe(pipe: Path) -> None:
    with pytest.raises(TypeError), atomic_file(pipe) as temporary:
        temporary.write_bytes([TEXT])  # type: ignore[arg-type]
    # Opening the pipe would have waited for a reader.
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_character_device_stays_one(tmp_path: Path) -> None:
    device = tmp_path / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # discards what is written
        device.open("wb").close()
    except OSError as error:
        pytest.skip(f"devices cannot be made here: {error}")
    write(device)
    assert stat.S_ISCHR(device.stat().st_mode)


def test_a_descriptor_is_written_where_it_is(tmp_path: Path) -> None:
    if not Path(f"/proc/{os.getpid()}/fd").is_dir():
        pytest.skip("open descriptors have no paths here")
    file, link = tmp_path / "file", tmp_path / "link"
    with file.open("wb", buffering=0) as stream:
        stream.write(b"before ")
        link.symlink_to(f"/proc/self/fd/{stream.fileno()}")
        write(Path(f"/proc/self/fd/{stream.fileno()}"), "written ")
        write(link, "twice ")
        stream.write(b"after")
    assert file.read_text() == "before written twice after"


def test_what_is_neither_file_nor_stream_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name, found in (("folder", "a folder"), ("socket", "a socket")):
            with pytest.raises(OutputFileError, match=f"{name}: found {found}; expected a new or existing file"):
                write(tmp_path / name)
            with pytest.raises(OutputFileError, match=f"{name}: found {found}"):
                is_stream(tmp_path / name)
        assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "socket"]


def test_a_missing_file_and_a_link_to_one_are_no_streams(tmp_path: Path) -> None:
    (tmp_path / "to-none").symlink_to("none")
    assert not any(is_stream(tmp_path / name) for name in ("none", "to-none"))


def test_links_that_lead_round_in_a_circle_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    for path in (tmp_path / "link", tmp_path / "link" / "net.safetensors"):
        for use in (is_stream, write):
            with pytest.raises(OutputFileError, match=f"{path}: found a loop of symbolic links"):
                use(path)


def test_a_plan_and_a_model_go_into_pipes_and_not_into_folders(pipe: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(8, 4)
    plan, reader = mn.plan(net, x), Reader(pipe)
    write_plan(plan, pipe)
    assert json.loads(reader.text()) == plan.to_dict()
    for write_to in (lambda path: write_plan(plan, path), lambda path: mn.save(mn.convert(net, x), path)):
        with pytest.raises(OutputFileError, match="found a folder"):
            write_to(pipe.parent)


def test_the_command_line_refuses_a_socket_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("net.safetensors")
        for options in (("convert", "--output"), ("diagnose", "--html")):
            arguments = [options[0], "gone.py:Net", "--input-shape", "4", options[1], "net.safetensors"]
            done = CliRunner().invoke(main, arguments)
            assert done.exit_code == 2
            assert "net.safetensors: found a socket" in " ".join(done.stderr.split())


# ---- no room ---------------------------------------------------------------------------------------------------------


def run_without_room(folder: Path, script: str, limit: int = 2000) -> str:
    """What a process prints in which no file grows beyond a size, as on a full disk."""
    program = f"""
        import resource, signal, sys
        import torch, manifold_nets as mn
        from manifold_nets.errors import OutputFileError, ManifoldNetsError
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(60, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 2))
        x = torch.randn(8, 60)
        converted = mn.convert(net, x)
        def full():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    """
    program = f"{textwrap.dedent(program)}\n{textwrap.dedent(script)}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_where_there_is_no_room_the_old_files_stay(tmp_path: Path) -> None:
    names = ["net.safetensors", "plain.safetensors", "net.pt2", "plan.json"]
    for name in names:
        (tmp_path / name).write_text(f"old {name}")
    said = run_without_room(
        tmp_path,
        """
        from manifold_nets.conversion import write_plan
        from manifold_nets.conversion.export import export_model
        plan = mn.plan(torch.nn.Sequential(*[torch.nn.Linear(9, 9) for _ in range(30)]), torch.randn(8, 9))
        full()
        for write in (
            lambda: mn.save(converted, "net.safetensors"),
            lambda: export_model(converted, "plain.safetensors", x),
            lambda: export_model(converted, "net.pt2", x, format="pt2"),
            lambda: write_plan(plan, "plan.json"),
        ):
            try:
                write()
            except OutputFileError as error:
                print(error)
        """,
    )
    lines = said.splitlines()
    assert [line.partition(":")[0] for line in lines] == names
    assert all("could not be written (File too large); an existing file there is unchanged" in line for line in lines)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: f"old {name}" for name in names}


def test_a_full_device_is_said_in_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no device that is full")
    with pytest.raises(OutputFileError, match=r"^/dev/full: it could not be written \(No space left on device\)"):
        write(Path("/dev/full"))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3_000, 100_000, 260_000])
def test_a_comparison_without_room_ends_in_one_line(tmp_path: Path, limit: int) -> None:
    """The first limit is below the empty study, the others end it among its runs and in the report."""
    pytest.importorskip("sqlalchemy")
    said = run_without_room(
        tmp_path,
        """
        full()
        try:
            mn.compare("mlp:10", optimizers=["sgd", "rsgd"], learning_rates=[0.1], seeds=6, epochs=30, output="out")
        except ManifoldNetsError as error:
            print(type(error).__name__, str(error))
        """,
        limit,
    )
    assert re.fullmatch(r"(StorageError|OutputFileError|RunFailedError) .*\n", said), said
    assert not list(tmp_path.rglob("*.tmp"))
