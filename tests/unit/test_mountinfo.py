"""What is mounted where: odd paths come back as they are."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.mount.mountinfo import (
    FSTYPE,
    Mount,
    _unescape,
    containing_mount,
    find_mount,
    mount_name,
    read_mounts,
    resolve_mountpoint,
)
from tests.conftest import needs_root
from tests.unit.profile import FIXED

paths = st.binary(min_size=1, max_size=60).filter(lambda name: b"\0" not in name).map(lambda name: b"/" + name)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (b"/plain", "/plain"),
        (rb"/a\040b", "/a b"),
        (rb"/a\011b\012c", "/a\tb\nc"),
        (rb"/a\134040", r"/a\040"),
        (rb"/hash\043", "/hash#"),
        (b"/\xc3\xa4", "/ä"),
        (b"/\xff", "/\udcff"),
        (rb"/\377", "/\udcff"),
        (rb"/no\09octal", r"/no\09octal"),
    ],
)
def test_octal_escapes(field, text):
    assert _unescape(field) == text


@FIXED
@given(paths)
def test_the_kernels_escapes_are_undone(path):
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in path)
    assert os.fsencode(_unescape(escaped)) == path


@FIXED
@given(paths)
def test_a_mount_says_where_its_scratch_is(path):
    scratch = Path(os.fsdecode(path))
    name = mount_name(scratch, "0123456789ab")
    assert name.isascii()
    assert not set(name) & set(", \t\n\\")
    mount = Mount(Path("/mnt"), "0:1", FSTYPE, name)
    assert mount.lease == (scratch, "0123456789ab")


@pytest.mark.parametrize("scratch", ["/tmp/a b", "/tmp/a,b", "/tmp/a%20b", "/tmp/a@b:c", "/tmp/ä\n", "/tmp/\udcff"])
def test_odd_scratch_paths_come_back(scratch):
    assert Mount(Path("/mnt"), "0:1", FSTYPE, mount_name(Path(scratch), "ab12")).lease == (Path(scratch), "ab12")


@pytest.mark.parametrize(
    ("fstype", "name"),
    [("fuse.other", "cachefs:ab@/tmp"), (FSTYPE, "cachefs:@/tmp"), (FSTYPE, "cachefs:xy@/tmp"), (FSTYPE, "/dev/vda")],
)
def test_other_mounts_are_not_ours(fstype, name):
    assert Mount(Path("/mnt"), "0:1", fstype, name).lease is None


def test_every_mount_of_this_machine_is_read():
    mounts = read_mounts()
    with open("/proc/self/mountinfo", "rb") as file:
        assert len(mounts) == len(file.read().rstrip(b"\n").split(b"\n"))
    assert Path("/proc") in [mount.path for mount in mounts]
    assert find_mount(Path("/proc")).fstype == "proc"
    assert find_mount(Path("/proc/self")) is None
    assert containing_mount(Path("/proc/self/nothing")).path == Path("/proc")


def test_a_mountpoint_is_resolved_up_to_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "dead").symlink_to("/nowhere")
    assert resolve_mountpoint(tmp_path / "link" / "dead") == tmp_path.resolve() / "real" / "dead"
    monkeypatch.chdir(tmp_path)
    assert resolve_mountpoint(Path("link/x/../dead")) == tmp_path.resolve() / "real" / "dead"


ODD_NAMES = [b"a b", b"a\nb", b"a\tb", rb"a\040b", b"a#b", b"\xff\xfe", b"-", b"a\rb", b"a\x0bb", b"a\x0cb", b"\x0c-"]


@needs_root
@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_mount_with_an_odd_name_is_found(tmp_path, name):
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "cachefs-test", path], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounts cannot be made here: {made.stderr.decode()}")
    try:
        mount = find_mount(path)
        assert mount is not None
        assert (mount.fstype, mount.name) == ("tmpfs", "cachefs-test")
        assert containing_mount(path / "below").path == path
    finally:
        subprocess.run(["umount", path], check=True)


@needs_root
def test_a_mount_without_a_name_is_read(tmp_path):
    made = subprocess.run(["mount", "-t", "tmpfs", "", tmp_path], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounts cannot be made here: {made.stderr.decode()}")
    try:
        assert find_mount(tmp_path).fstype == "tmpfs"
        assert find_mount(tmp_path).name in ("", "none")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
