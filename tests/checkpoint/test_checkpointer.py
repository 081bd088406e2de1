"""Round trips across meshes, kills, failures, mismatches, reading a part."""

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainings
from checkpoint_samples import (
  abstract,
  assert_same,
  make_mesh,
  make_state,
  open_checkpointer,
)

from mtv_jax.checkpoint.checkpointer import CheckpointSaveError, RetrySchedule
from mtv_jax.checkpoint.partial_restore import CheckpointMismatchError
from mtv_jax.checkpoint.reading import load_tree

# --- save and restore --------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 2, 4), None])
def test_restores_into_the_current_mesh(run, shape):
  """Without shardings, to the first device."""
  folder, state = run
  first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  if shape:
    wanted = abstract(state, make_mesh(*shape))
  with open_checkpointer(folder / "checkpoints") as ckpt:
    restored = ckpt.restore(wanted)
  assert restored.step == 7
  assert restored.timing == {"train": 1.5, "wait": 0.25}
  assert_same(restored.state, state)
  for got, want in zip(
    jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True
  ):
    assert got.sharding == (want.sharding or first)


def test_a_new_run_has_nothing_to_restore(tmp_path):
  state = make_state(make_mesh(8, 1, 1))
  with open_checkpointer(tmp_path / "new") as ckpt:
    assert ckpt.restore(state) is None
    assert ckpt.steps() == []
    with pytest.raises(FileNotFoundError, match="step 3.*steps are: none"):
      ckpt.restore(state, step=3)


def test_saved_state_may_be_donated_and_a_step_is_saved_once(tmp_path):
  state = make_state(make_mesh(8, 1, 1), seed=1)
  saved = jax.tree.map(np.asarray, state)
  with open_checkpointer(tmp_path) as ckpt:
    ckpt.save(1, state, timing={"train": 1.0})
    jax.tree.map(lambda x: x.delete(), state)  # As a donating step does.
    ckpt.save(1, make_state(make_mesh(8, 1, 1), seed=2))
    restored = ckpt.restore(abstract(saved, make_mesh(2, 4, 1)))
    assert restored.timing == {"train": 1.0}
    assert_same(restored.state, saved)
    ckpt.save(1, make_state(make_mesh(8, 1, 1), seed=2))
    assert ckpt.steps() == [1]


def test_keeps_the_latest_and_the_periodic_ones(tmp_path):
  state = {"x": jnp.zeros(2)}
  with open_checkpointer(tmp_path, every_steps=2, keep=2, keep_every=6) as ckpt:
    assert [s for s in range(1, 9) if ckpt.due(s)] == [1, 2, 4, 6, 8]
    for step in (2, 4, 6, 8, 10, 12, 14):
      ckpt.save(step, state)
    assert ckpt.steps() == [6, 12, 14]
    assert ckpt.survives_save(12) and ckpt.survives_save(14)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["12", "14", "6"]
  with open_checkpointer(tmp_path, keep=1) as ckpt:
    ckpt.save(15, state)
    assert ckpt.steps() == [15]
    assert not ckpt.survives_save(15)
    with pytest.raises(TypeError, match="state/step is 3, expected an array"):
      ckpt.save(16, {"step": 3})


@pytest.fixture
def failing_commit(monkeypatch):
  """A context in which committing a checkpoint fails."""

  def full(*args, **kwargs):
    raise OSError("no space left")

  @contextlib.contextmanager
  def fail():
    with monkeypatch.context() as patch:
      # The commit of a checkpoint is a rename.
      patch.setattr(os, "rename", full)
      patch.setattr(os, "replace", full)
      yield

  return fail


def warnings(caplog):
  """This package's: Orbax logs tracebacks, which a run does not show."""
  return [r.getMessage() for r in caplog.records if "mtv_jax" in r.name]


def wait_while(condition):
  deadline = time.monotonic() + 30
  while condition() and time.monotonic() < deadline:
    time.sleep(0.01)


def open_saved(folder, state, **options):
  """A checkpointer whose folder has step 1."""
  ckpt = open_checkpointer(folder, **options)
  ckpt.save(1, state)
  ckpt.wait()
  return ckpt


def fail_to_save(ckpt, step):
  ckpt.save(step, {"x": jnp.zeros(2)})
  wait_while(lambda: ckpt.saving)


