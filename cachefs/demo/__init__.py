"""What the demonstration, the tests and the benchmarks share: a slow source, a dataset and a loader."""
