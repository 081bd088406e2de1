"""Measurements of gradients at checkpoints."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import trainings

from mtv_jax.cli.main import run_command
from mtv_jax.cli.train import train
from mtv_jax.report.interference import describe_measurement
from mtv_jax.report.run_folders import read_run
from mtv_jax.studies import interference
from mtv_jax.studies.interference import GradientSets, Settings
from mtv_jax.utils.errors import InputError


def draw_gradient(rng):
  """An encoder's gradient with two blocks."""
  shapes = dict(embedding=(3, 2), norm=(4,))
  tree = {k: {"x": rng.standard_normal(v)} for k, v in shapes.items()}
  return tree | {"blocks": {"x": rng.standard_normal((2, 5))}}


def test_sets_of_gradients_have_the_products_of_their_means():
  rng = np.random.default_rng(0)
  sets, batches = GradientSets(3), [
    [draw_gradient(rng), draw_gradient(rng)] for _ in range(6)
  ]  # fmt: skip
  for gradients in batches:
    sets.add(gradients)
  products = sets.products()
  assert products.shape == (3, 2, 3, 2, 4) and sets.depth == 2

  def rows(s, objective):
    means = [(batches[s][objective], batches[s + 3][objective])]
    ((a, b),) = means
    mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
    blocks = mean["blocks"]["x"]
    return [mean["embedding"]["x"].ravel(), *blocks, mean["norm"]["x"]]

  for index in np.ndindex(3, 2, 3, 2):
    pairs = zip(rows(*index[:2]), rows(*index[2:]), strict=True)
    expected = [a @ b for a, b in pairs]
    np.testing.assert_allclose(products[index], expected, rtol=1e-5, atol=1e-6)
  whole = [np.mean([b[1]["norm"]["x"] for b in batches], axis=0)]
  np.testing.assert_allclose(sets.mean(1)["norm"]["x"], whole[0])


def test_controls_permute_entries_within_blocks():
  rng = np.random.default_rng(0)
  gradients = [draw_gradient(rng), draw_gradient(rng)]
  for gradient in gradients:
    gradient["norm"]["x"][:2] = 0.0  # Frozen.
  *shuffled, normal = interference.draw_controls(rng, gradients)
  for before, after in zip(gradients, shuffled, strict=True):
    for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
      assert (a != b).any()
    blocks = before["blocks"]["x"], after["blocks"]["x"]
    np.testing.assert_array_equal(*(np.sort(x, axis=1) for x in blocks))
  values = normal["norm"]["x"]
  assert (values[:2] == 0).all() and (values[2:] != 0).all()


def test_controls_tell_conflict_from_curvature():
  """A step along the gradient raises two losses, one of them by curvature."""
  rng = np.random.default_rng(0)
  dims, length, steep = 50, 0.1, 40.0
  unit = rng.standard_normal(dims)
  unit /= np.linalg.norm(unit)
  gradient = [{"blocks": {"x": 3 * unit.reshape(1, dims)}}]
  batches = []
  for _ in range(16):
    noise = 0.1 * rng.standard_normal((3, dims))

    def losses_at(direction, scale, noise=noise):
      theta = scale * direction["blocks"]["x"][0]
      along = unit @ theta
      losses = [2 + along, 2 - along, 2 + steep * along**2 / 2]
      return np.array(losses) + noise @ theta

    directions = [*gradient, *interference.draw_controls(rng, gradient)]
    batches.append(interference.compare_losses(losses_at, directions, length))
  result = interference.summarize_changes(batches)
  slope, curvature, fall = (
    {k: np.array(v) for k, v in result[part].items()}
    for part in ("slope", "curvature", "fall")
  )
  np.testing.assert_allclose(result["losses"], [2, 2, 2])
  assert (fall["high"][0, 1:] < 0).all()  # Both losses rise.
  own, conflict, curved = slope["value"][0]
  assert own == pytest.approx(length / 2, rel=0.2)
  assert conflict == pytest.approx(-length / 2, rel=0.2)
  assert slope["high"][0, 1] < 0
  assert slope["low"][0, 2] < 0 < slope["high"][0, 2]
  rise = steep * length**2 / 4
  assert curvature["value"][0] == pytest.approx([0, 0, rise], abs=1e-9)
  # The controls have neither the slope nor the curvature.
  for control in (1, 2):
    assert (np.abs(slope["value"][control, :2]) < length / 5).all()
    assert 0 < curvature["value"][control, 2] < rise / 5


def test_stored_gradients_print_their_page():
  docs = pathlib.Path(__file__).parents[2] / "docs" / "study"
  text = (docs / "gradients.md").read_text()
  for column, run in enumerate(("full1", "full2")):
    read = read_run(docs / "gradients" / run)
    stored = [*interference.measure_run(read.folder)]
    assert stored == read.checkpoint_interference
    assert [m["step"] for m in stored] == [100, 700, 1800]
    assert [*interference.measure_run(read.folder, [700])] == stored[1:2]
    with pytest.raises(InputError, match=r"step 300, only \[100, 700, 1800"):
      next(interference.measure_run(read.folder, [300]))
    for i, measurement in enumerate(stored):
      _, pairs, *_ = describe_measurement(measurement)
      for pair, cosine, _ in pairs.rows[1:]:
        (row,) = re.findall(rf"^\| {pair} \|.*", text, re.MULTILINE)
        assert cosine == row.split("|")[2 + 3 * column + i].strip()


@pytest.mark.slow
def test_a_run_is_measured_once_and_reported(tmp_path):
  config = trainings.smallest(
    total_steps=4, evals={}, checkpoint=dict(every_steps=4)
  )
  config.objectives.dino = dict(weight=0.5, **trainings.DINO)
  run = tmp_path / "run"
  state = train(config, run)
  settings = Settings(batches=16, transfer=2)
  (last,) = interference.measure_run(run, [4], settings)
  assert last["objectives"] == ["contrastive", "dino"]
  assert last["blocks"] == ["embedding", "0", "pool", "encoder"]
  assert [row["batches"] for row in last["reliability"]] == [0.5, 1]
  for rows in last["reliability"]:
    values = np.array(rows["value"], float)
    assert values.shape == (2, 4) and (np.abs(values) <= 1 + 1e-6).all()
  assert np.shape(last["cosines"]["value"]) == (2, 2, 4)
  assert np.shape(last["transfer"]["slope"]["low"]) == (5, 2)

  # A checkpoint is restored whole, and a file with these settings is read.
  with pytest.raises(InputError, match=r"no checkpoint of step 3, only"):
    list(interference.measure_run(run, [3], settings))
  file = run / "interference" / "4.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"batches": 32}))
  (again,) = interference.measure_run(run, [4], settings)
  assert again == last | {"batches": 32}

  assert run_command("report", [str(run), f"--output={tmp_path}"]) == 0
  text = (tmp_path / "report.md").read_text()
  assert "### step 4" in text and "| random |" in text
  file.write_text("{}")
  with pytest.raises(InputError, match=r"4\.json is not a measurement"):
    read_run(run)
  assert int(state.step) == 4
