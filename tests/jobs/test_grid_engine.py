"""Jobs of a real Grid Engine, with the scripts of sge/: however a job ends, its status is right and nothing stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
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
from tests.jobs.grid_engine_lab import Ended, GridEngine, Job, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
SGE = Path(__file__).parents[2] / "sge"
COMPLEX = "cachefs cachefs STRING != YES NO NONE 0"
KILLED = Ended(failed=100, exit_status=137)
OUT_OF_TIME = Ended(failed=37, exit_status=137)


class Cluster:
    """A Grid Engine whose administrator has followed sge/README.md, and the dataset of its users.

    Queues: `plain` has nothing of ours; `node` has prolog and epilog; `starter` has the starter method; `broken` is
    like `node` with a cachefs that fails.
    """

    def __init__(self, folder: Path, engine: GridEngine) -> None:
        self.engine = engine
        self.dataset = Dataset(folder / "nas" / "dataset")
        self.elsewhere = Dataset(folder / "elsewhere")
        self.shared = folder / "scratch"
        self.copies = folder / "copies"
        self.state = folder / "state"
        self.shared.mkdir()
        self.shared.chmod(0o1777)
        engine.add_complex(COMPLEX)
        engine.run("qconf", "-aattr", "exechost", "complex_values", "cachefs=none", "global")
        settings = node_settings(folder / "nas", self.copies, self.state)
        engine.add_queue("plain")
        engine.add_queue("node", **self._ends(folder / "settings", settings))
        engine.add_queue("broken", **self._ends(folder / "broken-settings", f"{settings}CACHEFS=/bin/false\n"))
        engine.add_queue("starter", starter_method=SGE / "starter")

    def _ends(self, file: Path, settings: str) -> dict[str, str]:
        """The attributes of a queue with prolog and epilog."""
        file.write_text(settings)
        arguments = f"$job_id $ja_task_id $job_owner {file}"
        return {name: f"root@{SGE / name} {arguments}" for name in ("prolog", "epilog")}

    def scratch_of_node(self) -> Path:
        """The scratch of the only mount that the prolog made."""
        (path,) = self.copies.iterdir()
        return path

    def left(self) -> list[object]:
        """What there is of ours: it should be nothing when no job runs."""
        folder = self.engine.folder
        files = entries_of(self.engine.temporary, self.shared, self.copies, self.state)
        return [*mounts_everywhere(folder), *processes_below(folder), *files]


@dataclass(frozen=True)
class Way:
    """One way in which a user's job comes to the cache."""

    name: str
    queue: str
    script: str = ""

    def submit(
        self,
        cluster: Cluster,
        *options: object,
        held: bool = False,
        notify: bool = False,
        tasks: int | None = None,
        status: int = 0,
        data: Path | None = None,
        **lines: str,
    ) -> Job:
        """A job that reads the dataset and exits with `status`; `held`, it waits between two passes."""
        engine, data = cluster.engine, data or cluster.dataset.path
        folder = engine.new_folder()
        for task in range(1, tasks + 1) if tasks else [None]:
            if held:
                engine.report(folder, task).hold()
        place = {"train.qsub": '"$data"', "train-mount.qsub": '"$mountpoint"'}.get(self.script, str(data))
        command = f'{PYTHON} {READER} {place} "report.$SGE_TASK_ID" {status}'
        if self.script:
            script = changed((SGE / self.script).read_text(), data=str(data), train=f"({command})", **lines)
        else:
            script = f"#!/bin/bash\nexec {command}\n"  # exec: with -notify bash itself would die of the signal
            options = (*options, "-l", f"cachefs={data}")
        if notify:
            options = (*options, "-notify")
        else:
            script = script.replace("#$ -notify\n", "")
        if tasks:
            options = (*options, "-t", f"1-{tasks}")
        return engine.submit(folder, script, self.queue, *options)


RUN = Way("run", "plain", "train.qsub")
STEPS = Way("steps", "node", "train-mount.qsub")
PROLOG = Way("prolog", "node")
STARTER = Way("starter", "starter")
RUN_WITH_EPILOG = Way("run-with-epilog", "node", "train.qsub")


@pytest.fixture(scope="module")
def site() -> Iterator[Cluster]:
    with lab_folder("cachefs-sge-") as (folder, user):
        engine = GridEngine(folder, user)
        try:
            yield Cluster(folder, engine)
        finally:
            engine.end()


@pytest.fixture
def cluster(site: Cluster) -> Iterator[Cluster]:
    """After the jobs of a test nothing of ours is left on the node, and no queue is in an error state."""
    yield site
    has_unfinished_jobs = site.engine.delete_jobs()  # of a test that failed
    left = clear_what_is_left(site.left)
    assert not has_unfinished_jobs
    assert not left
    assert not site.engine.queue_states()


