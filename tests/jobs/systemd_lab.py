"""A real systemd as PID 1 of namespaces of its own, over an overlay in memory of this machine's root.

Nothing of the machine is written: systemd-tmpfiles empties /tmp at boot, units are enabled in /etc, journals go to
/var, and all of that is the overlay's. The machine's files, this interpreter and the package among them, are seen
inside at their own paths. With its PID 1 everything of the lab ends: processes, mounts and the overlay's memory.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil

from cachefs.mount.mountinfo import read_mounts
from tests.harness import wait_until

SYSTEMD = Path("/lib/systemd/systemd")
ROOT = Path(__file__).parents[2]
COMMAND = Path("/usr/local/bin/cachefs")
_BOOT_SECONDS = 60.0

_BOOT = r"""
set -eu
lab=$1; shift
mount --make-rprivate /
mount -t tmpfs -o size=1g,mode=755 tmpfs "$lab/overlay"
mkdir "$lab/overlay/upper" "$lab/overlay/work" "$lab/overlay/root"
root=$lab/overlay/root
mount -t overlay -o "lowerdir=/,upperdir=$lab/overlay/upper,workdir=$lab/overlay/work" overlay "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
for needed; do  # what lies on another file system than the machine's root
  [ -n "$(ls -A "$root$needed" 2>/dev/null)" ] && continue
  mkdir -p "$root$needed"
  mount --bind "$needed" "$root$needed"
  mount -o remount,bind,ro "$root$needed"
