"""Promotion: what is completely resident is mounted directly from scratch, looks like the source, and stays."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from cachefs.mount.mountinfo import read_mounts
from tests.conftest import needs_root
from tests.harness import detach, lives, mounts_below, run_cachefs, wait_until
from tests.mount.observing import counters, digest, errno_of, opens, stored_files
from tests.mount.test_access import as_nobody

pytestmark = needs_root

PROMOTING = {"CACHEFS_NO_PROMOTE": "0"}
OTHER = 1234
_READ_ALL = """
import os, sys
for folder, _, files in os.walk(sys.argv[1].encode("utf-8", "surrogateescape")):
    for name in files:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            open(path, "rb").read()
"""
_HOLD = "import sys, os; sys.stdout.write('held' if %s else ''); sys.stdout.flush(); sys.stdin.read()"


@pytest.fixture
def promoting(mounted):
    """`mounted` with promotion."""

    def make(source, *options, **keywords):
        return mounted(source, *options, env=PROMOTING, **keywords)

    return make


def write(path, content=b"content", mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def make_tree(source):
    """Three directories with a few files each."""
    for name in ("a", "b", "c/d"):
        for number in range(3):
            write(source / name / str(number), b"%s %d" % (name.encode(), number) * 1000)
    return source


def describe(root):
    """What promotion keeps of a tree: names, types, modes, owners, sizes, times, targets, contents, hard links."""
    found, inodes = {}, {}
    top = os.fsencode(root)
    for folder, folders, files in os.walk(top):
        for name in (b".", *folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = None
            if stat.S_ISREG(status.st_mode):
                content = digest(path), inodes.setdefault(status.st_ino, path[len(top) :])
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            shown = status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns
            found[path[len(top) :]] = *shown, content
    return found


def read_all(path):
    """Read everything below a directory in a process of its own, which must come to its end."""
    subprocess.run([sys.executable, "-c", _READ_ALL, os.fspath(path)], check=True, timeout=60)


def promoted(cache):
    return counters(cache)["promoted_directories"]


def wait_for(cache, *paths):
    wait_until(lambda: promoted(cache) == sorted(paths), f"{paths} are promoted")


def assert_served_without_us(cache, path):
    """All of it can be read while the daemon is stopped."""
    before = opens(cache)
    os.kill(cache.pid, signal.SIGSTOP)
    try:
        read_all(path)
    finally:
        os.kill(cache.pid, signal.SIGCONT)
    assert opens(cache) == before


def trees(cache):
    return os.listdir(cache.scratch / "trees")


def hold(expression, *arguments, cwd=None):
    """A process that holds something until its stdin is closed."""
    command = [sys.executable, "-c", _HOLD % expression, *map(os.fspath, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd)
    assert process.stdout.read(4) == b"held"
    return process


def let_go(process):
    process.communicate(timeout=30)


def test_a_promoted_tree_is_that_of_the_source(source, promoting, mountpoint):
    """Names, modes, owners, times, sizes, links, listings and bytes; no request reaches the daemon."""
    write(source / "plain")
    for name in (b"new\nline", b"\xff\xfe", b"n" * 255, b"back\\slash", b" space"):
        folder = os.path.join(os.fsencode(source), b"d" + name[:200])
        os.mkdir(folder)
        with open(os.path.join(folder, name), "wb") as file:
            file.write(name)
    for mode in (0o400, 0o444, 0o755, 0o666, 0o000, 0o1644):
        write(source / "modes" / f"{mode:o}", b"%o" % mode, mode)
    write(source / "owned/file", b"of another")
    os.chown(source / "owned/file", OTHER, OTHER + 1)
    os.chown(source / "owned", OTHER, OTHER)
    write(source / "empty/nothing", b"")
    (source / "empty/directory").mkdir()
    write(source / "links/one", b"linked" * 100)
    os.link(source / "links/one", source / "links/two")
    os.link(source / "links/one", source / "modes/three")
    (source / "links/dangling").symlink_to("nowhere")
    (source / "links/up").symlink_to("../plain")
    (source / "links/root").symlink_to("/")
    with open(source / "sparse", "wb") as file:
        file.seek(3 << 20)
        file.write(b"end")
    for number, path in enumerate(sorted(source.rglob("*"))):
        if not path.is_symlink():
            os.utime(path, ns=(10**18, 10**18 + number * 10**9 + 1))
    os.utime(source / "links/dangling", ns=(5, 7), follow_symlinks=False)
    (source / "modes").chmod(0o555)
    want = describe(source)
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    wait_for(cache, ".")
    assert describe(mountpoint) == want
    assert_served_without_us(cache, mountpoint)
    said = counters(cache)
    assert said["promoted_files"] == sum(stat.S_ISREG(entry[0]) for entry in want.values())
    assert said["promoted_bytes"] == sum(entry[3] for entry in want.values() if stat.S_ISREG(entry[0]))
    assert said["promotion"] == "on"
    assert os.stat(mountpoint / "plain").st_nlink == 2  # scratch's own name counts
    for call in (os.unlink, os.truncate, os.rename):
        arguments = {os.truncate: [1], os.rename: [mountpoint / "other"]}.get(call, [])
        assert errno_of(call, mountpoint / "plain", *arguments) == "EROFS"
    assert errno_of(open, mountpoint / "plain", "ab") == "EROFS"
    assert "promoted" in run_cachefs("status", mountpoint).stdout
    cache.unmount()
    assert trees(cache) == []
    assert describe(source) == want


def test_over_its_own_source(source, promoting):
    """The mountpoint is the source: it is neither changed nor lost."""
    want = describe(make_tree(source))
    cache = promoting(source)
    read_all(source)
    wait_for(cache, ".")
    assert describe(source) == want
    assert_served_without_us(cache, source)
    cache.unmount()
    assert describe(source) == want


@needs_root
@pytest.mark.parametrize("how", ["flip", "truncate"])
@pytest.mark.parametrize("where", ["files", "trees"])
def test_a_promoted_copy_is_written_to(where, how, source, mounted, mountpoint):
    """What is promoted is taken back, and the file fetched again."""
    content = {f"{number % 3}/{number}": b"%d" % number * 1000 for number in range(10)}
    for name, data in content.items():
        write(source / name, data)
    cache = mounted(source, at=mountpoint, env=PROMOTING)
    read_all(mountpoint)
    wait_until(lambda: counters(cache)["promoted_files"] == len(content), "all is promoted")
    cache.must_log("promoted directories are taken back, because scratch was changed")
    cache.must_log("changed copy checked")
    cache.must_log("damaged copy dropped")
    shown = next((cache.scratch / "trees").rglob("9"))
    copy = next(path for path in cache.resident_data_files() if path.samefile(shown))
    with open(shown if where == "trees" else copy, "r+b") as file:
        if how == "truncate":
            file.truncate(10)
        else:
            file.write(b"8")
    wait_until(
        lambda: not any(mount.tree for mount in read_mounts() if mount.path.is_relative_to(mountpoint)), "it does"
    )
    for name, data in content.items():
        assert (mountpoint / name).read_bytes() == data
    assert counters(cache)["promotion"] == "off: scratch was changed by somebody else"
    cache.unmount()


@needs_root
@pytest.mark.parametrize("what", ["scratch", "trees", "a file"])
def test_scratch_is_removed(what, source, mounted, mountpoint):
    """By one who cleans up temporary directories: what was promoted is served by the mount again, and soon."""
    content = {f"{number % 3}/{number}": b"%d" % number * 1000 for number in range(30)}
    for name, data in content.items():
        write(source / name, data)
    cache = mounted(source, at=mountpoint, env=PROMOTING)
    for name, data in content.items():
        assert (mountpoint / name).read_bytes() == data
    wait_until(lambda: counters(cache)["promoted_files"] == len(content), "all is promoted")
    cache.must_log("promoted directories are taken back, because scratch was changed")
    cache.expect_log("scratch failed|fetch failed|index not|trees|not removed|not recorded|no room|copy=")
    held = os.open(mountpoint / "0/0", os.O_RDONLY)
    if what == "scratch":
        while cache.scratch.exists():
            shutil.rmtree(cache.scratch, ignore_errors=True)
    elif what == "trees":
        shutil.rmtree(next((cache.scratch / "trees").iterdir()))
    else:
        next((cache.scratch / "trees").rglob("29")).unlink()
    wait_until(
        lambda: not any(mount.tree for mount in read_mounts() if mount.path.is_relative_to(mountpoint)), "it does"
    )
    for name, data in content.items():
        assert (mountpoint / name).read_bytes() == data
    assert os.read(held, 10_000) == content["0/0"], "who has a file open reads on"
    os.close(held)
    if what != "scratch":
        said = counters(cache)
        assert said["promotion"] == "off: scratch was changed by somebody else"
        assert said["promoted_files"] == 0
        cache.unmount()
    else:
        run_cachefs("umount", mountpoint, check=False)
        assert not cache.is_mounted()


@pytest.mark.parametrize("hole", ["fifo", "setuid", "setgid", "too large", "not read"])
def test_a_hole_keeps_its_directory_and_those_above_out(source, promoting, mountpoint, hole):
    """What cannot be promoted: its siblings, and what lies below its directory, are all the same."""
    make_tree(source)
    write(source / "c/d/e/file")
    if hole == "fifo":
        os.mkfifo(source / "c/d/hole")
    else:
        size = 3_000_000 if hole == "too large" else 10
        write(source / "c/d/hole", bytes(size), {"setuid": 0o4755, "setgid": 0o2755}.get(hole, 0o644))
    cache = promoting(source, "--capacity", "2M", "--prefetch", "off", at=mountpoint)
    if hole == "not read":
        for name in ("a", "b", "c/d/e"):
            read_all(mountpoint / name)
        for number in range(3):
            (mountpoint / "c/d" / str(number)).read_bytes()
    else:
        read_all(mountpoint)
    wait_for(cache, "a", "b", "c/d/e")
    assert describe(mountpoint / "a") == describe(source / "a")
    assert_served_without_us(cache, mountpoint / "c/d/e")
    assert opens(cache)[1] >= 9
    (mountpoint / "c/d/1").read_bytes()
    assert opens(cache)[0] >= 1
    if hole == "not read":
        (mountpoint / "c/d/hole").read_bytes()
        wait_for(cache, ".")
        assert describe(mountpoint) == describe(source)


def test_the_larger_tree_takes_the_place_of_the_smaller(source, promoting, mountpoint):
    """Step by step up to the root; whoever is in a promoted directory notices nothing."""
    make_tree(source)
    write(source / "c/file")
    cache = promoting(source, "--prefetch", "off", at=mountpoint)
    read_all(mountpoint / "c/d")
    wait_for(cache, "c/d")
    inside = hold("os.listdir('.') and 1", cwd=mountpoint / "c/d")
    try:
        read_all(mountpoint / "a")
        wait_for(cache, "a", "c/d")
        read_all(mountpoint / "c")
        wait_for(cache, "a", "c")
        shown = [mount.path for mount in read_mounts() if mount.tree and mountpoint in mount.path.parents]
        assert shown.count(mountpoint / "c") == 1
        assert os.path.exists(f"/proc/{inside.pid}/cwd/../file")
        read_all(mountpoint)
        wait_for(cache, ".")
        assert os.path.exists(f"/proc/{inside.pid}/cwd/../../a/1")
        assert describe(mountpoint) == describe(source)
    finally:
        let_go(inside)
    cache.unmount()


def test_the_version_that_is_promoted_is_the_current_one(source, promoting, mountpoint):
    """Files that have changed, gone and come since an earlier mount cached them."""
    make_tree(source)
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    wait_for(cache, ".")
    cache.unmount()
    (source / "a/0").write_bytes(b"new")
    (source / "a/1").unlink()
    write(source / "b/9", b"added")
    (source / "c/d").rename(source / "c/f")
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    wait_for(cache, ".")
    assert describe(mountpoint) == describe(source)
    cache.unmount()


def test_what_an_earlier_mount_fetched_is_promoted_when_it_is_used(source, promoting, mountpoint):
    """Nothing is read: a listing and some opens are enough, and no byte comes from the source."""
    make_tree(source)
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    cache.unmount()
    cache = promoting(source, "--prefetch", "off", at=mountpoint)
    for number in (0, 1, 2, 0, 1):
        (mountpoint / "a" / str(number)).read_bytes()
    wait_for(cache, ".")
    assert counters(cache)["source_bytes_read"] == 0
    assert describe(mountpoint) == describe(source)
    cache.unmount()


@pytest.mark.parametrize("options", [("--no-promote",), ("--metadata-ttl", "59")], ids=" ".join)
def test_nothing_is_promoted_where_that_is_not_wanted(source, mounted, mountpoint, options):
    """Status says why."""
    make_tree(source)
    cache = mounted(source, *options, at=mountpoint, env=PROMOTING if len(options) > 1 else {})
    read_all(mountpoint)
    said = counters(cache)
    assert said["promotion"].startswith(f"off: {options[0]}")
    assert (said["promoted_files"], said["promoted_bytes"], said["promoted_directories"]) == (0, 0, [])
    assert trees(cache) == []


def test_eviction_takes_nothing_that_is_promoted(source, promoting, mountpoint, tmp_path):
    """Neither this mount's nor another's: what is promoted is leased."""
    for name, files in (("a", 5), ("b", 30)):
        for number in range(files):
            write(source / name / str(number), random.Random(f"{name}{number}").randbytes(100_000))
    other, place = tmp_path / "other", tmp_path / "other mount"
    for number in range(20):
        write(other / str(number), random.Random(number).randbytes(100_000))
    place.mkdir()
    options = ("--capacity", "1M", "--policy", "lru", "--prefetch", "off")
    cache = promoting(source, *options, at=mountpoint)
    read_all(mountpoint / "a")
    wait_for(cache, "a")
    read_all(mountpoint / "b")
    second = promoting(other, *options, at=place)
    read_all(place)
    assert describe(place) == describe(other)
    assert_served_without_us(cache, mountpoint / "a")
    assert describe(mountpoint) == describe(source)
    assert promoted(cache) == ["a"]
    assert sum(stored_files(cache.scratch).values()) <= 1 << 20
    assert counters(cache)["evictions"]
    second.unmount()
    cache.unmount()


def test_two_mounts_of_one_scratch(source, promoting, mountpoint, tmp_path):
    """Each promotes; purge is refused; what one leaves the other keeps."""
    make_tree(source)
    place = tmp_path / "second"
    place.mkdir()
    first, second = promoting(source, at=mountpoint), promoting(source, at=place)
    for cache in (first, second):
        read_all(cache.path)
        wait_for(cache, ".")
    assert "in use" in run_cachefs("purge", "--scratch", first.scratch, check=False).stderr
    first.unmount()
    assert "in use" in run_cachefs("purge", "--scratch", first.scratch, check=False).stderr
    assert describe(place) == describe(source)
    assert len(trees(second)) == 1
    second.unmount("--purge")
    assert not second.scratch.exists()


def test_purge_removes_trees_of_any_mode_and_depth(source, promoting, mountpoint):
    """Directories that are not writable, and a path that is longer than PATH_MAX."""
    write(source / "read-only/file", mode=0o444)
    (source / "read-only").chmod(0o555)
    fd = os.open(source, os.O_RDONLY)
    for _ in range(40):
        os.mkdir("d" * 250, dir_fd=fd)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open("deep", "wb", opener=lambda path, flags: os.open(path, flags, dir_fd=fd)) as file:
        file.write(b"deep down")
    cache = promoting(source, at=mountpoint)
    above = os.open(mountpoint, os.O_RDONLY)
    (mountpoint / "read-only/file").read_bytes()
    for _ in range(40):
        os.listdir(above)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    with open("deep", "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=above)) as file:
        assert file.read() == b"deep down"
    os.close(above)
    os.close(fd)
    wait_for(cache, ".")
    cache.kill()
    run_cachefs("umount", mountpoint)
    assert trees(cache)
    run_cachefs("purge", "--scratch", cache.scratch)
    assert not cache.scratch.exists()
    subprocess.run(["rm", "-rf", source], check=True)  # pytest's own way does not reach that deep


@pytest.mark.parametrize("what", ["file", "directory", "mapping"])
def test_a_promoted_directory_that_is_in_use_is_busy(source, promoting, mountpoint, what):
    """Who holds it is named; with --lazy it is detached, and the holder goes on."""
    make_tree(source)
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    wait_for(cache, ".")
    if what == "directory":
        holder = hold("1", cwd=mountpoint / "a")
    elif what == "file":
        holder = hold("(f := open(sys.argv[1]))", mountpoint / "a/1")
    else:
        mapping = "(m := __import__('mmap').mmap(os.open(sys.argv[1], 0), 10, prot=1)) and os.closerange(3, 20) is None"
        holder = hold(mapping, mountpoint / "a/1")
    try:
        refused = run_cachefs("umount", mountpoint, check=False)
        assert refused.returncode == 1
        assert "is busy" in refused.stderr
        assert f"pid {holder.pid}" in refused.stderr
        assert str(mountpoint) in refused.stderr
        assert describe(mountpoint) == describe(source)
        done = run_cachefs("umount", mountpoint, "--lazy")
        assert done.returncode == 0
        assert mounts_below(mountpoint) == []
    finally:
        let_go(holder)
    wait_until(lambda: not any(map(lives, cache.processes)), "the daemon ends")


def test_a_mount_is_unmounted_while_it_promotes(source, promoting, mountpoint):
    """However the daemon's own work and the command meet, nothing is left."""
    for folder in range(60):
        write(source / str(folder) / "file")
        os.mkfifo(source / str(folder) / "hole")
        write(source / str(folder) / "below" / "file")
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    wait_until(lambda: promoted(cache), "the first are promoted")
    cache.unmount()
    assert mounts_below(mountpoint) == []


