"""Under `cachefs run` what is completely resident is mounted directly from scratch, for root and for ordinary users."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.conftest import needs_root
from tests.harness import wait_until
from tests.run.running import SECONDS, Job, JobPlace, warnings_of

_ALL = "[read(os.path.join(folder, name)) for folder, _, names in os.walk({!r}) for name in sorted(names)]"


def read_all(job: Job, path: Path) -> list[str]:
    return job.command.ask(_ALL.format(str(path)))


def promoted(job: Job, path: Path) -> list[str]:
    """What the command sees promoted within `path`, relative to it."""
    lines = job.command.ask("read('/proc/self/mountinfo')").splitlines()
    shown = [line.split(" ")[4] for line in lines if "/trees/" in line.split(" ")[3]]
    return sorted(os.path.relpath(mountpoint, path) for mountpoint in shown if f"{mountpoint}/".startswith(f"{path}/"))


def wait_for(job: Job, path: Path, *wanted: str) -> None:
    wait_until(lambda: promoted(job, path) == sorted(wanted), f"{wanted} are promoted", SECONDS)


def test_all_of_it_is_promoted_and_goes_with_the_job(place: JobPlace):
    place.write(place.source / "empty", "")
    (place.source / "link").symlink_to("one")
    os.chown(place.source / "link", place.user.uid, place.user.gid, follow_symlinks=False)
    os.chmod(place.source / "one", 0o440)
    os.utime(place.source / "sub", ns=(1, 10**18 + 1))
    want = [(path.name, path.lstat().st_mode, path.lstat().st_mtime_ns) for path in sorted(place.source.rglob("*"))]
    job = place.job()
    first = read_all(job, place.source)
    wait_for(job, place.source, ".")
    daemon = place.daemon()
    daemon.suspend()
    try:
        assert read_all(job, place.source) == first
        described = job.command.ask(
            "[(p.name, p.lstat().st_mode, p.lstat().st_mtime_ns)"
            f" for p in sorted(__import__('pathlib').Path({str(place.source)!r}).rglob('*'))]"
        )
    finally:
        daemon.resume()
    assert [tuple(entry) for entry in described] == want
    assert job.command.error_of(f"open({str(place.source / 'one')!r}, 'wb')") in ("EROFS", "EACCES")
    assert warnings_of(job.end()) == []
    place.wait_for_the_end()
    assert not place.scratch.exists()


def test_when_the_daemon_dies_the_source_shows_again(place: JobPlace):
    os.mkfifo(place.source / "fifo")
    os.chmod(place.source / "fifo", 0o600)
    job = place.job()
    job.command.ask(f"os.listdir({str(place.source / 'sub')!r})")
    job.command.read(place.source / "sub/two")
    wait_for(job, place.source, "sub")
    job.command.ask(f"os.chdir({str(place.source / 'sub')!r})")
    place.daemon().send_signal(signal.SIGKILL)
    wait_until(lambda: promoted(job, place.source) == [], "all is uncovered", SECONDS)
    assert job.command.read(place.source / "sub/two") == b"2" * 2000
    assert job.command.read("two") == b"2" * 2000
    assert "is cached no more" in job.end()
    place.wait_for_the_end()


@needs_root
def test_what_is_not_his_own(ordinary_place: JobPlace):
    """An ordinary user's copies are his: what the mode would then refuse him is not promoted."""
    place = ordinary_place
    source = place.path / "of-root"
    for name, mode in (("plain", 0o644), ("for-others", 0o604), ("only-for-others", 0o004)):
        (source / name).mkdir(parents=True)
        (source / name / "file").write_bytes(name.encode())
        (source / name / "file").chmod(mode)
    (source / "closed-to-owner").mkdir()
    (source / "closed-to-owner/file").write_bytes(b"closed")
    (source / "closed-to-owner").chmod(0o055)
    job = place.job(data=source)
    first = read_all(job, source)
    assert len(first) == 4
    wait_for(job, source, "for-others", "plain")
    assert read_all(job, source) == first
    assert warnings_of(job.end()) == []


def test_no_promote(own_place: JobPlace):
    job = own_place.job("--no-promote", "--report", own_place.path / "report")
    for _ in range(3):
        read_all(job, own_place.source)
    job.end()
    assert '"off: --no-promote' in (own_place.path / "report").read_text()
