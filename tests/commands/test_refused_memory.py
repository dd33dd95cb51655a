"""Memory tiers that cannot be: refused in one line, before anything is mounted or made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cachefs.config import Settings
from cachefs.mount.memory import memory_path
from tests.commands.places import Place
from tests.conftest import needs_root
from tests.harness import run_cachefs

TIB = "100T"


@pytest.fixture
def shm() -> Path:
    return Path("/dev/shm")


def mount(place: Place, *options: object) -> tuple[object, ...]:
    return ("mount", place.source, place.make("mountpoint"), "--scratch", place.scratch, *options)


def test_larger_than_memory(own_place: Place):
    own_place.refused(*mount(own_place, "--memory", TIB), code=2, says=("--memory 100.0 TiB is more than", "smaller"))


@needs_root
def test_larger_than_the_tmpfs(own_place: Place):
    small = own_place.make("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], check=True)
    try:
        says = (f"--memory 5.0 MiB is more than the tmpfs at {small} holds (4.0 MiB)", "--memory-path")
        own_place.refused(*mount(own_place, "--memory", "5M", "--memory-path", small), code=2, says=says)
    finally:
        subprocess.run(["umount", small], check=True)


def test_inside_one_another_by_a_link(own_place: Place, shm: Path):
    """The tier is a directory in its place, so it is in scratch where that is scratch."""
    outer = shm / f"cachefs-test-{os.getpid()}"
    outer.mkdir(mode=0o700)
    link = own_place.path / "link"
    link.symlink_to(outer)
    try:
        for place in outer, link:
            options = ("--memory", "1M", "--memory-path", place, "--scratch", outer)
            own_place.refused(*mount(own_place)[:3], *options, code=2, says="one is inside the other")
    finally:
        outer.rmdir()


@pytest.mark.parametrize(
    ("value", "says"), [("lots", "is not a capacity"), ("101%", "more than all of it"), ("-1G", "is not a capacity")]
)
def test_nonsense(value: str, says: str, own_place: Place):
    own_place.refused(*mount(own_place, "--memory", value), code=2, says=says)


def test_not_in_memory(own_place: Place):
    place = own_place.make("disk")
    says = (f"--memory-path {place} is not in memory", "such as /dev/shm")
    own_place.refused(*mount(own_place, "--memory", "1M", "--memory-path", place), code=2, says=says)


def test_not_there(own_place: Place):
    says = ("cannot be used: No such file", "name a directory on tmpfs")
    own_place.refused(*mount(own_place, "--memory", "1M", "--memory-path", own_place.path / "no"), code=2, says=says)


def test_scratch_is_the_tier(own_place: Place, shm: Path):
    """Or one is inside the other."""
    place = own_place
    inner = shm / f"cachefs-test-{os.getpid()}"
    inner.mkdir(mode=0o700)
    try:
        options = ("--memory", "1M", "--memory-path", inner, "--scratch", inner)
        place.refused("mount", place.source, place.make("m"), *options, code=2, says="one is inside the other")
    finally:
        inner.rmdir()


def test_in_a_run(own_place: Place):
    """It says so, and the command reads the source, as for any other mount that cannot be."""
    options = ("--scratch", own_place.scratch, "--memory", TIB)
    done = own_place.run("run", "--data", own_place.source, *options, "--", "echo", "it runs")
    assert (done.returncode, done.stdout) == (0, "it runs\n")
    assert "warning: --memory 100.0 TiB is more than this job may have" in done.stderr


def test_a_run_with_a_place_that_cannot_be(own_place: Place):
    """It is not used all the same: there is a mount, without a memory tier."""
    disk = own_place.make("disk")
    options = ("--scratch", own_place.scratch, "--memory", "1M", "--memory-path", disk)
    ask = f"{sys.executable} -m cachefs status --json {own_place.source}"
    done = own_place.run("run", "--data", own_place.source, *options, "--", "sh", "-c", ask)
    assert done.returncode == 0, done.stderr
    assert "is not in memory" in done.stderr
    assert "there is no memory tier" in done.stderr
    (tier,) = json.loads(done.stdout)["tiers"]
    assert tier["path"] == str(own_place.scratch)
    assert os.listdir(disk) == []


def test_somebody_elses_directory(own_place: Place, shm: Path):
    """What lies where the tier would be is neither used nor removed."""
    place = own_place
    arguments = mount(place, "--memory", "1M")
    done = place.run(*arguments)
    assert done.returncode == 0, done.stderr
    (tier, _) = place.status(place.path / "mountpoint")["tiers"]
    place.do("umount", place.path / "mountpoint")
    assert not os.path.lexists(tier["path"])
    victim = Path(tier["path"])
    victim.mkdir(mode=0o700)
    (victim / "thesis").write_text("important")
    try:
        done = run_cachefs(*arguments, check=False)
        assert done.returncode == 1
        assert "holds files that are not of cachefs" in done.stderr
        assert (victim / "thesis").read_text() == "important"
    finally:
        (victim / "thesis").unlink()
        victim.rmdir()


@needs_root
def test_another_users_directory(own_place: Place, shm: Path):
    """Its name can be guessed: `mount` is refused, and a run goes without the tier."""
    place = own_place
    victim = memory_path(Settings(place.source, place.source, place.scratch))
    victim.mkdir(mode=0o700)
    os.chown(victim, 12345, 12345)
    try:
        says = (f"{victim} is owned by uid 12345", "choose another with --memory-path")
        place.refused(*mount(place, "--memory", "1M"), says=says)
        assert_runs_without(place, "is owned by uid 12345", "--memory", "1M")
    finally:
        victim.rmdir()


@needs_root
@pytest.mark.parametrize("inodes", range(2, 12))
def test_few_inodes(inodes: int, own_place: Place):
    """Wherever they run out, nothing is left."""
    small = own_place.make("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"nr_inodes={inodes}", "none", small], check=True)
    try:
        options = ("--memory", "1M", "--memory-path", small)
        own_place.make("mountpoint")
        says = ("No space left on device", "choose another with --memory-path")
        own_place.refused(*mount(own_place, *options), says=says)
        assert os.listdir(small) == []
        assert_runs_without(own_place, "No space left on device", *options)
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


def assert_runs_without(place: Place, says: str, *options: object) -> None:
    """There is a mount, without a memory tier."""
    ask = f"{sys.executable} -m cachefs status --json {place.source}"
    done = place.run("run", "--data", place.source, "--scratch", place.scratch, *options, "--", "sh", "-c", ask)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cachefs: warning: ")]
    assert says in line
    assert line.endswith("there is no memory tier")
    (tier,) = json.loads(done.stdout)["tiers"]
    assert tier["path"] == str(place.scratch)
