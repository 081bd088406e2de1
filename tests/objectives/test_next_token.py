"""The next-token loss against sequences built by hand, one at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.augment import views
from mtv_jax.models import vit
from mtv_jax.models.language_model import LanguageModel
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import base, build_objective
from mtv_jax.utils.errors import ConfigError

SPEC = ModelSpec(
  image=vit.ViTSpec(
    image_size=32, width=12, depth=3, heads=2, mlp_dim=16, projection=6
  ),
)
LANGUAGE = dict(
  vocab_size=21, width=16, depth=2, heads=4, kv_heads=2, mlp_dim=24
)
IMAGE, PATCHES = -1, 4


def build(**options):
  built = views.build_views({"image": dict(ops="resize(32)")})
  entry = LANGUAGE | dict(chunk=8) | options
  return build_objective("next_token", entry).resolve(SPEC, built)


def batch():
  """Questions 2.., answers from 10 on, padding 0; one row has no image."""
  tokens = np.array(
    [[IMAGE, 10, 11, 0, 0, 0], [2, IMAGE, 3, 12, 4, 13], [5, 14, 0, 0, 0, 0]]
  )
  rng = np.random.default_rng(0)
  patches = rng.normal(size=(3, 1, 1 + PATCHES, 12)).astype(np.float32)
  return tokens.astype(np.int32), patches


def test_loss_is_that_of_each_answer_token_after_what_precedes_it():
  objective = build()
  head = objective.heads()["language_model"]
  shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), SPEC))
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape), shapes)
  params = jax.tree.map(np.float32, params)
  tokens, features = batch()
  # The patches of the last but one block, without the CLS token.
  image = vit.ImageOutput(
    patches=jnp.zeros((3, 1, PATCHES, 12)),
    prefix=jnp.zeros((3, 1, 1, 12)),
    pooled=jnp.zeros((3, 1, 6)),
    intermediates={1: jnp.asarray(features)},
  )

  @jax.jit
  def run(params):
    heads = base.BoundHeads(objective.heads(), {"language_model": params})
    fields = {"conversation": jnp.asarray(tokens)}
    fields["conversation_answer"] = fields["conversation"] >= 10
    inputs = objective.loss_inputs(
      {base.Encoding("image", "image"): image}, heads, fields
    )
    return objective.loss(inputs, heads, base.Context(0, 1, {})), inputs

  terms, inputs = run(params)

  model = LanguageModel(objective.head.language_spec)
  decoder, dense = params["decoder"], params["connector"]

  @jax.jit
  def log_probabilities(x, length):
    def logits(model):
      # What follows has no influence: the reference tests show it.
      out = model.logits(model(x[None])[:, length - 1][:, None, None])
      return out.chunk(out.kernel, out.bias)[0, 0, 0]

    return jax.nn.log_softmax(model.apply({"params": decoder}, method=logits))

  losses, correct = [], []
  for row, patches in zip(tokens, features[:, 0, 1:], strict=True):
    hidden = patches @ dense["fc1"]["kernel"] + dense["fc1"]["bias"]
    hidden = np.asarray(jax.nn.gelu(hidden, approximate=False))
    patches = hidden @ dense["fc2"]["kernel"] + dense["fc2"]["bias"]
    x = np.zeros((0, 16), np.float32)
    for token in row:
      if token >= 10:
        padded = np.pad(x, ((0, 12 - len(x)), (0, 0)))
        scores = log_probabilities(padded, len(x))
        losses.append(-scores[token])
        correct.append(scores.argmax() == token)
      table = decoder["token_embedding"]
      x = np.concatenate([x, patches if token == IMAGE else table[[token]]])
  assert inputs.count.tolist() == [2, 2, 1]
  assert terms.loss.value() == pytest.approx(np.mean(losses), rel=1e-5)
  assert terms.report["accuracy"].value() == pytest.approx(np.mean(correct))


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(kv_heads=3), "heads must divide"),
    (dict(layer=7), r"layers \[7\]"),
    (dict(rope_scaling=(8.0, 1.0)), "rope_scaling"),
  ],
)
def test_options_that_do_not_fit(options, message):
  with pytest.raises((ConfigError, ValueError), match=message):
    build(**options)


def test_reads_the_layer_that_is_named():
  encoding = base.Encoding("image", "image")
  for layer, taps in ((-2, (1,)), (2, (2,)), (None, ())):
    assert build(layer=layer).needs().encodings == {encoding: taps}
