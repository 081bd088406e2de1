"""Checkpoints of two processes, which run all scenarios of this file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainings
from checkpoint_samples import open_checkpointer

pytestmark = pytest.mark.slow

IMPORTS = """
import json, os, resource, shutil, sys, time
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mtv_jax.checkpoint import checkpointer as checkpoint, reading
from mtv_jax.parallel.distributed import gather_json
from mtv_jax.utils.errors import UserError
"""
CONTINUE = """
mesh = jax.make_mesh((2,), ("x",))
split = NamedSharding(mesh, P("x"))
value = np.arange(8.0, dtype=np.float32).reshape(4, 2)
make = lambda v: jax.make_array_from_callback((4, 2), split, lambda i: v[i])
state = {"w": make(value), "step": jax.device_put(np.int32(2),
  NamedSharding(mesh, P()))}
with checkpoint.Checkpointer(folder, every_steps=1, keep=2) as ckpt:
  old = ckpt.restore(state)
  assert old.step == 1 and old.timing == {"train": 1.0}
  for shard in old.state["w"].addressable_shards:
    assert (np.asarray(shard.data) == 2 * value[shard.index]).all()
  assert ckpt.due(2)
  ckpt.save(2, state, timing={"train": 2.0})
  ckpt.wait()
  assert not ckpt.preempted(2)
  # One process alone may read, as a tool beside the run would.
  if process == 1:
    assert (reading.load_tree(folder, part="w") == value).all()
"""
RESTORE = """
replicated = NamedSharding(jax.make_mesh((2,), ("x",)), P())
state = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=replicated)}
verify, read = reading.verify_arrays, reading.read_arrays
failing, outcomes = {}, []  # Failures of process 1 that are left, by function.


def fail(name, error):
  if process == 1 and failing.get(name):
    failing[name] -= 1
    raise error


def verify_arrays(arrays, stored):
  verify(arrays, stored)
  if float(arrays["w"][0]) != 10:
    fail("verify", reading._ChecksumError("the stored checksums differ"))


def read_arrays(*args):
  fail("read", TimeoutError("no answer"))
  return read(*args)


reading.verify_arrays, reading.read_arrays = verify_arrays, read_arrays
with checkpoint.Checkpointer(folder, every_steps=1, keep=9) as ckpt:

  def restore(failures={}, **options):
    failing.clear()
    failing.update(failures)
    try:
      restored = ckpt.restore(state, **options)
      assert (np.asarray(restored.state["w"]) == restored.step).all()
      outcomes.append(restored.step)
    except UserError as error:
      outcomes.append([type(error).__name__, str(error)])
    outcomes.append(gather_json(sorted(os.listdir(folder)))[0])

  # Process 0 alone lists step 20, as if a killed run committed it late.
  if process == 0:
    os.rename(f"{folder}/late", f"{folder}/20")
    ckpt._manager.reload()
  assert ckpt.listed_steps() == [10, 20][:2 - process]
  restore()
  restore({"verify": 1}, latest_good=True)
  restore({"read": 2})
  restore({"verify": 2})
  restore({"verify": 2}, latest_good=True)
  # Process 1 alone lists step 20.
  if process == 1:
    os.rename(f"{folder}/20.damaged", f"{folder}/20")
    ckpt._manager.reload()
    os.rename(f"{folder}/20", f"{folder}/20.damaged")
  ckpt.save(20, {"w": jax.device_put(np.full(3, 20, np.float32), replicated)})
  ckpt.wait()
  restore()
reading.verify_arrays, reading.read_arrays = verify, read
with open(f"{folder}.{process}.json", "w") as file:
  json.dump(outcomes, file)
"""

FULL = """
split = NamedSharding(jax.make_mesh((2,), ("x",)), P("x"))
value = np.random.default_rng(0).normal(size=(2, 50_000)).astype(np.float32)
state = {"w": jax.make_array_from_callback(value.shape, split,
  lambda i: value[i])}
mkdir, rename, outcomes = os.mkdir, os.rename, []
rmtree = shutil.rmtree


def set_limit(size):
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def refuse(*args, **options):
  raise OSError("no space left")