def test_sigterm_takes_all_away(source, promoting, mountpoint):
    make_tree(source)
    os.mkfifo(source / "c/hole")
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    wait_for(cache, "a", "b", "c/d")
    with open(mountpoint / "a/1", "rb"):
        os.kill(cache.pid, signal.SIGTERM)
        wait_until(lambda: not any(map(lives, cache.processes)), "the daemon ends")
    assert mounts_below(mountpoint) == []
    assert trees(cache) == []


@pytest.mark.parametrize("hole", [False, True], ids=["whole", "in parts"])
def test_after_a_crash(source, promoting, mountpoint, tmp_path, hole):
    """What is promoted stays readable; umount uncovers the source; the next mount removes what was left."""
    make_tree(source)
    if hole:
        os.mkfifo(source / "c/hole")
    cache = promoting(source)
    read_all(source)
    wait_until(lambda: promoted(cache) == (["a", "b", "c/d"] if hole else ["."]), "it is promoted")
    cache.kill()
    if not hole:
        read_all(source / "a")
    assert "in use" in run_cachefs("purge", "--scratch", cache.scratch, check=False).stderr
    assert "has died" in run_cachefs("status", source, check=False).stderr
    left = trees(cache)
    if not hole:  # another mount's start does not take from under them what is still shown
        other = promoting(make_tree(tmp_path / "other"), at=mountpoint, scratch=cache.scratch)
        read_all(mountpoint)
        wait_for(other, ".")
        assert set(left) < set(trees(other))
        read_all(source / "a")
        other.unmount()
    run_cachefs("umount", source, "--if-dead")
    assert mounts_below(source) == []
    assert (source / "a/1").read_bytes()
    cache = promoting(source)
    wait_until(lambda: not set(left) & set(trees(cache)), "what was left is removed")
    read_all(source)
    wait_for(cache, *(["a", "b", "c/d"] if hole else ["."]))
    assert counters(cache)["source_bytes_read"] == 0
    cache.unmount("--purge")


