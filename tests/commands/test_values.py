"""What an option accepts, where its value may come from and which of them wins, and the help."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.cli import COMMANDS
from tests.commands.places import Place

ENVIRONMENT = {
    "capacity": ("CACHEFS_CAPACITY", "much"),
    "policy": ("CACHEFS_POLICY", "fifo"),
    "prefetch": ("CACHEFS_PREFETCH", "never"),
    "metadata-ttl": ("CACHEFS_METADATA_TTL", "-1"),
    "source-timeout": ("CACHEFS_SOURCE_TIMEOUT", "nan"),
    "allow-other": ("CACHEFS_ALLOW_OTHER", "perhaps"),
    "log-level": ("CACHEFS_LOG_LEVEL", "loud"),
}
WRONG_SIZES = ["much", "", "-5", "-5G", "300X", "1e3", "nan", "inf", "5G5", "150%", "-1%", "%", "0x10", "G", "1.2.3G"]
WRONG_SECONDS = ["soon", "", "-1", "nan", "inf", "1h", "1,5"]


@pytest.mark.parametrize("size", WRONG_SIZES)
def test_nonsense_sizes(own_place: Place, size: str):
    says = ("--capacity", f"'{size}' is", "write a s")
    own_place.refused("mount", own_place.source, "--scratch", own_place.scratch, "--capacity", size, code=2, says=says)


def test_a_size_of_thousands_of_digits(own_place: Place):
    own_place.refused("mount", own_place.source, "--capacity", "9" * 5000, code=2, says="--capacity")


@pytest.mark.parametrize("option", ["--metadata-ttl", "--source-timeout"])
@pytest.mark.parametrize("seconds", WRONG_SECONDS)
def test_nonsense_numbers(own_place: Place, option: str, seconds: str):
    says = (option, f"'{seconds}' is not a number of seconds")
    own_place.refused("mount", own_place.source, "--scratch", own_place.scratch, option, seconds, code=2, says=says)


@pytest.mark.parametrize("option", ["--policy", "--prefetch", "--log-level"])
def test_nonsense_choices(own_place: Place, option: str):
    own_place.refused("mount", own_place.source, option, "nonsense", code=2, says=(option, "'nonsense' is not"))


def test_unknown_option_and_command(own_place: Place):
    own_place.refused("mount", own_place.source, "--capacty", "1G", code=2, says=("--capacty", "--capacity"))
    own_place.refused("mnt", own_place.source, code=2, says="'mnt'")


@pytest.mark.parametrize("size", ["1000P", "8E+1", "9" * 40])
def test_capacity_larger_than_the_disk(own_place: Place, size: str):
    arguments = ("mount", own_place.source, "--scratch", own_place.scratch, "--capacity", size)
    if size != "1000P":
        own_place.refused(*arguments, code=2, says="is not a capacity")
    else:
        own_place.refused(*arguments, says=("is larger than the disk of scratch", "--capacity"))


def test_largest_seconds(own_place: Place):
    at = own_place.mount(own_place.source, "--metadata-ttl", "1e300", "--source-timeout", "1e300")
    assert own_place.read_as_user(at / "one") == b"1" * 1000
    own_place.do("umount", at)


@pytest.mark.parametrize(("written", "size"), [("1.5M", 1572864), ("2 GiB", 2 << 30), ("4096", 4096), ("1kB", 1024)])
def test_sizes(own_place: Place, written: str, size: int):
    at = own_place.mount(own_place.source, "--capacity", written)
    assert own_place.status(at)["capacity_bytes"] == size
    own_place.do("umount", at)


@pytest.mark.parametrize("option", ENVIRONMENT)
def test_wrong_value_in_the_environment(own_place: Place, option: str):
    variable, value = ENVIRONMENT[option]
    own_place.refused("mount", own_place.source, env={variable: value}, code=2, says=(f"--{option}", variable, value))


class TestFile:
    def refused(self, place: Place, content: str | bytes, *says: str, command: str = "mount") -> None:
        file = place.write(place.path / "options.toml", content)
        arguments = (place.source,) if command == "mount" else ()
        line = place.refused("--config", file, command, *arguments, code=2, says=(str(file), *says))
        assert line.startswith("cachefs: configuration file ")

    def test_unknown_key(self, own_place: Place):
        self.refused(own_place, "capacty = '1G'", "unknown key 'capacty'", "cachefs mount --help")
        self.refused(own_place, "capacty = '1G'", "unknown key 'capacty'", command="purge")
        self.refused(own_place, "[mount]\ncapacity = '1G'", "unknown key 'mount'")

    @pytest.mark.parametrize(
        "line",
        [
            "capacity = true",
            "capacity = [1, 2]",
            "capacity = 2024-01-01",
            "capacity = 'much'",
            "capacity = -1",
            "policy = 3",
            "policy = 'fifo'",
            "prefetch = {a = 1}",
            "metadata-ttl = 'soon'",
            "metadata-ttl = nan",
            "source-timeout = false",
            "allow-other = 'perhaps'",
            "allow-other = 2",
            "log-level = 'loud'",
            "scratch = 5",
            "scratch = ''",
            "scratch = ['a']",
        ],
    )
    def test_wrong_type_or_value(self, own_place: Place, line: str):
        self.refused(own_place, line, f"key {line.partition(' ')[0]}: ")

    @pytest.mark.parametrize("content", ["capacity = ", "= 3", "[", "policy = hold", b"scratch = '\xff'", b"\0"])
    def test_broken(self, place: Place, content: str | bytes):
        self.refused(place, content, "is not TOML")

    def test_missing(self, own_place: Place):
        says = f"configuration file {own_place.path}/no.toml cannot be read: No such file"
        own_place.refused("--config", own_place.path / "no.toml", "mount", own_place.source, code=2, says=says)
        own_place.refused(
            "mount", own_place.source, env={"CACHEFS_CONFIG": str(own_place.path / "no.toml")}, code=2, says=says
        )

    def test_directory(self, own_place: Place):
        says = "cannot be read: Is a directory"
        own_place.refused("--config", own_place.path, "mount", own_place.source, code=2, says=says)

    def test_unreadable(self, ordinary_place: Place):
        place = ordinary_place
        file = place.write(place.path / "options.toml", "")
        file.chmod(0)
        place.refused("--config", file, "mount", place.source, code=2, says="cannot be read: Permission denied")

    def test_its_faults_do_not_keep_from_help_status_and_umount(self, own_place: Place):
        at = own_place.mount()
        env = {"CACHEFS_CONFIG": str(own_place.write(own_place.path / "options.toml", "nonsense"))}
        assert "Usage:" in own_place.do("mount", "--help", env=env)
        assert own_place.do("status", at, env=env)
        own_place.do("umount", at, env=env)

    def test_is_found_in_the_home_directory(self, own_place: Place):
        own_place.make("home", ".config", "cachefs")
        own_place.write(own_place.path / "home" / ".config" / "cachefs" / "config.toml", "policy = 'lru'")
        own_place.environment["HOME"] = str(own_place.path / "home")
        own_place.environment["XDG_CONFIG_HOME"] = ""
        at = own_place.mount()
        assert own_place.status(at)["policy"] == "lru"
        own_place.do("umount", at)

    def test_unreachable_home_is_no_configuration(self, own_place: Place):
        own_place.environment["XDG_CONFIG_HOME"] = "/dev/null"
        own_place.do("umount", own_place.mount())


def test_command_line_wins_over_environment_over_file(place: Place):
    file = place.write(place.path / "options.toml", "policy = 'lru'\ncapacity = 1048576\nallow_other = false")
    at = place.mount(env={"CACHEFS_CONFIG": str(file)})
    status = place.status(at)
    assert (status["policy"], status["capacity_bytes"]) == ("lru", 1 << 20)
    place.do("umount", at)
    env = {"CACHEFS_CONFIG": str(file), "CACHEFS_CAPACITY": "2M", "CACHEFS_POLICY": "hold"}
    at = place.mount(env=env)
    status = place.status(at)
    assert (status["policy"], status["capacity_bytes"]) == ("hold", 2 << 20)
    place.do("umount", at)
    at = place.mount(place.source, "--capacity", "3M", "--policy", "lru", env=env)
    status = place.status(at)
    assert (status["policy"], status["capacity_bytes"]) == ("lru", 3 << 20)
    place.do("umount", at)


def test_scratch_from_environment_and_file(own_place: Place):
    file = own_place.write(own_place.path / "options.toml", f"scratch = '{own_place.path}/by-file'")
    own_place.do("--config", file, "mount", own_place.source)
    assert own_place.status(own_place.source)["scratch"] == f"{own_place.path}/by-file"
    own_place.do("umount", own_place.source)
    own_place.do("--config", file, "purge")
    assert not Path(own_place.path / "by-file").exists()
    env = {"CACHEFS_CONFIG": str(file), "CACHEFS_SCRATCH": str(own_place.path / "by-environment")}
    own_place.do("mount", own_place.source, env=env)
    assert own_place.status(own_place.source)["scratch"] == f"{own_place.path}/by-environment"
    own_place.do("umount", own_place.source, "--purge")


class TestDefaultScratch:
    @pytest.mark.parametrize("variable", ["JOB_ID", "SLURM_JOB_ID"])
    def test_of_a_job(self, place: Place, variable: str):
        env = {"TMPDIR": str(place.make("job")), variable: "17"}
        self.mount_at(place, env, place.path / "job" / "cachefs")

    def test_of_a_user(self, place: Place):
        env = {"TMPDIR": str(place.make("temporary")), "JOB_ID": "", "SLURM_JOB_ID": ""}
        self.mount_at(place, env, place.path / "temporary" / f"cachefs-{place.user.uid}")

    def test_of_a_job_whose_temporary_directory_is_everybodys(self, ordinary_place: Place, tmp_path: Path):
        if os.geteuid() != 0:
            pytest.skip("needs root to make a directory of somebody else")
        shared = tmp_path / "shared"
        shared.mkdir()
        shared.chmod(0o1777)
        env = {"TMPDIR": str(shared), "SLURM_JOB_ID": "17"}
        self.mount_at(ordinary_place, env, shared / f"cachefs-{ordinary_place.user.uid}")

    def test_of_a_job_whose_temporary_directory_is_missing(self, place: Place):
        env = {"TMPDIR": str(place.path / "missing"), "JOB_ID": "17"}
        place.refused("mount", place.source, env=env, says=f"{place.path}/missing does not exist")

    def mount_at(self, place: Place, env: dict[str, str], scratch: Path) -> None:
        assert place.do("mount", place.source, env=env) == ""
        assert place.status(place.source)["scratch"] == str(scratch)
        assert scratch.stat().st_mode & 0o777 == 0o700
        place.do("umount", place.source)
        assert place.do("purge", env=env).startswith(f"purged {scratch}")
        assert not scratch.exists()


class TestHelp:
    @pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
    def test_of_each_command(self, own_place: Place, command: tuple[str, ...]):
        text = own_place.do(*command, "--help", env={"COLUMNS": "100"})
        assert own_place.do(*command, "-h", env={"COLUMNS": "100"}) == text
        assert text.startswith(f"Usage: {' '.join(('cachefs', *command))} ")
        assert "--help" in text
        assert max(map(len, text.splitlines())) <= 100

    def test_of_the_program_describes_each_command_in_full(self, own_place: Place):
        text = own_place.do("--help", env={"COLUMNS": "80"})
        lines = [line for line in text.splitlines() if line.split()[:1] and line.split()[0] in COMMANDS]
        assert [line.split()[0] for line in lines] == list(COMMANDS)
        assert not [line for line in lines if line.endswith("...")]

    def test_of_mount_names_the_variables(self, own_place: Place):
        text = own_place.do("mount", "--help")
        for option, (variable, _) in ENVIRONMENT.items():
            assert f"--{option}" in text
            assert variable in text

    def test_version(self, own_place: Place):
        assert own_place.do("--version").startswith("cachefs, version ")
