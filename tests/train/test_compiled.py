"""A compiled step in a file, loaded by another process."""

import json
import logging

import jax
import numpy as np
import pytest
import trainings
from trainings import smallest

from mtv_jax.checkpoint.reading import load_tree
from mtv_jax.config import recipes
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.train import compiled
from mtv_jax.train.train import train
from mtv_jax.utils import xla_flags

SHORT = "steps=3,save=3"
CROPS = "crop(16, 0.4, 1.0)|flip"  # The step reads its seed.


def make_config(**changes):
  config = smallest(SHORT, evals={})
  config.views.image.ops = CROPS
  config.update(changes)
  return config


def plan(**changes):
  config = make_config(**changes)
  return compile_lib.make_plan(config, topologies.parse("cpu:8"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Compiled for eight CPU devices in this process."""
  path = tmp_path_factory.mktemp("compiled") / "step.bin"
  result = compile_lib.compile_step(plan(), save=path)
  assert result.saved_bytes == path.stat().st_size > 10_000
  return path


@pytest.mark.slow
def test_a_run_that_loads_the_step_is_bit_equal(saved, tmp_path):
  loaded, whole = tmp_path / "loaded", tmp_path / "whole"
  flags = ("--config.evals=None", f"--config.views.image.ops={CROPS}")
  flags += (f"--compiled={saved}", "--config.seed=9")  # Saved with seed 3.
  trainings.train(loaded, *flags, devices=8, arg=SHORT)
  text = trainings.log(loaded)
  assert f"Loaded the compiled step from {saved}." in text
  assert "From step 1: contrastive." in text
  assert "Compiling the step" not in text
  train(make_config(seed=9), whole)
  assert trainings.losses(loaded) == trainings.losses(whole)
  for part in ("params", "ema", "opt_state"):
    trees = (load_tree(folder, part=part) for folder in (loaded, whole))
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.slow
def test_a_step_of_another_config_is_compiled(saved, caplog, monkeypatch):
  """What the step doesn't depend on may differ."""
  caplog.set_level(logging.INFO)
  text = dict(tokenizer="/data/other.model", clean="lower")
  same = plan(
    seed=1, checkpoint=dict(every_steps=2), log=dict(every_steps=5),
    evals=dict(retrieval=dict(count=9)), model=dict(text=text),
  )  # fmt: skip
  assert compiled.load_if_compatible(saved, same).program.loaded is not None
  other = plan(optim=dict(lr=0.5), batch_size=32)
  assert compiled.load_if_compatible(saved, other) is other
  line = caplog.messages[-1]
  assert line.startswith(f"The step in {saved} does not match (")
  assert "config.optim.lr: 0.001 -> 0.5" in line
  assert "config.batch_size: 16 -> 32" in line

  def refuse(*args, **options):
    raise RuntimeError("another compiler")

  deserialize = "deserialize_and_load"
  monkeypatch.setattr(compiled.serialize_executable, deserialize, refuse)
  assert compiled.load_if_compatible(saved, same) is same
  reason = "(RuntimeError: another compiler); compiling."
  assert reason in caplog.messages[-1]
  data = saved.read_bytes()
  damaged = saved.with_name("damaged.bin")
  damaged.write_bytes(data[:-1])
  with pytest.raises(ValueError, match="damaged.bin is damaged: its program"):
    compiled.load_if_compatible(damaged, same)


def test_other_files_are_not_loaded(tmp_path, monkeypatch):
  def load(*args):
    raise AssertionError("loaded")

  monkeypatch.setattr(compiled, "_load_program", load)
  file, step = tmp_path / "step.bin", plan()
  for content in (b"", b"\x80\x04.\n", b"[]\n", b'{"format": "other"}\nx'):
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not a compiled train step"):
      compiled.load_if_compatible(file, step)
  with pytest.raises(FileNotFoundError, match=r"nowhere\.bin"):
    compiled.load_if_compatible(tmp_path / "nowhere.bin", step)


def test_the_key_has_devices_code_versions_and_epochs():
  config = recipes.read_config("siglip_b16_224:tiny")
  config.schedule = dict(name="cosine", warmup_epochs=1)
  topology = topologies.parse("cpu:8")
  step = compile_lib.make_plan(config, topology, examples_per_epoch=640)
  key = compiled.list_dependencies(step)
  assert key["examples_per_epoch"] == 640
  assert "examples_per_epoch" not in compiled.list_dependencies(plan())
  assert key["devices"]["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
  assert key["devices"]["order"] == [*range(8)] and key["code"]
  assert key["versions"].keys() == {"jax", "jaxlib", "flax", "optax"}
  assert key["batch"]["image"] == "(64, 32, 32, 3) uint8"
  assert "/web" not in json.dumps(key)


def test_flags_are_sets_and_single_flags():
  text = "dense_vmem | --xla_a=1|xla_tpu_scoped_vmem_limit_kib=65536"
  expected = {"xla_tpu_scoped_vmem_limit_kib": "65536", "xla_a": "1"}
  assert xla_flags.parse_flags(text) == expected
  assert xla_flags.parse_flags("") == {}
  config = smallest(SHORT, evals={}, xla_flags="async_all_gater")
  with pytest.raises(ValueError, match="config.xla_flags.*'async_all_gather'"):
    compile_lib.make_plan(config, topologies.parse("cpu:1"))
  with_flags = plan(xla_flags="dense_vmem")
  assert with_flags.config.to_dict()["xla_flags"] == "dense_vmem"
  assert "xla_flags" not in plan().config.to_dict()
  # Other devices than TPUs are compiled for without them.
  options = compiled.list_dependencies(with_flags)["compiler_options"]
  assert options == compiled.list_dependencies(plan())["compiler_options"]


def test_the_alarm_of_slow_compilations_is_silent_during_them():
  logger = logging.getLogger("jax")
  with xla_flags.silence_slow_compile_alarm():
    assert not logger.isEnabledFor(logging.ERROR)
  assert logger.isEnabledFor(logging.WARNING)


@pytest.mark.reference
def test_flags_reach_the_compiler_of_tpus_and_its_steps_are_saved(tmp_path):
  config = smallest(SHORT, evals={}, xla_flags="dense_vmem|async_all_gather")
  topology = topologies.parse("v5e:2x2")
  step = compile_lib.make_plan(config, topology)
  result = compile_lib.compile_step(step, save=tmp_path / "step.bin")
  assert result.saved_bytes > 10_000
  key = compiled.list_dependencies(step)
  assert key["compiler_options"] == xla_flags.parse_flags(config.xla_flags)
  assert key["devices"]["kind"].startswith("TPU v5")
  assert key["versions"]["libtpu"]
  config.xla_flags = "xla_tpu_nonsense=true"
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_nonsense"):
    compile_lib.compile_step(compile_lib.make_plan(config, topology))
