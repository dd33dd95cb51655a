"""Commands that run on a node at the same time with the same data: one daemon, one mount, one scratch for all."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys

import psutil
import pytest

from tests.harness import lives, wait_until
from tests.run.running import SECONDS, Job, JobPlace, assert_no_mounts, kill_together, namespace_of, warnings_of

RANKS = 8


def start_together(place: JobPlace, number: int, *options: object, **keywords: object) -> list[Job]:
    """Runs that are started at once, when all of their commands run."""
    stages = [place.stage() for _ in range(number)]
    launched = [place.launch(*options, command=stage.command, **keywords) for stage in stages]
    return [Job(process, errors, stage) for (process, errors), stage in zip(launched, stages, strict=True)]


def summaries(jobs: list[Job]) -> list[str]:
    return [line for job in jobs for line in job.stderr.splitlines() if " from the source, " in line]


def assert_share(place: JobPlace, jobs: list[Job]) -> None:
    place.daemon()  # there is just one
    assert len({namespace_of(job.command.pid) for job in jobs}) == 1


def assert_clean(place: JobPlace) -> None:
    place.wait_for_the_end()
    assert not place.scratch.exists(), list(place.scratch.rglob("*"))


def test_all_at_once(place: JobPlace, slow_source):
    """Each file is fetched once for all of them."""
    others = {"allow_other": True} if place.user.uid != os.geteuid() else {}
    slow = slow_source(place.source, **others)
    jobs = start_together(place, RANKS, data=slow.path)
    assert_share(place, jobs)
    for job in jobs:
        job.command.say(f"[read('{slow.path}/one'), read('{slow.path}/sub/two')]")
    for job in jobs:
        assert job.command.hear()["value"] == ["1" * 1000, "2" * 2000]
    statistics = slow.statistics()
    assert statistics.bytes_read == 3000
    assert statistics.file("one").bytes_read == 1000
    for status, job in enumerate(jobs):
        job.command.exit(status)
    assert [job.wait() for job in jobs] == list(range(RANKS))
    assert [warnings_of(job.stderr) for job in jobs] == [[]] * RANKS
    (summary,) = summaries(jobs)
    assert summary.startswith("cachefs: 2 files and 2.9 KiB from the source, "), summary
    assert_clean(place)


def test_one_joins_and_leaves_while_others_run(place: JobPlace):
    first = place.job()
    assert first.command.read(place.source / "one") == b"1" * 1000
    second = place.job()
    assert_share(place, [first, second])
    assert second.command.read(place.source / "one") == b"1" * 1000
    assert second.end() == "", "others go on: there is nothing to sum up yet"
    third = place.job()
    assert_share(place, [first, third])
    third.end()
    assert first.end().startswith("cachefs: 1 file and 1000 B from the source, 1 hit, ")
    assert_clean(place)


def test_the_one_that_started_leaves_first(place: JobPlace):
    first = place.job()
    daemon = place.daemon()
    second = place.job()
    first.end()
    assert second.command.read(place.source / "one") == b"1" * 1000
    third = place.job()
    assert place.daemon() == daemon
    second.end()
    assert third.command.read(place.source / "one") == b"1" * 1000
    assert third.end().startswith("cachefs: 1 file ")
    assert_clean(place)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed(place: JobPlace, victim: int):
    """The one that started the mounts, or another: it takes nothing from the others."""
    jobs = [place.job() for _ in range(3)]
    command = psutil.Process(jobs[victim].command.pid)
    jobs[victim].kill()
    assert jobs[victim].wait() == -signal.SIGKILL
    wait_until(lambda: not lives(command), "its command ends")
    rest = [job for job in jobs if job is not jobs[victim]]
    for job in rest:
        assert job.command.read(place.source / "one") == b"1" * 1000
    late = place.job()
    assert_share(place, [*rest, late])
    assert late.command.read(place.source / "sub/two") == b"2" * 2000
    for job in [*rest, late]:
        job.end()
    assert [len(summaries([job])) for job in (*rest, late)] == [0, 0, 1]
    assert_clean(place)


def test_a_command_crashes(own_place: JobPlace):
    jobs = [own_place.job() for _ in range(2)]
    os.kill(jobs[0].command.pid, signal.SIGKILL)
    assert jobs[0].wait() == 128 + signal.SIGKILL
    assert jobs[1].command.read(own_place.source / "one") == b"1" * 1000
    jobs[1].end()
    assert_clean(own_place)


def test_all_are_killed_at_once(place: JobPlace):
    jobs = start_together(place, RANKS)
    assert jobs[0].command.read(place.source / "one") == b"1" * 1000
    for job in jobs:
        job.kill()
    assert [job.wait() for job in jobs] == [-signal.SIGKILL] * RANKS
    assert_clean(place)


def test_all_are_killed_while_they_start(own_place: JobPlace):
    for _ in range(3):
        launched = [own_place.launch(command=("sleep", "1000"))[0] for _ in range(4)]
        wait_until(own_place.scratch.exists, "the first is at work")
        for process in launched:
            process.kill()
        for process in launched:
            process.wait(SECONDS)
        assert_clean(own_place)


def test_the_daemon_is_killed_under_all(place: JobPlace):
    jobs = start_together(place, 4)
    place.daemon().kill()
    for job in jobs:
        wait_until(lambda job=job: "is cached no more" in job.stderr, "each is told")
        assert job.command.read(place.source / "one") == b"1" * 1000
    late = place.job()
    assert "is not cached, the command reads the source: its daemon was killed by SIGKILL" in late.stderr
    assert late.command.read(place.source / "one") == b"1" * 1000
    for job in [*jobs, late]:
        job.end()
        assert len(warnings_of(job.stderr)) == 1
    assert_clean(place)


def test_the_keeper_is_killed_under_all(place: JobPlace):
    jobs = start_together(place, 4)
    place.keeper().kill()
    for job in jobs:
        wait_until(lambda job=job: "the keeper of the mounts died" in job.stderr, "each says so")
        assert job.command.read(place.source / "one") == b"1" * 1000
    late = place.job()  # it starts another keeper
    assert late.command.read(place.source / "one") == b"1" * 1000
    assert late.command.error_of(f"open('{place.source}/new', 'w')") == "EROFS"
    for job in [*jobs, late]:
        job.end()
    assert warnings_of(late.stderr) == []
    place.wait_for_the_end()
    assert not place.scratch.exists()


def test_ranks_with_other_options_do_not_share(place: JobPlace):
    """But the scratch, if that is the same: what one fetched is a hit for the other."""
    first = place.job()
    assert first.command.read(place.source / "one") == b"1" * 1000
    wait_until(lambda: any(path.is_file() for path in (place.scratch / "files").rglob("*")), "the copy is complete")
    second = place.job("--metadata-ttl", "1")
    assert len(place.daemons()) == 2
    assert namespace_of(first.command.pid) != namespace_of(second.command.pid)
    assert second.command.read(place.source / "one") == b"1" * 1000
    first.end()
    assert place.scratch.exists(), "the second uses it"
    assert second.command.read(place.source / "sub/two") == b"2" * 2000
    assert second.end().startswith("cachefs: 1 file and 2.0 KiB from the source, 1 hit, ")
    assert_clean(place)


def test_the_order_of_data_does_not_matter(own_place: JobPlace):
    other = own_place.make("other")
    first = own_place.job(data=[own_place.source, other])
    second = own_place.job(data=[other, own_place.source])
    assert namespace_of(first.command.pid) == namespace_of(second.command.pid)
    first.end()
    second.end()
    assert_clean(own_place)


def test_users_do_not_meet(place: JobPlace):
    """Each has a keeper, a daemon and a scratch of their own: here two of one user, with other scratches."""
    first = place.job()
    second = place.job("--scratch", place.path / "scratch2")
    assert namespace_of(first.command.pid) != namespace_of(second.command.pid)
    place.daemon()
    place.daemon(place.path / "scratch2")
    first.end()
    second.end()
    assert_clean(place)


def test_a_run_after_the_last_makes_mounts_anew(place: JobPlace):
    for _ in range(3):
        jobs = start_together(place, 2)
        assert_share(place, jobs)
        for job in jobs:
            job.end()
    assert_clean(place)


def test_ranks_from_working_directories_in_the_data(place: JobPlace):
    jobs = [place.job(cwd=place.source / "sub"), place.job(cwd=place.source)]
    assert jobs[0].command.read("two") == jobs[1].command.read("sub/two") == b"2" * 2000
    for job in jobs:
        job.end()
    assert_clean(place)


RANK = """
import hashlib, json, os, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
data = sys.argv[1]
digests = [None] * dist.get_world_size()
mine = [open(os.path.join(data, name), "rb").read().decode() for name in ("one", "sub/two")]
mounts = json.loads(os.environ["CACHEFS_MOUNTS"])
digest = hashlib.md5("".join(mine).encode()).hexdigest()
dist.all_gather_object(digests, (digest, len(mounts), os.readlink("/proc/self/ns/mnt")))
if dist.get_rank() == 0:
    print(json.dumps(digests))
