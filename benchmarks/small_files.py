"""2,000 files of 110 KB on a source with 2 ms an operation, read by 4 processes in a shuffled order."""

from __future__ import annotations

from pathlib import Path

from benchmarks.stage import Result, drop_caches, mounted, read_all
from cachefs.demo.dataset import make_dataset
from cachefs.demo.slow_source import SlowSource

LATENCY, WORKERS = 0.002, 4


def run(folder: Path, repetitions: int, *, quick: bool) -> list[Result]:
    files = 200 if quick else 2000
    make_dataset(folder / "remote", files=files, classes=20, mean_bytes=110_000)
    mountpoint = folder / "dataset"
    mountpoint.mkdir()
    rows: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    with SlowSource(folder / "remote", mountpoint, latency=LATENCY) as source:
        for seed in range(repetitions):
            drop_caches()
            source.reset()
            direct = read_all(mountpoint, WORKERS, seed)
            cost = source.statistics().cpu_seconds_per_request
            with mounted(mountpoint, folder / "scratch") as cache:
                drop_caches()
                source.reset()
                before = cache.cpu_seconds()
                first = read_all(mountpoint, WORKERS, seed)
                after_first = cache.cpu_seconds()
                bytes_read = source.statistics().bytes_read
                source.reset()
                second = read_all(mountpoint, WORKERS, seed + 1)
                after_second = cache.cpu_seconds()
                dropped = drop_caches()
                third = read_all(mountpoint, WORKERS, seed + 2)
                after_third = cache.cpu_seconds()
                assert bytes_read == first["bytes"], "each file is read from the source once"
                assert source.statistics().bytes_read == 0, "later epochs read nothing from the source"
                assert {e["digest"] for e in (direct, first, second, third)} == {direct["digest"]}
                note("direct: seconds", direct["seconds"])
                note("epoch 1: seconds", first["seconds"])
                note("epoch 1 / direct", first["seconds"] / direct["seconds"])
                note("direct / epoch 2", direct["seconds"] / second["seconds"])
                if dropped:
                    note("direct / epoch 3, page cache dropped before", direct["seconds"] / third["seconds"])
                note("daemon CPU a file, epoch 1", (after_first - before) / files * 1e6)
                note("daemon CPU a file, epoch 2", (after_second - after_first) / files * 1e6)
                if dropped:
                    note("daemon CPU a file, epoch 3, page cache dropped", (after_third - after_second) / files * 1e6)
                note("daemon memory", cache.resident_bytes() / 2**20)
                note("slow source CPU a request", cost * 1e6)
    units = {"seconds": "s", "CPU": "us", "memory": "MiB"}
    goals = {"epoch 1 / direct": "at most 1.10", "direct / epoch 2": "at least 10"}
    return [
        Result(name, values, next((u for word, u in units.items() if word in name), "x"), goals.get(name, ""))
        for name, values in rows.items()
    ]