done
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
while read -r name major minor; do mknod -m 666 "$root/dev/$name" c "$major" "$minor"; done <<END
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
fuse 10 229
END
ln -s /proc/self/fd "$root/dev/fd"
for n in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${n%:*}" "$root/dev/${n#*:}"; done
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"

# of the machine's own services none starts
rm -rf "$root/etc/systemd" "$root"/etc/rc?.d "$root/etc/init.d" "$root/etc/cachefs" "$root/var/log/journal"
units=$root/etc/systemd/system
mkdir -p "$units" "$root/var/log/journal"
: >"$root/etc/fstab"
for name in systemd-udevd.service systemd-udev-trigger.service systemd-sysctl.service systemd-modules-load.service \
  systemd-timesyncd.service systemd-random-seed.service systemd-tmpfiles-setup-dev.service getty.target \
  dev-hugepages.mount dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
  proc-sys-fs-binfmt_misc.automount; do
  ln -s /dev/null "$units/$name"
done
cp -a "$lab/files/." "$root/"

cd "$root"
mkdir -p mnt/machine
pivot_root . mnt/machine
umount -l /mnt/machine
cd /
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin container=lab LANG=C.UTF-8 TERM=dumb \
  /lib/systemd/systemd --system --unit=lab.target --log-target=journal --show-status=no
"""

_TARGET = """
[Unit]
Requires=basic.target dbus.socket
Wants=systemd-logind.service systemd-user-sessions.service remote-fs.target
After=basic.target dbus.socket remote-fs.target
AllowIsolate=yes
"""


def why_not() -> str | None:
    """Why this machine cannot have a lab, if it cannot."""
    if os.geteuid() != 0:
        return "needs root"
    if not SYSTEMD.exists():
        return f"there is no {SYSTEMD}"
    hierarchy = cgroup_hierarchy()
    if hierarchy is None or not os.access(hierarchy, os.W_OK):
        return "there is no cgroup2 file system to write to"
    missing = [tool for tool in ("dbus-daemon", "unshare", "nsenter", "setpriv", "findmnt") if not shutil.which(tool)]
    if missing:
        return f"there is no {missing[0]}"
    command = ["unshare", "--mount", "--pid", "--cgroup", "--fork", "true"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


def cgroup_hierarchy() -> Path | None:
    return next((mount.path for mount in read_mounts() if mount.fstype == "cgroup2"), None)


class SystemdLab:
    """A booted systemd. `folder` is an existing directory of the machine's disk, for nothing but mountpoints.

    `files` has the text of files that exist before the boot, `links` of symbolic links, both by their path inside.
    """

    def __init__(self, folder: Path, files: dict[str, str], links: dict[str, str]) -> None:
        hierarchy = cgroup_hierarchy()
        assert hierarchy is not None
        self.folder = folder
        self.cgroup = hierarchy / f"cachefs-lab-{os.getpid()}"
        for left in hierarchy.glob("cachefs-lab-*"):  # by a run of tests that was killed
            if not Path("/proc", left.name.rpartition("-")[2]).exists():
                _remove_cgroup(left)
        self.console = folder / "console"
        self._pid1: psutil.Process | None = None
        self._unshare: subprocess.Popen[bytes] | None = None
        (folder / "overlay").mkdir()
        self._stage({"/etc/systemd/system/lab.target": _TARGET, **files}, links)
        try:
            self._boot()
        except BaseException:
            self.end()
            raise

    def _stage(self, files: dict[str, str], links: dict[str, str]) -> None:
        staged = self.folder / "files"
        for path, text in files.items():
            place = staged / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        for path, target in {**links, str(COMMAND): f"{sysconfig.get_path('scripts')}/cachefs"}.items():
            place = staged / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(target)

    def _boot(self) -> None:
        self.cgroup.mkdir()
        enter = f'echo $$ >{self.cgroup}/cgroup.procs && exec "$@"'
        # if this process dies, unshare is killed, and then PID 1: setpriv and --kill-child see to that
        command = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", enter, "sh"]
        command += ["unshare", "--cgroup", "--uts", "--ipc", "--net", "--pid", "--mount", "--fork", "--kill-child"]
        command += ["bash", "-c", _BOOT, "lab", str(self.folder), str(ROOT), sys.prefix, sys.base_prefix]
        with self.console.open("wb") as console:
            self._unshare = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
        wait_until(self._has_booted, "systemd boots", _BOOT_SECONDS)

    def _has_booted(self) -> bool:
        assert self._unshare is not None
        if self._unshare.poll() is not None:
            raise AssertionError(f"systemd did not boot: {self.console.read_text(errors='replace')[-4000:]}")
        children = psutil.Process(self._unshare.pid).children()
        if not children or children[0].name() != "systemd":
            return False
        self._pid1 = children[0]
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")

    def run(
        self, *command: object, check: bool = True, stdin: str | None = None, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root or as `user`; with `check`, fail with what it said if its status is not 0."""
        assert self._pid1 is not None
        enter = ["nsenter", "-t", str(self._pid1.pid), "-m", "-p", "-u", "-i", "-C", "-n", "--", "env", "-i"]
        environment = ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG=C.UTF-8"]
        if user is not None:
            uid = self.run("id", "-u", user).stdout.strip()
            environment += [f"XDG_RUNTIME_DIR=/run/user/{uid}"]
            environment = [*environment, "runuser", "-u", user, "--"]
        done = subprocess.run(
            [*enter, *environment, *map(str, command)],
            cwd="/",
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} exited with {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def write(self, path: str, text: str) -> None:
        """Write a file inside, making its directory."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "sh", path, stdin=text)

    def end(self) -> None:
        """End everything of the lab. What the processes had mounted goes with them."""
        if self._unshare is not None:
            for child in psutil.Process(self._unshare.pid).children() if self._unshare.poll() is None else []:
                child.send_signal(signal.SIGKILL)  # PID 1: the kernel then ends all others of its namespace
            try:
                self._unshare.wait(30)
            except subprocess.TimeoutExpired:
                self._unshare.kill()
                self._unshare.wait(30)
        if self.cgroup.exists():
            wait_until(lambda: _remove_cgroup(self.cgroup), f"{self.cgroup} is empty")
        shutil.rmtree(self.folder)


def _remove_cgroup(group: Path) -> bool:
    """Whether it is gone; not while processes that are ending are in it."""
    for path, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(path)
        except OSError:
            return False
    return True
