"""One module a workload, with a docstring that is its title and a function `run(stage) -> list[Result]`."""

from __future__ import annotations

WORKLOADS = (
    "small_files",
    "tiny_files",
    "opens",
    "large_file",
    "shards",
    "training",
    "metadata",
    "requests",
    "fetching",
    "growth",
    "policies",
)
"""In the order in which they are run."""