@pytest.fixture(params=[RUN, STEPS, PROLOG, STARTER], ids=lambda way: way.name)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


class TestEveryWay:
    def test_a_job(self, cluster: Cluster, way: Way):
        job = way.submit(cluster)
        assert job.wait() == Ended(0, 0), job.output()
        (only,) = job.report().passes()
        assert (only["digest"], only["mounted"]) == (cluster.dataset.digest, True), job.output()

    def test_a_job_that_fails(self, cluster: Cluster, way: Way):
        job = way.submit(cluster, status=3)
        assert job.wait() == Ended(0, 3), job.output()

    def test_qdel(self, cluster: Cluster, way: Way):
        """SIGKILL at once."""
        job = way.submit(cluster, held=True)
        assert job.report().wait_for_pass()["mounted"], job.output()
        job.delete()
        assert job.wait() == KILLED, job.output()

    def test_qdel_with_notify(self, cluster: Cluster, way: Way):
        """SIGUSR2, upon which the program reads on, saves its state and exits before the SIGKILL."""
        job = way.submit(cluster, held=True, notify=True)
        assert job.report().wait_for_pass()["mounted"], job.output()
        job.delete()
        assert job.wait() == Ended(0, 75), job.output()
        assert set(job.report().signals()) == {"SIGUSR2"}
        assert [line["mounted"] for line in job.report().passes()] == [True] * 2

    def test_out_of_time(self, cluster: Cluster, way: Way):
        job = way.submit(cluster, "-l", "h_rt=5", held=True)
        assert job.report().wait_for_pass()["mounted"], job.output()
        assert job.wait() == OUT_OF_TIME, job.output()

    def test_the_daemon_is_killed(self, cluster: Cluster, way: Way):
        """The job reads on from the source; step by step it gets the error, for nobody watches the mount."""
        job = way.submit(cluster, held=True)
        assert job.report().wait_for_pass()["mounted"], job.output()
        process = daemon_of(cluster.scratch_of_node() if way is PROLOG else job.temporary_directory() / "cachefs")
        process.kill()
        if way is not STEPS:
            reader = int(job.report().passes()[0]["pid"])
            wait_until(lambda: not shows_cache(reader, cluster.dataset.path), "the mount is detached")
        job.report().go_on()
        if way is STEPS:
            assert job.wait() == Ended(0, 1), job.output()
            assert "Transport endpoint is not connected" in job.output()
        else:
            assert job.wait() == Ended(0, 0), job.output()
            assert [line["digest"] for line in job.report().passes()] == [cluster.dataset.digest] * 2
            assert not job.report().passes()[1]["mounted"]


@pytest.mark.parametrize("way", [RUN, PROLOG], ids=lambda way: way.name)
def test_a_job_is_suspended_and_resumed(cluster: Cluster, way: Way):
    job = way.submit(cluster, held=True)
    reader = psutil.Process(int(job.report().wait_for_pass()["pid"]))
    cluster.engine.run("qmod", "-sj", job.id)
    wait_until(lambda: reader.status() == psutil.STATUS_STOPPED, "the job is suspended")
    cluster.engine.run("qmod", "-usj", job.id)
    job.report().go_on()
    assert job.wait() == Ended(0, 0), job.output()
    assert [line["mounted"] for line in job.report().passes()] == [True] * 2


def test_a_node_without_cachefs(cluster: Cluster):
    job = RUN.submit(cluster, "-v", "PATH=/usr/bin:/bin", status=3)
    assert job.wait() == Ended(0, 3), job.output()
    assert job.report().passes()[0]["digest"] == cluster.dataset.digest


