"""Shards under `cachefs run`: each rank sees its part at the same path; where it cannot have that, nothing is run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cachefs.mount.launchers import find_part
from tests.harness import wait_until
from tests.run.running import Job, JobPlace, namespace_of, warnings_of
from tests.run.test_ranks import assert_clean

VIEW = ("--shard", "auto", "--shard-mode", "view")
FILES = 12


def rank(number: int, count: int) -> dict[str, str]:
    environment = {"RANK": str(number), "WORLD_SIZE": str(count)}
    assert find_part(environment, "rank") == (number, count)
    return environment


def fill(place: JobPlace) -> set[str]:
    """More files in the source; the names of all."""
    folder = place.make("source", "many")
    for number in range(FILES):
        place.write(folder / f"{number}", f"{number}" * 500)
    return {"one", "sub/two", *(f"many/{number}" for number in range(FILES))}


def shown(job: Job, root: Path) -> set[str]:
    walk = f"[os.path.relpath(os.path.join(at, name), {str(root)!r}) for at, _, names in os.walk({str(root)!r})"
    return set(job.command.ask(f"{walk} for name in names]"))


def test_each_rank_sees_its_part_at_the_same_path(place: JobPlace, slow_source):
    """The ranks of a node have mounts of their own, and one scratch."""
    everything = fill(place)
    others = {"allow_other": True} if place.user.uid != os.geteuid() else {}
    slow = slow_source(place.source, **others)
    jobs = [place.job(*VIEW, "--report", f"{n}.json", data=slow.path, env=rank(n, 3)) for n in range(3)]
    assert len({namespace_of(job.command.pid) for job in jobs}) == 3
    parts = [shown(job, slow.path) for job in jobs]
    assert sorted(name for part in parts for name in part) == sorted(everything)
    for job, part in zip(jobs, parts, strict=True):
        for name in part:
            assert job.command.read(slow.path / name) == (place.source / name).read_bytes()
    files = slow.statistics().files
    assert all(files[name.encode()].bytes_read == (place.source / name).stat().st_size for name in everything)
    for job in jobs:
        assert warnings_of(job.end()) == []
    reports = [json.loads((place.path / f"{n}.json").read_text())["mounts"][0] for n in range(3)]
    assert [report["shard"] for report in reports] == ["0/3", "1/3", "2/3"]
    assert len({report["shard_fingerprint"] for report in reports}) == 1
    assert_clean(place)


def test_ranks_of_a_node_share_what_the_node_has(own_place: JobPlace):
    """Divided by node: one mount for all of its ranks."""
    fill(own_place)
    options = ("--shard", "auto", "--shard-by", "node")
    node = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}
    jobs = [own_place.job(*options, env={**rank(n, 4), **node}) for n in (2, 3)]
    own_place.daemon()  # there is just one
    assert len({namespace_of(job.command.pid) for job in jobs}) == 1
    for job in jobs:
        job.end()
    assert_clean(own_place)


def test_a_shard_that_cannot_fit_runs_nothing(place: JobPlace):
    done = place.cached("echo", "run", options=("--shard", "0/2", "--capacity", "100"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be divided as --shard says: shard 0/2 has " in done.stderr
    assert done.stderr.count("\n") == 1
    assert_clean(place)
    done = place.cached("echo", "run", options=("--shard", "0/2", "--capacity", "100", "--shard-cut"))
    assert (done.returncode, done.stdout) == (0, "run\n")
    (warning,) = warnings_of(done.stderr)
    assert " of the shard are cut off, because scratch has no room for them" in warning
    assert_clean(place)


def test_a_view_that_cannot_be_had_runs_nothing(own_place: JobPlace):
    """On the source the command would see what is others' part; a cache is done without."""
    own_place.write(own_place.make("scratch") / "something", "not of cachefs")
    done = own_place.cached("echo", "run", options=("--shard", "0/2", "--shard-mode", "view"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be shown as --shard-mode view says: " in done.stderr
    done = own_place.cached("echo", "run", options=("--shard", "0/2"))
    assert (done.returncode, done.stdout) == (0, "run\n")
    assert "is not cached, the command reads the source" in done.stderr
    own_place.wait_for_the_end()


def test_a_view_whose_daemon_dies_goes_on_with_the_source(own_place: JobPlace):
    """The names that it has are there too."""
    fill(own_place)
    job = own_place.job("--shard", "0/2", "--shard-mode", "view")
    part = shown(job, own_place.source)
    own_place.daemon().kill()
    wait_until(lambda: "is cached no more" in job.stderr, "it is told")
    for name in part:
        assert job.command.read(own_place.source / name) == (own_place.source / name).read_bytes()
    job.end()
    assert_clean(own_place)


def test_a_run_within_a_run(own_place: JobPlace):
    """The outer one's shard is that of the inner one, which cannot have another."""
    fill(own_place)
    job = own_place.job("--shard", "0/2", "--shard-mode", "view")
    listed = own_place.source / "many"
    own = sorted(name.partition("/")[2] for name in shown(job, own_place.source) if name.startswith("many/"))
    for options in ((), ("--shard", "0/2", "--shard-mode", "view")):
        line = [*own_place.line(*options), "ls", str(listed)]
        assert job.command.ask(f"subprocess.run({line}, capture_output=True, text=True).stdout.split()") == sorted(own)
    for options in (("--shard", "1/2", "--shard-mode", "view"), ("--shard", "0/2")):
        line = [*own_place.line(*options), "ls", str(listed)]
        asking = (
            f"(lambda done: [done.returncode, done.stderr])(subprocess.run({line}, capture_output=True, text=True))"
        )
        status, said = job.command.ask(asking)
        assert status == 2
        assert "is in a mount of cachefs already, which has not shard " + options[1] in said
    job.end()
    assert_clean(own_place)


def test_a_source_that_takes_long_to_list(own_place: JobPlace, slow_source):
    """It says so, and nobody gives up."""
    for number in range(40):
        own_place.make("source", f"folder{number}")
    slow = slow_source(own_place.source, latency=0.03)
    jobs = [own_place.job("--shard", "1/2", data=slow.path) for _ in range(2)]
    for job in jobs:
        assert warnings_of(job.end()) == []
    assert_clean(own_place)
