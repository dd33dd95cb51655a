"""Finds files and reads them with worker processes, as a data loader does: a plain script that knows of no cache.

    python reader.py        requests come in on stdin, a line of JSON each; each is answered by one on stdout

Who starts it decides what it reads, and where: on the source, or as the command of `cachefs run`. Whatever may hang is
done here, so that it can be killed.

Invariants:

- It ends when its input does, and its workers end with it.
- What the page cache has of a file is dropped before the file is read. Where something stays, that is counted.
- A reading ends by itself after the seconds that it is given, and the files that are being read then.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import multiprocessing
import os
import random
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Names of what is decoded where Pillow is installed."""
_PIECE = 1 << 20
_STATS_AT_ONCE = 16
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Found:
    """Regular files below a directory, as [relative path, size] in random order: a sample, or all of them.

    `seen` were counted, and with `is_counted` there are no more; `is_all`: all of them are here. `too_large` and
    `empty` are those of the sample that were left out, as were all `links` that were seen. All files of the directories
    `whole` are in the sample.
    """

    files: list[tuple[str, int]]
    seen: int
    is_all: bool
    too_large: int
    empty: int
    unreadable_directories: int
    too_large_bytes: int = 0
    links: int = 0
    is_counted: bool = True
    whole: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """What one worker has read. Times are of its own clock, which is that of all; `cached` files were, in part, still
    in the page cache when they were read; `decoded` are images."""

    start: float
    end: float
    files: int = 0
    bytes: int = 0
    failed: int = 0
    reason: str = ""
    cached: int = 0
    decoded: int = 0


def find(root: str, seconds: float, most: int, largest: int, seed: int) -> Found:
    """A sample of `most` files, from what can be listed in `seconds`; directories are listed in random order."""
    draw = random.Random(seed)
    pending = [""]
    chosen: list[str] = []
    in_folder: dict[str, int] = {}
    seen = unreadable = links = 0
    end = time.monotonic() + seconds
    while pending and time.monotonic() < end:
        last = draw.randrange(len(pending))
        pending[last], pending[-1] = pending[-1], pending[last]
        folder = pending.pop()
        seen_before = seen
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = os.path.join(folder, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    elif entry.is_symlink():
                        links += 1
                    elif entry.is_file(follow_symlinks=False):
                        seen += 1
                        if len(chosen) < most:
                            chosen.append(path)
                        elif (place := draw.randrange(seen)) < most:
                            chosen[place] = path
                    if time.monotonic() > end:
                        pending.append(folder)  # not listed to its end
                        break
                else:
                    in_folder[folder] = seen - seen_before
        except OSError:
            unreadable += 1
    draw.shuffle(chosen)
    with ThreadPoolExecutor(_STATS_AT_ONCE) as threads:
        sizes = list(threads.map(lambda path: _size(os.path.join(root, path)), chosen))
    files = [(path, size) for path, size in zip(chosen, sizes, strict=True) if size is not None]
    fitting = [(path, size) for path, size in files if 0 < size <= largest]
    large = [size for _, size in files if size > largest]
    is_counted = not pending and not unreadable
    is_all = is_counted and seen == len(chosen)
    empty = len(files) - len(fitting) - len(large)
    chosen_in_folder = Counter(map(os.path.dirname, chosen))
    whole = [folder for folder, number in chosen_in_folder.items() if number == in_folder.get(folder)]
    return Found(fitting, seen, is_all, len(large), empty, unreadable, sum(large), links, is_counted, whole)


def _size(path: str) -> int | None:
    try:
        status = os.lstat(path)
    except OSError:  # removed since
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def devices(root: str, paths: Iterable[str]) -> list[int]:
    """The file system that each file is in: what is mounted over some shows in it. Without those removed since."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append(os.lstat(os.path.join(root, path)).st_dev)
    return found


def read(root: str, paths: list[str], workers: int, seconds: float, decode: bool) -> dict[str, Any]:
    """Read the files, each once, with so many worker processes; without any, in this one.

    The time is from when all of them have started until the last has done its part.
    """
    decoder = _decoder() if decode else None
    fork = multiprocessing.get_context("fork")
    following = fork.Value("q", 0)
    os.chdir(root)
    try:
        if not workers:
            shares = [_read_share(paths, following, seconds, decoder)]
        else:
            shares = _read_together(paths, following, seconds, decoder, workers)
    finally:
        os.chdir("/")
    return {
        "seconds": max(share.end for share in shares) - min(share.start for share in shares),
        **{
            name: sum(getattr(share, name) for share in shares)
            for name in ("files", "bytes", "failed", "cached", "decoded")
        },
        "reason": next((share.reason for share in shares if share.reason), ""),
    }


def _read_together(paths: list[str], following: Any, seconds: float, decoder: Any, workers: int) -> list[Share]:
    fork = multiprocessing.get_context("fork")
    start_line = fork.Barrier(workers)
    parent = os.getpid()
    answers, processes = [], []
    for _ in range(workers):
        ours, theirs = fork.Pipe(duplex=False)

        def work(answer: Any) -> None:
            _end_with(parent)
            start_line.wait()
            answer.send(_read_share(paths, following, seconds, decoder))

        process = fork.Process(target=work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        answers.append(ours)
        processes.append(process)
    try:
        shares: list[Share] = [answer.recv() for answer in answers]
    except EOFError:
        raise OSError("a worker process died: is there too little memory for so many?") from None
    for process in processes:
        process.join()
    return shares


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _read_share(paths: list[str], following: Any, seconds: float, decoder: Callable[[bytes], None] | None) -> Share:
    """Read whichever file is the next, until there is none or the time is over."""
    files = size = failed = cached = decoded = 0
    reason = ""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= len(paths):
            break
        try:
            content, was_cached = _read_file(paths[number])
        except OSError as error:
            failed += 1
            reason = reason or error.strerror or str(error)
            continue
        files += 1
        size += len(content)
        cached += was_cached
        if decoder is not None and paths[number].lower().endswith(IMAGES):
            try:
                decoder(content)
                decoded += 1
            except Exception:  # whatever Pillow has against it, it was read
                pass
    return Share(start, time.perf_counter(), files, size, failed, reason, cached, decoded)


def _read_file(path: str) -> tuple[bytes, bool]:
    """(The content, whether the page cache still had its beginning). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        was_cached = _is_cached(fd)
        pieces = []
        while piece := os.read(fd, _PIECE):
            pieces.append(piece)
    finally:
        os.close(fd)
    return b"".join(pieces), was_cached


def _is_cached(fd: int) -> bool:
    """Whether a first byte can be had without waiting. Where the file system cannot say it is taken for no."""
    try:
        return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) > 0
    except OSError:
        return False


def has_decoder() -> bool:
    return _decoder() is not None


def _decoder() -> Callable[[bytes], None] | None:
    try:
        images = importlib.import_module("PIL.Image")
    except ImportError:
        return None
    images.init()  # or each worker process would import the formats again, while its time is taken

    def decode(content: bytes) -> None:
        with images.open(io.BytesIO(content)) as image:
            image.load()

    return decode


def _answer(request: dict[str, Any]) -> Any:
    action = request.pop("do")
    if action == "find":
        return asdict(find(**request))
    if action == "devices":
        return devices(**request)
    if action == "read":
        return read(**request)
    return has_decoder()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the workers too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for who has started us
    for line in sys.stdin:
        try:
            answer = {"answer": _answer(json.loads(line))}
        except OSError as error:
            answer = {"error": error.strerror or str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
