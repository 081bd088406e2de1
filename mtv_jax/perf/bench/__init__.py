"""Benchmarks, each with a limit measured in the same run."""