def test_what_somebody_unmounts_is_promoted_again(source, promoting, mountpoint):
    """Status says what is there, and the next look makes it good."""
    make_tree(source)
    os.mkfifo(source / "hole")
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    wait_for(cache, "a", "b", "c")
    detach(mountpoint / "a")
    assert promoted(cache) == ["b", "c"]
    read_all(mountpoint / "a")
    wait_for(cache, "a", "b", "c")
    cache.unmount()


def test_one_large_file_of_an_incomplete_directory(source, promoting, mountpoint):
    """It is promoted alone, and gives way when its directory is complete."""
    content = random.Random(1).randbytes(9 << 20)
    write(source / "d/large", content)
    write(source / "d/small")
    write(source / "d/other")
    cache = promoting(source, "--prefetch", "off", at=mountpoint)
    assert (mountpoint / "d/large").read_bytes() == content
    wait_for(cache, "d/large")
    assert (counters(cache)["promoted_files"], counters(cache)["promoted_bytes"]) == (1, len(content))
    assert describe(mountpoint) == describe(source)
    wait_for(cache, ".")
    assert describe(mountpoint) == describe(source)
    assert len([mount for mount in read_mounts() if mountpoint in (mount.path, *mount.path.parents)]) == 2
    cache.unmount()


def open_to_all(*paths):
    for path in paths:
        for folder in (path, *path.parents):
            if not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)


