"""Scratch is its user's alone, purge removes what is ours, and other users only with --allow-other (12 and 13)."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import sys

import pytest

from tests.conftest import needs_root
from tests.harness import run_cachefs, wait_until
from tests.mount.observing import counters, errno_of

NOBODY = 65534


def acl(user_obj, nobody, group_obj, mask, other):
    """A POSIX ACL in which one user is named, as linux/posix_acl_xattr.h has it."""
    entries = (1, user_obj, -1), (2, nobody, NOBODY), (4, group_obj, -1), (16, mask, -1), (32, other, -1)
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


DENIES_NOBODY, GRANTS_NOBODY = acl(6, 0, 4, 4, 4), acl(6, 4, 0, 4, 0)
_AS_NOBODY = """
import errno, os, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
for path in sys.argv[1:]:
    try:
        if os.path.isdir(path):
            print(len(os.listdir(path)))
        else:
            print(len(open(path, "rb").read()))
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def as_nobody(*paths):
    """What another user gets: for each path the number of bytes or names, or the errno."""
    command = [sys.executable, "-c", _AS_NOBODY, *map(os.fspath, paths)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def user_of(program):
    """Who nobody is while he runs a copy of /usr/bin/id."""
    done = subprocess.run([program, "-u"], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=True)
    return int(done.stdout)


@pytest.fixture
def tree(source, tmp_path):
    """A source that other users may reach."""
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001 and os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    source.chmod(0o755)
    for name, mode in (("private", 0o600), ("public", 0o644)):
        (source / name).write_bytes(b"content")
        (source / name).chmod(mode)
    (source / "closed").mkdir(mode=0o700)
    (source / "closed/file").write_bytes(b"content")
    return source


@needs_root
def test_with_allow_other_the_kernel_enforces_the_modes(tree, mounted, mountpoint):
    """Semantics 13: with --allow-other another user has what the source's modes give, and no more."""
    mountpoint.chmod(0o755)
    cache = mounted(tree, "--allow-other", at=mountpoint)
    paths = [mountpoint / name for name in ("private", "public", "closed", "closed/file", ".")]
    for _ in range(2):
        assert as_nobody(*paths) == ["EACCES", "7", "EACCES", "EACCES", "3"]
        assert (mountpoint / "private").read_bytes() == b"content"
        assert (mountpoint / "closed/file").read_bytes() == b"content"
    assert stat.S_IMODE(cache.scratch.stat().st_mode) == 0o700
    assert as_nobody(cache.scratch) == ["EACCES"]


@needs_root
@pytest.mark.parametrize("is_promoted", [False, True])
def test_an_access_control_list_is_not_exceeded(tree, mounted, mountpoint, is_promoted):
    """Who may not read a file of the source may not through the mount, whatever its mode says."""
    mountpoint.chmod(0o755)
    for name, acl in {"public": DENIES_NOBODY, "private": GRANTS_NOBODY}.items():
        os.setxattr(tree / name, "system.posix_acl_access", acl)
    assert as_nobody(tree / "public", tree / "private") == ["EACCES", "7"]
    cache = mounted(tree, "--allow-other", at=mountpoint, env={"CACHEFS_NO_PROMOTE": "0" if is_promoted else "1"})
    paths = [mountpoint / name for name in ("public", "private", "closed", "closed/file")]
    for path in (paths[0], paths[1], paths[3]):
        assert path.read_bytes() == b"content"
    if is_promoted:
        os.listdir(mountpoint / "closed")
        os.listdir(mountpoint)
        wait_until(lambda: counters(cache)["promoted_files"] == 3, "all is promoted")
    assert as_nobody(*paths) == ["EACCES"] * 4  # a list that gives more than the mode does is not followed
    cache.unmount()


@needs_root
@pytest.mark.parametrize("is_promoted", [False, True])
def test_a_setuid_bit_has_no_effect(tree, mounted, mountpoint, is_promoted):
    """A program of root's that is run by another user stays that user's."""
    mountpoint.chmod(0o755)
    shutil.copy("/usr/bin/id", tree / "id")
    (tree / "id").chmod(0o4755)
    assert user_of(tree / "id") == 0, "on the source it has"
    cache = mounted(tree, "--allow-other", at=mountpoint, env={"CACHEFS_NO_PROMOTE": "0" if is_promoted else "1"})
    assert user_of(mountpoint / "id") == NOBODY
    assert stat.S_IMODE((mountpoint / "id").stat().st_mode) == 0o4755
    cache.unmount()


@needs_root
def test_without_allow_other_nobody_else_comes_in(tree, mounted, mountpoint):
    """Semantics 13: it is opt-in: another user gets EACCES at the mountpoint already, over the source too."""
    mountpoint.chmod(0o755)
    cache = mounted(tree, at=mountpoint)
    assert as_nobody(mountpoint, mountpoint / "public") == ["EACCES", "EACCES"]
    assert (mountpoint / "private").read_bytes() == b"content"
    cache.unmount()
    assert as_nobody(tree / "public") == ["7"]
    mounted(tree)
    assert as_nobody(tree / "public") == ["EACCES"]


def test_scratch_is_its_users_alone(tree, mounted, mountpoint):
    """Semantics 12: whatever the umask, nothing in scratch can be read by others."""
    before = os.umask(0)
    try:
        cache = mounted(tree, at=mountpoint)
    finally:
        os.umask(before)
    assert (mountpoint / "public").read_bytes() == b"content"
    for path in (cache.scratch, *cache.scratch.rglob("*")):
        status = path.lstat()
        assert status.st_uid == os.geteuid()
        if path.name in ("cachefs-scratch", "index.db", "index.db-wal", "index.db-shm") or path.is_socket():
            continue  # in a directory of 0700
        assert stat.S_IMODE(status.st_mode) & 0o077 == 0, path


def test_an_empty_directory_becomes_private(tree, mounted, mountpoint, tmp_path):
    """Semantics 12: an empty directory that is given as scratch is closed to others."""
    scratch = tmp_path / "given"
    scratch.mkdir(mode=0o755)
    mounted(tree, at=mountpoint, scratch=scratch)
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700


def make_link(path, other):
    path.symlink_to(other)


def make_foreign(path, _):
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)


