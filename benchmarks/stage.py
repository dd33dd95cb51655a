"""What every workload stands on: its folder, its data, the slow source, cold caches, readers, and what they tell.

Invariants:
- Every read is checked: a reader's digest must be that of the same reader on the files themselves.
- Nothing of a stage is left when its block ends, on an interrupt either: no mount, no process, no file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.contenders import CONTENDERS, PLAIN, BenchmarkError, Contender, Place, Running, detach_below
from benchmarks.results import Circumstances, Records
from cachefs.demo.dataset import make_dataset
from cachefs.demo.slow_source import SlowSource

T = TypeVar("T")

READERS = Path(__file__).parent / "readers"
CLASSES = 20
READ_SECONDS = 900.0
KILLED_SECONDS = 10.0


@dataclass(frozen=True)
class Conditions:
    """What the source costs: of each operation, and of the bytes."""

    latency_ms: float
    bandwidth_mb_s: float

    def circumstances(self) -> Circumstances:
        return {"latency_ms": self.latency_ms, "bandwidth_mb_s": self.bandwidth_mb_s}


@dataclass(frozen=True)
class Reader:
    """A script of `readers/` and its arguments behind the directory. `shuffle` are those that change the order in which
    it reads; where `is_ordered` its digest depends on that."""

    script: str
    arguments: tuple[object, ...] = ()
    shuffle: tuple[object, ...] = ()
    is_ordered: bool = False
    can_repeat: bool = False
    """Whether it knows `--at-least`."""
    limit: float = READ_SECONDS
    """After so many seconds it has failed."""

    def at_least(self, seconds: float) -> Reader:
        """The same, repeated until it took so long, where the script can."""
        return replace(self, shuffle=(*self.shuffle, "--at-least", seconds)) if self.can_repeat else self


@dataclass(frozen=True)
class Measured:
    """What one run of a reader took: one epoch."""

    seconds: float
    files: int
    bytes: int
    daemon_seconds: float = 0.0
    worker_seconds: float = 0.0
    requests: float | None = None
    listing_seconds: float | None = None
    """What a reader took before that to find out which files there are."""
    waited_seconds: float | None = None
    """For how much of it a training waited for its data."""
    latencies: tuple[float, ...] | None = None
    """Of each file."""

    @property
    def scale(self) -> tuple[float, str]:
        """What to multiply seconds with, and the unit that this gives: for each file, where there are several."""
        return (1e6 / self.files, "µs/file") if self.files > 1 else (1.0, "s")


@dataclass(frozen=True)
class Options:
    """What the command line says. Without `latencies` or `bandwidths` a workload has its own."""

    repetitions: int = 3
    is_quick: bool = False
    latencies: tuple[float, ...] = ()
    bandwidths: tuple[float, ...] = ()
    contenders: tuple[str, ...] = ()
    folder: Path | None = None
    seed: int = 0
    samples: int | None = None
    pictures: Path | None = None
    """Where pictures that a run takes are kept; without it they are not."""


@dataclass
class Stage:
    """One run of one workload."""

    folder: Path
    options: Options
    tools: Path
    tell: Callable[[str], None] = lambda line: None
    records: Records = field(default_factory=Records)
    skipped: dict[str, str] = field(default_factory=dict)
    page_cache: str = "dropped where a case says so, and before every first read"
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _expected: dict[tuple[Any, ...], list[str]] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, options: Options, tools: Path, tell: Callable[[str], None]) -> Iterator[Stage]:
        """`tools` is where contenders put what they need, once for all workloads."""
        with tempfile.TemporaryDirectory(prefix="cachefs-bench-", dir=options.folder) as name:
            folder = Path(name).resolve()
            folder.chmod(0o755)
            try:
                yield cls(folder, options, tools, tell)
            finally:
                detach_below(folder)

    @property
    def repetitions(self) -> int:
        return 1 if self.options.is_quick else self.options.repetitions

    def size(self, full: int, quick: int) -> int:
        return quick if self.options.is_quick else full

    def conditions(self, *usual: Conditions) -> list[Conditions]:
        """Those that were asked for, else the usual ones of a workload, of which a quick run takes the first."""
        if not self.options.latencies and not self.options.bandwidths:
            return list(usual[:1] if self.options.is_quick else usual)
        latencies = self.options.latencies or sorted({each.latency_ms for each in usual})
        bandwidths = self.options.bandwidths or sorted({each.bandwidth_mb_s for each in usual})
        return [Conditions(latency, bandwidth) for latency in latencies for bandwidth in bandwidths]

    def contenders(self, *names: str) -> list[Contender]:
        """Those of the names that were asked for and can take part; why others cannot is in `skipped`."""
        found = []
        for name in names:
            if self.options.contenders and name not in self.options.contenders:
                self.skipped.setdefault(name, "not asked for")
            elif name not in self.skipped:
                reason = CONTENDERS[name].missing(self.tools)
                if reason is None:
                    found.append(CONTENDERS[name])
                else:
                    self.skipped[name] = reason
                    self.tell(f"skipped: {CONTENDERS[name].title}, because {reason}")
        return found

    def new_folder(self) -> Path:
        folder = self.folder / f"{next(self._numbers):04}"
        folder.mkdir()
        return folder

    def photographs(self, files: int, mean_bytes: int = 110_000) -> Path:
        """A new dataset of JPEG files in class folders."""
        folder = self.new_folder()
        classes = min(CLASSES, files)
        make_dataset(folder, files=files, classes=classes, mean_bytes=mean_bytes, seed=self.options.seed)
        return folder

    def slow(self, backing: Path, conditions: Conditions | None) -> AbstractContextManager[SlowSource]:
        """The slow source over `backing`; without conditions it takes no time of its own."""
        latency, bandwidth = (conditions.latency_ms / 1e3, conditions.bandwidth_mb_s * 1e6) if conditions else (0, None)
        return SlowSource(backing, self.new_folder(), latency=latency, bandwidth=bandwidth)

    def start(
        self, contender: Contender, source: Path, local: Path, serving: Mapping[str, Running] | None = None
    ) -> AbstractContextManager[Running]:
        return contender.run(Place(source, local, self.new_folder(), serving or {}), self.tools)

    def drop_caches(self) -> bool:
        """Empty the page cache, as root; False where that is not permitted, and then the results say so.

        A quick run leaves it alone: all that starts after it would be slow."""
        if self.options.is_quick:
            self.page_cache = "never dropped: a quick run"
            return True
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except PermissionError:
            self.page_cache = "never dropped: only root may"
            return False
        return True

    def measure(
        self, reader: Reader, running: Running, local: Path, between: Callable[[], object] | None = None
    ) -> list[Measured]:
        """Run a reader where a contender serves; BenchmarkError if it read anything else than lies in `local`.

        One result for each line that the reader prints, with the processor time of all epochs shared among them.
        `between` is called after each of them, and the reader, which has to know `--pause`, waits for it."""
        counts = running.status() if running.process else {}
        before = running.cpu()
        answers = self._read(reader, running.path, between)
        after = running.cpu()
        epochs = sum(answer.get("epochs", 1) for answer in answers)
        requests = None
        if "requests" in counts:
            requests = (running.status()["requests"] - counts["requests"]) / epochs
        expected = self._digests(reader, local)
        found = [answer["digest"] for answer in answers]
        if found != expected:
            raise BenchmarkError(f"{running.path}: {reader} read {found}, and the files have {expected}")
        return [
            Measured(
                answer["seconds"],
                answer["files"],
                answer["bytes"],
                max(0.0, after.daemon - before.daemon) / epochs,
                max(0.0, after.workers - before.workers) / epochs,
                requests,
                answer.get("listing_seconds"),
                answer.get("waited_seconds"),
                tuple(answer.get("latencies", ())),
            )
            for answer in answers
        ]

    def note_memory(self, case: str, contender: Contender, running: Running, circumstances: Circumstances) -> None:
        """Record what the daemon takes now, if there is one."""
        memory = running.memory_bytes() / 1e6
        if memory:
            self.records.add(case, contender.name, "memory", "MB", memory, circumstances)

    def note(self, case: str, contender: Contender, measured: Measured, circumstances: Circumstances) -> None:
        """Record a run: times a file where there are several, else as they are."""
        scale, unit = measured.scale

        def add(quantity: str, of_unit: str, value: float) -> None:
            self.records.add(case, contender.name, quantity, of_unit, value, circumstances)

        add("time", unit, measured.seconds * scale)
        if contender.kind != PLAIN:
            add("daemon CPU", unit, measured.daemon_seconds * scale)
        if contender.kind == "cachefs":
            add("worker CPU", unit, measured.worker_seconds * scale)
        if measured.requests is not None:
            add("requests", "1/file", measured.requests / measured.files)
        self.tell(f"{case}: {contender.title}, {_describe(circumstances)}: {measured.seconds:.3f} s")

    def _digests(self, reader: Reader, local: Path) -> list[str]:
        key = (reader.script, reader.arguments, reader.shuffle if reader.is_ordered else (), local)
        if key not in self._expected:
            self._expected[key] = [answer["digest"] for answer in self._read(reader, local)]
        return self._expected[key]

    def _read(
        self, reader: Reader, directory: Path, between: Callable[[], object] | None = None
    ) -> list[dict[str, Any]]:
        command = [sys.executable, "-W", "ignore", READERS / reader.script, directory]
        command += [*reader.arguments, *reader.shuffle, *(["--pause"] if between else [])]
        answers = []
        with tempfile.TemporaryFile() as errors, subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # so that its workers can be ended with it
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            is_late = threading.Event()

            def end_late() -> None:
                is_late.set()
                _kill_all_of(process)

            killer = threading.Timer(reader.limit, end_late)
            killer.start()
            try:
                for line in process.stdout:
                    answers.append(json.loads(line))
                    if between is not None:
                        between()
                        with contextlib.suppress(BrokenPipeError):  # it was the last
                            os.write(process.stdin.fileno(), b"\n")
                process.wait()
            except BaseException:
                _kill_all_of(process)
                raise
            finally:
                killer.cancel()
                killer.join()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()[-2000:]
        if process.returncode and is_late.is_set():
            raise BenchmarkError(f"{reader.script} at {directory} does not end within {reader.limit:g} s")
        if process.returncode:
            raise BenchmarkError(f"{reader.script} failed at {directory}: {said}")
        return answers


def _kill_all_of(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it has forked, and wait until they are gone: they hold the mount."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + KILLED_SECONDS
        while time.monotonic() < deadline:
            process.poll()  # or it would be there for as long as nobody asks
            os.killpg(process.pid, 0)
            time.sleep(0.01)


def lacking(*modules: str) -> str | None:
    """Which of them cannot be imported, and how to get them; None if all can."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} is not installed: pip install -e '.[bench]' torch==2.13.0"


def rotated(contenders: Sequence[T], by: int) -> list[T]:
    """In another order each repetition, so that nobody always runs behind the same one."""
    by %= len(contenders) or 1
    return [*contenders[by:], *contenders[:by]]


def _describe(circumstances: Circumstances) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in circumstances.items()) or "as it is"
