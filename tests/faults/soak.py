"""The soak: random trees, random readers and random faults on real mounts, and a checker that knows every byte.

    python -m tests.faults.soak [--minutes 30] [--seed N] [--mounts 2]

Readers read through the mounts all the time while files change on the source, which fails, hangs and gets slow; daemons
and workers are killed; copies and the index in scratch are damaged; scratch is verified and repaired. At the end it
prints operations, bytes, faults and errors, and exits with 0 if no byte was wrong and nothing was left: mounts,
processes, files, or room that is counted and not taken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from cachefs.demo.slow_source import SlowSource
from tests.commands.places import processes_of
from tests.faults import versions
from tests.faults.readers import Crowd
from tests.harness import mounts_below, run_cachefs, wait_until
from tests.mount.observing import stored_bytes

FILES, DIRECTORIES, READERS = 80, 6, 3
CAPACITY = 12 << 20
ELSEWHERE = b"not ours " * 1000
OPTIONS = ("--metadata-ttl", "1", "--source-timeout", "2", "--policy", "lru", "--capacity", str(CAPACITY))
PAUSE = 0.15
HEAL_SECONDS = 60.0


class Soak:
    """One run below `folder`."""

    def __init__(self, folder: Path, seed: int, mounts: int) -> None:
        self.dice = random.Random(seed)
        self.backing, self.scratch = folder / "backing", folder / "scratch"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.write_bytes(ELSEWHERE)
        self.mountpoints = [folder / f"mount{number}" for number in range(mounts)]
        for path in (self.backing, folder / "remote", *self.mountpoints):
            path.mkdir()
        self.names = [f"{number % DIRECTORIES}/{number}" for number in range(FILES)]
        self.current = dict.fromkeys(self.names, 0)
        for name in self.names:
            (self.backing / name).parent.mkdir(exist_ok=True)
            versions.write(self.backing / name, name, 0)
        self.slow = SlowSource(self.backing, folder / "remote", latency=0.001)
        self.faults: Counter[str] = Counter()
        self.largest = 0

    def read(self, dice: random.Random) -> tuple[int, str | None]:
        """What the readers do."""
        root, name = dice.choice(self.mountpoints), dice.choice(self.names)
        if dice.random() < 0.1:
            os.listdir((root / name).parent)
            return 0, None
        return versions.check(root / name, name, dice)

    # The mounts

    def mount(self, place: Path) -> None:
        run_cachefs("mount", self.slow.path, place, "--scratch", self.scratch, *OPTIONS)

    def unmount(self, place: Path, *options: str) -> None:
        run_cachefs("umount", place, "--lazy", *options)

    def daemon(self, place: Path) -> psutil.Process:
        return psutil.Process(json.loads(run_cachefs("status", place, "--json").stdout)["pid"])

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
                versions.write(self.backing / name, name, self.current[name])

    def delete_a_file(self) -> None:
        name = self.dice.choice(self.names)
        if self.current[name] >= 0:
            (self.backing / name).unlink()
            self.current[name] = ~self.current[name]

    def bring_files_back(self) -> None:
        for name, version in self.current.items():
            if version < 0:
                self.current[name] = ~version + 1
                versions.write(self.backing / name, name, self.current[name])

    def fail_the_source(self) -> None:
        self.slow.fail(f"{self.dice.randrange(DIRECTORIES)}*", errno=self.dice.choice(("EIO", "ESTALE", "EACCES")))

    def hang_the_source(self) -> None:
        self.slow.fail(f"{self.dice.randrange(DIRECTORIES)}/*", self.dice.choice(("open", "read")), hang=True)

    def slow_the_source(self) -> None:
        self.slow.set(latency=0.1)

    def heal_the_source(self) -> None:
        self.slow.clear_faults()
        self.slow.set(latency=0.001)

    def damage_a_copy(self) -> None:
        found = (self.scratch / "files").rglob("*")
        copies = [path for path in found if path.is_file() and not path.is_symlink()]  # never what a link leads to
        if not copies:
            return
        victim = self.dice.choice(copies)
        how = self.dice.choice(("truncate", "flip", "remove", "link", "directory"))
        with suppress(FileNotFoundError):  # evicted meanwhile
            if how == "truncate":
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

    def verify(self) -> None:
        run_cachefs("verify", "--repair", "--scratch", self.scratch, check=False)

    # The whole

    def run(self, seconds: float) -> dict[str, object]:
        for place in self.mountpoints:
            self.mount(place)
        readers = Crowd(self.read, [self.dice.randrange(1 << 30) for _ in range(READERS)])
        kinds: list[Callable[[], None]] = [
            self.kill_a_daemon, self.kill_a_worker, self.mount_again, self.change_files, self.delete_a_file,
            self.bring_files_back, self.fail_the_source, self.hang_the_source, self.slow_the_source,
            self.heal_the_source, self.heal_the_source, self.damage_a_copy, self.damage_a_copy, self.damage_the_index,
            self.verify,
        ]  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fault = self.dice.choice(kinds)
            fault()
            self.faults[fault.__name__] += 1
            self.largest = max(self.largest, stored_bytes(self.scratch))
            time.sleep(self.dice.uniform(0, 2 * PAUSE))
        self.heal_the_source()
        self.bring_files_back()
        problems = self._await_health()
        readers.terminate()
        seen = readers.join()
        problems += self._conclude()
        return {
            "operations": seen.operations,
            "bytes": seen.bytes,
            "faults": dict(self.faults),
            "errors": dict(seen.errors),
            "largest": self.largest,
            "problems": problems + seen.wrong,
        }

    def _await_health(self) -> list[str]:
        """Without faults all is as on the source within a minute; else what is not."""
        end = time.monotonic() + HEAL_SECONDS
        while True:
            left = []
            for place in self.mountpoints:
                for name, version in self.current.items():
                    try:
                        if (place / name).read_bytes() != versions.content(name, version):
                            left.append(f"{place.name}/{name} is not version {version} in the end")
                    except OSError as error:
                        left.append(f"{place.name}/{name} in the end: {error.strerror}")
            if not left or time.monotonic() > end:
                return left[:20]
            time.sleep(0.5)

    def _conclude(self) -> list[str]:
        """Unmount, verify, purge; whatever should not be there then."""
        problems = []
        for place in self.mountpoints:
            run_cachefs("umount", place)
        for strange in (self.scratch / "staging").glob("strange-*"):
            shutil.rmtree(strange)
        done = run_cachefs("verify", "--repair", "--scratch", self.scratch, check=False)
        if "cannot be verified" in done.stderr:
            problems.append(done.stderr)
        done = run_cachefs("verify", "--scratch", self.scratch, check=False)
        if done.returncode:
            problems.append(f"after a repair: {done.stderr}")
        for name, version in self.current.items():
            if (self.backing / name).read_bytes() != versions.content(name, version):
                problems.append(f"the source's own {name} was changed")
        if self.elsewhere.read_bytes() != ELSEWHERE:
            problems.append("a file was changed to which a link in scratch led")
        if self.largest > CAPACITY:
            problems.append(f"scratch held {self.largest} bytes, and its capacity is {CAPACITY}")
        run_cachefs("purge", "--scratch", self.scratch)
        if self.scratch.exists():
            problems.append(f"after the purge there is {os.listdir(self.scratch)}")
        return problems

    def close(self) -> None:
        for place in self.mountpoints:
            run_cachefs("umount", place, "--lazy", check=False)
        self.slow.close()


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
    for what in ("operations", "bytes", "faults", "errors"):
        print(f"{what}: {result[what]:,}" if isinstance(result[what], int) else f"{what}: {result[what]}")
    problems = [*result["problems"], *left]  # type: ignore[misc]
    for problem in problems:
        print(problem)
    print(f"wrong or left: {len(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
