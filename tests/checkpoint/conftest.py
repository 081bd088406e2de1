"""A run's checkpoint, and damaged copies of it."""

import shutil

import pytest
from checkpoint_samples import make_mesh, make_state, open_checkpointer


@pytest.fixture(scope="package")
def run(tmp_path_factory):
  """A run's folder with a checkpoint of step 7, and the state saved there."""
  folder = tmp_path_factory.mktemp("run")
  state = make_state(make_mesh(8, 1, 1), seed=7)
  with open_checkpointer(folder / "checkpoints") as ckpt:
    ckpt.save(7, state, timing={"train": 1.5, "wait": 0.25})
  return folder, state


@pytest.fixture
def damaged(run, tmp_path):
  """A copy of the checkpoint at steps 3 and 7."""
  folder = tmp_path / "checkpoints"
  shutil.copytree(run[0] / "checkpoints", folder)
  shutil.copytree(folder / "7", folder / "3")
  return folder
