"""The units as they are shipped, under a real systemd: readiness, crashes, configuration, boot order, hardening."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator

import pytest

from cachefs.mount.mountinfo import FSTYPE
from tests.harness import wait_until
from tests.jobs.systemd_lab import COMMAND, ROOT, SystemdLab, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"no systemd of its own: {REASON}"),
]

SYSTEM_UNIT = (ROOT / "systemd" / "cachefs@.service").read_text()
USER_UNIT = (ROOT / "systemd" / "user" / "cachefs@.service").read_text()
EXPOSURE = 36
"""What `systemd-analyze security` may say of the unit, in tenths."""
HIDING = sorted(set(re.findall(r"(\w+)=", SYSTEM_UNIT.partition("so there can be\n")[2].partition(" and no ")[0])))
"""The options that the unit's comment says cannot be used, whatever the version of systemd."""
VALUES = {
    "BindPaths": "/usr",
    "InaccessiblePaths": "/boot",
    "MountFlags": "slave",
    "ProcSubset": "pid",
    "ProtectProc": "invisible",
    "ProtectSystem": "full",
    "ReadOnlyPaths": "/usr",
    "TemporaryFileSystem": "/boot",
}

REMOTE_MOUNT = """
[Unit]
{unit}
[Mount]
What=/srv/remote
Where={where}
Type=none
Options=bind,_netdev
[Install]
WantedBy=remote-fs.target
"""
GATE = """
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'until [ -e /run/gate-is-open ]; do sleep 0.02; done'
"""
USER = "researcher"


def after(unit: str) -> str:
    return f"Requires={unit}\nAfter={unit}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdLab]:
    units = "/etc/systemd/system"
    lab = SystemdLab(
        tmp_path_factory.mktemp("systemd"),
        {
            f"{units}/cachefs@.service": SYSTEM_UNIT,
            "/etc/systemd/user/cachefs@.service": USER_UNIT,
            "/srv/remote/data/one": "1" * 1000,
            # what the boot itself starts: see test_boot_order
            f"{units}/slow-server.service": "[Service]\nType=oneshot\nExecStart=sleep 0.5\n",
            f"{units}/net-boot.mount": REMOTE_MOUNT.format(unit=after("slow-server.service"), where="/net/boot"),
            "/etc/cachefs/boot.env": "CACHEFS_SOURCE=/net/boot/data\n",
        },
        {
            f"{units}/remote-fs.target.wants/net-boot.mount": "../net-boot.mount",
            f"{units}/lab.target.wants/cachefs@boot.service": "../cachefs@.service",
        },
    )
    yield lab
    lab.end()
    assert not lab.cgroup.exists()
    assert not lab.folder.exists()


