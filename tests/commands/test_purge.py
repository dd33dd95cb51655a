"""purge removes what we stored and only that: whose it is, who uses it, and what others put into it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.commands.places import Place, is_ours
from tests.conftest import needs_root
from tests.harness import wait_until


@pytest.fixture
def filled(place: Place) -> Path:
    """A scratch directory with one resident file and no mount."""
    place.mount()
    place.read_as_user(place.source / "one")
    wait_until(lambda: place.status(place.source)["resident_files"] == 1, "the file is resident")
    place.do("umount", place.source)
    return place.scratch


class TestRefused:
    def test_a_directory_that_does_not_exist(self, place: Place):
        says = (f"there is no scratch directory {place.scratch}", "--scratch")
        place.refused("purge", "--scratch", place.scratch, says=says)

    def test_a_directory_that_we_did_not_make(self, place: Place):
        folder = place.make("data")
        place.write(folder / "thesis", "important")
        says = (f"{folder} is not a scratch directory of cachefs", "cachefs-scratch")
        place.refused("purge", "--scratch", folder, says=says)

    def test_an_empty_directory(self, place: Place):
        place.refused("purge", "--scratch", place.make("empty"), says="is not a scratch directory of cachefs")

    def test_a_file(self, place: Place):
        place.refused("purge", "--scratch", place.source / "one", says="is not a directory")

    def test_a_link_to_scratch(self, place: Place, filled: Path):
        link = place.path / "link"
        link.symlink_to(filled)
        place.refused("purge", "--scratch", link, says=f"scratch {link} is a symbolic link")

    def test_one_in_use(self, place: Place):
        place.mount()
        says = (f"scratch {place.scratch} is in use by {place.source}", "cachefs umount")
        place.refused("purge", "--scratch", place.scratch, says=says)
        assert place.read_as_user(place.source / "one") == b"1" * 1000
        place.do("umount", place.source)

    def test_one_of_another_user(self, ordinary_place: Place):
        place = ordinary_place
        place.refused("purge", "--scratch", "/usr", says="scratch /usr is owned by uid 0")

    def test_one_that_others_can_write_to(self, place: Place, filled: Path):
        filled.chmod(0o777)
        place.refused("purge", "--scratch", filled, says="is writable by others")

    def test_one_of_another_format(self, place: Place, filled: Path):
        place.write(filled / "cachefs-scratch", '{"format": 99, "directory_made_by_cachefs": true}')
        place.refused("purge", "--scratch", filled, says="format 99")


def test_after_a_crash(place: Place):
    place.mount()
    place.kill_daemon(place.source)
    assert place.do("purge", "--scratch", place.scratch) == f"purged {place.scratch}: 0 files, 0 B\n"
    assert not place.scratch.exists()
    place.do("umount", place.source)
    assert not is_ours(place.source)


def test_twice(place: Place, filled: Path):
    assert place.do("purge", "--scratch", filled) == f"purged {filled}: 1 file, 1000 B\n"
    place.refused("purge", "--scratch", filled, says="there is no scratch directory")


def test_removes_what_a_killed_writer_of_the_index_leaves(place: Place, filled: Path):
    for name in "index.db-journal", "index.db-wal", "index.db-shm":
        place.write(filled / name, "x")
    place.do("purge", "--scratch", filled)
    assert not filled.exists()


def test_goes_on_where_an_earlier_one_stopped(place: Place, filled: Path):
    subprocess.run(["rm", "-r", filled / "files", filled / "leases", filled / "index.db"], check=True)
    place.do("purge", "--scratch", filled)
    assert not filled.exists()


def test_follows_no_link(place: Place, filled: Path):
    victim = place.make("victim")
    place.write(victim / "thesis", "important")
    place.make("victim", "folder")
    (filled / "files" / "link-to-file").symlink_to(victim / "thesis")
    (filled / "files" / "link-to-folder").symlink_to(victim)
    (filled / "staging" / "dangling").symlink_to("nowhere")
    os.link(victim / "thesis", filled / "files" / "hard-link")
    place.do("purge", "--scratch", filled)
    assert not filled.exists()
    assert (victim / "thesis").read_text() == "important"
    assert (victim / "thesis").stat().st_nlink == 1
    assert sorted(os.listdir(victim)) == ["folder", "thesis"]


@pytest.mark.parametrize("name", ["files", "staging", "logs"])
def test_refuses_a_link_in_the_place_of_a_directory(place: Place, filled: Path, name: str):
    victim = place.make("victim")
    place.write(victim / "thesis", "important")
    subprocess.run(["rm", "-r", filled / name], check=True)
    (filled / name).symlink_to(victim)
    done = place.run("purge", "--scratch", filled)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cachefs: purge of {filled} stopped at {name}: ")
    assert done.stderr.count("\n") == 1
    assert (victim / "thesis").read_text() == "important"
    (filled / name).unlink()
    place.do("purge", "--scratch", filled)
    assert not filled.exists()


@needs_root
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
@pytest.mark.parametrize("where", ["files", "files/mounted"])
def test_crosses_no_mount(place: Place, filled: Path, kind: str, where: str):
    victim = place.make("victim")
    place.write(victim / "thesis", "important")
    target = filled / where
    target.mkdir(exist_ok=True)
    command = ["mount", "--bind", victim, target] if kind == "bind" else ["mount", "-t", "tmpfs", "none", target]
    subprocess.run(command, check=True)
    try:
        (target / "more").write_text("important")
        done = place.run("purge", "--scratch", filled)
        assert done.returncode == 1
        assert done.stderr == (
            f"cachefs: the purge stopped: {target.name} in scratch is a mount: unmount it and purge again\n"
        )
        assert (target / "more").read_text() == "important"
        assert (victim / "thesis").read_text() == "important"
    finally:
        subprocess.run(["umount", target], check=True)
    place.do("purge", "--scratch", filled)
    assert not filled.exists()


def test_keeps_what_is_not_ours(place: Place, filled: Path):
    place.write(filled / "thesis", "important")
    done = place.run("purge", "--scratch", filled)
    assert done.returncode == 0
    assert done.stdout.startswith(f"purged {filled}: 1 file")
    assert done.stderr == f"cachefs: warning: {filled} holds files that are not of cachefs and stay: thesis\n"
    assert os.listdir(filled) == ["thesis"]
    assert (filled / "thesis").read_text() == "important"


def test_of_the_default_scratch(place: Place):
    place.environment["TMPDIR"] = str(place.make("temporary"))
    place.do("mount", place.source)
    place.do("umount", place.source)
    scratch = place.path / "temporary" / f"cachefs-{place.user.uid}"
    assert place.do("purge") == f"purged {scratch}: 0 files, 0 B\n"
    assert not scratch.exists()
