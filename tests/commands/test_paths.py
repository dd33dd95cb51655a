"""Where mounts may be: odd names, relative paths, links, mounts in mounts, several at once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.commands.places import Place, is_ours
from tests.harness import CACHEFS

ODD_NAMES = [
    "with space",
    "comma,rw,colon:semi;percent%2Fquote'\"",
    "back\\slash and \\040",
    "two\nlines\tand a tab",
    "größe-日本語-🗻",
    "-lazy",
    "[bold]markup :smile:",
    "x" * 200,
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: ascii(name[:20]))
def test_odd_names(place: Place, name: str):
    folder = place.make(name)
    source, at, scratch = (place.make(name, f"{part} {name}"[:250]) for part in ("source", "mountpoint", "scratch"))
    scratch.rmdir()
    place.write(source / "file", "content")
    assert place.do("mount", source, at, "--scratch", scratch) == ""
    assert place.read_as_user(at / "file") == b"content"
    status = place.status(at)
    assert (status["source"], status["mountpoint"], status["scratch"]) == (str(source), str(at), str(scratch))
    assert str(at) in [json.loads(line)["mountpoint"] for line in place.run("status", "--json").stdout.splitlines()]
    assert "resident files" in place.do("status", at)
    assert place.do("umount", at, "--purge").count("\n") == 1
    assert not is_ours(at)
    assert sorted(os.listdir(folder)) == sorted([source.name, at.name])


def test_names_that_are_not_utf_8(place: Place):
    raw = os.fsencode(place.path) + b"/caf\xe9"
    os.mkdir(raw)
    os.chown(raw, place.user.uid, place.user.gid)
    at = Path(os.fsdecode(raw))
    place.do("mount", place.source, at, "--scratch", place.scratch)
    assert place.read_as_user(at / "one") == b"1" * 1000
    assert place.status(at)["mountpoint"] == str(at)
    assert place.do("status", at)
    place.do("umount", at)
    place.refused("umount", at, says="nothing is mounted at")


def test_a_message_about_a_name_with_a_newline_is_one_line(place: Place):
    place.refused(
        "mount", place.path / "a\nb\x1b[31m", says=r"there is no source " + str(place.path) + r"/a\nb\x1b[31m"
    )


def test_status_for_people_shows_paths_in_full(place: Place):
    at = place.mount(place.source, place.make("m" * 100))
    text = place.do("status", at, env={"COLUMNS": "60"})
    assert "…" not in text
    place.do("umount", at)


def test_relative_paths(place: Place):
    assert place.do("mount", "source", "mountpoint", "--scratch", "scratch") == ""
    status = place.status(place.mountpoint)
    assert status["source"] == str(place.source)
    assert status["scratch"] == str(place.scratch)
    place.do("umount", "mountpoint/.", cwd=place.path)
    assert place.do("mount", "../source/./", "--scratch", "../scratch", cwd=place.mountpoint) == ""
    assert place.status(place.source)["mountpoint"] == str(place.source)
    inside = ["sh", "-c", 'cd source && exec "$@"', "sh", *CACHEFS, "status", "--json", "."]  # root may not go there
    answer = subprocess.check_output(inside, cwd=place.path, env=place.environ(), **place.user.identity)
    assert json.loads(answer)["source"] == str(place.source)
    place.do("umount", "source", "--purge")
    assert not place.scratch.exists()


def test_mounting_over_the_current_directory(place: Place):
    assert place.do("mount", ".", "--scratch", "../scratch", cwd=place.source) == ""
    assert place.read_as_user(place.source / "one") == b"1" * 1000
    place.do("umount", "source")


@pytest.mark.parametrize("target", ["source", "absolute", "another"])
def test_a_source_given_as_a_link(place: Place, target: str):
    link = place.path / "link"
    (place.path / "another").symlink_to("source")
    link.symlink_to(place.source if target == "absolute" else target)
    place.do("mount", link, "--scratch", place.scratch)
    assert is_ours(place.source)
    assert place.status(link)["mountpoint"] == str(place.source)
    assert place.read_as_user(link / "one") == b"1" * 1000
    place.refused("mount", link, "--scratch", place.scratch, says="is a mount of cachefs already")
    place.do("umount", link)
    assert not is_ours(place.source)


def test_a_link_to_a_mount_whose_daemon_died(place: Place):
    link = place.path / "link"
    link.symlink_to("source")
    place.mount()
    place.kill_daemon(place.source)
    place.refused("mount", link, "--scratch", place.scratch, says="is a mount of cachefs already")
    place.do("umount", link)
    assert not is_ours(place.source)


def test_a_source_and_a_mountpoint_given_as_links(place: Place):
    (place.path / "from").symlink_to("source")
    (place.path / "to").symlink_to("mountpoint")
    place.do("mount", "from", "to", "--scratch", place.scratch)
    status = place.status(place.path / "to")
    assert (status["source"], status["mountpoint"]) == (str(place.source), str(place.mountpoint))
    place.do("umount", "to")


def test_a_loop_of_links_is_no_mount(place: Place):
    (place.path / "loop").symlink_to("loop")
    place.refused("umount", place.path / "loop", says="nothing is mounted at")


def test_a_mount_whose_source_is_in_another(place: Place):
    outer = place.mount(place.source, place.mountpoint)
    inner = place.mount(outer / "sub", place.make("inner"))
    assert place.read_as_user(inner / "two") == b"2" * 2000
    done = place.run("umount", outer)
    assert done.returncode == 1
    assert "is busy: held by" in done.stderr
    place.do("umount", inner)
    place.do("umount", outer)


def test_a_mount_inside_another(place: Place):
    outer = place.mount(place.source, place.mountpoint)
    if place.user.uid != 0:
        says = f"mountpoint {outer}/sub is on a read-only file system, where only root can mount"
        place.refused("mount", place.make("third"), outer / "sub", "--scratch", place.scratch, says=says)
        place.do("umount", outer)
        return
    inner = place.mount(outer / "sub")
    assert place.read_as_user(inner / "two") == b"2" * 2000
    place.refused("umount", outer, says=(f"{outer} is busy", f"{inner} is mounted in it"))
    place.do("umount", inner)
    place.do("umount", outer)


def test_two_at_once_in_one_scratch(place: Place):
    first = place.mount(place.source, place.mountpoint)
    second = place.mount(place.source, place.make("second"))
    for at in first, second:
        assert place.read_as_user(at / "one") == b"1" * 1000
    reports = [json.loads(line) for line in place.run("status", "--json").stdout.splitlines()]
    here = [report for report in reports if report["scratch"] == str(place.scratch)]
    assert {report["mountpoint"] for report in here} == {str(first), str(second)}
    done = place.run("umount", first, "--purge")
    assert done.returncode == 1
    assert done.stderr == (
        f"cachefs: scratch {place.scratch} is in use by {second}: unmount first, with cachefs umount\n"
    )
    assert not is_ours(first)
    assert place.do("umount", second, "--purge").startswith(f"purged {place.scratch}: ")
    assert not place.scratch.exists()


def test_a_mountpoint_in_its_own_source(place: Place):
    says = f"mountpoint {place.source}/sub is inside the source {place.source}, so the mount would show itself"
    place.refused("mount", place.source, place.source / "sub", says=says)
    assert place.read_as_user(place.source / "sub" / "two") == b"2" * 2000


def test_a_mountpoint_above_its_source(place: Place):
    deep = place.make("above", "below")
    place.write(deep / "file", "deep")
    at = place.mount(deep, place.path / "above")
    assert place.read_as_user(at / "file") == b"deep"
    place.do("umount", at)
