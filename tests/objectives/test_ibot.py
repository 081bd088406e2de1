"""iBOT against NumPy in float64, edge cases, meshes and a train step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optim_samples
import prototype_samples as samples
import pytest
import step_samples
import tiny_mtv

from mtv_jax.augment import views
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import build_objective, ibot
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.train import gradients
from mtv_jax.train.step import make_train_step
from mtv_jax.utils.tree import flatten_with_names

SMALL = dict(
  prototypes=8, hidden=6, bottleneck=4, chunk=None, student_temp=0.5,
  teacher_temp=0.4,
)  # fmt: skip


def make(**options):
  return build_objective("ibot", {**SMALL, **options})


def make_loss_inputs(counts, patches=4, seed=0):
  """Crops with so many masked patches each: counts [rows, crops].

  A row's patches come from its crops, `patches` from each.
  """
  rng = np.random.default_rng(seed)
  counts = np.asarray(counts)
  rows = len(counts)

  def unit():
    x = samples.unit(rng.normal(size=(rows, counts.shape[1] * patches, 4)))
    return jnp.asarray(x, jnp.float32)

  valid = jnp.asarray(np.arange(patches) < counts[..., None])
  return ibot.LossInputs(
    teacher=unit(),
    student=unit(),
    weights=ibot.patch_weights(valid).reshape(rows, -1),
    masked=jnp.asarray(counts > 0),
  )


def reference(objective, params, loss_inputs, *, center=None):
  """A mean over masked patches, then over all crops: loops over both."""
  crops = loss_inputs.masked.size
  valid = np.asarray(loss_inputs.weights > 0).reshape(crops, -1)
  teacher, student = (
    np.float64(x).reshape(*valid.shape, -1)
    @ samples.prototypes_of(objective, params, side)
    for x, side in (
      (loss_inputs.teacher, "teacher"),
      (loss_inputs.student, "student"),
    )
  )
  if not valid.any():
    return 0.0
  q = np.zeros_like(teacher)
  if center is None:
    q[valid] = samples.sinkhorn(teacher[valid] / 0.4)
  else:
    q = np.exp(samples.log_softmax((teacher - center) / 0.4))
  p = samples.log_softmax(student / 0.5)
  total = 0.0
  for crop in range(crops):
    losses = [
      -(q[crop][i] * p[crop][i]).sum() for i in np.flatnonzero(valid[crop])
    ]
    total += np.mean(losses) if losses else 0.0
  return total / crops


COUNTS = {
  "half the crops": [[3, 0], [0, 2], [4, 1]],
  "all of them": [[4], [4], [4], [4]],
  "one patch": [[0], [1], [0]],
  "batch of one": [[3]],
  "none": [[0], [0]],
}


@pytest.mark.parametrize(
  ("case", "target"),
  [
    *[(case, "sinkhorn") for case in COUNTS],
    ("half the crops", "centering"),
    ("none", "centering"),
  ],
)
def test_loss_and_gradient_equal_numpy(case, target):
  objective = make(target=target, chunk=None if target == "sinkhorn" else 2)
  loss_inputs, params = (
    make_loss_inputs(COUNTS[case]),
    samples.params_of(objective),
  )
  value, (report, statistics), gradients = samples.loss_and_gradients(
    objective, params, loss_inputs, samples.context_of(objective)
  )
  center = None if target == "sinkhorn" else np.zeros(8)

  def loss(student):
    changed = loss_inputs.replace(student=student)
    return reference(objective, params, changed, center=center)

  np.testing.assert_allclose(value, loss(loss_inputs.student), rtol=1e-5)
  np.testing.assert_array_equal(gradients[0], 0.0)
  expected = samples.numeric_gradient(loss, loss_inputs.student)
  np.testing.assert_allclose(gradients[1], expected, rtol=1e-4, atol=1e-6)
  assert all(np.isfinite(x).all() for x in gradients)

  valid = np.asarray(loss_inputs.weights > 0)
  share = (np.asarray(COUNTS[case]) > 0).mean()
  np.testing.assert_allclose(report["labelled"], share)
  np.testing.assert_allclose(report["cross_entropy"] * share, value, rtol=1e-5)
  if not valid.any():
    assert all(report[k] == 0 for k in report if k != "teacher_temp")
  else:
    assert 0 < report["prototypes_used"] <= 1
  if target == "centering":
    matrix = samples.prototypes_of(objective, params, "teacher")
    rows = np.float64(loss_inputs.teacher)[valid] @ matrix
    mean = rows.mean(0) if len(rows) else np.zeros(8)
    np.testing.assert_allclose(
      statistics["center"], 0.1 * mean, rtol=1e-5, atol=1e-8
    )


def test_a_crop_has_the_same_weight_at_any_mask_ratio():
  weights = ibot.patch_weights(
    jnp.array([[[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]], bool)
  )[0]
  np.testing.assert_allclose(weights.sum(-1), [1, 1, 0])
  np.testing.assert_allclose(weights[0], 0.25)


# ---------------------------------------------------------------------------
# From encodings to loss inputs.


def masked_loss_inputs(objective, mask):
  """LossInputs of patches whose vectors identify their position."""
  rows, crops, patches = (1, 1, 4) if mask is None else mask.shape
  # One direction per patch, so that the head separates them.
  x = jnp.broadcast_to(jnp.eye(patches, 5), (rows, crops, patches, 5))
  output = type("Output", (), {"patches": x})
  view_batch = views.ViewBatch(images=None, box=None, flipped=None, mask=mask)
  heads = samples.bound(objective, samples.params_of(objective))
  encodings = dict.fromkeys(objective.needs().encodings, output)
  loss_inputs = objective.loss_inputs(
    encodings, heads, {"views": {"global": view_batch}}
  )
  return loss_inputs, heads


def test_loss_inputs_are_at_the_masked_patches():
  mask = np.zeros((2, 1, 5), bool)
  mask[0, 0, [1, 3]] = mask[1, 0, 4] = True
  loss_inputs, heads = masked_loss_inputs(make(), jnp.asarray(mask))
  valid = np.asarray(loss_inputs.weights > 0)
  assert valid.sum() == 3
  for vectors, side in (
    (loss_inputs.student, "student"),
    (loss_inputs.teacher, "teacher"),
  ):
    expected = heads["ibot", side](jnp.eye(5))[jnp.array([1, 3, 4])]
    np.testing.assert_allclose(vectors[valid], expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(loss_inputs.masked, [[True], [True]])


def test_patches_all_has_targets_at_all_patches():
  mask = jnp.zeros((2, 1, 5), bool).at[0, 0, 2].set(True)
  loss_inputs, heads = masked_loss_inputs(
    make(patches="all", head="dino"), mask
  )
  np.testing.assert_allclose(
    loss_inputs.weights, np.full((2, 5), 0.2), rtol=1e-6
  )
  np.testing.assert_array_equal(loss_inputs.masked, [[True], [False]])
  expected = heads["dino"](jnp.eye(5))
  np.testing.assert_allclose(loss_inputs.student[1], expected, rtol=1e-5)


def test_number_of_gathered_patches_is_the_views_maximum():
  spec = ModelSpec.from_config(dict(variant="mu/8", image_size=32))
  ops = "crop(32, 0.4, 1.0)|blocks(0.1, 0.25, 0.5, patch=8)"
  seen = views.build_views({"global": dict(count=2, ops=ops)})
  objective = make().resolve(spec, seen)
  # One of the two crops is masked.
  assert objective.max_masked == 4
  mask = jnp.zeros((2, 2, 16), bool)
  mask = mask.at[0, 0, jnp.array([0, 7, 15])].set(True)
  mask = mask.at[1, 1, jnp.array([3, 5, 6, 9])].set(True)
  bounded, _ = masked_loss_inputs(objective, mask)
  whole, _ = masked_loss_inputs(make(), mask)
  assert bounded.student.shape == (2, 4, 4)
  assert whole.student.shape == (2, 32, 4)
  for row, positions in ((0, [0, 7, 15]), (1, [19, 21, 22, 25])):
    for x, y in (
      (bounded.student, whole.student),
      (bounded.teacher, whole.teacher),
      (bounded.weights, whole.weights),
    ):
      result = x[row, : len(positions)]
      np.testing.assert_allclose(
        result, y[row, jnp.array(positions)], rtol=1e-5
      )
  np.testing.assert_allclose(bounded.weights.sum(1), 1, rtol=1e-6)
  np.testing.assert_allclose(whole.weights.sum(1), 1, rtol=1e-6)
  assert make().resolve(spec, {}).max_masked is None


@pytest.mark.parametrize(
  "ops, options, message",
  [
    ("", {}, "'global' hides no patches.*blocks"),
    ("|blocks(0.25, 0.5)", {}, r"expected blocks\(..., patch=8\)"),
    (
      "|blocks(0.25, 0.5, patch=8)",
      dict(max_masked=3),
      "expected 8",
    ),
    ("", dict(patches="maskd"), "Did you mean 'masked'"),
  ],
)
def test_invalid_views_and_options_raise(ops, options, message):
  spec = ModelSpec.from_config(dict(variant="mu/8", image_size=32))
  seen = views.build_views({"global": dict(ops=f"resize(32){ops}")})
  with pytest.raises(ValueError, match=message):
    make(**options).resolve(spec, seen)


# ---------------------------------------------------------------------------
# Both objectives in a train step.


def make_spec(**options):
  spec = tiny_mtv.everything().select_objectives(("dino", "ibot"))
  changed = dataclasses.replace(spec.objectives["ibot"], **options)
  objectives = {**spec.objectives, "ibot": changed}
  return dataclasses.replace(
    spec, objectives=objectives, total_steps=300, teacher_momentum=0.5
  )


def by_name(tree):
  return dict(flatten_with_names(jax.device_get(tree)))


def begin(spec, **optim):
  """The step on one device: program, state and batch."""
  params, mesh = step_samples.params_of(spec), step_samples.mesh_of((1, 1, 1))
  lengths = dict(total_steps=spec.total_steps, start_steps=spec.start_steps)
  tx = optim_samples.build({"lr": 1e-3, **optim}, params=params, **lengths).tx
  train_step = make_train_step(spec, tx, mesh)
  return train_step, train_step.init(params), shard_batch(tiny_mtv.rows(), mesh)


@pytest.mark.slow
def test_dino_and_ibot_share_encodings_and_the_teacher_is_updated():
  spec = make_spec()
  assert [str(e) for e in spec.plan] == [
    "image(global, student)",
    "image(global, teacher)",
    "image(local, student)",
  ]
  train_step, state, batch = begin(spec)
  start = by_name(state.params)
  assert set(state.teacher["heads"]) == {"dino", "ibot"}
  history = []
  for _ in range(5):
    state, metrics = train_step.update(state, batch)
    history.append((by_name(state.params), by_name(state.teacher)))
    for name in ("dino", "ibot"):
      for key in ("loss", "teacher_entropy", "prototypes_used", "kl"):
        assert np.isfinite(metrics[f"{name}/{key}"])
  assert 0 < metrics["ibot/labelled"] < 1

  # The last layer is frozen for the first 3 of 300 steps, and then moves.
  for name, before in start.items():
    if not name.startswith("text/"):
      frozen = "last_layer" in name
      assert (history[2][0][name] == before).all() == frozen, name
      assert (history[4][0][name] != before).any(), name
  (student, teacher), (_, previous) = history[4], history[3]
  for name, value in teacher.items():
    expected = 0.5 * previous[name] + 0.5 * student[name]
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.reference
def test_the_first_updates_of_the_last_layer_are_those_of_torch():
  """DINOv2 freezes it by a rate of 0, under which Adam's moments advance."""
  torch = pytest.importorskip("torch")
  train_step, state, batch = begin(make_spec(), weight_decay=0.04)
  compute = jax.jit(
    lambda state: gradients.compute_gradients(train_step.spec, state, batch)[1]
  )
  name = "heads/dino/last_layer/kernel"
  weight = torch.nn.Parameter(torch.tensor(by_name(state.params)[name]))
  adamw = torch.optim.AdamW([weight], lr=0.0, weight_decay=0.04)
  moved = []
  for step in range(7):
    weight.grad = torch.tensor(by_name(compute(state))[name])
    adamw.param_groups[0]["lr"] = 0.0 if step < 3 else 1e-3
    before, theirs = by_name(state.params)[name], weight.detach().clone()
    adamw.step()
    state, _ = train_step.update(state, batch)
    ours = by_name(state.params)[name] - before
    theirs = (weight.detach() - theirs).numpy()
    if step < 3:
      assert not ours.any() and not theirs.any()
    else:
      assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)
      moved.append(np.sqrt(np.mean(ours**2)) / 1e-3)
  # Without moments the first one would be sqrt(1 / (1 - b2)) times as large.
  assert max(moved) < 1.1


def test_a_shared_head_has_one_set_of_parameters():
  assert set(make_spec(head="dino").heads) == {"dino"}
  with pytest.raises(ValueError, match="heads/dino"):
    _ = make_spec(head="dino", hidden=24).heads
