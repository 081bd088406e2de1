"""DINO against NumPy in float64, its schedules, edge cases and meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import prototype_samples as samples
import pytest
from jax.sharding import NamedSharding
from step_samples import mesh_of

from mtv_jax.augment import views
from mtv_jax.data.lanes import LaneOrder
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import base, build_objective, dino
from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh, replicated_sharding
from mtv_jax.perf import hlo
from mtv_jax.train.spec import ObjectiveWeight, StepSpec

SMALL = dict(
  prototypes=8, hidden=6, bottleneck=4, chunk=None, student_temp=0.5,
  teacher_temp=0.4, teacher_temp_start=0.2,
)  # fmt: skip


def make(**options):
  return build_objective("dino", {**SMALL, **options})


def make_loss_inputs(rows=4, crops=2, local=3, channels=5, seed=0):
  rng = np.random.default_rng(seed)

  def unit(*shape):
    return jnp.asarray(samples.unit(rng.normal(size=shape)), jnp.float32)

  return dino.LossInputs(
    teacher=unit(rows, crops, 4),
    student=unit(rows, crops + local, 4),
    pooled=jnp.asarray(rng.normal(size=(rows, crops, channels)), jnp.float32),
  )


def reference(objective, params, loss_inputs, *, center=None, temp=0.4):
  """The loss pair by pair, and the KoLeo part of it."""
  teacher, student, pooled = (
    np.float64(x)
    for x in (loss_inputs.teacher, loss_inputs.student, loss_inputs.pooled)
  )
  rows, crops = teacher.shape[:2]
  logits = teacher @ samples.prototypes_of(objective, params, "teacher")
  if center is None:
    q = samples.sinkhorn(logits.reshape(rows * crops, -1) / temp)
    q = q.reshape(logits.shape)
  else:
    q = np.exp(samples.log_softmax((logits - center) / temp))
  p = samples.log_softmax(
    student @ samples.prototypes_of(objective, params, "student") / 0.5
  )
  terms = []
  for g in range(crops):
    for v in range(student.shape[1]):
      if g != v or objective.same_crop == "include":
        terms.append(-(q[:, g] * p[:, v]).sum(-1).mean())
  loss = np.mean(terms)
  if objective.koleo_weight:
    spread = sum(samples.koleo(pooled[:, i]) for i in range(crops))
    loss += objective.koleo_weight * spread
  return loss


CASES = {
  "two globals": (dict(), dict()),
  "one global": (dict(), dict(crops=1)),
  "no locals": (dict(koleo_weight=0.0), dict(local=0)),
  "one global against itself": (
    dict(same_crop="include"),
    dict(crops=1, local=0),
  ),
  "chunks": (dict(chunk=2), dict()),
  "centring": (dict(target="centering"), dict()),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_numpy(case):
  options, shape = CASES[case]
  objective, loss_inputs = make(**options), make_loss_inputs(**shape)
  params = samples.params_of(objective)
  context, center = samples.context_of(objective), None
  if objective.target == "centering":
    center = np.linspace(-1, 1, 8)
    context = dataclasses.replace(
      context, statistics={"center": jnp.asarray(center, jnp.float32)}
    )
  value, (report, statistics), gradients = samples.loss_and_gradients(
    objective, params, loss_inputs, context
  )

  def loss(**changes):
    changed = loss_inputs.replace(**changes)
    return reference(objective, params, changed, center=center)

  np.testing.assert_allclose(value, loss(), rtol=1e-5)
  teacher, student, pooled = gradients[:3]
  np.testing.assert_array_equal(teacher, 0.0)
  expected = samples.numeric_gradient(
    lambda x: loss(student=x), loss_inputs.student
  )
  np.testing.assert_allclose(student, expected, rtol=1e-4, atol=1e-6)
  expected = samples.numeric_gradient(
    lambda x: loss(pooled=x), loss_inputs.pooled
  )
  np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-5)

  assert report["labelled"] == 1
  np.testing.assert_allclose(report["teacher_temp"], 0.4)
  assert 0 < report["kl"] < value + 1
  assert 0 < report["teacher_entropy"] <= report["mean_entropy"] + 1e-6
  if objective.target == "centering":
    matrix = samples.prototypes_of(objective, params, "teacher")
    mean = np.float64(loss_inputs.teacher).mean((0, 1)) @ matrix
    np.testing.assert_allclose(
      statistics["center"], 0.9 * center + 0.1 * mean, rtol=1e-5
    )
  else:
    assert statistics == {}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sinkhorn", "centering"])
def test_sharded_chunks_equal_one_device(target):
  """Each device has some prototypes, of which a chunk has fewer."""
  objective = make(target=target, chunk=2)
  args = objective, samples.params_of(objective), make_loss_inputs(rows=16)
  compute = functools.partial(
    samples.loss_and_gradients, *args, samples.context_of(objective)
  )
  one, many = compute(), compute(mesh_of((2, 2, 2)))
  np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, many[1], one[1])
  assert len(one[2]) > 3
  for a, b in zip(many[2], one[2], strict=True):
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8


# ---------------------------------------------------------------------------
# KoLeo.


def koleo_of(vectors, valid, group=64):
  def loss(x):
    return dino.koleo(x, jnp.asarray(valid), group=group).value()

  return jax.jit(jax.value_and_grad(loss))(jnp.asarray(vectors, jnp.float32))


def grouped_koleo(vectors, valid, group):
  """The mean over the valid rows whose group has another one."""
  parts = [slice(i, i + group) for i in range(0, len(vectors), group)]
  parts = [vectors[p][valid[p]] for p in parts if valid[p].sum() > 1]
  total = sum(len(x) * samples.koleo(x) for x in parts)
  return total / sum(map(len, parts))


@pytest.mark.parametrize(
  ("rows", "group", "valid"),
  [
    (6, 64, [0, 1, 2, 3, 4, 5]),
    (6, 64, [1, 4]),
    (9, 3, range(9)),
    (9, 4, [0, 2, 3, 4, 5, 7, 8]),  # The last group has one row.
    (8, 4, [0, 1, 3, 6]),  # The second group has one valid row.
  ],
)
def test_koleo_and_gradient_equal_numpy_in_each_group(rows, group, valid):
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(rows, 4)) * 3
  valid = np.isin(np.arange(rows), valid)
  value, gradient = koleo_of(vectors, valid, group)
  expected = grouped_koleo(vectors, valid, group)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  expected = samples.numeric_gradient(
    lambda x: grouped_koleo(x, valid, group), vectors
  )
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(gradient[~valid], 0.0)


@pytest.mark.parametrize(
  ("vectors", "valid"),
  [
    (np.ones((4, 3)), np.ones(4, bool)),
    (np.zeros((4, 3)), np.ones(4, bool)),
    (np.eye(3), np.zeros(3, bool)),
    (np.eye(3), np.arange(3) == 1),
    (np.ones((1, 3)), np.ones(1, bool)),
  ],
  ids=["twins", "zeros", "none valid", "one valid", "batch of one"],
)
def test_koleo_of_equal_vectors_is_finite(vectors, valid):
  value, gradient = koleo_of(vectors, valid)
  assert np.isfinite(value) and np.isfinite(gradient).all()
  if valid.sum() < 2:
    assert value == 0 and not gradient.any()
  else:
    np.testing.assert_allclose(value, -np.log(2e-8), rtol=1e-5)


@pytest.mark.parametrize(
  ("group", "strided", "received"),
  [(4, False, 16), (16, False, None), (8, True, 2 * 8 * 16), (16, True, None)],
  ids=["aligned", "across devices", "strided", "few strided groups"],
)
def test_koleo_on_a_mesh_equals_one_device(group, strided, received):
  mesh = make_mesh(dict(data=4, fsdp=2))
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(64, 4)).astype(np.float32)
  valid = np.arange(64) % 5 > 0

  def loss(x, mesh=None):
    options = dict(group=group, mesh=mesh, strided=strided)
    return dino.koleo(x, jnp.asarray(valid), **options).value()

  expected = jax.jit(jax.value_and_grad(loss))(vectors)
  rows = np.arange(64).reshape(group, -1).T if strided else np.arange(64)
  rows = rows.reshape(-1)
  np.testing.assert_allclose(
    expected[0], grouped_koleo(vectors[rows], valid[rows], group), rtol=1e-5
  )
  sharding = NamedSharding(mesh, BATCH_SPEC)
  sharded = jax.device_put(vectors, sharding)
  graded = jax.jit(
    jax.value_and_grad(functools.partial(loss, mesh=mesh)),
    out_shardings=(replicated_sharding(mesh), sharding),
  )
  result = graded(sharded)
  np.testing.assert_allclose(result[0], expected[0], rtol=1e-6)
  np.testing.assert_allclose(result[1], expected[1], rtol=1e-5, atol=1e-7)
  if received:  # Eight rows a device: none or all leave it, and return.
    rows = hlo.list_collectives(graded.lower(sharded).compile())
    assert sum(row.bytes for row in rows) <= received + 16, rows


def test_koleo_groups_are_rows_of_the_data_on_a_permuted_mesh(monkeypatch):
  """As on a pod whose hosts' devices are not consecutive on the mesh."""
  mesh = make_mesh(dict(data=8))
  order = np.arange(16).reshape(8, 2)[[0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
  monkeypatch.setattr(dino, "data_rows", lambda rows, mesh: order)
  groups = dino.group_rows(jnp.asarray(order), 8, mesh)
  np.testing.assert_array_equal(groups, np.arange(16).reshape(2, 8))
  groups = dino.group_rows(jnp.asarray(order), 5, mesh, strided=True)
  expected = np.pad(np.arange(16), (0, 4)).reshape(5, 4).T
  np.testing.assert_array_equal(groups, expected)


def clustered_features(labels, rng):
  """Features `[n, 64]` around the centers of 1,000 classes."""
  centers = rng.normal(size=(1000, 64))
  noise = rng.normal(size=(len(labels), 64))
  return np.float32(samples.unit(centers[labels] + noise))


def same_class_share(features, labels, group, *, strided=False):
  """Share of images whose nearest neighbour in the group has their class."""
  mesh = make_mesh(dict(data=8))
  split = functools.partial(
    dino.group_rows, size=group, mesh=mesh, strided=strided
  )

  @jax.jit
  def nearest(x):
    x = split(x)
    return dino.nearest_neighbours(x, jnp.ones(x.shape[:2], bool))

  index = nearest(jax.device_put(features, NamedSharding(mesh, BATCH_SPEC)))
  classes = np.asarray(split(jnp.asarray(labels)))
  return (np.take_along_axis(classes, np.asarray(index), 1) == classes).mean()


def test_koleo_seldom_repels_images_of_one_class_in_groups_of_64():
  """The table of docs/results.md: 1,000 clusters, 8,192 images."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 1000, 8192)
  features = clustered_features(labels, rng)
  for group, expected in {64: 0.062, 1024: 0.578, 8192: 0.965}.items():
    share = same_class_share(features, labels, group)
    print(group, share)
    np.testing.assert_allclose(share, expected, atol=0.001)


def test_koleo_in_lanes_seldom_repels_images_of_sorted_shards():
  """The table of docs/results.md: 1,000 shards of 1,280 records."""
  ends = np.arange(64, 1_280_001, 64)
  options = dict(batch_size=16_384, lanes=256, window=1024)
  order = LaneOrder([ends], weights=[1.0], seeds=[0], **options)
  rows = np.array([next(order.candidates(i)[1]) for i in range(16_384)])
  rng = np.random.default_rng(0)
  shuffled = rng.permutation(1_280_000)[rows]
  for records, expected in ((rows, (0.982, 0.059)), (shuffled, (0.064, 0.063))):
    labels = records // 1280
    features = clustered_features(labels, rng)
    for strided, share in zip((False, True), expected, strict=True):
      found = same_class_share(features, labels, 64, strided=strided)
      print(strided, found)
      np.testing.assert_allclose(found, share, atol=0.001)


def test_koleo_of_a_batch_of_one_raises():
  loss_inputs = make_loss_inputs(rows=1)
  params = samples.params_of(make())
  with pytest.raises(ValueError, match="koleo_weight.*which has 1: "):
    samples.loss_and_gradients(
      make(), params, loss_inputs, samples.context_of(make())
    )
  objective = make(koleo_weight=0)
  value, _, gradients = samples.loss_and_gradients(
    objective, params, loss_inputs, samples.context_of(objective)
  )
  np.testing.assert_allclose(
    value, reference(objective, params, make_loss_inputs(rows=1)), rtol=1e-5
  )
  assert all(np.isfinite(x).all() for x in gradients)


# ---------------------------------------------------------------------------
# Schedules.


def test_teacher_temperature_warms_up():
  objective, loss_inputs = make(koleo_weight=0), make_loss_inputs()
  params = samples.params_of(objective)

  @jax.jit
  def compute(step):
    context = base.Context(step, 1000, {})
    heads = samples.bound(objective, params)
    terms = objective.loss(loss_inputs, heads, context)
    return terms.loss.value(), terms.report["teacher_temp"].value()

  for step, temp in [(0, 0.2), (150, 0.3), (300, 0.4), (999, 0.4)]:
    value, result = compute(step)
    np.testing.assert_allclose(result, temp, rtol=1e-6)
    expected = reference(objective, params, loss_inputs, temp=temp)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_last_layer_is_frozen_for_the_first_percent_of_the_run():
  """By the optimizer: it has its gradient, so that its moments advance."""
  objective, loss_inputs = (
    make(teacher_temp_warmup_percent=0),
    make_loss_inputs(),
  )
  params, context = samples.params_of(objective), base.Context(0, 1000, {})
  _, _, gradients = samples.loss_and_gradients(
    objective, params, loss_inputs, context
  )
  kernel, scale = gradients[3:5]  # After the three loss inputs'.
  assert np.abs(kernel).max() > 0 and np.abs(scale).max() > 0
  for percent, starts, total, expected in [
    (1.0, (0, 0), 1000, 10),
    (7.0, (0, 0), 100, 7),
    (0.5, (0, 0), 100, 1),
    (0.0, (0, 0), 100, 0),
    (10.0, (50, 0), 100, 10),
    (10.0, (50, 60), 100, 55),
  ]:
    # Both share the head `dino`.
    first = make(freeze_last_layer_percent=percent)
    spec = StepSpec(
      model=ModelSpec.from_config(dict(variant="mu/8", image_size=16)),
      dtype="float32",
      objectives={"a": first, "b": first},
      weights={
        name: ObjectiveWeight(1.0, start)
        for name, start in zip("ab", starts, strict=True)
      },
      views=views.build_views(
        {v: dict(ops="resize(16)") for v in ("global", "local")}
      ),
      seed=0,
      total_steps=total,
    )
    assert spec.start_steps == {"heads/dino/last_layer/": expected}


# ---------------------------------------------------------------------------
# Settings.


def test_pair_weights_equal_dinov2():
  weights = dino.pair_weights(2, 8, same_crop="exclude")
  assert weights.shape == (2, 10)
  assert weights[0, 0] == weights[1, 1] == 0
  np.testing.assert_allclose(np.unique(weights), [0, 1 / 18])
  crops = views.build_views({"global": dict(ops="resize(16)")})
  with pytest.raises(ValueError, match="set count=2 or a local view"):
    make().resolve(None, crops)
  assert make(same_crop="include").resolve(None, crops).same_crop == "include"
  assert make().resolve(None, {}) == make()


def test_needs_and_head_follow_the_options():
  objective = make(view_global="image", view_local=None, head="shared")
  assert [str(e) for e in objective.needs().encodings] == [
    "image(image, student)",
    "image(image, teacher)",
  ]
  assert objective.needs().fields == ()
  assert objective.heads()["shared"].teacher
  assert make().initial_statistics() == {}
  centre = make(target="centering").initial_statistics()["center"]
  np.testing.assert_array_equal(centre, np.zeros(8))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(target="sinkhorm"), "Did you mean 'sinkhorn'"),
    (dict(same_crop="no"), "same_crop"),
    (dict(koleo_weight=-1.0), "koleo_weight is -1.0, expected a number >= 0"),
    (dict(teacher_temp=0.0), "teacher_temp is 0.0, expected a number > 0"),
    (dict(chunk=3), "chunk is 3; expected a divisor of prototypes=8, or None"),
    (dict(teacher_temp_warmup_percent=130), ">= 0 and <= 100"),
    (dict(center_momentum=1.0), "center_momentum is 1.0"),
    (dict(iterations=0), "iterations is 0, expected an integer >= 1"),
    (dict(prototypes=1), "prototypes is 1, expected an integer >= 2"),
    (dict(hidden="many"), "hidden is 'many', expected an integer"),
    (dict(koleo_wieght=1.0), "Did you mean 'koleo_weight'"),
  ],
  ids=lambda x: "" if isinstance(x, str) else str(x),
)
def test_invalid_options_raise(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)