class Instance:
    """cachefs@NAME with a source of its own, unless `environment` names another, and what systemd says of it."""

    def __init__(self, lab: SystemdLab, name: str, user: str | None = None) -> None:
        self.lab = lab
        self.name = name
        self.unit = f"cachefs@{name}.service"
        self.user = user
        home = f"/home/{user}" if user else ""
        self.source = f"{home or '/srv'}/{name}"
        self.mountpoint = self.source
        self.configuration = f"{home}/.config/cachefs" if user else "/etc/cachefs"
        self.units = f"{home}/.config/systemd/user" if user else "/etc/systemd/system"
        self.expected_log: list[str] = []

    def set_up(self, **environment: str) -> None:
        self.lab.write(f"{self.source}/one", "1" * 1000)
        self.lab.write(f"{self.source}/sub/two", "2" * 2000)
        self.configure(**{"CACHEFS_SOURCE": self.source, **environment})
        self.mountpoint = environment.get("CACHEFS_MOUNTPOINT", self.mountpoint)

    def configure(self, **environment: str) -> None:
        lines = [f"{key}={value}\n" for key, value in environment.items() if value]
        self.lab.write(f"{self.configuration}/{self.name}.env", "".join(lines))

    def drop_in(self, section: str, *lines: str) -> None:
        text = "\n".join([f"[{section}]", *lines, ""])
        self.lab.write(f"{self.units}/{self.unit}.d/{section}.conf", text)
        self.systemctl("daemon-reload")

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        manager = ["--user"] if self.user else []
        return self.lab.run("systemctl", *manager, *arguments, check=check, user=self.user).stdout

    def start(self) -> None:
        self.systemctl("start", self.unit)

    def fails_to_start(self) -> None:
        """Start it, and wait until systemd has given up: not between two attempts."""
        self.systemctl("start", self.unit, check=False)
        self.wait_for(ActiveState="failed")

    def stop(self) -> None:
        self.systemctl("stop", self.unit)

    def signal(self, name: str) -> None:
        """Send a signal to the daemon itself, not to its workers."""
        self.systemctl("kill", "--signal", name, "--kill-who", "main", self.unit)

    def show(self, name: str) -> str:
        return self.systemctl("show", "--value", "--property", name, self.unit).strip()

    def wait_for(self, **properties: str) -> None:
        def has_come() -> bool:
            return all(self.show(name) == value for name, value in properties.items())

        wait_until(has_come, f"{self.unit} has {properties}")

    def is_mounted(self) -> bool:
        return self.fstype_at(self.mountpoint) == FSTYPE

    def fstype_at(self, path: str) -> str:
        """Of the topmost mount at `path`, in the mount namespace of PID 1; empty if there is none."""
        lines = self.lab.run("findmnt", "-no", "FSTYPE", "--mountpoint", path, check=False).stdout.split()
        return lines[-1] if lines else ""

    def read(self, name: str = "one") -> str:
        return self.lab.run("cat", f"{self.mountpoint}/{name}", user=self.user).stdout

    def status(self) -> dict[str, object]:
        return json.loads(self.lab.run("cachefs", "status", "--json", self.mountpoint, user=self.user).stdout)

    def journal(self, *options: str) -> list[str]:
        self.lab.run("journalctl", "--sync")
        field = "USER_UNIT" if self.user else "UNIT"
        lines = self.lab.run(
            "journalctl",
            "--output=cat",
            "--quiet",
            f"_SYSTEMD_{field}={self.unit}",
            *(options or ("+", f"{field}={self.unit}")),
        )
        return lines.stdout.splitlines()

    def said(self) -> list[str]:
        """What cachefs itself said."""
        return self.journal("_COMM=cachefs")

    def has_processes(self) -> bool:
        """Whether the unit's control group is still there: systemd removes it with the last process."""
        found = self.lab.run("find", "/sys/fs/cgroup", "-type", "d", "-name", self.unit)
        return bool(found.stdout.strip())

    def end(self) -> None:
        self.systemctl("stop", self.unit)
        self.systemctl("reset-failed", self.unit, check=False)
        assert not self.is_mounted()
        wait_until(lambda: not self.has_processes(), f"the processes of {self.unit} end")
        wrong = [line for line in self.said() if re.search(r" (WARNING|ERROR|CRITICAL) |Traceback|Fatal", line)]
        unexpected = [line for line in wrong if not any(re.search(pattern, line) for pattern in self.expected_log)]
        assert not unexpected, unexpected


@pytest.fixture
def make_instance(lab: SystemdLab, request: pytest.FixtureRequest) -> Iterator[Callable[..., Instance]]:
    """`make_instance(name, user=..., VARIABLE=...)`; each is stopped at the end and checked."""
    made: list[Instance] = []

    def make(name: str = "", user: str | None = None, **environment: str) -> Instance:
        title = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")
        instance = Instance(lab, name or title, user)
        made.append(instance)
        instance.set_up(**environment)
        return instance

    yield make
    for instance in made:
        instance.end()


@pytest.fixture
def instance(make_instance: Callable[..., Instance]) -> Instance:
    """One over a source of its own, not started."""
    return make_instance()


@pytest.fixture(scope="module")
def researcher(lab: SystemdLab) -> str:
    """An ordinary user inside, whose own systemd runs."""
    if not lab.run("sh", "-c", "ls /lib/*/security/pam_systemd.so /lib64/security/pam_systemd.so", check=False).stdout:
        pytest.skip("users have no systemd of their own without pam_systemd")
    lab.run("useradd", "--create-home", USER)
    if lab.run(COMMAND, "--version", check=False, user=USER).returncode:
        pytest.skip("this interpreter cannot be run by other users")
    lab.run("runuser", "-u", USER, "--", "mkdir", "-p", f"/home/{USER}/.local/bin")
    lab.run("ln", "-s", COMMAND, f"/home/{USER}/.local/bin/cachefs")
    lab.run("loginctl", "enable-linger", USER)
    is_running = ("systemctl", "--user", "is-system-running")
    wait_until(lambda: lab.run(*is_running, check=False, user=USER).stdout == "running\n", "the user's systemd runs")
    return USER


