"""sge/node-mounts, which prologs and epilogs call: claims of jobs on the mounts of a node, without a batch system."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import needs_root
from tests.harness import detach, mounts_below, wait_until
from tests.jobs.batch import COMMAND, Dataset, daemon_of, end_processes, entries_of, processes_below, wait_for_nothing

pytestmark = needs_root
TOOL = Path(__file__).parents[2] / "sge" / "node-mounts"


class Node:
    """A node with an administrator's settings, and a dataset that jobs may ask for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "nas" / "data set"
        self.dataset = Dataset(self.data)
        self.copies = folder / "copies"
        self.state = folder / "state"
        self.settings = folder / "settings"
        self.set()

    def set(self, **more: str) -> None:
        """Settings, and more of them."""
        values = {"SOURCES": self.data.parent, "SCRATCH": self.copies, "STATE": self.state, "CACHEFS": COMMAND, **more}
        self.settings.write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))

    def run(self, *arguments: object) -> str:
        """node-mounts; what it said to the job."""
        command = [TOOL, "--settings", self.settings, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={}, timeout=120).stderr

    def enter(self, job: str, *pid: int) -> str:
        return self.run("enter", job, self.data, *pid)

    def leave(self, job: str) -> str:
        return self.run("leave", job, "root")

    def is_mounted(self) -> bool:
        return self.data in mounts_below(self.folder)

    def scratch(self) -> Path:
        (path,) = self.copies.iterdir()
        return path

    def left(self) -> list[object]:
        """What there is but for the copies: nothing when no job claims anything."""
        return [*mounts_below(self.folder), *processes_below(self.folder), *entries_of(self.state)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    left = wait_for_nothing(node.left)
    end_processes(processes_below(tmp_path))
    for path in mounts_below(tmp_path):
        detach(path)
    assert not left


def test_the_last_job_unmounts_and_purges(node: Node):
    assert node.enter("1") == ""
    assert node.enter("2") == ""
    assert node.is_mounted()
    assert (node.data / "class0" / "0.bin").stat().st_mode & 0o444
    assert node.leave("1") == ""
    assert node.is_mounted()
    assert node.leave("2") == ""
    wait_until(lambda: not node.left() and not entries_of(node.copies), "nothing is left")


def test_the_copies_can_be_kept(node: Node):
    node.set(KEEP="yes")
    node.enter("1")
    (node.data / "class0" / "0.bin").read_bytes()
    node.leave("1")
    wait_until(lambda: not node.left(), "nothing is left")
    assert len([path for path in (node.scratch() / "files").rglob("*") if path.is_file()]) == 1


def test_a_mount_that_is_still_in_use_is_detached_and_purged_when_it_is_not(node: Node):
    node.enter("1")
    with open(node.data / "class0" / "0.bin", "rb") as file:
        node.leave("1")
        assert not mounts_below(node.folder)
        assert file.read()
        assert entries_of(node.copies)
    wait_until(lambda: not node.left() and not entries_of(node.copies), "the supervisor purges")


def test_a_dead_daemon_uncovers_the_source(node: Node):
    node.enter("1")
    daemon_of(node.scratch()).kill()
    wait_until(lambda: not mounts_below(node.folder), "the mount is detached")
    assert (node.data / "class0" / "0.bin").read_bytes()
    assert node.enter("2") == ""
    assert node.is_mounted()
    node.leave("1")
    assert node.is_mounted()
    node.leave("2")
    wait_until(lambda: not node.left() and not entries_of(node.copies), "nothing is left")


def test_a_supervisor_that_is_killed_with_its_daemon(node: Node):
    node.enter("1")
    (supervisor,) = node.state.glob("*/supervisor")
    os.killpg(int(supervisor.read_text()), signal.SIGKILL)
    wait_until(lambda: not processes_below(node.folder), "the processes end")
    assert node.is_mounted()
    assert node.leave("1") == ""
    wait_until(lambda: not node.left() and not entries_of(node.copies), "nothing is left")


def test_a_claim_is_void_without_its_process(node: Node):
    with subprocess.Popen(["sleep", "1000"]) as shepherd:
        node.enter("1", shepherd.pid)
        node.enter("2", os.getpid())
        shepherd.kill()
    node.leave("2")
    wait_until(lambda: not node.left(), "nothing is left")


def test_many_jobs_begin_and_end_at_once(node: Node):
    def job(number: int) -> str:
        said = node.enter(str(number))
        (node.data / "class0" / "0.bin").read_bytes()
        return said + node.leave(str(number))

    with ThreadPoolExecutor(4) as jobs:
        assert "".join(jobs.map(job, range(8))) == ""
    wait_until(lambda: not node.left() and not entries_of(node.copies), "nothing is left")


def test_a_mount_that_fails_says_why(node: Node):
    node.set(OPTIONS="--capacity 9000T")
    said = node.enter("1")
    assert said.startswith(
        f"cachefs: {node.data} is not mounted, and read directly: capacity 9000.0 TiB is larger than"
    )
    assert said.count("\n") == 1
    assert not node.left()


def test_what_is_not_listed_is_not_mounted(node: Node):
    for path in ("/etc", node.folder, node.data.parent.parent / "nassau"):
        Path(path).mkdir(exist_ok=True)
        assert node.run("enter", "1", path) == (
            f"cachefs: {path} is not mounted: it is not in SOURCES of {node.settings}\n"
        )
    node.set(SOURCES="")
    assert "is not in SOURCES" in node.enter("1")