class TestArray:
    @pytest.mark.parametrize("way", [RUN, PROLOG], ids=lambda way: way.name)
    def test_tasks_on_one_node_share_a_cache(self, cluster: Cluster, way: Way):
        """Also after one of them has ended: Grid Engine kills everything that a task has started."""
        scratch = cluster.shared / "array"
        lines = {"scratch": str(scratch)} if way is RUN else {}
        job = way.submit(cluster, tasks=3, held=True, **lines)
        for task in (1, 2, 3):
            only = job.report(task).wait_for_pass()
            assert (only["digest"], only["mounted"]) == (cluster.dataset.digest, True), job.output()
        where = scratch if way is RUN else cluster.scratch_of_node()
        assert sum(path.is_file() for path in (where / "files").rglob("*")) == FILES
        devices = {line.split()[2] for line in mounts_everywhere(cluster.engine.folder)}
        assert len(devices) == (3 if way is RUN else 1)  # a daemon would die with the task that has started it
        if way is PROLOG:
            status = status_in(cluster.engine.pid, cluster.dataset.path)
            assert (status["fetches"], status["bypasses"]) == (FILES, 0)
        for task in (1, 2, 3):
            job.report(task).go_on()
            assert job.wait(task) == Ended(0, 0), job.output()
            assert [line["digest"] for line in job.report(task).passes()] == [cluster.dataset.digest] * 2
            assert job.report(task).passes()[1]["mounted"], f"{task}: {job.output()}"

    def test_qdel_leaves_a_common_scratch_to_the_next_job(self, cluster: Cluster):
        """It is not in any task's $TMPDIR, and with all tasks everybody is killed who knows of it."""
        lines = {"scratch": str(cluster.shared / "array")}
        killed = RUN.submit(cluster, tasks=2, held=True, **lines)
        for task in (1, 2):
            killed.report(task).wait_for_pass()
        killed.delete()
        for task in (1, 2):
            assert killed.wait(task) == KILLED
        assert cluster.left() == [cluster.shared / "array"]
        assert RUN.submit(cluster, **lines).wait() == Ended(0, 0)


class TestPrologAndEpilog:
    def test_the_epilog_after_a_run_that_was_killed(self, cluster: Cluster):
        job = RUN_WITH_EPILOG.submit(cluster, held=True)
        assert job.report().wait_for_pass()["mounted"], job.output()
        job.delete()
        assert job.wait() == KILLED, job.output()

    def test_a_job_that_asks_for_nothing(self, cluster: Cluster):
        folder = cluster.engine.new_folder()
        command = f"{PYTHON} {READER} {cluster.dataset.path} report.undefined 4"
        job = cluster.engine.submit(folder, f"#!/bin/bash\n{command}\n", "node")
        assert job.wait() == Ended(0, 4)
        assert not job.report().passes()[0]["mounted"]
        assert job.output() == ""

    def test_a_directory_that_the_administrator_has_not_listed(self, cluster: Cluster):
        data = cluster.elsewhere.path
        job = PROLOG.submit(cluster, data=data)
        assert job.wait() == Ended(0, 0)
        (only,) = job.report().passes()
        assert only["digest"] == cluster.elsewhere.digest
        assert not only["mounted"]
        assert job.output().startswith(f"cachefs: {data} is not mounted: it is not in SOURCES of ")
        assert job.output().count("\n") == 1

    def test_a_link_out_of_what_is_listed(self, cluster: Cluster):
        link = cluster.dataset.path.parent / "link"
        link.symlink_to(cluster.elsewhere.path)
        job = PROLOG.submit(cluster, data=link)
        assert job.wait() == Ended(0, 0)
        assert not job.report().passes()[0]["mounted"]
        assert job.output().startswith(f"cachefs: {cluster.elsewhere.path} is not mounted: it is not in SOURCES of ")

    def test_a_directory_that_is_not_there(self, cluster: Cluster):
        missing = cluster.dataset.path.parent / "missing"
        job = PROLOG.submit(cluster, data=missing)
        assert job.wait() == Ended(0, 1)  # the reader's own
        assert f"cachefs: {missing} is not mounted: it cannot be reached" in job.output()

    def test_a_cachefs_that_fails_does_not_stop_the_queue(self, cluster: Cluster):
        job = Way("broken", "broken").submit(cluster)
        assert job.wait() == Ended(0, 0)
        assert job.report().passes()[0]["digest"] == cluster.dataset.digest
        assert job.output().startswith(f"cachefs: {cluster.dataset.path} is not mounted, and read directly")

    def test_the_claim_of_a_job_of_which_nothing_is_heard_again(self, cluster: Cluster):
        """The shepherd is killed: there is no epilog. The next job that asks for a mount clears up."""
        lost = PROLOG.submit(cluster, held=True)
        reader = psutil.Process(int(lost.report().wait_for_pass()["pid"]))
        shepherd = next(parent for parent in reader.parents() if parent.name().startswith("sge_shepherd"))
        shepherd.kill()
        reader.kill()
        assert lost.wait().failed != 0
        assert cluster.left()
        assert PROLOG.submit(cluster).wait() == Ended(0, 0)

    def test_other_jobs_of_the_user_are_left_alone(self, cluster: Cluster):
        first, second = (STEPS.submit(cluster, held=True) for _ in range(2))
        for job in (first, second):
            assert job.report().wait_for_pass()["mounted"], job.output()
        first.delete()
        assert first.wait() == KILLED
        second.report().go_on()
        assert second.wait() == Ended(0, 0), second.output()
        assert [line["mounted"] for line in second.report().passes()] == [True] * 2
