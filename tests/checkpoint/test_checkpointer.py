"""Round trips across meshes, kills, failures, mismatches, reading a part."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtv_jax.checkpoint import checkpointer
from mtv_jax.checkpoint.checkpointer import (
  Checkpointer,
  DamagedCheckpointError,
  load_tree,
)
from mtv_jax.checkpoint.partial_restore import CheckpointMismatchError
from mtv_jax.utils.tree import flatten_with_names

ROOT = pathlib.Path(checkpointer.__file__).parents[2]


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  teacher: dict
  ema: dict


def mesh(*shape):
  axis_types = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=axis_types)


def spec(leaf):
  return P(None, "fsdp") if leaf.ndim == 2 else P()


def shardings(tree, m):
  return jax.tree.map(lambda x: NamedSharding(m, spec(x)), tree)


def make_state(m, seed=0):
  rng = np.random.default_rng(seed)
  params = {
    "image": {
      "kernel": rng.normal(size=(6, 8)).astype(np.float32),
      "bias": rng.normal(size=3).astype(jnp.bfloat16),
    },
    "heads": {"logit_scale": np.float32(rng.normal()).reshape(())},
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  state = State(
    step=jnp.int32(seed),
    params=params,
    opt_state=tx.init(jax.tree.map(lambda x: x + x, params)),
    teacher={"image": params["image"]},
    ema={},
  )
  return jax.device_put(state, shardings(state, m))


def abstract(state, m):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(m, spec(x))
    ),
    state,
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(
    flatten_with_names(a), flatten_with_names(b), strict=True
  ):
    assert x.dtype == y.dtype, name
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def open_(folder, **kwargs):
  return Checkpointer(folder, **({"every_steps": 1, "keep": 3} | kwargs))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run's folder with a checkpoint of step 7, and the state saved there."""
  folder = tmp_path_factory.mktemp("run")
  state = make_state(mesh(8, 1, 1), seed=7)
  with open_(folder / "checkpoints") as ckpt:
    ckpt.save(7, state, timing={"train": 1.5, "wait": 0.25})
  return folder, state


# --- save and restore --------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_restores_into_the_current_mesh(run, shape):
  folder, state = run
  wanted = abstract(state, mesh(*shape))
  with open_(folder / "checkpoints") as ckpt:
    restored = ckpt.restore(wanted)
  assert restored.step == 7
  assert restored.timing == {"train": 1.5, "wait": 0.25}
  assert_same(restored.state, state)
  for got, want in zip(
    jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True
  ):
    assert got.sharding == want.sharding


def test_restores_without_shardings(run):
  folder, state = run
  plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  with open_(folder / "checkpoints") as ckpt:
    restored = ckpt.restore(plain, step=7)
  assert_same(restored.state, state)
  assert restored.state.step.devices() == {jax.devices()[0]}


def test_a_new_run_has_nothing_to_restore(tmp_path):
  state = make_state(mesh(8, 1, 1))
  with open_(tmp_path / "new") as ckpt:
    assert ckpt.restore(state) is None
    assert ckpt.steps() == []
    with pytest.raises(FileNotFoundError, match="step 3.*steps are: none"):
      ckpt.restore(state, step=3)


def test_saved_state_may_be_donated_and_a_step_is_saved_once(tmp_path):
  state = make_state(mesh(8, 1, 1), seed=1)
  saved = jax.tree.map(np.asarray, state)
  with open_(tmp_path) as ckpt:
    ckpt.save(1, state, timing={"train": 1.0})
    jax.tree.map(lambda x: x.delete(), state)  # As a donating step does.
    ckpt.save(1, make_state(mesh(8, 1, 1), seed=2))
    restored = ckpt.restore(abstract(saved, mesh(2, 4, 1)))
    assert restored.timing == {"train": 1.0}
    assert_same(restored.state, saved)
    ckpt.save(1, make_state(mesh(8, 1, 1), seed=2))
    assert ckpt.steps() == [1]