def test_other_users_get_no_further(source, promoting, mountpoint):
    """Without --allow-other the root is not promoted where others could come that far; all within it is."""
    make_tree(source)
    open_to_all(source, mountpoint)
    cache = promoting(source, at=mountpoint)
    read_all(mountpoint)
    wait_for(cache, "a", "b", "c")
    assert as_nobody(mountpoint, mountpoint / "a", mountpoint / "a/1") == ["EACCES"] * 3


def test_other_users_get_what_the_modes_give(source, promoting, mountpoint):
    """With --allow-other: owners and modes are the source's, and the kernel enforces them."""
    write(source / "public")
    write(source / "private", mode=0o600)
    write(source / "closed/file")
    (source / "closed").chmod(0o700)
    write(source / "theirs", mode=0o400)
    os.chown(source / "theirs", 65534, 65534)
    open_to_all(source, mountpoint)
    source.chmod(0o755)
    cache = promoting(source, "--allow-other", at=mountpoint)
    read_all(mountpoint)
    wait_for(cache, ".")
    paths = [mountpoint / name for name in ("public", "private", "closed", "closed/file", "theirs")]
    assert as_nobody(*paths) == ["7", "EACCES", "EACCES", "EACCES", "7"]
    assert errno_of(os.open, mountpoint / "public", os.O_RDWR) == errno.errorcode[errno.EROFS]


