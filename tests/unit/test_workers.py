"""Worker processes, real ones: order, number, time-outs, deaths, cancellation, errors, and their end."""

from __future__ import annotations

import errno
import os
import select
import signal
import time

import psutil
import pytest
import trio
import trio.testing

from cachefs.errors import (
    SourceChangedError,
    SourceError,
    SourceTimeoutError,
    StorageError,
    WorkerDiedError,
)
from cachefs.workers.fork_server import ForkServer
from cachefs.workers.pool import WorkerBugError, WorkerPool
from cachefs.workers.protocol import PACKET_BYTES, serve
from tests.filesystem.fakes import until
from tests.harness import lives, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def _pid():
    yield from ()
    return os.getpid()


def _echo(value):
    yield from ()
    return value


def _count(upto):
    yield from range(upto)
    return "done"


def _hang(path=""):
    """Say that the job has begun, by making a file, and never anything else."""
    yield from ()
    if path:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    signal.pause()


def _say_and_hang():
    yield "said"
    signal.pause()


def _wait_for(path):
    """End when `path` is there; say so now and then."""
    while not os.path.exists(path):
        yield "waiting"
        time.sleep(0.005)
    return os.getpid()


def _die():
    yield "dying"
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(class_name, number, path):
    yield from ()
    if class_name == "SourceChangedError":
        raise SourceChangedError(path)
    raise {"SourceError": SourceError, "StorageError": StorageError, "OSError": OSError}[class_name](
        number, os.strerror(number), path
    )


def _bug():
    yield from ()
    raise ValueError("a bug planted in handler _bug")


def _descriptors():
    yield from ()
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in links if os.path.lexists(link)]


HANDLERS = {
    "pid": _pid,
    "echo": _echo,
    "count": _count,
    "hang": _hang,
    "say_and_hang": _say_and_hang,
    "wait_for": _wait_for,
    "die": _die,
    "fail": _fail,
    "bug": _bug,
    "descriptors": _descriptors,
}


@pytest.fixture
def fork_server():
    server = ForkServer.start(lambda sock: serve(sock, HANDLERS), keep_fds=[])
    family = psutil.Process(server.pid)
    yield server
    workers = family.children(recursive=True)
    server.close()
    wait_until(lambda: not any(map(lives, workers)), "the workers end with their server")


@pytest.fixture
def pool_of(fork_server):
    """`pool_of(size)`: a pool; whatever it keeps idle ends with the test."""
    made = []

    def make(size):
        made.append(WorkerPool(fork_server, "test", size))
        return made[-1]

    yield make

    async def end():
        for pool in made:
            await pool.aclose()
            assert pool.busy == 0
            assert pool._alive == 0

    trio.run(end)


def test_a_job_is_done_in_another_process(pool_of):
    pool = pool_of(1)
    assert trio.run(lambda: pool.run(("pid",))) != os.getpid()


@pytest.mark.parametrize(
    "value", [None, 0, -(2**70), 1.5, b"", b"\0\xff" * 1000, "ä\n", (1, (b"2", "3")), [1, [2]], {"a": b"b"}, True]
)
def test_values_go_there_and_back(pool_of, value):
    pool = pool_of(1)
    assert trio.run(lambda: pool.run(("echo", value))) == value


def test_a_full_packet_fits(pool_of):
    pool = pool_of(1)
    data = bytes(PACKET_BYTES)
    assert trio.run(lambda: pool.run(("echo", data))) == data


def test_progress_comes_before_the_result_and_in_order(pool_of):
    pool = pool_of(1)
    said = []

    async def main():
        return await pool.run(("count", 2000), on_progress=said.append)

    assert trio.run(main) == "done"
    assert said == list(range(2000))


def test_jobs_begin_in_the_order_in_which_they_came_and_one_worker_does_them(pool_of):
    pool = pool_of(1)
    order, pids = [], set()

    async def job(number):
        pids.add(await pool.run(("pid",)))
        order.append(number)

    async def main():
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(job, number)
                await trio.testing.wait_all_tasks_blocked()

    trio.run(main)
    assert order == list(range(20))
    assert len(pids) == 1


