"""Benchmarks: they measure, print and write JSON; they never assert. See docs/benchmarks.md."""