@pytest.mark.parametrize("seed", range(3))
def test_random_trees(source, promoting, mountpoint, seed):
    """Whatever shape it has, a part of it that is promoted looks like the source, and all of it in the end."""
    dice = random.Random(seed)
    folders = [source]
    for number in range(120):
        path = dice.choice(folders) / f"{number}{dice.choice(['', ' ', 'é', chr(0xDC80)])}"
        kind = dice.random()
        if kind < 0.25:
            path.mkdir()
            folders.append(path)
        elif kind < 0.35:
            path.symlink_to(dice.choice(folders))
        elif kind < 0.42 and (files := [p for p in source.rglob("*") if p.is_file() and not p.is_symlink()]):
            os.link(dice.choice(files), path)
        else:
            write(path, dice.randbytes(dice.choice([0, 1, 5000, 300_000])), dice.choice([0o644, 0o400, 0o755]))
    for folder in folders:
        os.utime(folder, ns=(1, dice.randrange(2 * 10**18)))
    want = describe(source)
    cache = promoting(source, "--prefetch", dice.choice(["off", "auto"]), at=mountpoint)
    part = dice.choice(folders).relative_to(source)
    read_all(mountpoint / part)
    assert describe(mountpoint / part) == describe(source / part)
    read_all(mountpoint)
    wait_for(cache, ".")
    assert describe(mountpoint) == want
    assert_served_without_us(cache, mountpoint)