def test_keeps_the_latest_and_the_periodic_ones(tmp_path):
  state = {"x": jnp.zeros(2)}
  with open_(tmp_path, every_steps=2, keep=2, keep_every=6) as ckpt:
    assert [s for s in range(1, 9) if ckpt.due(s)] == [2, 4, 6, 8]
    for step in (2, 4, 6, 8, 10, 12, 14):
      ckpt.save(step, state)
    assert ckpt.steps() == [6, 12, 14]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["12", "14", "6"]
  with open_(tmp_path, keep=1) as ckpt:
    ckpt.save(15, state)
    assert ckpt.steps() == [15]


def test_bad_arguments(tmp_path):
  with (
    open_(tmp_path) as ckpt,
    pytest.raises(TypeError, match="state/step is 3, expected an array"),
  ):
    ckpt.save(1, {"step": 3})


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_a_failed_save_is_raised_at_the_next_call(tmp_path, monkeypatch, call):
  state = {"x": jnp.zeros(2)}
  ckpt = open_(tmp_path)
  ckpt.save(1, state)
  ckpt.wait()

  def full(*args, **kwargs):
    raise OSError("no space left")

  with monkeypatch.context() as patch:
    # The commit of a checkpoint is a rename.
    patch.setattr(os, "rename", full)
    patch.setattr(os, "replace", full)
    ckpt.save(2, state)
    deadline = time.monotonic() + 30
    while ckpt.saving and time.monotonic() < deadline:
      time.sleep(0.01)
  with pytest.raises(OSError, match="no space left"):
    ckpt.save(3, state) if call == "save" else getattr(ckpt, call)()
  # Raised once; the failed step does not count as saved.
  ckpt.save(2, {"x": jnp.ones(2)})
  assert ckpt.steps() == [1, 2]
  assert (ckpt.restore(state).state["x"] == 1).all()
  ckpt.close()


def test_another_shape_prints_a_diff(run):
  folder, state = run
  other = abstract(state, mesh(8, 1, 1))
  image = dict(other.params["image"])
  image["kernel"] = jax.ShapeDtypeStruct((6, 9), jnp.float32)
  image["scale"] = jax.ShapeDtypeStruct((3,), jnp.float32)
  del image["bias"]
  other = other.replace(params={**other.params, "image": image})
  with (
    open_(folder / "checkpoints") as ckpt,
    pytest.raises(CheckpointMismatchError) as e,
  ):
    ckpt.restore(other)
  message = str(e.value)
  assert "a checkpoint of another shape" in message
  assert message.split("\n")[1:5] == [
    "  - params/image/bias  bfloat16[3]",
    "  - params/image/kernel  float32[6,8]",
    "  + params/image/kernel  float32[6,9]",
    "  + params/image/scale  float32[3]",
  ]
  assert "config.json" in message and "config.init" in message


# --- kills -------------------------------------------------------------------

WRITER = """
  import os, sys, time
  import jax, jax.numpy as jnp
  from mtv_jax.checkpoint.checkpointer import Checkpointer

  folder, how = sys.argv[1:]
  ckpt = Checkpointer(folder, every_steps=1, keep=3)
  state = lambda step: {"x": jnp.full((4_000_000,), step, jnp.float32)}
  ckpt.save(1, state(1))
  ckpt.wait()
  if how == "before the commit":
    # Everything of step 2 is written; only the rename is still to come.
    def hang(source, *args, **kwargs):
      print("committing", flush=True)
      time.sleep(1000)
    os.rename = os.replace = hang
  ckpt.save(2, state(2))
  if how == "exit":
    with ckpt:
      raise RuntimeError("training went wrong")
  print("saving", flush=True)
  time.sleep(1000)
"""


