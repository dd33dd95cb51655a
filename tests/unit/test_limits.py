"""Memory limits of control groups, in both versions, and other limits of this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.mount.limits import MemoryLimit, limit_files, read_limits, tightest_limit
from cachefs.mount.mountinfo import Mount

GIB = 2**30
V2 = Mount(Path("/sys/fs/cgroup"), "0:30", "cgroup2", "cgroup2", frozenset(["rw"]))
V1_MEMORY = Mount(Path("/sys/fs/cgroup/memory"), "0:31", "cgroup", "cgroup", frozenset(["rw", "memory"]))
V1_CPU = Mount(Path("/sys/fs/cgroup/cpu"), "0:32", "cgroup", "cgroup", frozenset(["rw", "cpu"]))


def test_version_2_names_each_group_up_to_the_root():
    assert limit_files(b"0::/system.slice/slurm/job_7\n", [V1_CPU, V2]) == [
        Path("/sys/fs/cgroup/system.slice/slurm/job_7/memory.max"),
        Path("/sys/fs/cgroup/system.slice/slurm/memory.max"),
        Path("/sys/fs/cgroup/system.slice/memory.max"),
        Path("/sys/fs/cgroup/memory.max"),
    ]


def test_version_1_has_its_own_hierarchy_for_memory():
    groups = b"9:name=systemd:/\n4:hugetlb,memory:/uge/7.1\n1:cpu:/x\n"
    assert limit_files(groups, [V1_CPU, V1_MEMORY]) == [
        Path("/sys/fs/cgroup/memory/uge/7.1/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/uge/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ]


def test_both_versions_at_once():
    files = limit_files(b"4:memory:/a\n0::/\n", [V1_MEMORY, V2])
    assert {file.name for file in files} == {"memory.limit_in_bytes", "memory.max"}


def test_a_group_with_an_odd_name():
    (file, _) = limit_files(b"0::/a:b\xff c\n", [V2])
    assert os.fsencode(file) == b"/sys/fs/cgroup/a:b\xff c/memory.max"


@pytest.mark.parametrize("groups", [b"", b"1:cpu:/x\n"])
def test_without_a_controller_for_memory(groups):
    assert limit_files(groups, [V1_CPU, V1_MEMORY]) == []


NO_LIMIT_V1 = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("contents", "size"),
    [
        (["max\n", "max\n"], None),
        ([NO_LIMIT_V1], None),
        ([None, None], None),
        (["", "rubbish"], None),
        ([f"{8 * GIB}\n", "max\n"], 8 * GIB),
        (["max\n", f"{4 * GIB}\n", f"{8 * GIB}\n"], 4 * GIB),
        ([None, f"{GIB}\n"], GIB),
        ([f"{64 * GIB}\n"], None),
        (["0\n"], 0),
    ],
)
def test_the_tightest_limit_counts(contents, size):
    files = [Path(str(number)) for number in range(len(contents))]
    found = tightest_limit(files, lambda file: contents[int(file.name)], 32 * GIB)
    assert (found and found.size) == size


def test_a_limit_says_where_it_stands():
    found = tightest_limit([Path("/a"), Path("/b")], {Path("/a"): "max", Path("/b"): "5"}.get, 9)
    assert found == MemoryLimit(5, Path("/b"))


def test_this_machine():
    limits = read_limits()
    assert 0 < limits.memory_available <= limits.memory_total
    assert 1 <= limits.processors <= limits.processors_of_machine
    soft, hard = limits.open_files
    assert hard is None or (soft is not None and soft <= hard)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        (
            "memory.limit_in_bytes",
            {"memory.usage_in_bytes": "1000", "memory.stat": "cache 5\ntotal_inactive_file 300\n"},
        ),
        ("memory.max", {"memory.current": "1000\n", "memory.stat": "anon 5\ninactive_file 300\n"}),
    ],
)
def test_what_counts_against_a_limit(name, files, tmp_path):
    """Page cache that nobody uses can be taken back."""
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    assert MemoryLimit(5000, tmp_path / name).used() == 700
    (tmp_path / "memory.stat").unlink()
    assert MemoryLimit(5000, tmp_path / name).used() == 1000