class TestServing:
    def test_serves_when_start_returns(self, instance: Instance):
        instance.start()
        assert (instance.show("ActiveState"), instance.show("SubState")) == ("active", "running")
        assert instance.is_mounted()
        assert instance.read("sub/two") == "2" * 2000
        assert str(instance.status()["pid"]) == instance.show("MainPID")

    def test_is_seen_by_the_whole_machine(self, lab: SystemdLab, instance: Instance):
        instance.start()
        spaces = {lab.run("readlink", f"/proc/{pid}/ns/mnt").stdout for pid in ("1", "self", instance.show("MainPID"))}
        assert len(spaces) == 1
        other = lab.run("systemd-run", "--quiet", "--pipe", "--wait", "cat", f"{instance.mountpoint}/one")
        assert other.stdout == "1" * 1000
        assert instance.status()["misses"] == 1

    def test_is_active_only_when_the_mount_answers(self, lab: SystemdLab, make_instance: Callable[..., Instance]):
        """The source is a FUSE file system whose daemon is stopped, as a server that does not answer."""
        lab.run("mkdir", "-p", "/net/hung", "/mnt/hung", "/srv/hung/data")
        lab.run("cachefs", "mount", "/srv/hung", "/net/hung", "--scratch", "/var/tmp/hung")
        instance = make_instance("hung", CACHEFS_SOURCE="/net/hung/data", CACHEFS_MOUNTPOINT="/mnt/hung")
        daemon = json.loads(lab.run("cachefs", "status", "--json", "/net/hung").stdout)["pid"]
        device = lab.run("findmnt", "-no", "MAJ:MIN", "/net/hung").stdout.strip().partition(":")[2]
        waiting = f"/sys/fs/fuse/connections/{device}/waiting"
        lab.run("kill", "-STOP", daemon)
        try:
            instance.systemctl("start", "--no-block", instance.unit)
            wait_until(lambda: lab.run("cat", waiting).stdout.strip() != "0", "the source is asked")
            assert instance.show("ActiveState") == "activating"
        finally:
            lab.run("kill", "-CONT", daemon)
        instance.wait_for(ActiveState="active")
        assert instance.is_mounted()
        instance.stop()
        lab.run("cachefs", "umount", "/net/hung", "--purge")

    def test_status_line(self, instance: Instance):
        instance.start()
        assert instance.show("StatusText") == f"serving {instance.mountpoint}: 0 files resident (0 B)"
        instance.read("one")
        instance.read("one")
        instance.wait_for(StatusText=f"serving {instance.mountpoint}: 1 file resident (1000 B), 50% hits")
        assert f'Status: "serving {instance.mountpoint}: 1 file' in instance.systemctl("status", instance.unit)

    def test_other_users_read_what_the_source_lets_them(self, lab: SystemdLab, instance: Instance):
        lab.run("chmod", "600", f"{instance.source}/sub/two")
        instance.start()
        assert lab.run("cat", f"{instance.mountpoint}/one", user="nobody").stdout == "1" * 1000
        refused = lab.run("cat", f"{instance.mountpoint}/sub/two", user="nobody", check=False)
        assert "Permission denied" in refused.stderr
        assert instance.read("sub/two") == "2" * 2000

    def test_restart_keeps_what_is_resident(self, instance: Instance):
        instance.start()
        instance.read()
        wait_until(lambda: instance.status()["resident_files"] == 1, "the file is resident")
        before = instance.show("MainPID")
        instance.systemctl("restart", instance.unit)
        assert instance.show("MainPID") != before
        assert instance.read() == "1" * 1000
        assert (instance.status()["hits"], instance.status()["misses"]) == (1, 0)

    def test_stop_unmounts_and_leaves_no_process(self, instance: Instance):
        instance.start()
        instance.read()
        assert instance.has_processes()
        instance.stop()
        assert (instance.show("ActiveState"), instance.show("Result")) == ("inactive", "success")
        assert not instance.is_mounted()
        assert not instance.has_processes()
        assert instance.read() == "1" * 1000
        assert [line.partition(" INFO ")[2] or line for line in instance.said()] == [
            f"cachefs: serving {instance.source}",
            "cachefs.mount.serve ending signal=SIGTERM",
        ]

    def test_stop_of_a_mount_in_use(self, lab: SystemdLab, instance: Instance):
        instance.start()
        with_a_shell_in(lab, instance.mountpoint)
        instance.stop()
        assert instance.show("Result") == "success"
        assert not instance.is_mounted()

    def test_unmounted_by_hand_it_stays_so(self, lab: SystemdLab, instance: Instance):
        instance.start()
        lab.run("cachefs", "umount", instance.mountpoint)
        instance.wait_for(ActiveState="inactive", Result="success")
        assert not instance.is_mounted()

    def test_clean_removes_what_is_resident(self, lab: SystemdLab, instance: Instance):
        instance.start()
        scratch = instance.status()["scratch"]
        assert scratch == f"/var/cache/cachefs/{instance.name}"
        assert lab.run("stat", "-c", "%a %U", scratch).stdout == "700 root\n"
        instance.stop()
        instance.systemctl("clean", "--what=cache", instance.unit)
        assert lab.run("ls", "-d", scratch, check=False).returncode


