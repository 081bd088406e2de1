"""Benchmarks, each beside a limit that the same run measures."""
