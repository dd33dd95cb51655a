"""What somebody else, or something else, has put where we store: it is neither used nor followed nor removed."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs.errors import CachefsError
from cachefs.mount.purge import purge
from tests.commands.places import Place
from tests.conftest import needs_root
from tests.harness import mounts_below, run_cachefs, scripted, verify
from tests.mount.observing import describe_tree
from tests.unit.profile import FIXED

NOBODY = 65534
_SWAP = """
import os, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
folder, target = sys.argv[1:]
os.chdir(folder)
print("swapping", flush=True)
number = 0
while True:
    number += 1
    try:
        if number % 3 == 0:
            os.mkdir("scratch", 0o777)
        elif number % 3 == 1:
            os.symlink(target, "scratch")
        os.rename("scratch", f"aside{number}")
    except OSError:
        pass
"""


@needs_root
def test_a_race_for_scratch(ordinary_place: Place):
    """Another user puts directories and links of his own where scratch is to be made or purged, as fast as he can."""
    place = ordinary_place
    shared, victim = place.make("shared", mode=0o1777), place.make("victim")
    place.write(victim / "thesis", "important")
    place.make("mountpoint")
    before = describe_tree(victim)
    outcomes = []
    with scripted(_SWAP, shared, victim, says="swapping"):
        for _ in range(12):
            done = place.run("mount", place.source, place.mountpoint, "--scratch", shared / "scratch")
            outcomes.append(done.returncode)
            assert "Traceback" not in done.stderr
            if done.returncode == 0:
                assert place.run("umount", place.mountpoint).returncode == 0
            assert "Traceback" not in place.run("purge", "--scratch", shared / "scratch").stderr
    assert describe_tree(victim) == before
    for entry in shared.iterdir():
        if not entry.is_symlink() and entry.stat().st_uid == NOBODY:
            assert os.listdir(entry) == [], "we have stored something in somebody else's directory"
    assert len(outcomes) == 12


def test_where_anybody_could_rename_scratch_it_is_refused(own_place: Place):
    place = own_place
    shared = place.make("shared")
    place.make("shared", "mine")
    shared.chmod(0o777)
    for scratch in shared / "scratch", shared / "mine" / "scratch":
        says = (f"in {shared} any user may put something else in its place", "chmod +t")
        place.refused("mount", place.source, place.make("mountpoint"), "--scratch", scratch, says=says)
    shared.chmod(0o1777)
    place.do("mount", place.source, place.mountpoint, "--scratch", shared / "scratch")
    place.do("umount", place.mountpoint)


@needs_root
def test_the_control_socket_is_its_users_alone(dataset, mounted, mountpoint, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o011)
    cache = mounted(dataset.path, at=mountpoint)
    (path,) = (cache.scratch / "sockets").iterdir()
    script = """
import os, socket, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
os.chdir(sys.argv[1])
"""
    for command in (script, "import socket\n" + script.replace("os.chdir", "socket.socket(socket.AF_UNIX).connect")):
        done = subprocess.run(
            [sys.executable, "-c", command, cache.scratch if command is script else path],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "PermissionError" in done.stderr or "path too long" in done.stderr


@pytest.mark.parametrize("what", ["a prefix", "the boot", "files", "index.db"])
def test_links_in_scratch_lead_nowhere(what, dataset, mounted, mountpoint, tmp_path):
    """What a link leads to is neither read nor changed; the mount serves, or says in one line what is wrong."""
    first = mounted(dataset.path, at=mountpoint)
    dataset.check(mountpoint)
    first.unmount()
    scratch, victim = first.scratch, tmp_path / "victim"
    (boot,) = (scratch / "files").iterdir()
    files = scratch / "files"
    place = {"a prefix": next(boot.iterdir()), "the boot": boot, "files": files, "index.db": scratch / "index.db"}[what]
    place.rename(victim)
    for path in scratch.glob("index.db-*"):
        path.unlink()
    place.symlink_to(victim)
    before = describe_tree(victim) if victim.is_dir() else victim.read_bytes()
    done = run_cachefs("mount", dataset.path, mountpoint, "--scratch", scratch, "--no-promote", check=False)
    if done.returncode:
        assert done.stderr.count("\n") == 1, done.stderr
    else:
        dataset.check(mountpoint)
        run_cachefs("umount", mountpoint)
    verify(scratch, "--repair")
    run_cachefs("purge", "--scratch", scratch, check=False)
    assert (describe_tree(victim) if victim.is_dir() else victim.read_bytes()) == before


KINDS = ("file", "folder", "link", "link to folder", "hard link", "fifo", "socket", "dangling", "loop")
KINDS += ("mount", "mount over a file") if os.geteuid() == 0 else ()
TREES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 30)), max_size=25)


@settings(FIXED, max_examples=60)
@given(shape=TREES, seed=st.integers(0, 1000))
def test_purge_leaves_its_directory_alone_in_nothing(shape, seed, tmp_path_factory):
    """Whatever lies in scratch, purge removes it, and changes nothing outside; where something is mounted it stops."""
    folder = tmp_path_factory.mktemp("purge")
    victim, scratch = folder / "victim", folder / "scratch"
    (victim / "sub").mkdir(parents=True)
    (victim / "thesis").write_text("important")
    (victim / "sub/more").write_text("important too")
    scratch.mkdir(0o700)
    (scratch / "cachefs-scratch").write_text('{"format": 1, "directory_made_by_cachefs": true}')
    names = ("files", "staging", "trees", "leases", "sockets", "logs")
    for name in names:
        (scratch / name).mkdir()
    dice = random.Random(seed)
    places = [scratch / name for name in names if name != "leases"]
    for number, (kind, where) in enumerate(shape):
        make(kind, places[where % len(places)] / f"{number}", victim, places, dice)
    links = {path: path.stat().st_nlink for path in victim.rglob("*")}
    mounted, said = sorted(mounts_below(scratch), reverse=True), "is a mount"
    try:
        purge(scratch)
    except CachefsError as error:
        said = str(error)
    finally:
        for path in mounted:
            subprocess.run(["umount", path], check=True)
    assert "is a mount" in said or "busy" in said, said
    assert (victim / "thesis").read_text() == "important"
    if scratch.exists():
        purge(scratch)
    assert not scratch.exists()
    assert (victim / "thesis").read_text() == "important"
    assert (victim / "sub/more").read_text() == "important too"
    assert {path.name for path in victim.rglob("*")} == {"thesis", "sub", "more"}
    assert all(path.stat().st_nlink <= links[path] for path in links)


def make(kind: str, path: Path, victim: Path, places: list[Path], dice: random.Random) -> None:
    if kind == "folder":
        path.mkdir(mode=dice.choice((0o700, 0o500, 0o000)) if os.geteuid() == 0 else 0o700)
        places.append(path)
    elif kind == "file":
        path.write_bytes(b"x" * dice.randrange(100))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            folder = os.open(path.parent, os.O_RDONLY)
            sock.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)
    elif kind == "hard link":
        os.link(victim / dice.choice(("thesis", "sub/more")), path)
    elif kind == "mount":
        path.mkdir()
        subprocess.run(["mount", "--bind", victim, path], check=True)
    elif kind == "mount over a file":
        path.touch()
        subprocess.run(["mount", "--bind", victim / "thesis", path], check=True)
    else:
        targets = {"link": victim / "thesis", "link to folder": victim, "dangling": Path("nowhere"), "loop": path}
        path.symlink_to(targets[kind])
