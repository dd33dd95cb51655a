"""Who sees the mounts of a run: the command and what it starts. What others mount meanwhile, it sees too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.conftest import needs_root
from tests.harness import mount_lines, mounts_everywhere, scripted
from tests.run.running import JobPlace, namespace_of


def own_mounts(place: JobPlace) -> list[str]:
    return [line for line in mount_lines() if str(place.path) in line]


def test_nobody_else_ever_sees_the_mount(place: JobPlace):
    job = place.job()
    assert namespace_of(job.pid) == namespace_of(job.command.pid) != namespace_of(os.getpid())
    assert own_mounts(place) == []
    assert len(mounts_everywhere(place.path)) == 1
    place.write(place.source / "outside", "written outside")
    assert job.command.read(place.source / "one") == b"1" * 1000
    job.end()
    assert own_mounts(place) == mounts_everywhere(place.path) == []


def test_children_of_the_command_see_it(place: JobPlace):
    job = place.job()
    child = place.stage()
    job.command.ask(f"subprocess.Popen({list(child.command)!r}, start_new_session=True).pid")
    grandchild = child.join()
    assert namespace_of(grandchild.pid) == namespace_of(job.command.pid)
    assert grandchild.error_of(f"open('{place.source}/new', 'w')") == "EROFS"
    grandchild.exit()
    job.end()


def test_what_is_not_cached_is_as_it_was(place: JobPlace):
    """Outside of the data the command writes as before, and everybody sees it."""
    job = place.job()
    job.command.ask(f"open('{place.path}/result', 'w').write('written inside')")
    assert (place.path / "result").read_text() == "written inside"
    assert (place.path / "result").stat().st_uid == place.user.uid
    assert (place.path / "result").stat().st_gid == place.user.gid
    job.end()


@needs_root
def test_mounts_that_come_later_are_seen_inside(place: JobPlace):
    """Automounted file systems, whether they lie beside the data or in them."""
    outer = place.make("outer")
    late, inside = place.make("outer", "late"), place.source / "sub"
    share = " && ".join(f"mount --bind {path} {path} && mount --make-shared {path}" for path in (outer, place.source))
    machine = place.machine(share)
    job = machine.job()
    assert job.command.ask(f"os.listdir('{late}')") == []
    machine.do(f"mount -t tmpfs none {late} && touch {late}/appeared && chmod 755 {late}")
    assert job.command.ask(f"os.listdir('{late}')") == ["appeared"]
    machine.do(f"umount {late}")
    assert job.command.ask(f"os.listdir('{late}')") == []
    assert job.command.read(inside / "two") == b"2" * 2000
    job.end()


@needs_root
def test_mounts_of_the_command_are_not_seen_outside(own_place: JobPlace):
    place = own_place
    outer = place.make("outer")
    machine = place.machine(f"mount --bind {outer} {outer} && mount --make-shared {outer}")
    job = machine.job()
    job.command.ask(f"subprocess.run(['mount', '-t', 'tmpfs', 'none', '{outer}'], check=True).returncode")
    job.command.ask(f"open('{outer}/inside', 'w').close()")
    machine.do(f'test -z "$(ls {outer})"')
    job.command.ask(f"subprocess.run(['umount', '{outer}'], check=True).returncode")
    job.end()


_NOBODY_AT = """
import os, socket, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if sys.argv[1] == "connect":
    sock.connect("\\0" + sys.argv[2])
    sock.settimeout(20)
    try:
        sock.send(b'{"command": "report"}')
        print(socket.recv_fds(sock, 10_000, 10)[:2])
    except (BrokenPipeError, ConnectionResetError):
        print((b"", []))
else:
    sock.bind("\\0" + sys.argv[2])
    sock.listen()
    print("bound", flush=True)
    sys.stdin.read()
"""


def meeting_point(keeper: psutil.Process) -> str:
    """The name at which the runs of a job meet, without its first byte, which is 0."""
    inodes = {os.readlink(fd)[8:-1] for fd in Path(f"/proc/{keeper.pid}/fd").iterdir()}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    (name,) = {words[7] for words in lines if len(words) == 8 and words[6] in inodes and words[7][:1] == "@"}
    return name[1:]


@needs_root
def test_another_user_where_the_runs_meet(own_place: JobPlace):
    """He learns nothing and gets no namespace; where he was first, a run says so and reads the source."""
    job = own_place.job()
    name = meeting_point(own_place.keeper())
    command = [sys.executable, "-c", _NOBODY_AT, "connect", name]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "(b'', [])\n"
    assert job.command.read(own_place.source / "one") == b"1" * 1000
    job.end()
    own_place.wait_for_the_end()
    with scripted(_NOBODY_AT, "hold", name, says="bound"):
        done = own_place.cached("cat", own_place.source / "one")
    assert (done.returncode, done.stdout) == (0, "1" * 1000)
    assert "another user holds the name of this job's mounts" in done.stderr