def start(folder, how):
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), how],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
  )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["while writing", "before the commit"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, how):
  with start(tmp_path, how) as process:
    if how == "while writing":
      deadline = time.monotonic() + 60
      while not list(tmp_path.glob("2.*")):
        assert time.monotonic() < deadline
    else:
      while process.stdout.readline().strip() != "committing":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  names = sorted(p.name for p in tmp_path.iterdir())
  assert "2" not in names, "the kill came too late to test anything"
  assert len(names) == 2, names
  wanted = {"x": jax.ShapeDtypeStruct((4_000_000,), jnp.float32)}
  tree = load_tree(tmp_path, part="x")
  assert (tree == 1).all()
  with open_(tmp_path) as ckpt:
    restored = ckpt.restore(wanted)
    assert restored.step == 1 and (restored.state["x"] == 1).all()
    ckpt.save(2, {"x": jnp.full((4_000_000,), 3.0)})
    assert (ckpt.restore(wanted).state["x"] == 3).all()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_a_save_in_progress_is_waited_for_when_training_fails(tmp_path):
  with start(tmp_path, "exit") as process:
    assert process.wait(timeout=120) == 1
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
  assert (load_tree(tmp_path, part="x") == 2).all()


# --- many processes ----------------------------------------------------------

WORKER = """
  import json, sys
  import jax, jax.numpy as jnp, numpy as np
  from jax.sharding import NamedSharding, PartitionSpec as P
  from mtv_jax.checkpoint import checkpointer as checkpoint

  folder, port, index = sys.argv[1:]
  jax.config.update("jax_num_cpu_devices", 2)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", 2, int(index))
  mesh = jax.make_mesh((4,), ("x",))
  split = NamedSharding(mesh, P("x"))
  value = np.arange(8.0, dtype=np.float32).reshape(4, 2)
  make = lambda v: jax.make_array_from_callback((4, 2), split, lambda i: v[i])
  state = {"w": make(value), "step": jax.device_put(jnp.int32(2),
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
    if index == "1":
      tree = checkpoint.load_tree(folder, part="w")
      assert (tree == value).all()
  print("done")
"""


@pytest.mark.slow
def test_two_processes_continue_what_one_wrote_and_back(tmp_path):
  value = np.arange(8.0, dtype=np.float32).reshape(4, 2)
  one = {"w": jnp.asarray(2 * value), "step": jnp.int32(1)}
  with open_(tmp_path) as ckpt:
    ckpt.save(1, one, timing={"train": 1.0})
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = str(s.getsockname()[1])
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path), port, i],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )
    for i in "01"
  ]
  for worker in workers:
    out, err = worker.communicate(timeout=180)
    assert out.strip().endswith("done"), err[-3000:]
  with open_(tmp_path) as ckpt:
    restored = ckpt.restore(one)
  assert restored.step == 2 and restored.timing == {"train": 2.0}
  np.testing.assert_array_equal(restored.state["w"], value)


# --- reading a part ----------------------------------------------------------


@pytest.mark.parametrize(
  "lost",
  [("state/d", "state/ocdbt.process_0"), ("state/_METADATA",), ("state",)],
)
def test_lost_files_are_named_with_the_step_before(run, tmp_path, lost):
  folder, state = tmp_path / "checkpoints", run[1]
  shutil.copytree(run[0] / "checkpoints", folder)
  shutil.copytree(folder / "7", folder / "3")
  for name in lost:
    path = folder / "7" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  match = r"checkpoints/7 can't be read.*resume from step 3"
  with (
    open_(folder) as ckpt,
    pytest.raises(DamagedCheckpointError, match=match),
  ):
    ckpt.restore(abstract(state, mesh(8, 1, 1)))
  with pytest.raises(DamagedCheckpointError, match=match):
    load_tree(folder)
  assert load_tree(folder, step=3)


def test_load_tree(run):
  folder, state = run
  for path in (folder, folder / "checkpoints", str(folder)):
    assert_same(load_tree(path), jax.tree.map(np.asarray, state.params))
  bias = load_tree(folder, part="teacher/image")["bias"]
  assert isinstance(bias, np.ndarray) and bias.dtype == jnp.bfloat16
  before = sorted(p.name for p in (folder / "checkpoints").iterdir())
  assert before == ["7"]


def test_load_tree_errors(run, tmp_path):
  folder, _ = run
  with pytest.raises(ValueError, match="no 'ema'. Its parts are: opt_state, p"):
    load_tree(folder, part="ema")
  with pytest.raises(FileNotFoundError, match="step 3 in .*steps are: 7"):
    load_tree(folder, step=3)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    load_tree(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
    load_tree(tmp_path)
