"""warm: fetches what it is told to, says how far it is, and survives interruption."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cachefs.demo.slow_source import SlowSource
from tests.commands.places import Place
from tests.harness import on_a_terminal, wait_until

FILES = 30


@pytest.fixture
def many(place: Place) -> Place:
    """A place whose source has a directory of FILES files of 1,000 bytes besides."""
    folder = place.make("source", "many")
    for number in range(FILES):
        place.write(folder / f"{number}", f"{number:4}" * 250)
    return place


def resident(place: Place) -> int:
    return int(place.status(place.source)["resident_files"])


def test_everything(many: Place):
    many.mount()
    assert many.do("warm", many.source) == f"{many.source}: {FILES + 2} files resident, 32.2 KiB\n"
    assert resident(many) == FILES + 2
    status = many.status(many.source)
    assert (status["fetches"], status["hits"], status["misses"]) == (FILES + 2, 0, 0)
    assert many.do("warm", many.source).startswith(f"{many.source}: {FILES + 2} files resident")
    assert many.status(many.source)["fetches"] == FILES + 2
    many.do("umount", many.source)


@pytest.mark.parametrize(("paths", "expected"), [(["many"], FILES), (["one"], 1), (["one", "sub/two"], 2)])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_paths(many: Place, paths: list[str], expected: int, kind: str):
    many.mount()
    given = paths if kind == "relative" else [many.source / path for path in paths]
    many.do("warm", many.source, *given)
    assert resident(many) == expected
    many.do("umount", many.source)


class TestRefused:
    def test_a_path_outside(self, place: Place):
        place.mount()
        place.refused("warm", place.source, "../elsewhere", code=2, says="../elsewhere is not inside")
        place.refused("warm", place.source, "/etc", code=2, says="/etc is not inside")
        place.do("umount", place.source)

    def test_a_path_that_does_not_exist(self, place: Place):
        place.mount()
        done = place.run("warm", place.source, "nothing")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "cachefs: nothing: No such file or directory\n"
        place.do("umount", place.source)

    def test_no_mount(self, place: Place):
        place.refused("warm", place.source, says="nothing is mounted")

    def test_a_dead_mount(self, place: Place):
        place.mount()
        place.kill_daemon(place.source)
        done = place.run("warm", place.source)
        assert done.returncode == 1
        assert "the daemon of this mount has died" in done.stderr
        place.do("umount", place.source)


def test_what_cannot_be_fetched_is_said(many: Place):
    (many.source / "many" / "7").chmod(0)
    many.mount()
    done = many.run("warm", many.source)
    if many.user.uid == 0:
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        assert "1 file could not be fetched" in done.stderr
        assert resident(many) == FILES + 1
    many.run("umount", many.source)


@contextmanager
def mounted_slow(place: Place, latency: float) -> Iterator[SlowSource]:
    """FILES files more on a slow source, mounted with nothing resident."""
    for number in range(FILES):
        place.write(place.source / f"{number}", "x" * 1000)
    place.make("remote")
    with SlowSource(place.source, place.path / "remote", latency=latency) as slow:
        place.do("mount", slow.path, place.mountpoint, "--scratch", place.scratch, "--prefetch", "off")
        yield slow
        place.do("umount", place.mountpoint)


def test_interrupted_and_gone_on_with(own_place: Place):
    place = own_place
    with mounted_slow(place, 0.1) as slow:
        process = place.start("warm", place.mountpoint, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_until(lambda: place.status(place.mountpoint)["resident_files"], "something has come")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode == 130
        assert said == "cachefs: interrupted: what was fetched stays\n"
        slow.set(latency=0)
        place.do("warm", place.mountpoint)
        assert place.status(place.mountpoint)["fetches"] == FILES + 2


def test_a_bar_on_a_terminal(own_place: Place):
    with mounted_slow(own_place, 0.02):
        shown, printed = on_a_terminal("warm", own_place.mountpoint, env=own_place.environ())
    assert printed.startswith(f"{own_place.mountpoint}: {FILES + 2} files resident")
    assert f"of {FILES + 2} files".encode() in shown