def make_open(path, _):
    path.mkdir()
    path.chmod(0o777)
    (path / "cachefs-scratch").write_text('{"format": 1, "directory_made_by_cachefs": true}')


def make_full(path, _):
    path.mkdir(mode=0o700)
    (path / "thesis.tex").write_text("years of work")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_link, "symbolic link"),
        pytest.param(make_foreign, "owned by uid 65534", marks=needs_root),
        (make_open, "writable by others"),
        (make_full, "not of cachefs"),
    ],
)
def test_scratch_that_is_not_safely_ours_is_refused(tree, mountpoint, tmp_path, make, reason):
    """Semantics 12: a link, somebody else's directory, one that others may write, one with other things in it."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    make(tmp_path / "chosen", other)
    done = run_cachefs("mount", tree, mountpoint, "--scratch", tmp_path / "chosen", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert reason in done.stderr
    assert not os.path.ismount(mountpoint)
    assert os.listdir(other) == []


def test_purge_removes_what_is_ours_alone(tree, mounted, mountpoint, tmp_path):
    """Semantics 12: not while a mount lives; then all of ours, no file of others, nothing behind a link."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("precious")
    cache = mounted(tree, at=mountpoint)
    assert (mountpoint / "public").read_bytes() == b"content"
    refused = run_cachefs("purge", "--scratch", cache.scratch, check=False)
    assert refused.returncode == 1
    assert "in use" in refused.stderr
    assert (mountpoint / "public").read_bytes() == b"content"
    cache.unmount()
    (cache.scratch / "files/link").symlink_to(tmp_path / "precious")
    (cache.scratch / "mine").write_text("not of cachefs")
    run_cachefs("purge", "--scratch", cache.scratch)
    assert os.listdir(cache.scratch) == ["mine"]
    assert (tmp_path / "precious/file").read_text() == "precious"


def test_purge_leaves_a_directory_without_our_mark(tmp_path):
    """Semantics 12: a directory that does not carry our mark is not touched."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/data").write_text("data")
    done = run_cachefs("purge", "--scratch", tmp_path, check=False)
    assert done.returncode == 1
    assert (tmp_path / "files/data").read_text() == "data"


@needs_root
def test_purge_does_not_cross_a_mount(tree, mounted, mountpoint, tmp_path):
    """Semantics 12: what is mounted inside scratch is not ours to remove."""
    cache = mounted(tree, at=mountpoint)
    cache.unmount()
    inside = cache.scratch / "files/mounted"
    inside.mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("precious")
    subprocess.run(["mount", "--bind", tmp_path / "precious", inside], check=True)
    try:
        run_cachefs("purge", "--scratch", cache.scratch, check=False)
        assert (tmp_path / "precious/file").read_text() == "precious"
    finally:
        subprocess.run(["umount", "-l", inside], check=True)


def test_access_answers_as_for_the_source(tree, mounted, mountpoint):
    """Semantics 13: access(2) says of each file what it says of the source's, but that nothing may be written."""
    (tree / "program").write_text("#!/bin/sh\necho ran\n")
    (tree / "program").chmod(0o755)
    mounted(tree, at=mountpoint)
    for path in (*tree.iterdir(), tree):
        for mode in (os.F_OK, os.R_OK, os.X_OK, os.R_OK | os.X_OK):
            assert os.access(mountpoint / path.relative_to(tree), mode) == os.access(path, mode)
    assert not os.access(mountpoint / "public", os.W_OK)
    assert subprocess.run([mountpoint / "program"], check=True, capture_output=True).stdout == b"ran\n"
    if os.geteuid():
        (tree / "private").chmod(0)
        assert errno_of(open, mountpoint / "private", "rb") == "EACCES"