@pytest.mark.parametrize("call", ["save", "wait", "close", "poll"])
def test_a_failed_save_is_seen(tmp_path, failing_commit, caplog, call):
  state = {"x": jnp.zeros(2)}
  ckpt = open_saved(tmp_path, state)
  with failing_commit():
    fail_to_save(ckpt, 2)
  if call in ("wait", "close"):
    with pytest.raises(CheckpointSaveError) as raised:
      getattr(ckpt, call)()
    text = str(raised.value)
  else:
    ckpt.save(2, {"x": jnp.ones(2)}) if call == "save" else ckpt.poll(3)
    (text,) = warnings(caplog)
  assert "step 2 can't be written" in text and "is of step 1" in text
  assert "no space left" in text
  if call == "close":
    return
  # Told once; the failed step does not count as saved.
  ckpt.save(2, {"x": jnp.ones(2)})
  assert ckpt.steps() == [1, 2]
  assert (ckpt.restore(state).state["x"] == 1).all()
  ckpt.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_failed_save_is_retried_after_growing_waits(tmp_path, failing_commit):
  state = {"x": jnp.zeros(2)}
  tried = []
  with open_saved(tmp_path, state, every_steps=32, retries=5) as ckpt:
    with failing_commit(), pytest.raises(CheckpointSaveError, match="step 64"):
      for step in range(32, 200):
        if ckpt.due(step):
          tried.append(step)
          fail_to_save(ckpt, step)
        ckpt.poll(step)
    # After 2, 4, 8, 16 steps; step 64 is due anyway.
    assert tried == [32, 34, 38, 46, 62, 64]
  retry = RetrySchedule(every_steps=32, limit=10**6, failures=2000)
  retry.postpone(32)
  assert retry.due_at == 64 and not retry.is_exhausted


@pytest.fixture
def full_disk(mount_disk):
  """A small file system, and a function that fills it but for some bytes."""
  folder = mount_disk("1m")

  def fill(free):
    available = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize
    (folder / "filler").write_bytes(bytes(available - free))

  return folder, fill