class TestCrashes:
    def test_a_killed_daemon_is_replaced(self, lab: SystemdLab, instance: Instance):
        instance.start()
        instance.read()
        wait_until(lambda: instance.status()["resident_files"] == 1, "the file is resident")
        with_a_shell_in(lab, instance.mountpoint)
        instance.signal("KILL")
        instance.wait_for(NRestarts="1", ActiveState="active")
        assert instance.read() == "1" * 1000
        assert (instance.status()["hits"], instance.status()["misses"]) == (1, 0)

    def test_a_crash_uncovers_the_source(self, instance: Instance):
        instance.drop_in("Service", "Restart=no")
        instance.start()
        instance.signal("KILL")
        instance.wait_for(ActiveState="failed", Result="signal")
        assert not instance.is_mounted()
        assert instance.read() == "1" * 1000
        assert not instance.has_processes()
        instance.stop()
        assert not instance.is_mounted()
        instance.start()
        assert instance.is_mounted()

    def test_a_hung_daemon_is_replaced(self, instance: Instance):
        instance.drop_in("Service", "WatchdogSec=1s")
        instance.expected_log = ["Fatal Python error: Aborted"]
        instance.start()
        before = instance.show("WatchdogTimestampMonotonic")
        wait_until(lambda: instance.show("WatchdogTimestampMonotonic") != before, "the daemon says that it lives")
        assert instance.show("NRestarts") == "0"
        instance.signal("STOP")
        instance.wait_for(NRestarts="1", ActiveState="active")
        assert instance.read() == "1" * 1000
        assert any("Failed with result 'watchdog'" in line for line in instance.journal())
        assert any("/mount/serve.py" in line for line in instance.said())  # where it hung

    def test_start_detaches_what_a_dead_daemon_left(self, lab: SystemdLab, instance: Instance):
        lab.run("cachefs", "mount", instance.source, "--scratch", "/var/tmp/dead", "--allow-other")
        with_a_shell_in(lab, instance.mountpoint)
        lab.run("kill", "-KILL", instance.status()["pid"])
        dead = ("ls", instance.mountpoint)
        wait_until(lambda: "endpoint is not connected" in lab.run(*dead, check=False).stderr, "the mount is dead")
        instance.start()
        assert instance.read() == "1" * 1000
        instance.stop()
        assert instance.fstype_at(instance.source) == ""
        lab.run("cachefs", "purge", "--scratch", "/var/tmp/dead")

    def test_start_leaves_a_living_mount_alone(self, lab: SystemdLab, instance: Instance):
        instance.drop_in("Service", "Restart=no")
        lab.run("cachefs", "mount", instance.source, "--scratch", "/var/tmp/alive")
        pid = instance.status()["pid"]
        instance.fails_to_start()
        assert instance.said() == [
            f"cachefs: {instance.source} is a mount of cachefs already: "
            f"unmount it with: cachefs umount {instance.source}"
        ]
        assert instance.status()["pid"] == pid
        assert instance.read() == "1" * 1000
        lab.run("cachefs", "umount", instance.source, "--purge")

    def test_a_source_that_comes_later(self, lab: SystemdLab, make_instance: Callable[..., Instance]):
        instance = make_instance("later", CACHEFS_SOURCE="/srv/comes-later")
        instance.mountpoint = "/srv/comes-later"
        instance.systemctl("start", instance.unit, check=False)
        assert any("there is no source /srv/comes-later" in line for line in instance.said())
        lab.write("/srv/comes-later/one", "late")
        instance.wait_for(ActiveState="active")
        assert instance.is_mounted()
        assert instance.read() == "late"

    def test_a_source_that_never_comes(self, make_instance: Callable[..., Instance]):
        instance = make_instance(CACHEFS_SOURCE="/srv/never-comes")
        instance.drop_in("Service", "RestartSec=10ms")
        instance.fails_to_start()
        lines = instance.journal()  # not what _COMM finds: journald looks that up, when the process may have ended
        assert sum("there is no source /srv/never-comes" in line for line in lines) == 10
        assert any("Start request repeated too quickly" in line for line in lines)