def test_there_are_never_more_workers_than_the_pool_is_large(pool_of, tmp_path):
    pool = pool_of(3)
    begun, pids = [], set()

    async def job():
        pids.add(await pool.run(("wait_for", str(tmp_path / "go")), on_progress=lambda _: begun.append(1)))

    async def main():
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(job)
            await until(lambda: pool.busy == 3 and len(begun) >= 10)
            assert pool.busy == 3
            assert len(psutil.Process(pool._fork_server.pid).children()) == 3
            (tmp_path / "go").touch()

    trio.run(main)
    assert len(pids) <= 3
    assert pool.busy == 0


def test_a_job_that_says_nothing_is_ended_and_the_next_one_gets_a_new_worker(pool_of):
    async def main():
        pool = pool_of(1)
        first = await pool.run(("pid",))
        with pytest.raises(SourceTimeoutError) as caught:
            await pool.run(("hang",), what="stat b'x'", timeout=0.05)
        assert caught.value.errno == errno.EIO
        assert "stat b'x'" in str(caught.value)
        assert not psutil.pid_exists(first)
        second = await pool.run(("pid",))
        assert second != first

    trio.run(main)


def test_the_time_out_is_for_each_word_and_not_for_the_job(pool_of, tmp_path):
    async def main():
        pool = pool_of(1)
        said = []
        async with trio.open_nursery() as nursery:

            async def job():
                await pool.run(("wait_for", str(tmp_path / "go")), timeout=2.0, on_progress=said.append)

            nursery.start_soon(job)
            await until(lambda: len(said) >= 20)
            (tmp_path / "go").touch()
        with pytest.raises(SourceTimeoutError):
            await pool.run(("say_and_hang",), timeout=0.2, on_progress=said.append)
        assert said[-1] == "said"

    trio.run(main)


def test_a_worker_that_dies_is_an_error_of_its_own_and_is_replaced(pool_of):
    async def main():
        pool = pool_of(1)
        for _ in range(3):
            with pytest.raises(WorkerDiedError) as caught:
                await pool.run(("die",), what="fetch b'x'")
            assert caught.value.errno == errno.EIO
        assert await pool.run(("echo", 7)) == 7

    trio.run(main)


def test_a_worker_that_died_while_it_was_idle_is_replaced_or_said_to_have_died(pool_of):
    """As the kernel's out-of-memory killer may do. The reader must not see EPIPE or ECONNRESET."""

    async def main():
        pool = pool_of(1)
        pid = await pool.run(("pid",))
        os.kill(pid, signal.SIGKILL)
        await trio.to_thread.run_sync(wait_until, lambda: not psutil.pid_exists(pid), "the worker is gone")
        try:
            assert await pool.run(("echo", 7)) == 7
        except WorkerDiedError:
            pass
        assert await pool.run(("echo", 8)) == 8

    trio.run(main)


def test_a_job_that_does_not_fit_into_a_message_is_an_error_and_costs_no_worker(pool_of):
    """The path of a very deep tree is longer than a packet may be."""

    async def main():
        pool = pool_of(2)
        for size in (200_000, 1_000_000, 1_000_000, 1_000_000):
            with pytest.raises(OSError):  # noqa: PT011 - any error will do
                await pool.run(("echo", bytes(size)))
            assert pool.busy == 0, "the place of a worker is lost: the next job would wait for ever"
        assert await pool.run(("echo", 7)) == 7

    trio.run(main)


def test_a_cancelled_job_ends_its_worker(pool_of, tmp_path):
    async def main():
        pool = pool_of(1)
        first = await pool.run(("pid",))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run, ("hang", str(tmp_path / "begun")))
            await until((tmp_path / "begun").exists)
            nursery.cancel_scope.cancel()
        assert not psutil.pid_exists(first)
        assert pool.busy == 0
        assert await pool.run(("pid",)) != first

    trio.run(main)


