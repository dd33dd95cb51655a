"""What real launchers and batch systems tell a process of its rank and node is what --shard auto understands."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.harness import clean_environment
from tests.jobs import grid_engine_lab, slurm_lab
from tests.jobs.batch import PYTHON, lab_folder
from tests.jobs.grid_engine_lab import GridEngine
from tests.jobs.slurm_lab import Slurm

ASK = f"""{PYTHON} -c '
import os
from cachefs.errors import UsageError
from cachefs.mount.launchers import find_part
for by in "rank", "node":
    try:
        said = "%d %d" % find_part(os.environ, by)
    except UsageError as error:
        said = str(error)
    os.write(1, f"{{by}} {{said}}\\n".encode())  # in one piece: others write there too
'"""
PARALLEL_ENVIRONMENT = """\
pe_name mpi
slots 99
user_lists NONE
xuser_lists NONE
start_proc_args NONE
stop_proc_args NONE
allocation_rule $pe_slots
control_slaves TRUE
job_is_first_task FALSE
urgency_slots min
accounting_summary TRUE
qsort_args NONE
"""

needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")


def mpirun(count: int) -> str:
    options = ["--oversubscribe", "-n", str(count)] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
    return " ".join(["mpirun", *options, ASK])


def ranks(count: int) -> list[str]:
    """What that many ranks of one node say."""
    return sorted(["node 0 1"] * count + [f"rank {number} {count}" for number in range(count)])


@needs_mpirun
def test_open_mpi():
    done = subprocess.run(
        ["sh", "-c", mpirun(3)], env=clean_environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert sorted(done.stdout.splitlines()) == ranks(3)


@pytest.mark.slow
@pytest.mark.skipif(slurm_lab.why_not() is not None, reason=str(slurm_lab.why_not()))
def test_slurm():
    """Tasks of a step; the script, which is none; a task of an array, in its script and in a step of one task."""
    with lab_folder("cachefs-shards-slurm-") as (folder, user):
        slurm = Slurm(folder, user, "#!/bin/sh\n", "#!/bin/sh\n")
        try:

            def said(commands: str, *options: object) -> list[str]:
                job = slurm.submit(f"#!/bin/bash\n{commands}\n", *options)
                assert job.wait().state == "COMPLETED", job.output()
                return sorted(job.output().splitlines())

            assert said(f"srun {ASK}", "--ntasks=3") == ranks(3)
            node, rank = said(ASK, "--ntasks=3")
            assert node == "node 0 1"
            assert rank.startswith("rank --shard auto: this is the script of a Slurm job with several tasks")
            second = f'[ "$SLURM_ARRAY_TASK_ID" = 5 ] && {{ {ASK}; srun {ASK}; }}; true'
            told = said(second, "--array=3-7:2", "--open-mode=append")
            assert told == ["node 0 1", "node 0 1", "rank 1 3", "rank 1 3"]
        finally:
            slurm.end()


@pytest.mark.slow
@pytest.mark.skipif(grid_engine_lab.why_not() is not None, reason=str(grid_engine_lab.why_not()))
def test_grid_engine():
    """A job; tasks of an array; a parallel environment, which has no ranks, and what mpirun starts in it, which are."""
    with lab_folder("cachefs-shards-sge-") as (folder, user):
        engine = GridEngine(folder, user)
        try:
            (folder / "environment").write_text(PARALLEL_ENVIRONMENT)
            engine.run("qconf", "-Ap", folder / "environment")
            engine.add_queue("plain", pe_list="mpi")

            def said(commands: str, *options: object, tasks: tuple[int, ...] = (1,)) -> list[str]:
                job = engine.submit(engine.new_folder(), f"#!/bin/bash\n{commands}\n", "plain", *options)
                for task in tasks:
                    ended = job.wait(task)
                    assert (ended.failed, ended.exit_status) == (0, 0), job.output()
                return sorted(job.output().splitlines())

            assert said(ASK) == ranks(1)
            told = said(ASK, "-t", "2-7:2", tasks=(2, 4, 6))
            assert told == ["node 0 1"] * 3 + ["rank 0 3", "rank 1 3", "rank 2 3"]
            node, rank = said(ASK, "-pe", "mpi", "2")
            assert node == "node 0 1"
            assert "environment of Grid Engine has hosts and slots, and no ranks (NHOSTS=1, NSLOTS=2)" in rank
            if shutil.which("mpirun") is not None:
                assert said(mpirun(2).replace("--allow-run-as-root", ""), "-pe", "mpi", "2") == ranks(2)
        finally:
            engine.end()
