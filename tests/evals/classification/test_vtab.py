"""VTAB: tasks in a folder, TFDS's splits, means over tasks and groups."""

import numpy as np
import pytest
from dataset_samples import write_colours

from mtv_jax.data import registry as sources
from mtv_jax.encoder import baselines
from mtv_jax.evals.classification.vtab import TASKS, Vtab
from mtv_jax.evals.core.base import NotApplicable


@pytest.mark.slow
def test_means_over_tasks_and_groups(tmp_path):
  write_colours(tmp_path / "vtab/pets")
  write_colours(tmp_path / "wds_vtab-svhn", noise=10)
  write_colours(tmp_path / "pcam", noise=5)
  tasks = ("pets", "svhn", "pcam")
  evaluator = Vtab(data=str(tmp_path), tasks=tasks, train_count=30)
  result = evaluator.run(baselines.load("pixels:16/8"))
  want = {"mean": 0.75, "natural": 0.75, "specialized": 0.75}
  want |= {"pets": 1.0, "svhn": 0.5, "pcam": 0.75}
  assert result.metrics == pytest.approx(want)
  assert result.chance == dict.fromkeys(want, 0.5)
  one = [result.errors[name] for name in tasks]
  assert result.errors["mean"] == pytest.approx(np.linalg.norm(one) / 3)
  assert result.resamples["natural"].shape == (400,)
  described = result.protocol["tasks"]["pcam"]
  assert described["train_images"] == 30
  assert "training images" in described["selection"]
  with pytest.raises(NotApplicable, match=r"lacks 16 of 19 tasks: .*caltech"):
    Vtab(data=str(tmp_path)).prepare()
  with pytest.raises(NotApplicable, match="'scenes': VTAB reads a folder"):
    Vtab().prepare()
  with pytest.raises(ValueError, match="Did you mean 'pets'"):
    Vtab(tasks=("petz",))


def test_the_digest_follows_the_images_of_all_tasks(tmp_path):
  """Or `evaluate` would reuse a result of other images."""
  for name in ("pets", "svhn"):
    write_colours(tmp_path / name)

  def digest():
    evaluator = Vtab(data=str(tmp_path), tasks=("pets", "svhn"))
    evaluator.prepare()
    return evaluator.data_digest()

  before = digest()
  assert digest() == before
  write_colours(tmp_path / "svhn", noise=1)
  assert digest() != before


@pytest.mark.parametrize(
  ("name", "size", "train", "test"),
  [
    ("cifar100", 50_000, "train[:800]+train[45000:45200]", "test"),
    ("dtd", 0, "train[:800]+validation[0:200]", "test"),
    ("eurosat", 27_000, "train[:800]+train[16200:16400]", "train[21600:]"),
  ],
)
def test_splits_of_tfds_sets(tmp_path, monkeypatch, name, size, train, test):
  """task_adaptation's `train800val200` and `test`."""
  folder = tmp_path / TASKS[name].tfds / "1.0.0"
  folder.mkdir(parents=True)
  (folder / "dataset_info.json").touch()
  monkeypatch.setattr(sources, "build_source", lambda config: range(size))
  found = Vtab(data=str(tmp_path))._find_task(tmp_path, name)
  assert (found["train"]["split"], found["data"]["split"]) == (train, test)
  full = Vtab(train_count=None)._find_task(tmp_path, name)["train"]["split"]
  want = {"dtd": "train+validation", "eurosat": "train[:21600]"}
  assert full == want.get(name, "train")
