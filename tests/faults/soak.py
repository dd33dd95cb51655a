"""The soak: random trees, random readers and random faults on real mounts, and a checker that knows every byte.

    python -m tests.faults.soak [--minutes 30] [--seed N] [--mounts 2]

Readers read through the mounts all the time while files change on the source, which fails, hangs and gets slow; daemons
and workers are killed; copies and the index in scratch are damaged, its disk is filled, the clock is set; scratch is
verified, repaired and purged. These mounts have a memory tier, from which files move down all the time. One more mount
shows a directory that does not change, without one, and promotes it where it may. Now
and then all faults end, and soon every file is the one that the source has. At the end it prints operations, bytes,
faults and errors, and exits with 0 if no byte was wrong and nothing was left: mounts, processes, files, or room that is
counted and not taken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from cachefs.demo.slow_source import SlowSource
from cachefs.mount.mountinfo import read_mounts
from tests.faults import versions
from tests.faults.readers import Crowd
from tests.harness import clean_environment, mounts_below, run_cachefs, wait_until
from tests.mount.observing import stored_bytes

FILES, DIRECTORIES, DEPTH, READERS = 80, 6, 4, 3
FROZEN_BYTES = 2 << 20
CAPACITY = 12 << 20
MEMORY = 2 << 20
DISK_BYTES = 64 << 20
ELSEWHERE = b"not ours " * 1000
SHARED = ("--policy", "lru", "--capacity", str(CAPACITY))
OPTIONS = ("--metadata-ttl", "1", "--source-timeout", "2")
PAUSE = 0.15
HEAL_SECONDS = 30.0
MOST_CLOCK_SECONDS = 400 * 86_400


class Soak:
    """One run below `folder`. As root scratch has a small disk of its own."""

    def __init__(self, folder: Path, seed: int, mounts: int) -> None:
        self.dice = random.Random(seed)
        self.folder, self.backing, self.frozen = folder, folder / "backing", folder / "frozen"
        self.disk, self.clock = folder / "disk", folder / "clock"
        self.scratch = self.disk / "scratch"
        self.memory = Path(tempfile.mkdtemp(prefix="cachefs-soak-", dir="/dev/shm"))
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.write_bytes(ELSEWHERE)
        changing = [folder / f"mount{number}" for number in range(mounts)]
        self.still = folder / "still"
        self.mountpoints = [*changing, self.still]
        for path in (self.backing, self.frozen, self.disk, folder / "remote", *self.mountpoints):
            path.mkdir()
        self.names = sorted(self._some_path(number) for number in range(FILES))
        self.current = dict.fromkeys(self.names, 0)
        for name in self.names:
            self._write(self.backing, name, 0)
        self.frozen_names: list[str] = []
        for number in range(FILES):
            size = sum((self.frozen / name).stat().st_size for name in self.frozen_names)
            name = self._some_path(number)
            if size + len(versions.content(name, 0)) < FROZEN_BYTES:
                self._write(self.frozen, name, 0)
                self.frozen_names.append(name)
        self.slow = SlowSource(self.backing, folder / "remote", latency=0.001)
        if os.geteuid() == 0:
            device = folder / "device"
            with open(device, "wb") as file:
                file.truncate(DISK_BYTES)
            subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
            subprocess.run(["mount", "-o", "loop", device, self.disk], check=True)
        self.set_clock(0.0)
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.largest = self.largest_memory = self.promoted = 0

    def _some_path(self, number: int) -> str:
        between = [str(self.dice.randrange(3)) for _ in range(self.dice.randrange(DEPTH))]
        return "/".join([str(number % DIRECTORIES), *(f"d{name}" for name in between), str(number)])

    @staticmethod
    def _write(root: Path, name: str, version: int) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        versions.write(root / name, name, version)

    def read(self, dice: random.Random) -> tuple[int, str | None]:
        """What the readers do."""
        root = dice.choice(self.mountpoints)
        name = dice.choice(self.frozen_names if root == self.still else self.names)
        if dice.random() < 0.1:
            os.listdir((root / name).parent)
            return 0, None
        size, problem = versions.check(root / name, name, dice)
        return size, problem and f"{root.name}: {problem}"

    # The mounts

    def mount(self, place: Path) -> None:
        """With the clock that is set. Not where the disk is full: there is no room for a lease."""
        self.drain_the_disk()
        memory = ("--memory", str(MEMORY), "--memory-path", self.memory)
        source, options = (self.frozen, ()) if place == self.still else (self.slow.path, (*OPTIONS, *memory))
        command = [sys.executable, "-m", "tests.faults.clocked", self.clock, "mount", source, place]
        command += ["--scratch", self.scratch, *SHARED, *options]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"not mounted: {done.stderr}")

    def unmount(self, place: Path, *options: str) -> None:
        run_cachefs("umount", place, "--lazy", *options)

    def daemon(self, place: Path) -> psutil.Process:
        return psutil.Process(json.loads(run_cachefs("status", place, "--json").stdout)["pid"])

    def set_clock(self, seconds: float) -> None:
        new = self.folder / "clock.new"
        new.write_text(str(seconds))
        os.rename(new, self.clock)

    # Faults, each by its name

    def kill_a_daemon(self) -> None:
        place = self.dice.choice(self.mountpoints)
        daemon = self.daemon(place)
        daemon.kill()
        daemon.wait()
        self.unmount(place)
        self.mount(place)

    def kill_a_worker(self) -> None:
        workers = self.daemon(self.dice.choice(self.mountpoints)).children(recursive=True)
        with suppress(psutil.NoSuchProcess):
            self.dice.choice(workers[1:]).kill()  # the first is the fork server: without it the mount ends

    def mount_again(self) -> None:
        place = self.dice.choice(self.mountpoints)
        self.unmount(place)
        self.mount(place)

    def change_files(self) -> None:
        for name in self.dice.sample(self.names, 5):
            if self.current[name] >= 0:
                self.current[name] += 1
                self._write(self.backing, name, self.current[name])

    def delete_a_file(self) -> None:
        name = self.dice.choice(self.names)
        if self.current[name] >= 0:
            (self.backing / name).unlink()
            self.current[name] = ~self.current[name]

    def bring_files_back(self) -> None:
        for name, version in self.current.items():
            if version < 0:
                self.current[name] = ~version + 1
                self._write(self.backing, name, self.current[name])

    def fail_the_source(self) -> None:
        self.slow.fail(f"{self.dice.randrange(DIRECTORIES)}*", errno=self.dice.choice(("EIO", "ESTALE", "EACCES")))

    def hang_the_source(self) -> None:
        self.slow.fail(f"{self.dice.randrange(DIRECTORIES)}/*", self.dice.choice(("open", "read")), hang=True)

    def slow_the_source(self) -> None:
        self.slow.set(latency=0.1)

    def replace_a_directory(self) -> None:
        """By another tree that is renamed into its place, with new versions of all files."""
        top = str(self.dice.randrange(DIRECTORIES))
        inside = [name for name in self.names if name.split("/")[0] == top and self.current[name] >= 0]
        if not inside:
            return
        for name in inside:
            self.current[name] += 1
            self._write(self.folder / "new", name, self.current[name])
        os.rename(self.backing / top, self.folder / "old")
        os.rename(self.folder / "new" / top, self.backing / top)
        shutil.rmtree(self.folder / "old")
        shutil.rmtree(self.folder / "new")

    def heal_the_source(self) -> None:
        self.slow.clear_faults()
        self.slow.set(latency=0.001)

    def damage_a_copy(self) -> None:
        tiers = [self.scratch, *self.memory.iterdir()]
        found = (path for tier in tiers for path in (tier / "files").rglob("*"))
        copies = [path for path in found if path.is_file() and not path.is_symlink()]  # never what a link leads to
        if not copies:
            return
        self.drain_the_disk()  # else there is no room for what is put in its place
        victim = self.dice.choice(copies)
        how = self.dice.choice(("truncate", "flip", "remove", "link", "directory"))
        with suppress(FileNotFoundError):  # evicted meanwhile
            if (
                how == "truncate" and victim.stat().st_nlink == 1
            ):  # of what is promoted the kernel shows it for a moment
                os.truncate(victim, victim.stat().st_size // 2)
                return
            data = bytearray(victim.read_bytes())
            victim.unlink()  # whoever has it open has the right one
            if how == "flip" and data:
                data[len(data) // 2] ^= 1
                victim.write_bytes(data)
            elif how == "link":
                victim.symlink_to(self.elsewhere)
            elif how == "directory":
                victim.mkdir()

    def damage_the_index(self) -> None:
        for path in self.scratch.glob("index.db*"):
            if self.dice.random() < 0.5:
                path.unlink()
            else:
                with open(path, "r+b") as file:
                    file.seek(self.dice.randrange(10_000))
                    file.write(b"damage" * 50)

    def fill_the_disk(self) -> None:
        if os.geteuid() == 0:
            with open(self.disk / "filler", "ab", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(64 << 10))

    def drain_the_disk(self) -> None:
        (self.disk / "filler").unlink(missing_ok=True)

    def turn_the_clock(self) -> None:
        self.set_clock(self.dice.uniform(-MOST_CLOCK_SECONDS, MOST_CLOCK_SECONDS))

    def verify(self) -> None:
        run_cachefs("verify", "--repair", "--scratch", self.scratch, check=False)

    def purge_in_use(self) -> None:
        if not run_cachefs("purge", "--scratch", self.scratch, check=False).returncode:
            self.problems.append("scratch was purged, and in use")

    def purge_and_begin_again(self) -> None:
        for place in self.mountpoints:
            self.unmount(place)
        run_cachefs("purge", "--scratch", self.scratch, check=False)  # who has a file open keeps a mount
        for place in self.mountpoints:
            self.mount(place)

    def calm_down(self) -> None:
        """All faults end, and soon everything is as on the source."""
        self.heal_the_source()
        self.drain_the_disk()
        self.bring_files_back()
        self.problems += self._await_health()

    # The whole

    def run(self, seconds: float) -> dict[str, object]:
        for place in self.mountpoints:
            self.mount(place)
        readers = Crowd(self.read, [self.dice.randrange(1 << 30) for _ in range(READERS)])
        kinds: list[Callable[[], None]] = [
            self.kill_a_daemon, self.kill_a_worker, self.mount_again, self.change_files, self.delete_a_file,
            self.bring_files_back, self.fail_the_source, self.hang_the_source, self.slow_the_source,
            self.heal_the_source, self.heal_the_source, self.replace_a_directory, self.damage_a_copy,
            self.damage_a_copy, self.damage_the_index, self.fill_the_disk, self.drain_the_disk, self.turn_the_clock,
            self.verify, self.purge_in_use, self.purge_and_begin_again, self.calm_down,
        ]  # fmt: skip
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                fault = self.dice.choice(kinds)
                fault()
                self.faults[fault.__name__] += 1
                self.largest = max(self.largest, stored_bytes(self.scratch))
                self.largest_memory = max(self.largest_memory, *map(stored_bytes, self.memory.iterdir()), 0)
                shown = [mount for mount in read_mounts() if mount.tree and mount.path.is_relative_to(self.still)]
                self.promoted = max(self.promoted, len(shown))
                time.sleep(self.dice.uniform(0, 2 * PAUSE))
            self.calm_down()
        finally:
            readers.terminate()
            seen = readers.join()
        self._conclude()
        return {
            "operations": seen.operations,
            "bytes": seen.bytes,
            "faults": dict(self.faults),
            "errors": dict(seen.errors),
            "promoted directories": self.promoted,
            "largest": self.largest,
            "problems": self.problems + seen.wrong,
        }

    def _await_health(self) -> list[str]:
        """Without faults all is as on the source soon; else what is not."""
        end = time.monotonic() + HEAL_SECONDS
        frozen = dict.fromkeys(self.frozen_names, 0)
        while True:
            left = []
            for place in self.mountpoints:
                for name, version in (frozen if place == self.still else self.current).items():
                    try:
                        if (place / name).read_bytes() != versions.content(name, version):
                            left.append(f"{place.name}/{name} is not version {version} without faults")
                    except OSError as error:
                        left.append(f"{place.name}/{name} without faults: {error.strerror}")
            if not left or time.monotonic() > end:
                return left[:20]
            time.sleep(0.5)

    def _conclude(self) -> None:
        """Unmount, verify, purge; whatever should not be there then is a problem."""
        for place in self.mountpoints:
            run_cachefs("umount", place)
        for strange in (self.scratch / "staging").glob("strange-*"):
            shutil.rmtree(strange)
        done = run_cachefs("verify", "--repair", "--scratch", self.scratch, check=False)
        if "cannot be verified" in done.stderr:
            self.problems.append(done.stderr)
        done = run_cachefs("verify", "--scratch", self.scratch, check=False)
        if done.returncode:
            self.problems.append(f"after a repair: {done.stderr}")
        for root, versions_there in ((self.backing, self.current), (self.frozen, dict.fromkeys(self.frozen_names, 0))):
            found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
            if found != {*versions_there}:
                self.problems.append(f"the source has other files now: {found ^ {*versions_there}}")
            for name, version in versions_there.items():
                if (root / name).read_bytes() != versions.content(name, version):
                    self.problems.append(f"the source's own {name} was changed")
        if self.elsewhere.read_bytes() != ELSEWHERE:
            self.problems.append("a file was changed to which a link in scratch led")
        if self.largest > CAPACITY:
            self.problems.append(f"scratch held {self.largest} bytes, and its capacity is {CAPACITY}")
        if self.largest_memory > MEMORY:
            self.problems.append(f"memory held {self.largest_memory} bytes, and its capacity is {MEMORY}")
        if not self.largest_memory:
            self.problems.append("nothing was in memory")
        if left := os.listdir(self.memory):
            self.problems.append(f"without mounts there is still a memory tier: {left}")
        run_cachefs("purge", "--scratch", self.scratch)
        if self.scratch.exists():
            self.problems.append(f"after the purge there is {os.listdir(self.scratch)}")

    def close(self) -> None:
        for place in self.mountpoints:
            run_cachefs("umount", place, "--lazy", check=False)
        self.slow.close()
        shutil.rmtree(self.memory)
        if os.path.ismount(self.disk):
            subprocess.run(["umount", "-l", self.disk], check=True)


def processes_of(folder: Path) -> list[int]:
    """Those that were told of `folder` or of something in it, but this one."""
    found = psutil.process_iter(["cmdline"])
    return [
        one.pid
        for one in found
        if one.pid != os.getpid() and any(f"{folder}/" in word for word in one.info["cmdline"] or [])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--mounts", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where everything lies meanwhile")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cachefs-soak-", dir=arguments.folder) as name:
        folder = Path(name).resolve()
        soak = Soak(folder, arguments.seed, arguments.mounts)
        try:
            result = soak.run(arguments.minutes * 60)
        finally:
            soak.close()
        left = [f"mounted: {path}" for path in mounts_below(folder)]
        with suppress(AssertionError):
            wait_until(lambda: not processes_of(folder), "the processes of its mounts end", 10)
        left += [f"running: process {pid}" for pid in processes_of(folder)]
    for what in ("operations", "bytes", "faults", "errors", "promoted directories"):
        print(f"{what}: {result[what]:,}" if isinstance(result[what], int) else f"{what}: {result[what]}")
    problems = [*result["problems"], *left]  # type: ignore[misc]
    for problem in problems:
        print(problem)
    print(f"wrong or left: {len(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
