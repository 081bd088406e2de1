"""Reading a part, and damaged files: lost ones, flipped bits, old versions."""

import errno
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_samples import (
  abstract,
  assert_same,
  make_mesh,
  open_checkpointer,
)

from mtv_jax.checkpoint import reading
from mtv_jax.checkpoint.reading import DamagedCheckpointError, load_tree
from mtv_jax.utils.errors import StorageError, UserError

# --- reading a part ----------------------------------------------------------


def test_load_tree(run):
  folder, state = run
  for path in (folder, folder / "checkpoints", str(folder)):
    assert_same(load_tree(path), jax.tree.map(np.asarray, state.params))
  bias = load_tree(folder, part="teacher/image")["bias"]
  assert isinstance(bias, np.ndarray) and bias.dtype == jnp.bfloat16
  before = sorted(p.name for p in (folder / "checkpoints").iterdir())
  assert before == ["7"]


def test_load_tree_errors(run, tmp_path):
  for folder, options, message in (
    (run[0], dict(part="ema"), "no 'ema'. Its parts are: opt_state, p"),
    (run[0], dict(step=3), "step 3 in .*steps are: 7"),
    (tmp_path / "nowhere", {}, "does not exist"),
    (tmp_path, {}, "no complete checkpoint"),
  ):
    with pytest.raises(UserError, match=message):
      load_tree(folder, **options)


# --- damage ------------------------------------------------------------------


@pytest.mark.parametrize(
  "lost",
  [
    ("state/d", "state/ocdbt.process_0"),
    ("state/_METADATA",),
    ("state",),
    ("checksums",),
  ],
)
def test_lost_files_are_named_with_the_step_before(run, damaged, lost):
  for name in lost:
    path = damaged / "7" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  why = "its checksums are missing" if lost == ("checksums",) else ""
  check_damage(damaged, run[1], f"7 is damaged: {why}.*resume from step 3")
  assert load_tree(damaged, step=3)


def restore(folder, state, **options):
  """Restores on two devices."""
  with open_checkpointer(folder) as ckpt:
    return ckpt.restore(abstract(state, make_mesh(1, 2, 1)), **options)


def check_damage(folder, state, match):
  with pytest.raises(DamagedCheckpointError, match=f"(?s){match}"):
    restore(folder, state)
  with pytest.raises(DamagedCheckpointError, match=f"(?s){match}"):
    load_tree(folder)


def change_checksum(folder, name="params/image/kernel", step=7):
  """As if the array had changed: its stored checksum is another."""
  path = folder / str(step) / "checksums" / "metadata"
  stored = json.loads(path.read_text())
  old = stored["arrays"][name]
  stored["arrays"][name] = old[:-1] + ("0" if old[-1] != "0" else "1")
  path.write_text(json.dumps(stored))


def test_a_changed_array_is_named(run, damaged):
  change_checksum(damaged)
  match = "7 is damaged: the checksums of 1 of .* from the stored.*image/kernel"
  check_damage(damaged, run[1], match)
  # Only the parts that are read are checked.
  assert load_tree(damaged, part="params/heads")


def test_latest_good_takes_the_checkpoint_before_and_frees_the_step(
  run, damaged, caplog
):
  state = run[1]
  wanted = abstract(state, make_mesh(1, 2, 1))
  change_checksum(damaged)
  with open_checkpointer(damaged) as ckpt:
    restored = ckpt.restore(wanted, latest_good=True)
    assert restored.step == 3 and ckpt.steps() == [3]
    assert_same(restored.state, state)
    said = "\n".join(r.getMessage() for r in caplog.records)
    assert "7 is damaged" in said and "to 7.damaged" in said
    ckpt.save(7, restored.state)
    assert ckpt.steps() == [3, 7]
    # Again: the name is taken.
    change_checksum(damaged)
    assert ckpt.restore(wanted, latest_good=True).step == 3
  names = sorted(p.name for p in damaged.iterdir())
  assert names == ["3", "7.damaged", "7.damaged1"]
  assert (damaged / "7.damaged" / "state" / "_METADATA").exists()


def test_without_any_good_checkpoint_nothing_is_renamed(run, damaged):
  for step in (3, 7):
    change_checksum(damaged, step=step)
  with pytest.raises(DamagedCheckpointError, match="(?s)3 is.*no earlier one"):
    restore(damaged, run[1], latest_good=True)
  assert sorted(p.name for p in damaged.iterdir()) == ["3", "7"]


@pytest.mark.parametrize(
  "error",
  [
    ValueError("UNAVAILABLE: Error reading gs://bucket/run/checkpoints/7"),
    TimeoutError("no answer"),
    OSError(errno.EMFILE, "Too many open files"),
  ],
)
def test_a_storage_that_does_not_answer_is_not_damage(
  run, damaged, monkeypatch, error
):
  def fail(*_):
    raise error

  monkeypatch.setattr(reading, "read_arrays", fail)
  with pytest.raises(StorageError, match="7 can't be read"):
    restore(damaged, run[1], latest_good=True)
  assert sorted(p.name for p in damaged.iterdir()) == ["3", "7"]


def flip_bits(folder, seed, count):
  """Flips one random bit of a checkpoint's files; yields its position."""
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  generator = random.Random(seed)
  for _ in range(count):
    path = generator.choice(files)
    content = path.read_bytes()
    bit = generator.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    yield f"bit {bit} of {path.relative_to(folder)}"
    path.write_bytes(content)


@pytest.mark.parametrize(
  ("seed", "count"),
  [(0, 10), pytest.param(1, 100, marks=pytest.mark.long)],
)
def test_a_flipped_bit_never_changes_a_value_unseen(run, damaged, seed, count):
  """Saved on eight devices, read on two."""
  state = run[1]
  params = jax.tree.map(np.asarray, state.params)
  raised = 0

  def check():
    restored = restore(damaged, state)
    assert restored.step == 7
    assert_same(restored.state, state)
    assert restored.timing == {"train": 1.5, "wait": 0.25}

  def load():
    assert_same(load_tree(damaged), params)

  for place in flip_bits(damaged / "7", seed, count):
    for read in (check, load):
      try:
        read()
      except DamagedCheckpointError as error:
        raised += 1
        assert "7 is damaged" in str(error), place
      except BaseException as error:
        error.add_note(place)
        raise
  # Names of files are random, and so is how many flips hit the arrays' data.
  assert raised > count / 5