class TestConfiguration:
    def test_of_the_environment_file(self, make_instance: Callable[..., Instance]):
        instance = make_instance(CACHEFS_CAPACITY="64M", CACHEFS_POLICY="lru", CACHEFS_SCRATCH="/var/tmp/elsewhere")
        instance.start()
        status = instance.status()
        assert (status["capacity_bytes"], status["policy"]) == (64 << 20, "lru")
        assert status["scratch"] == "/var/tmp/elsewhere"

    def test_of_a_toml_file(self, lab: SystemdLab, make_instance: Callable[..., Instance]):
        lab.run("mkdir", "-p", "/mnt/by-toml")
        instance = make_instance("toml", CACHEFS_SOURCE="", CACHEFS_CONFIG="/etc/cachefs/toml.toml")
        lab.write(
            "/etc/cachefs/toml.toml",
            "source = '/srv/toml'\nmountpoint = '/mnt/by-toml'\ncapacity = '32M'\npolicy = 'lru'",
        )
        instance.mountpoint = "/mnt/by-toml"
        instance.start()
        status = instance.status()
        assert (status["source"], status["mountpoint"]) == ("/srv/toml", "/mnt/by-toml")
        assert (status["capacity_bytes"], status["policy"]) == (32 << 20, "lru")
        instance.drop_in("Service", "Restart=no")
        instance.signal("KILL")
        instance.wait_for(ActiveState="failed")
        assert not instance.is_mounted()  # the file says to ExecStopPost= where it was

    def test_of_all_instances(self, lab: SystemdLab, make_instance: Callable[..., Instance]):
        lab.write("/etc/cachefs/config.toml", "capacity = '16M'\npolicy = 'lru'\n")
        try:
            instance = make_instance(CACHEFS_POLICY="hold")
            instance.start()
            assert (instance.status()["capacity_bytes"], instance.status()["policy"]) == (16 << 20, "hold")
        finally:
            lab.run("rm", "/etc/cachefs/config.toml")

    @pytest.mark.parametrize(
        ("toml", "says"),
        [
            ("capacty = '1G'", "has an unknown key 'capacty': the keys are options in cachefs mount --help"),
            ("capacity = 'much'", "key capacity: 'much' is not a capacity: write a size"),
            ("capacity =", "is not TOML: Invalid value"),
        ],
        ids=["key", "value", "syntax"],
    )
    def test_that_is_wrong_is_one_clear_line(
        self, lab: SystemdLab, make_instance: Callable[..., Instance], toml: str, says: str
    ):
        instance = make_instance(CACHEFS_CONFIG="/etc/cachefs/wrong.toml")
        lab.write("/etc/cachefs/wrong.toml", toml)
        instance.fails_to_start()
        assert (instance.show("Result"), instance.show("ExecMainStatus")) == ("exit-code", "2")
        assert instance.show("NRestarts") == "0"
        (line,) = instance.said()
        assert line.startswith("cachefs: configuration file /etc/cachefs/wrong.toml")
        assert says in line
        assert line in instance.systemctl("status", "--full", instance.unit, check=False)

    def test_with_a_wrong_variable(self, make_instance: Callable[..., Instance]):
        instance = make_instance(CACHEFS_CAPACITY="much")
        instance.fails_to_start()
        assert instance.show("NRestarts") == "0"
        assert any("'CACHEFS_CAPACITY'): 'much' is not a capacity" in line for line in instance.said())

    def test_without_an_environment_file(self, lab: SystemdLab, instance: Instance):
        lab.run("rm", f"/etc/cachefs/{instance.name}.env")
        instance.drop_in("Service", "Restart=no")
        instance.fails_to_start()
        assert any("Failed to load environment files" in line for line in instance.journal())


