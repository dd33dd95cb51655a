"""Machines that cannot mount: no device, no permission on it, no fusermount3. Made real in a mount namespace."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.commands.places import PRIVATE_MOUNTS, Place, is_ours
from tests.conftest import needs_root
from tests.harness import CACHEFS

pytestmark = needs_root

NEW_DEV = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
HIDE_FUSERMOUNT = f"mount --bind /dev/null {shutil.which('fusermount3')}"


def run_on_machine(place: Place, setup: str, *arguments: object, then: str = "true"):
    """Run a command as the place's user where the shell script `setup` was run by root; `then` is run after it."""
    script = f'{setup} || exit 99; {" ".join(place.user.become)} "$@"; status=$?; {then}; exit $status'
    command = [*PRIVATE_MOUNTS, script, "sh", *CACHEFS, *map(str, arguments)]
    return subprocess.run(
        command, cwd=place.path, env=place.environ(), capture_output=True, text=True, check=False, timeout=60
    )


def assert_refused(place: Place, setup: str, *says: str) -> None:
    before = place.snapshot()
    done = run_on_machine(place, setup, "mount", place.source, "--scratch", place.scratch)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("cachefs: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for words in says:
        assert words in done.stderr
    assert place.snapshot() == before


def test_no_device(place: Place):
    assert_refused(place, NEW_DEV, "there is no /dev/fuse", "modprobe fuse", "--device /dev/fuse")


def test_no_permission_on_the_device(ordinary_place: Place):
    setup = f"{NEW_DEV} && mknod -m 600 /dev/fuse c 10 229"
    assert_refused(ordinary_place, setup, "/dev/fuse cannot be opened: Permission denied", "0666")


def test_a_device_without_its_module(place: Place):
    setup = f"{NEW_DEV} && mknod -m 666 /dev/fuse c 10 253"
    assert_refused(place, setup, "/dev/fuse cannot be opened: No such device", "modprobe fuse")


def test_no_fusermount3(ordinary_place: Place):
    assert_refused(ordinary_place, HIDE_FUSERMOUNT, "there is no fusermount3", "install the package fuse3")


def test_no_fusermount3_on_the_path(ordinary_place: Place):
    place = ordinary_place
    env = {"PATH": str(place.make("empty"))}
    says = "there is no fusermount3"
    place.refused("mount", place.source, "--scratch", place.scratch, env=env, says=says)


def test_umount_without_fusermount3(ordinary_place: Place):
    place = ordinary_place
    at = place.mount()
    place.refused("umount", at, env={"PATH": str(place.make("empty"))}, says=("cannot unmount", "fuse3"))
    assert is_ours(at)
    place.do("umount", at)


def test_fusermount3_without_its_setuid_bit(ordinary_place: Place):
    place = ordinary_place
    helper = shutil.which("fusermount3")
    setup = (
        f"cp {helper} {place.path}/helper && chmod 755 {place.path}/helper && mount --bind {place.path}/helper {helper}"
    )
    done = run_on_machine(place, setup, "mount", place.source, "--scratch", place.scratch)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"cachefs: cannot mount at {place.source}: ")
    assert done.stderr.count("\n") == 1
    assert not place.scratch.exists(), list(place.scratch.rglob("*"))


def test_root_needs_no_fusermount3(tmp_path, place: Place):
    if place.user.uid != 0:
        pytest.skip("for root alone")
    cachefs = " ".join(CACHEFS)
    then = f"{cachefs} status {place.source} && {cachefs} umount {place.source} --purge"
    done = run_on_machine(place, HIDE_FUSERMOUNT, "mount", place.source, "--scratch", place.scratch, then=then)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"purged {place.scratch}" in done.stdout


def test_root_without_the_capability_to_mount(place: Place):
    if place.user.uid != 0:
        pytest.skip("for root alone")
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--", *CACHEFS]
    done = subprocess.run(
        [*command, "mount", place.source, "--scratch", place.scratch],
        env=place.environ(),
        cwd=place.path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"cachefs: cannot mount at {place.source}: ")
    assert "Operation not permitted" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not place.scratch.exists(), list(place.scratch.rglob("*"))


def test_allow_other_where_it_is_not_permitted(ordinary_place: Place):
    place = ordinary_place
    setup = f"mount --bind {place.write(place.path / 'fuse.conf', '# nothing')} /etc/fuse.conf"
    before = place.snapshot()
    done = run_on_machine(place, setup, "mount", place.source, "--scratch", place.scratch, "--allow-other")
    assert done.returncode == 1
    assert done.stderr.startswith("cachefs: --allow-other is not permitted")
    assert "user_allow_other" in done.stderr
    assert place.snapshot() == before
