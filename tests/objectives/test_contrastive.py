"""The contrastive losses against NumPy in float64, and edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prototype_samples import numeric_gradient

from mtv_jax.models.heads.projection import unit
from mtv_jax.objectives import base, build_objective, contrastive, pairwise
from mtv_jax.parallel import ring


def _log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def numpy_sigmoid_loss(logits, valid):
  total = 0.0
  for i in np.flatnonzero(valid):
    for j in np.flatnonzero(valid):
      total -= _log_sigmoid(logits[i, j] if i == j else -logits[i, j])
  return total / max(valid.sum(), 1)


def numpy_softmax_loss(logits, valid):
  pairs = logits[np.ix_(valid, valid)]
  if not pairs.size:
    return 0.0
  rows = np.log(np.exp(pairs).sum(1)) - np.diag(pairs)
  columns = np.log(np.exp(pairs).sum(0)) - np.diag(pairs)
  return 0.5 * (rows + columns).mean()


CASES = {
  "random": lambda r: (r.normal(size=(6, 6)) * 3, np.ones(6, bool)),
  "part valid": lambda r: (
    r.normal(size=(6, 6)),
    np.array([1, 0, 1, 1, 0, 1], bool),
  ),
  "one": lambda r: (r.normal(size=(1, 1)), np.ones(1, bool)),
  "none valid": lambda r: (r.normal(size=(4, 4)), np.zeros(4, bool)),
  "all equal": lambda r: (np.full((5, 5), -10.0), np.ones(5, bool)),
  "large": lambda r: (r.normal(size=(4, 4)) * 100, np.ones(4, bool)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
  ("ours", "reference"),
  [
    (contrastive.sigmoid_losses, numpy_sigmoid_loss),
    (contrastive.softmax_losses, numpy_softmax_loss),
  ],
  ids=["sigmoid", "softmax"],
)
def test_loss_and_gradient_equal_numpy(ours, reference, case):
  logits, valid = CASES[case](np.random.default_rng(0))
  ids = contrastive.ExampleIds(jnp.arange(len(valid)), jnp.asarray(valid))
  texts = ring.EmbeddingBatch(jnp.eye(len(valid)), ids)

  def loss(logits):
    images = ring.EmbeddingBatch(logits, ids)
    losses, _ = ours(images, texts, pairwise.Affine(1.0, 0.0))
    return base.WeightedMean(losses.sum(), ids.valid.sum()).value()

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits, jnp.float32))
  np.testing.assert_allclose(
    value, reference(logits, valid), rtol=1e-5, atol=1e-12
  )
  expected = numeric_gradient(lambda x: reference(x, valid), logits)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def _terms(objective, image, text, valid):
  head = objective.heads()["contrastive"]
  params = {"contrastive": head.module.init(jax.random.key(0))["params"]}
  heads = base.BoundHeads(objective.heads(), params)
  loss_inputs = contrastive.LossInputs(
    image=unit(image.reshape(len(text), -1, text.shape[1])),
    text=unit(text),
    valid=jnp.asarray(valid),
  )
  context = base.Context(step=0, total_steps=1, statistics={})
  return objective.loss(loss_inputs, heads, context), params


def test_the_objective_scales_and_shifts_the_cosine():
  rng = np.random.default_rng(1)
  image, text = rng.normal(size=(2, 4, 8))
  terms, params = _terms(
    build_objective("contrastive", dict(init_scale=7.0, init_bias=-2.0)),
    jnp.asarray(image, jnp.float32),
    jnp.asarray(text, jnp.float32),
    np.ones(4, bool),
  )
  cosine = (image / np.linalg.norm(image, axis=1, keepdims=True)) @ (
    text / np.linalg.norm(text, axis=1, keepdims=True)
  ).T
  expected = numpy_sigmoid_loss(7.0 * cosine - 2.0, np.ones(4, bool))
  np.testing.assert_allclose(terms.loss.value(), expected, rtol=1e-5)
  np.testing.assert_allclose(params["contrastive"]["logit_scale"], np.log(7.0))


@pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
def test_every_crop_is_compared_with_the_captions_of_the_batch(loss_type):
  """SILC: the mean of the losses and accuracies of the crops."""
  rng = np.random.default_rng(2)
  images = jnp.asarray(rng.normal(size=(5, 2, 8)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
  valid = np.array([True, True, False, True, True])
  objective = build_objective(
    "contrastive", dict(loss_type=loss_type, crops="all")
  )
  terms, _ = _terms(objective, images, text, valid)
  each = [_terms(objective, images[:, i], text, valid)[0] for i in range(2)]
  for name in ("loss", "accuracy"):
    mean, *of_crops = (
      (t.loss if name == "loss" else t.report[name]).value()
      for t in (terms, *each)
    )
    np.testing.assert_allclose(mean, np.mean(of_crops), rtol=1e-6)
  assert each[0].loss.value() != each[1].loss.value()


def test_accuracy_counts_valid_rows_only():
  eye = jnp.eye(4, 8)
  swapped = eye[jnp.array([0, 2, 1, 3])]
  terms, _ = _terms(
    build_objective('contrastive', {}), eye, swapped,
    np.array([True, True, True, False]),
  )  # fmt: skip
  np.testing.assert_allclose(terms.report["accuracy"].value(), 1 / 3)
  np.testing.assert_allclose(terms.report["labelled"].value(), 3 / 4)


def test_mean_of_a_zero_count_is_zero_with_a_zero_gradient():
  def value(x):
    return base.WeightedMean(sum=x, count=jnp.zeros(())).value()

  assert value(3.0) == 0.0
  assert jax.grad(value)(3.0) == 0.0


@pytest.mark.parametrize(
  "options, expected",
  [
    ({}, dict(logit_scale=np.log(10), logit_bias=-10)),  # SigLIP's.
    (dict(loss_type="softmax"), dict(logit_scale=2.6592600)),  # CLIP's.
  ],
)
def test_published_temperatures_and_biases(options, expected):
  ones, objective = jnp.ones((2, 4)), build_objective("contrastive", options)
  terms, params = _terms(objective, ones, ones, np.ones(2, bool))
  params = params["contrastive"]
  assert params.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(params[name], value)
  scale = np.exp(expected["logit_scale"])
  np.testing.assert_allclose(terms.report["scale"].value(), scale, rtol=1e-6)
  assert terms.report["bias"].value() == expected.get("logit_bias", 0)


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("contrastiv", {}, "Did you mean 'contrastive'"),
    ("contrastive", dict(init_scal=1.0), "Did you mean 'init_scale'"),
    ("contrastive", dict(loss_type="siglip"), "There are.*sigmoid"),
    ("contrastive", dict(max_scale=5.0), "1 <= init_scale <= max_scale=5"),
  ],
)
def test_invalid_types_and_options_raise(name, options, message):
  with pytest.raises(ValueError, match=message):
    build_objective(name, options)