@pytest.mark.parametrize("free", [0, 100_000])
def test_a_full_disk_keeps_the_last_checkpoint_until_there_is_space(
  full_disk, free
):
  folder, fill = full_disk
  values = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
  state = {"x": jnp.asarray(values)}
  with open_saved(folder / "checkpoints", state) as ckpt:
    fill(free)
    for step in (2, 3):
      ckpt.save(step, state)
      with pytest.raises(CheckpointSaveError) as raised:
        ckpt.wait()
      assert "No space left on device" in str(raised.value)
      assert "(the last one is of step 1)" in str(raised.value)
    assert ckpt.steps() == [1]
    np.testing.assert_array_equal(ckpt.restore(state).state["x"], values)
    (folder / "filler").unlink()
    ckpt.save(4, state)
    assert ckpt.steps() == [1, 4]
  # Writes that Orbax has abandoned can leave files, which a restart removes.
  (folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(exist_ok=True)
  with open_checkpointer(folder / "checkpoints") as ckpt:
    ckpt.save(5, state)
    assert ckpt.steps() == [1, 4, 5]
  names = sorted(p.name for p in (folder / "checkpoints").iterdir())
  assert names == ["1", "4", "5"]


def test_many_writes_to_a_full_disk_log_no_tracebacks(full_disk, caplog):
  """Orbax writes arrays concurrently, and raises the first error."""
  folder, fill = full_disk
  values = np.random.default_rng(0).normal(size=(200, 1000))
  state = {f"x{i}": jnp.asarray(x) for i, x in enumerate(values)}
  with open_checkpointer(folder / "checkpoints") as ckpt:
    fill(100_000)
    for step in (1, 2, 3):
      ckpt.save(step, state)
      with pytest.raises(CheckpointSaveError, match="No space left on device"):
        ckpt.wait()
  gc.collect()
  assert "Traceback" not in caplog.text


def test_the_writes_that_orbax_abandons_log_no_tracebacks(tmp_path, caplog):
  with open_checkpointer(tmp_path):
    pass

  async def fail():
    raise ValueError

  async def abandon():
    asyncio.gather(fail())
    await asyncio.sleep(0.01)

  gc.collect()  # Futures of earlier tests.
  caplog.clear()
  asyncio.run(abandon())
  gc.collect()
  assert not caplog.records


def test_storage_that_can_not_hold_the_first_checkpoint_ends_the_run(
  tmp_path, failing_commit
):
  with (
    open_checkpointer(tmp_path) as ckpt,
    failing_commit(),
    pytest.raises(CheckpointSaveError, match="step 1 .*there is none"),
  ):
    fail_to_save(ckpt, 1)
    ckpt.poll(2)


def test_a_folder_deleted_during_a_run_is_created_again(tmp_path):
  state = {"x": jnp.arange(3.0)}
  folder = tmp_path / "run" / "checkpoints"
  with open_saved(folder, state) as ckpt:
    shutil.rmtree(tmp_path / "run")
    ckpt.save(2, state)
    ckpt.wait()
    ckpt.save(3, state)
    ckpt.wait()
  assert (load_tree(folder, step=3, part="x") == state["x"]).all()


def test_a_file_in_place_of_the_folder_is_a_named_error(tmp_path, monkeypatch):
  # Orbax's threads wait for the folder for minutes, and Python for them.
  start = threading.Thread.start

  def start_daemon(thread):
    thread.daemon = True
    start(thread)

  monkeypatch.setattr(threading.Thread, "start", start_daemon)
  state = {"x": jnp.arange(3.0)}
  folder = tmp_path / "checkpoints"
  with open_saved(folder, state) as ckpt:
    shutil.rmtree(folder)
    folder.write_text("")
    for step in (2, 3):
      ckpt.save(step, state)
      with pytest.raises(CheckpointSaveError, match=f"step {step} can't be"):
        ckpt.wait()
    folder.unlink()
    # A thread of the save before may still fail, which is seen as this one's.
    with contextlib.suppress(CheckpointSaveError):
      ckpt.save(4, state)
      ckpt.wait()
    ckpt.save(5, state)
    assert ckpt.steps()[-1] == 5


def test_another_shape_prints_a_diff(run):
  folder, state = run
  other = abstract(state, make_mesh(8, 1, 1))
  image = dict(other.params["image"])
  image["kernel"] = jax.ShapeDtypeStruct((6, 9), jnp.float32)
  image["scale"] = jax.ShapeDtypeStruct((3,), jnp.float32)
  del image["bias"]
  other = other.replace(params={**other.params, "image": image})
  with (
    open_checkpointer(folder / "checkpoints") as ckpt,
    pytest.raises(CheckpointMismatchError) as e,
  ):
    ckpt.restore(other)
  message = str(e.value)
  assert "does not match the state of this config" in message
  assert message.split("\n")[1:5] == [
    "  - params/image/bias  bfloat16[3]",
    "  - params/image/kernel  float32[6,8]",
    "  + params/image/kernel  float32[6,9]",
    "  + params/image/scale  float32[3]",
  ]
  assert "config.json" in message and "config.init" in message


# --- kills -------------------------------------------------------------------

# Everything of step 2 is written; only the rename is still to come.
WRITER = """
  import os, sys, time
  import jax.numpy as jnp
  from mtv_jax.checkpoint.checkpointer import Checkpointer

  ckpt = Checkpointer(sys.argv[1], every_steps=1, keep=3)
  ckpt.save(1, {"x": jnp.ones(1000)})
  ckpt.wait()
  def hang(source, *args, **kwargs):
    print("committing", flush=True)
    time.sleep(1000)
  os.rename = os.replace = hang
  ckpt.save(2, {"x": jnp.full(1000, 2.0)})
  time.sleep(1000)
"""


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path):
  """Before the commit; while it writes in tests/train/runtime."""
  with subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
    cwd=trainings.ROOT,
    env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
  ) as process:
    while process.stdout.readline().strip() != "committing":
      assert process.poll() is None
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  names = sorted(p.name for p in tmp_path.iterdir())
  assert "2" not in names and len(names) == 2, names
  wanted = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
  assert (load_tree(tmp_path, part="x") == 1).all()
  with open_checkpointer(tmp_path) as ckpt:
    restored = ckpt.restore(wanted)
    assert restored.step == 1 and (restored.state["x"] == 1).all()
    ckpt.save(2, {"x": jnp.full(1000, 3.0)})
    assert (ckpt.restore(wanted).state["x"] == 3).all()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_save_in_progress_is_waited_for_when_training_fails(
  tmp_path, monkeypatch
):
  rename = os.rename

  def rename_late(*args, **kwargs):
    time.sleep(0.3)
    rename(*args, **kwargs)

  with (
    pytest.raises(RuntimeError, match="went wrong"),
    open_saved(tmp_path, {"x": jnp.ones(2)}) as ckpt,
  ):
    monkeypatch.setattr(os, "rename", rename_late)
    ckpt.save(2, {"x": jnp.full(2, 2.0)})
    raise RuntimeError("training went wrong")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
  assert (load_tree(tmp_path, part="x") == 2).all()
