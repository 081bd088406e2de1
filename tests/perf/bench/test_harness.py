"""Benchmark results."""

import pytest

from mtv_jax.perf.bench import harness

INTEL = "model name\t: A Processor\nflags\t\t: fpu {}\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
  ("flags", "has"), [("avx2", "without"), ("avx512f avx2", "with")]
)
def test_results_name_the_processor(flags, has):
  text = harness.describe_processor(INTEL.format(flags))
  assert text == f"A Processor {has} AVX-512"
  result = harness.BenchResult(batch_size=2)
  result.add("seconds", 0.5, "step", "{:.1f} s")
  title, row = str(result).splitlines()
  assert title.startswith("batch size 2, processor ")
  assert title.endswith(harness.describe_processor())
  assert row == "step  0.5 s"
