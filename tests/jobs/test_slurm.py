"""Jobs of a real Slurm, with the job script, the prolog and the epilog that the README shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import mounts_everywhere, wait_until
from tests.jobs.batch import (
    FILES,
    PYTHON,
    READER,
    Dataset,
    changed,
    clear_what_is_left,
    daemon_of,
    entries_of,
    lab_folder,
    node_settings,
    processes_below,
    shows_cache,
    status_in,
)
from tests.jobs.slurm_lab import Ended, Job, Slurm, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
ROOT = Path(__file__).parents[2]
COMPLETED = Ended("COMPLETED", 0, 0)
CANCELLED = Ended("CANCELLED", 0, 15)


def readme_script(first: str) -> str:
    """The only code block of the README's section on Slurm in which a line starts with `first`."""
    section = (ROOT / "README.md").read_text().partition("## Slurm\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(#!.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if re.search(rf"^{re.escape(first)}", block, flags=re.MULTILINE)]
    return found


class Site:
    """A Slurm whose administrator has followed the README, and the dataset of its users."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        self.slurm = slurm
        self.dataset = Dataset(folder / "nas" / "dataset")
        self.copies = folder / "copies"
        self.state = folder / "state-of-mounts"
        (folder / "settings").write_text(node_settings(folder / "nas", self.copies, self.state))

    def submit(self, *options: object, held: tuple[int, ...] = (), status: int = 0) -> Job:
        """The README's job script, but for the dataset and the command."""
        script = self._with_command(readme_script("srun cachefs run"), status)
        return self.slurm.submit(script, *options, held=held)

    def submit_plain(self, *, held: tuple[int, ...] = (), status: int = 0, data: Path | None = None) -> Job:
        """A script that knows nothing of cachefs, with the request in its comment."""
        data = data or self.dataset.path
        script = f"#!/bin/bash\n{PYTHON} {READER} {data} report.0 {status}\n"
        return self.slurm.submit(script, f"--comment=cachefs={data}", held=held)

    def scratch_of(self, job: Job) -> Path:
        return Path(f"/tmp/cachefs-job-{job.id}")

    def left(self) -> list[object]:
        """What there is of ours: it should be nothing when no job runs."""
        scratches = [self.scratch_of(job) for job in self.slurm.jobs]
        files = [*entries_of(self.copies, self.state), *(path for path in scratches if path.exists())]
        return [*mounts_everywhere(self.slurm.folder), *processes_below(self.slurm.folder), *files]

    def _with_command(self, script: str, status: int) -> str:
        command = f"bash -c 'exec {PYTHON} {READER} {self.dataset.path} report.$SLURM_PROCID {status}'"
        script, number = re.subn(r"python train\.py .*$", lambda _: command, script, flags=re.MULTILINE)
        assert number == 1
        return changed(script, data=str(self.dataset.path))


@pytest.fixture(scope="module")
def whole_site() -> Iterator[Site]:
    with lab_folder("cachefs-slurm-") as (folder, user):
        tool = f"{ROOT / 'sge/node-mounts'} --settings {folder / 'settings'}"
        scripts = [
            readme_script(f"# {name}").replace("/opt/cachefs/sge/node-mounts", tool) for name in ("Prolog=", "Epilog=")
        ]
        slurm = Slurm(folder, user, *scripts)
        try:
            yield Site(folder, slurm)
        finally:
            slurm.end()


@pytest.fixture
def site(whole_site: Site) -> Iterator[Site]:
    """After the jobs of a test nothing of ours is left on the node, and it takes jobs."""
    yield whole_site
    has_unfinished_jobs = whole_site.slurm.cancel_jobs()  # of a test that failed
    left = clear_what_is_left(whole_site.left)
    assert not has_unfinished_jobs
    assert not left
    assert whole_site.slurm.node_state() == "idle"


class TestRun:
    def test_ranks_share_a_cache(self, site: Site):
        ranks = (0, 1, 2, 3)
        job = site.submit(held=ranks)
        for rank in ranks:
            only = job.report(rank).wait_for_pass()
            assert (only["digest"], only["mounted"]) == (site.dataset.digest, True), job.output()
        assert sum(path.is_file() for path in (site.scratch_of(job) / "files").rglob("*")) == FILES
        assert len({line.split()[2] for line in mounts_everywhere(site.slurm.folder)}) == 1
        for rank in ranks:
            job.report(rank).go_on()
        assert job.wait() == COMPLETED, job.output()
        for rank in ranks:
            assert [line["mounted"] for line in job.report(rank).passes()] == [True] * 2
        assert job.output().count("cachefs: ") == 1, job.output()

    def test_a_job_that_fails(self, site: Site):
        assert site.submit("--ntasks=1", status=3).wait() == Ended("FAILED", 3, 0)

    def test_scancel(self, site: Site):
        """SIGTERM to every process of the job, upon which the program reads on and saves its state."""
        job = site.submit(held=(0, 1, 2, 3))
        for rank in range(4):
            assert job.report(rank).wait_for_pass()["mounted"], job.output()
        job.cancel()
        assert job.wait() == CANCELLED, job.output()
        for rank in range(4):
            assert [line["mounted"] for line in job.report(rank).passes()] == [True] * 2, job.output()

    def test_out_of_time(self, site: Site):
        job = site.submit("--ntasks=1", held=(0,))
        assert job.report().wait_for_pass()["mounted"], job.output()
        site.slurm.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+1")
        assert job.wait() == Ended("TIMEOUT", 0, 15), job.output()

    def test_the_daemon_is_killed(self, site: Site):
        job = site.submit("--ntasks=1", held=(0,))
        assert job.report().wait_for_pass()["mounted"], job.output()
        daemon_of(site.scratch_of(job)).kill()
        reader = int(job.report().passes()[0]["pid"])
        wait_until(lambda: not shows_cache(reader, site.dataset.path), "the mount is detached")
        job.report().go_on()
        assert job.wait() == COMPLETED, job.output()
        assert [line["digest"] for line in job.report().passes()] == [site.dataset.digest] * 2


class TestPrologAndEpilog:
    def test_two_jobs_share_a_mount(self, site: Site):
        jobs = [site.submit_plain(held=(0,)) for _ in range(2)]
        for job in jobs:
            only = job.report().wait_for_pass()
            assert (only["digest"], only["mounted"]) == (site.dataset.digest, True), job.output()
        status = status_in(site.slurm.pid, site.dataset.path)
        assert (status["fetches"], status["bypasses"]) == (FILES, 0)
        for job in jobs:
            job.report().go_on()
            assert job.wait() == COMPLETED, job.output()
            assert [line["mounted"] for line in job.report().passes()] == [True] * 2

    def test_scancel(self, site: Site):
        job = site.submit_plain(held=(0,))
        assert job.report().wait_for_pass()["mounted"], job.output()
        job.cancel()
        assert job.wait() == CANCELLED

    def test_a_directory_that_the_administrator_has_not_listed(self, site: Site):
        job = site.submit_plain(data=site.slurm.folder / "jobs", status=4)
        assert job.wait() == Ended("FAILED", 4, 0)
        assert not job.report().passes()[0]["mounted"]

    def test_what_a_users_own_mount_left(self, site: Site):
        """Step by step, without a trap: the daemon outlives the job's script, and the epilog ends it."""
        scratch = "/tmp/cachefs-job-$SLURM_JOB_ID"
        lines = ["mkdir mountpoint", f"cachefs mount {site.dataset.path} mountpoint --scratch {scratch}"]
        lines.append(f"{PYTHON} {READER} mountpoint report.0 6")
        job = site.slurm.submit("\n".join(["#!/bin/bash", *lines]))
        assert job.wait() == Ended("FAILED", 6, 0), job.output()
        assert job.report().passes()[0]["mounted"]
