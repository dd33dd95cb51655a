"""SOURCE and MOUNTPOINT from the environment and the file, and `umount --if-dead`: what a service is started with."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.commands.places import Place, is_ours
from tests.harness import CACHEFS


@pytest.fixture
def other(own_place: Place) -> Place:
    """A place with a second source and a second mountpoint."""
    own_place.write(own_place.make("other") / "one", "other")
    own_place.make("elsewhere")
    return own_place


def variables(place: Place, source: str | None = None, mountpoint: str | None = None) -> dict[str, str]:
    named = {"CACHEFS_SOURCE": source, "CACHEFS_MOUNTPOINT": mountpoint}
    return {name: str(place.path / value) for name, value in named.items() if value}


def configuration(place: Place, **paths: str) -> dict[str, str]:
    lines = [f"{key} = '{place.path / value}'\n" for key, value in paths.items()]
    return {"CACHEFS_CONFIG": str(place.write(place.path / "options.toml", "".join(lines)))}


def mounted(place: Place) -> dict[str, str]:
    """Which of the directories are mounts of ours, and of what."""
    found = {}
    for path in place.path.iterdir():
        if is_ours(path):
            found[path.name] = str(place.status(path)["source"]).removeprefix(f"{place.path}/")
    return found


class TestMount:
    @pytest.mark.parametrize(
        ("environment", "file", "arguments", "expected"),
        [
            (("source", None), {}, (), {"source": "source"}),
            (("source", "mountpoint"), {}, (), {"mountpoint": "source"}),
            ((), {"source": "source"}, (), {"source": "source"}),
            ((), {"source": "source", "mountpoint": "mountpoint"}, (), {"mountpoint": "source"}),
            # the nearest wins
            (("source", "mountpoint"), {}, ("other",), {"other": "other"}),
            (("source", "mountpoint"), {}, ("other", "elsewhere"), {"elsewhere": "other"}),
            ((), {"source": "source", "mountpoint": "mountpoint"}, ("other",), {"other": "other"}),
            (("other", None), {"source": "source", "mountpoint": "mountpoint"}, (), {"other": "other"}),
            (("other", "elsewhere"), {"source": "source", "mountpoint": "mountpoint"}, (), {"elsewhere": "other"}),
            # a mountpoint that is named nearer than its source
            ((None, "elsewhere"), {"source": "source", "mountpoint": "mountpoint"}, (), {"elsewhere": "source"}),
            # a mountpoint without a source of its own does not move the mount that is asked for
            ((None, "mountpoint"), {}, ("other",), {"other": "other"}),
        ],
    )
    def test_from_wherever(self, other: Place, environment, file, arguments, expected):
        env = variables(other, *environment)
        if file:
            env |= configuration(other, **file)
        paths = [other.path / argument for argument in arguments]
        other.do("mount", *paths, "--scratch", other.scratch, env=env)
        assert mounted(other) == expected
        other.do("umount", *(() if not arguments else (other.path / next(iter(expected)),)), env=env)
        assert mounted(other) == {}

    def test_nothing_says_the_source(self, own_place: Place):
        says = "Missing argument 'SOURCE'"
        own_place.refused("mount", code=2, says=says)
        own_place.refused("mount", env=variables(own_place, None, "mountpoint"), code=2, says=says)
        own_place.refused("mount", env={"CACHEFS_SOURCE": ""}, code=2, says=says)

    @pytest.mark.parametrize("key", ["source", "mountpoint"])
    @pytest.mark.parametrize("value", ["5", "''", "true", "['/a']"])
    def test_nonsense_in_the_file(self, own_place: Place, key: str, value: str):
        file = own_place.write(own_place.path / "options.toml", f"{key} = {value}\n")
        arguments = () if key == "source" else (own_place.source,)
        says = f"configuration file {file}, key {key}: "
        own_place.refused("--config", file, "mount", *arguments, code=2, says=says)

    def test_they_are_keys_for_every_command(self, own_place: Place):
        env = configuration(own_place, source="source", mountpoint="mountpoint", scratch="scratch")
        own_place.do("mount", env=env)
        own_place.do("umount", env=env)
        assert own_place.do("purge", env=env).startswith("purged ")


class TestUmount:
    def test_an_argument_wins(self, other: Place):
        env = {**variables(other, "other"), **configuration(other, source="source", mountpoint="mountpoint")}
        other.do("mount", "--scratch", other.path / "first", env=env)
        other.do("mount", other.source, "--scratch", other.path / "second")
        other.do("umount", other.source, env=env)
        assert mounted(other) == {"other": "other"}
        other.do("umount", env=env)

    def test_nothing_says_the_mountpoint(self, own_place: Place):
        own_place.refused("umount", code=2, says="Missing argument 'MOUNTPOINT'")
        own_place.refused("umount", env=configuration(own_place), code=2, says="Missing argument 'MOUNTPOINT'")

    def test_only_what_it_needs_of_the_file_must_be_right(self, own_place: Place):
        own_place.mount()
        file = own_place.write(own_place.path / "options.toml", f"capacty = 5\nsource = '{own_place.source}'\n")
        own_place.do("--config", file, "umount")
        file.write_text("mountpoint = 5")
        own_place.refused("--config", file, "umount", code=2, says=f"configuration file {file}, key mountpoint: ")


class TestIfDead:
    def test_a_dead_mount_is_detached_also_in_use(self, place: Place):
        place.mount()
        command = ["sh", "-c", "cd source && echo && read wait"]
        with subprocess.Popen(
            command, cwd=place.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **place.user.identity
        ) as holder:
            assert holder.stdout.readline() == b"\n"
            place.kill_daemon(place.source)
            assert place.do("umount", "--if-dead", place.source) == ""
            holder.communicate(b"\n")
        assert not is_ours(place.source)
        assert (place.source / "one").read_bytes() == b"1" * 1000

    def test_a_dead_mount_of_which_the_kernel_still_knows_everything(self, own_place: Place):
        """stat(2) is answered from what it remembers, so it does not show that the daemon is dead."""
        at = own_place.mount()
        os.stat(at)
        own_place.kill_daemon(at)
        own_place.do("umount", "--if-dead", at)
        assert not is_ours(at)

    def test_a_living_mount_is_left_alone(self, place: Place):
        at = place.mount()
        assert place.do("umount", "--if-dead", at) == ""
        assert place.read_as_user(at / "one") == b"1" * 1000
        place.do("umount", at)

    def test_a_mount_that_hangs_is_left_alone(self, own_place: Place):
        at = own_place.mount()
        pid = int(own_place.status(at)["pid"])
        os.kill(pid, signal.SIGSTOP)
        try:
            assert own_place.do("umount", "--if-dead", at) == ""
        finally:
            os.kill(pid, signal.SIGCONT)
        assert is_ours(at)
        own_place.do("umount", at)

    def test_another_users_mount_is_left_alone(self, ordinary_place: Place):
        """Root may not look into that user's scratch or mount, and must not take it for dead."""
        if os.geteuid() != 0:
            pytest.skip("needs root")
        at = ordinary_place.mount()
        done = subprocess.run(
            [*CACHEFS, "umount", "--if-dead", at], env=ordinary_place.environ(), capture_output=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert is_ours(at)
        ordinary_place.do("umount", at)

    @pytest.mark.parametrize("place_of", ["source", "missing"])
    def test_nothing_mounted_is_nothing_to_say(self, own_place: Place, place_of: str):
        assert own_place.do("umount", "--if-dead", own_place.path / place_of) == ""

    def test_a_configuration_that_is_wrong_is_for_mount_to_say(self, own_place: Place):
        file = own_place.write(own_place.path / "options.toml", "= nonsense")
        assert own_place.do("--config", file, "umount", "--if-dead") == ""
        assert own_place.do("umount", "--if-dead") == ""

    def test_it_can_purge(self, own_place: Place):
        at = own_place.mount()
        own_place.kill_daemon(at)
        assert own_place.do("umount", "--if-dead", "--purge", at).startswith("purged ")
        assert not own_place.scratch.exists()