dist.destroy_process_group()
"""
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--master-port",
    "0",
    "--standalone",
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torchrun_inside_a_run(place: JobPlace):
    script = place.write(place.path / "train.py", RANK)
    done = place.cached(*TORCHRUN, script, place.source, env={"OMP_NUM_THREADS": "1", "TMPDIR": str(place.path)})
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first == second
    assert first[1] == 1
    assert "cachefs: 2 files and 2.9 KiB from the source, " in done.stderr
    assert_clean(place)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torchrun_around_runs(place: JobPlace):
    """`torchrun --no-python cachefs run ... python train.py`: its ranks share."""
    script = place.write(place.path / "train.py", RANK)
    line = [*TORCHRUN, "--no-python", *place.line(), sys.executable, script, place.source]
    done = place.cached_by_shell(" ".join(map(str, ["OMP_NUM_THREADS=1", f"TMPDIR={place.path}", *line])))
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first == second
    assert done.stderr.count(" from the source, ") == 1
    assert_clean(place)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
def test_mpirun_around_runs(place: JobPlace):
    options = ["mpirun", "--oversubscribe", "-n", "4"] + (["--allow-run-as-root"] if place.user.uid == 0 else [])
    line = [*options, *place.line(), "sh", "-c", f"'cat {place.source}/one; readlink /proc/self/ns/mnt'"]
    done = place.cached_by_shell(" ".join(line))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1") >= 4000
    assert_clean(place)


@pytest.mark.slow
def test_a_crash_of_a_node_in_small(place: JobPlace):
    """Everything dies at once, several times: what is left is reclaimed, and nothing is wrong afterwards."""
    for _ in range(3):
        jobs = start_together(place, 4)
        for job in jobs:
            assert job.command.read(place.source / "one") == b"1" * 1000
        kill_together(place.marked())
        for job in jobs:
            job.wait()
        place.wait_for_the_end()
        assert_no_mounts(place.path)
        assert (place.scratch / "cachefs-scratch").exists()
    done = place.cached("cat", place.source / "one")
    assert (done.returncode, done.stdout, warnings_of(done.stderr)) == (0, "1" * 1000, [])
    assert_clean(place)