def test_who_is_cancelled_in_the_queue_leaves_it(pool_of, tmp_path):
    async def main():
        pool = pool_of(1)
        results = []

        async def job(number):
            results.append(await pool.run(("echo", number)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run, ("wait_for", str(tmp_path / "go")))
            await trio.testing.wait_all_tasks_blocked()
            async with trio.open_nursery() as others:
                others.start_soon(job, "cancelled")
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(job, "stays")
                await trio.testing.wait_all_tasks_blocked()
                others.cancel_scope.cancel()
            (tmp_path / "go").touch()
        assert results == ["stays"]
        assert pool.busy == 0

    trio.run(main)


def test_who_is_cancelled_when_its_turn_has_come_passes_it_on(pool_of, tmp_path):
    async def main():
        pool = pool_of(1)
        results = []

        async def job(number):
            results.append(await pool.run(("echo", number)))

        async def end_and_cancel(scope):
            await pool.run(("wait_for", str(tmp_path / "go")))
            scope.cancel()  # in the same step in which the next in the queue gets its turn

        async with trio.open_nursery() as nursery, trio.open_nursery() as others:
            nursery.start_soon(end_and_cancel, others.cancel_scope)
            await trio.testing.wait_all_tasks_blocked()
            others.start_soon(job, "cancelled")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(job, "next")
            await trio.testing.wait_all_tasks_blocked()
            (tmp_path / "go").touch()
        assert results == ["next"]
        assert pool.busy == 0

    trio.run(main)


@pytest.mark.parametrize("path", [b"a/\xff", "scratch/x", b""])
@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("class_name", ["SourceError", "StorageError", "OSError"])
def test_errors_keep_their_class_and_errno(pool_of, class_name, number, path):
    async def main():
        pool = pool_of(1)
        pid = await pool.run(("pid",))
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            await pool.run(("fail", class_name, number, path))
        assert caught.value.errno == number
        assert isinstance(caught.value, SourceError) == (class_name == "SourceError")
        assert isinstance(caught.value, StorageError) == (class_name == "StorageError")
        if path:
            assert caught.value.filename == path
        assert await pool.run(("pid",)) == pid, "an error does not cost the worker"

    trio.run(main)


def test_a_change_of_the_source_is_estale(pool_of):
    pool = pool_of(1)
    with pytest.raises(SourceChangedError) as caught:
        trio.run(lambda: pool.run(("fail", "SourceChangedError", 0, b"a/\xff")))
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, b"a/\xff")


def test_a_bug_is_logged_with_its_traceback_and_the_worker_lives_on(pool_of, caplog):
    async def main():
        pool = pool_of(1)
        pid = await pool.run(("pid",))
        with pytest.raises(WorkerBugError) as caught:
            await pool.run(("bug",))
        assert caught.value.errno == errno.EIO
        with pytest.raises(WorkerBugError):
            await pool.run(("no such handler",))
        assert await pool.run(("pid",)) == pid

    trio.run(main)
    assert "a bug planted in handler _bug" in caplog.text
    assert "test_workers.py" in caplog.text
    assert "KeyError" in caplog.text


def test_no_descriptor_of_the_parent_survives_but_those_to_be_kept(tmp_path):
    kept, dropped = (os.open(tmp_path / name, os.O_CREAT | os.O_RDWR) for name in ("kept", "dropped"))
    server = ForkServer.start(lambda sock: serve(sock, HANDLERS), keep_fds=[kept])
    try:

        async def main():
            pool = WorkerPool(server, "test", 1)
            try:
                return await pool.run(("descriptors",))
            finally:
                await pool.aclose()

        links = trio.run(main)
    finally:
        server.close()
        os.close(kept)
        os.close(dropped)
    assert str(tmp_path / "kept") in links
    assert str(tmp_path / "dropped") not in links
    assert sum(link.startswith("socket:") for link in links) == 1, "a worker has its own socket and nobody else's"


def test_workers_end_with_the_fork_server(fork_server):
    async def main():
        pool = WorkerPool(fork_server, "test", 2)
        pid = await pool.run(("pid",))
        os.kill(fork_server.pid, signal.SIGKILL)
        await trio.to_thread.run_sync(wait_until, lambda: not psutil.pid_exists(pid), "the worker ends")
        for _ in range(2):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - which class is not the point, the errno is
                await pool.run(("echo", 1))
            assert caught.value.errno in (errno.EIO, None), "what a reader gets"
        await pool.aclose()

    trio.run(main)


def test_a_server_and_its_workers_end_when_their_parent_is_killed():
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            os.close(reading)
            server = ForkServer.start(lambda sock: serve(sock, HANDLERS), keep_fds=[])
            workers = [server.spawn() for _ in range(3)]
            assert len(workers) == 3  # they wait for jobs
            pids = [process.pid for process in psutil.Process(server.pid).children()]
            os.write(writing, " ".join(map(str, [server.pid, *pids])).encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert select.select([reading], [], [], 60)[0]
        processes = [psutil.Process(int(pid)) for pid in os.read(reading, 1000).split()]
        assert len(processes) == 4
    finally:
        os.close(reading)
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    wait_until(lambda: not any(map(lives, processes)), "the server and its workers end")