with checkpoint.Checkpointer(
  folder, every_steps=16, keep=1, retries=0
) as ckpt:
  ckpt.save(1, state)
  ckpt.wait()
  for step, full, function in (
    (10, 1, lambda: set_limit(40_000)),
    (20, 0, lambda: set_limit(40_000)),
    (30, 0, lambda: setattr(os, "rename", refuse)),
    (40, 0, lambda: setattr(os, "mkdir", refuse)),
  ):
    if process == full:
      function()
    start = time.monotonic()
    ckpt.save(step, state)
    try:
      while True:
        ckpt.poll(step)
    except checkpoint.CheckpointSaveError as error:
      outcomes.append(str(error))
    assert time.monotonic() - start < 60
    assert (ckpt.restore(state).step, ckpt.listed_steps()) == (1, [1])
    set_limit(resource.RLIM_INFINITY)
    os.mkdir, os.rename = mkdir, rename
  # An error after the commit: process 0 can't delete the step before.
  if process == 0:
    shutil.rmtree = lambda path, **options: (
      refuse() if str(path).endswith("/1") else rmtree(path, **options)
    )
  start = time.monotonic()
  try:
    ckpt.save(50, state)
    ckpt.wait()
  except checkpoint.CheckpointSaveError as error:
    outcomes.append(str(error))
  assert time.monotonic() - start < 60
  shutil.rmtree = rmtree
  assert 50 in ckpt.steps(), outcomes
  restored = ckpt.restore(state).state["w"].addressable_shards[0]
  assert (np.asarray(restored.data) == value[restored.index]).all()
with open(f"{folder}.{process}.json", "w") as file:
  json.dump(outcomes, file)
"""
SCENARIOS = {"continue": CONTINUE, "restore": RESTORE, "full": FULL}
VALUE = np.arange(8.0, dtype=np.float32).reshape(4, 2)
ONE = {"w": 2 * VALUE, "step": np.int32(1)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """The folder of the scenarios' checkpoints, after two processes ran them."""
  root = tmp_path_factory.mktemp("processes")
  with open_checkpointer(root / "continue") as ckpt:
    ckpt.save(1, jax.tree.map(jnp.asarray, ONE), timing={"train": 1.0})
  with open_checkpointer(root / "restore") as ckpt:
    for step in (10, 20):
      ckpt.save(step, {"w": jnp.full(3, step, jnp.float32)})
  (root / "restore" / "20").rename(root / "restore" / "late")
  code = IMPORTS
  for name, scenario in SCENARIOS.items():
    code += f"folder = {str(root / name)!r}\n{scenario}"
  trainings.run_pair(code, devices=1)
  return root


def read_outcomes(root, name):
  """What each process stored."""
  files = [root / f"{name}.{i}.json" for i in range(2)]
  return [json.loads(file.read_text()) for file in files]


def test_two_processes_continue_what_one_wrote_and_back(root):
  with open_checkpointer(root / "continue") as ckpt:
    restored = ckpt.restore(jax.tree.map(jnp.asarray, ONE))
  assert restored.step == 2 and restored.timing == {"train": 2.0}
  np.testing.assert_array_equal(restored.state["w"], VALUE)


def test_two_processes_agree_on_what_they_restore(root):
  first, second = read_outcomes(root, "restore")
  assert first == second
  # The steps of process 0 count, and one bad read is repeated.
  assert first[:4] == [20, ["10", "20"]] * 2
  (unread, _, damaged, names), only = first[4:8], "Only process 1 of 2 can't"
  assert names == ["10", "20"]
  assert unread[0] == "StorageError" and unread[1].startswith(only)
  assert "20 can't be read (TimeoutError: no answer)" in unread[1]
  assert damaged[0] == "DamagedCheckpointError" and damaged[1].startswith(only)
  assert "20 is damaged: the stored checksums differ" in damaged[1]
  assert first[8:10] == [10, ["10", "20.damaged"]]
  assert first[10:] == [20, ["10", "20", "20.damaged"]]


def test_a_full_disk_of_one_process_fails_the_save_of_both(root):
  outcomes = read_outcomes(root, "full")
  causes = ["File too large"] * 2 + ["OSError: no space left"] * 2
  for i, (full, cause) in enumerate(zip((1, 0, 0, 0), causes, strict=True)):
    failed, other = outcomes[full][i], outcomes[1 - full][i]
    assert cause in failed and "the last one is of step 1" in failed
    assert cause in other and f"process {full} failed: " in other