class TestBootOrder:
    def test_of_the_boot_itself(self, lab: SystemdLab):
        boot = Instance(lab, "boot")
        boot.mountpoint = "/net/boot/data"
        boot.wait_for(ActiveState="active")
        assert boot.is_mounted()
        assert boot.read() == "1" * 1000
        assert boot.said() == ["cachefs: serving /net/boot/data"]  # at the first attempt
        remote, target = (
            int(boot.systemctl("show", "--value", "-p", "ActiveEnterTimestampMonotonic", unit))
            for unit in ("net-boot.mount", "remote-fs.target")
        )
        assert 0 < remote <= target <= int(boot.show("InactiveExitTimestampMonotonic"))
        boot.end()

    def test_it_waits_for_remote_file_systems(self, lab: SystemdLab, make_instance: Callable[..., Instance]):
        lab.write("/etc/systemd/system/gate.service", GATE)
        mount = REMOTE_MOUNT.format(unit=after("gate.service"), where="/net/slow")
        lab.write("/etc/systemd/system/net-slow.mount", mount)
        instance = make_instance("slow", CACHEFS_SOURCE="/net/slow/data")
        instance.mountpoint = "/net/slow/data"
        assert "remote-fs.target" in instance.show("After").split()
        lab.run("systemctl", "enable", "net-slow.mount")
        lab.run("systemctl", "stop", "remote-fs.target")  # so that it is started again, as at boot
        lab.run("systemctl", "start", "--no-block", "remote-fs.target", instance.unit)
        gate = ("systemctl", "show", "--value", "-p", "ActiveState", "gate.service")
        wait_until(lambda: lab.run(*gate).stdout == "activating\n", "the mount waits at the gate")
        jobs = lab.run("systemctl", "list-jobs", "--plain", "--no-legend").stdout
        assert {line.split()[1]: line.split()[3] for line in jobs.splitlines()} == {
            "gate.service": "running",
            "net-slow.mount": "waiting",
            "remote-fs.target": "waiting",
            instance.unit: "waiting",
        }
        assert instance.show("ActiveState") == "inactive"
        lab.write("/run/gate-is-open", "")
        instance.wait_for(ActiveState="active")
        assert instance.is_mounted()
        assert instance.read() == "1" * 1000
        instance.stop()
        lab.run("systemctl", "disable", "--now", "net-slow.mount")

    def test_a_drop_in_that_names_the_file_system(self, lab: SystemdLab, make_instance: Callable[..., Instance]):
        lab.write("/etc/systemd/system/net-late.mount", REMOTE_MOUNT.format(unit="", where="/net/late"))
        instance = make_instance("late", CACHEFS_SOURCE="/net/late/data")
        instance.mountpoint = "/net/late/data"
        instance.drop_in("Unit", "RequiresMountsFor=/net/late")
        assert "net-late.mount" in instance.show("After").split()
        assert instance.fstype_at("/net/late") == ""
        instance.start()
        assert instance.read() == "1" * 1000
        lab.run("systemctl", "stop", "net-late.mount")  # what stands on it is stopped first
        assert (instance.show("ActiveState"), instance.show("Result")) == ("inactive", "success")
        assert instance.fstype_at("/net/late") == ""

    def test_mounted_over_the_root_of_the_file_system(self, lab: SystemdLab, make_instance: Callable[..., Instance]):
        """Both mounts are one unit for systemd."""
        lab.write("/etc/systemd/system/net-root.mount", REMOTE_MOUNT.format(unit="", where="/net/root"))
        instance = make_instance("root", CACHEFS_SOURCE="/net/root")
        instance.mountpoint = "/net/root"
        instance.drop_in("Unit", "RequiresMountsFor=/net/root")
        instance.start()
        assert instance.is_mounted()
        assert instance.read("data/one") == "1" * 1000
        instance.signal("KILL")
        instance.wait_for(NRestarts="1", ActiveState="active")
        assert instance.read("data/one") == "1" * 1000
        instance.stop()
        assert instance.fstype_at("/net/root") not in ("", FSTYPE)
        lab.run("systemctl", "stop", "net-root.mount")
        assert instance.fstype_at("/net/root") == ""


