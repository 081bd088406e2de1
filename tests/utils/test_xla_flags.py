"""XLA compiler flags, and JAX's persistent compilation cache."""

import logging

import jax
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from trainings import smallest

from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.utils import xla_flags


def plan(topology, flags):
  config = smallest("steps=3,save=3", evals={}, xla_flags=flags)
  return compile_lib.make_plan(config, topologies.parse(topology))


def test_flags_are_sets_and_single_flags():
  text = "dense_vmem | --xla_a=1|xla_tpu_scoped_vmem_limit_kib=65536"
  expected = {"xla_tpu_scoped_vmem_limit_kib": "65536", "xla_a": "1"}
  assert xla_flags.parse_flags(text) == expected
  assert xla_flags.parse_flags("") == {}
  with pytest.raises(ValueError, match="config.xla_flags.*'async_all_gather'"):
    plan("cpu:1", "async_all_gater")
  # Other devices than TPUs are compiled for without them.
  mesh = plan("cpu:8", "dense_vmem").mesh
  options = xla_flags.compiler_options(mesh, "dense_vmem")
  assert options == xla_flags.compiler_options(mesh)


@pytest.mark.reference
def test_flags_reach_the_compiler_of_tpus():
  step = plan("v5e:2x2", "dense_vmem|async_all_gather")
  flags = step.config.xla_flags
  options = xla_flags.compiler_options(step.mesh, flags)
  assert options == xla_flags.parse_flags(flags)
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_nonsense"):
    compile_lib.compile_step(plan("v5e:2x2", "xla_tpu_nonsense=true"))


def test_the_alarm_of_slow_compilations_is_silent_during_them():
  logger = logging.getLogger("jax")
  with xla_flags.silence_slow_compile_alarm():
    assert not logger.isEnabledFor(logging.ERROR)
  assert logger.isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
  "store",
  [
    "tmp_path",
    *(pytest.param(s, marks=pytest.mark.slow) for s in ("gs", "s3")),
  ],
)
def test_compiled_programs_are_read_from_a_folder_or_bucket(store, request):
  folder = f"{request.getfixturevalue(store)}/compiled"
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  old, hits = [getattr(jax.config, name) for name in names], []

  def listener(event, **kwargs):
    hits.append(event)

  jax.monitoring.register_event_listener(listener)
  try:
    compilation_cache.reset_cache()
    xla_flags.enable_compilation_cache(folder, "unused")
    jax.config.update(names[1], 0.0)
    for _ in range(2):
      jax.jit(lambda x: x * x + 3)(2.0)  # A new function: compiled anew.
  finally:
    jax.monitoring.unregister_event_listener(listener)
    for name, value in zip(names, old, strict=True):
      jax.config.update(name, value)
    compilation_cache.reset_cache()
  programs = list(epath.Path(folder).glob("*/jit__lambda-*-cache"))
  assert len(programs) == 1
  assert hits.count("/jax/compilation_cache/cache_hits") >= 1
