"""Benchmarks of cachefs against its alternatives, side by side in one run."""