class TestHardening:
    def test_verify_has_nothing_to_say(self, lab: SystemdLab):
        done = lab.run("systemd-analyze", "verify", "/etc/systemd/system/cachefs@.service")
        assert (done.stdout, done.stderr) == ("", "")

    def test_verify_has_nothing_to_say_of_the_user_unit(self, lab: SystemdLab, researcher: str):
        unit = "/etc/systemd/user/cachefs@.service"
        done = lab.run("systemd-analyze", "verify", "--user", unit, user=researcher)
        assert (done.stdout, done.stderr) == ("", "")

    def test_exposure(self, lab: SystemdLab, instance: Instance):
        instance.start()
        lab.run("systemd-analyze", "security", f"--threshold={EXPOSURE}", "--no-pager", instance.unit)

    def test_no_device_but_fuse(self, instance: Instance):
        """With /dev/fuse taken away from the list nothing can be mounted: the list is enforced."""
        instance.drop_in("Service", "Restart=no", "DeviceAllow=")
        instance.fails_to_start()
        assert any("/dev/fuse cannot be opened: Operation not permitted" in line for line in instance.said())

    @pytest.mark.parametrize("option", HIDING)
    def test_what_would_hide_the_mount(self, lab: SystemdLab, option: str):
        """Each option that the unit's comment excludes gives a mount namespace of its own."""
        command = ("systemd-run", "--quiet", "--pipe", "--wait")
        namespace = ("readlink", "/proc/self/ns/mnt")
        plain = lab.run(*command, *namespace).stdout
        assert plain == lab.run("readlink", "/proc/1/ns/mnt").stdout
        assert lab.run(*command, f"--property={option}={VALUES.get(option, 'yes')}", *namespace).stdout != plain
        assert f"\n{option}=" not in SYSTEM_UNIT

    def test_the_comment_names_them(self):
        assert len(HIDING) == 18
        assert {"DynamicUser", "PrivateMounts", *VALUES} <= set(HIDING)


class TestUserUnit:
    def test_start_and_stop(self, lab: SystemdLab, make_instance: Callable[..., Instance], researcher: str):
        instance = self.make(lab, make_instance, "mine")
        instance.start()
        assert instance.show("StatusText").startswith(f"serving {instance.mountpoint}: 0 files")
        assert instance.is_mounted()
        assert instance.read() == "1" * 1000
        assert instance.status()["scratch"] == f"/home/{researcher}/.cache/cachefs/mine"
        instance.stop()
        assert instance.show("Result") == "success"
        assert not instance.is_mounted()
        assert not instance.has_processes()

    def test_a_killed_daemon_is_replaced(
        self, lab: SystemdLab, make_instance: Callable[..., Instance], researcher: str
    ):
        instance = self.make(lab, make_instance, "killed")
        instance.start()
        instance.signal("KILL")
        instance.wait_for(NRestarts="1", ActiveState="active")
        assert instance.read() == "1" * 1000

    def test_hardening_would_keep_it_from_mounting(
        self, lab: SystemdLab, make_instance: Callable[..., Instance], researcher: str
    ):
        instance = self.make(lab, make_instance, "hardened")
        instance.drop_in("Service", "Restart=no", "NoNewPrivileges=yes")
        instance.fails_to_start()
        assert any("cannot mount at" in line for line in instance.said())

    def make(self, lab: SystemdLab, make_instance: Callable[..., Instance], name: str) -> Instance:
        instance = make_instance(name, user=USER)
        lab.run("chown", "-R", f"{USER}:", f"/home/{USER}")
        return instance


def with_a_shell_in(lab: SystemdLab, folder: str) -> None:
    """A process that has its working directory there, for as long as the lab is up."""
    lab.run("sh", "-c", f"cd {shlex.quote(folder)} && {{ setsid sleep infinity >/dev/null 2>&1 & }}")
