"""status: none, one, several, dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from tests.commands.places import Place, current_user
from tests.conftest import needs_root
from tests.harness import CACHEFS, wait_until

NUMBERS = {
    "capacity_bytes",
    "resident_files",
    "resident_bytes",
    "hits",
    "misses",
    "bypasses",
    "evictions",
    "fetches",
    "fetch_errors",
    "source_bytes_read",
    "requests",
    "bytes_served",
    "uptime_seconds",
}
STRINGS = {"source", "mountpoint", "scratch", "policy"}

UNMOUNT_ALL = (
    "while path=$(grep -m 1 -- ' - fuse.cachefs ' /proc/self/mountinfo | cut -d' ' -f5) && [ -n \"$path\" ]; "
    'do umount -l "$(printf %b "$path")" || exit 99; done'
)


def without_other_mounts(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as if nobody on this machine had a mount; needs root."""
    command = [*place.on_own_mounts(UNMOUNT_ALL), *CACHEFS, *arguments]
    return subprocess.run(command, cwd="/", env=place.environ(), capture_output=True, text=True, check=False)


@needs_root
def test_without_mounts(place: Place):
    done = without_other_mounts(place, "status")
    assert (done.returncode, done.stdout, done.stderr) == (0, "no mounts of cachefs\n", "")
    done = without_other_mounts(place, "status", "--json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_of_what_is_no_mount(place: Place):
    place.refused("status", place.source, says=f"nothing is mounted at {place.source}")
    place.refused("status", "/proc", says="/proc is a mount of proc, not of cachefs")
    place.refused("status", place.path / "missing", "--json", says="nothing is mounted at")


def test_of_one_mount(place: Place):
    at = place.mount()
    place.read_as_user(at / "one")
    wait_until(lambda: place.status(at)["resident_files"] == 1, "the file is resident")
    text = place.do("status", at)
    for words in str(at), str(place.scratch), "policy", "auto", "hold", "1000 B", "misses", "not known yet":
        assert words in text.replace("\n", "")
    place.do("umount", at)


def test_json_has_the_keys_of_the_contract(place: Place):
    at = place.mount()
    lines = place.do("status", at, "--json").splitlines()
    assert len(lines) == 1
    report = json.loads(lines[0])
    assert set(report) >= NUMBERS | STRINGS
    assert all(type(report[key]) in (int, float) for key in NUMBERS)
    assert all(type(report[key]) is str for key in STRINGS)
    assert report["source"] == report["mountpoint"] == str(at)
    place.do("umount", at)


def test_json_is_one_line_a_mount(place: Place):
    paths = [place.mount(place.source, place.make(name)) for name in ("first", "second")]
    found = {json.loads(line)["mountpoint"] for line in place.run("status", "--json").stdout.splitlines()}
    assert found >= set(map(str, paths))
    for path in paths:
        place.do("umount", path)


def test_counts_what_was_read(place: Place):
    at = place.mount()
    for _ in range(2):
        place.read_as_user(at / "one")
        wait_until(lambda: place.status(at)["resident_files"] == 1, "the file is resident")
    status = place.status(at)
    assert (status["misses"], status["hits"], status["fetches"], status["bypasses"]) == (1, 1, 1, 0)
    assert (status["resident_bytes"], status["source_bytes_read"], status["fetch_errors"]) == (1000, 1000, 0)
    place.do("umount", at)


class TestDead:
    @pytest.mark.parametrize("option", [(), ("--json",)])
    def test_says_so(self, place: Place, option: tuple[str, ...]):
        at = place.mount()
        place.kill_daemon(at)
        says = (f"{at}: the daemon of this mount has died", f"cachefs umount {at}")
        place.refused("status", at, *option, says=says)
        place.do("umount", at)

    def test_does_not_hide_the_living(self, place: Place):
        dead, alive = (place.mount(place.source, place.make(name)) for name in ("dead", "alive"))
        other = place.status(alive)["pid"]
        os.kill(int(place.status(dead)["pid"]), signal.SIGKILL)
        wait_until(lambda: place.run("status", dead).returncode == 1, "the daemon has died")
        done = place.run("status", "--json")
        assert done.returncode == 1
        assert f"{dead}: the daemon of this mount has died" in done.stderr
        assert str(alive) not in done.stderr
        assert other in [json.loads(line)["pid"] for line in done.stdout.splitlines()]
        place.do("umount", dead)
        place.do("umount", alive)


@needs_root
def test_of_another_users_mounts(ordinary_place: Place):
    root = Place(current_user(), ordinary_place.path)
    at = root.mount()
    assert str(at) not in ordinary_place.run("status", "--json").stdout  # other tests' mounts may be dead
    ordinary_place.refused("status", at, says=(str(at), "is another user's"))
    root.do("umount", at)


@needs_root
def test_of_an_ordinary_users_mount_for_root(ordinary_place: Place):
    root = Place(current_user(), ordinary_place.path)
    at = ordinary_place.mount()
    assert str(at) not in root.run("status", "--json").stdout
    root.refused("status", at, says=(str(at), "is another user's"))
    ordinary_place.do("umount", at)
