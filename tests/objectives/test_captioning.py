"""Captioning losses against NumPy, one unpadded sequence at a time; steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import step_samples
import tiny_mtv
from numpy_transformer import NumpyTransformer

from mtv_jax.augment import views
from mtv_jax.data import tokenizers
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.datasets import registry
from mtv_jax.models import text as text_lib
from mtv_jax.models import vit
from mtv_jax.models.heads import caption_decoder as decoders
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import base, build_objective, captioning
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.perf import flops
from mtv_jax.train.spec import ObjectiveWeight
from mtv_jax.train.step import make_train_step
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import flatten_with_names

IMAGE = base.Encoding("image", "image")
VOCAB, BINS, EOS, WIDTH, HEADS = 9, 5, 1, 8, 2
SPEC = ModelSpec(
  image=vit.ViTSpec(
    image_size=64, width=12, depth=1, heads=2, mlp_dim=16, projection=6
  ),
  text=text_lib.TextSpec(
    vocab_size=VOCAB, width=WIDTH, depth=4, heads=HEADS, mlp_dim=10, length=6,
    projection=6,
  ),
)  # fmt: skip


def build(model=SPEC, ops="resize(64)", **options):
  entry = dict(bins=BINS, regions=2, chunk=None) | options
  built = views.build_views({"image": dict(ops=ops)})
  return build_objective("captioning", entry).resolve(model, built)


OBJECTIVE = build()


@functools.cache
def params_of(seed=0):
  """The decoder's parameters, all nonzero."""
  head = OBJECTIVE.heads()["caption_decoder"]
  shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), SPEC))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes
  )


def batch_of(rows=6, seed=0):
  rng = np.random.default_rng(seed)

  def texts(*shape):
    tokens = rng.integers(2, VOCAB, shape)
    tokens[..., -1] = EOS
    ends = rng.integers(0, shape[-1], shape[:-1])[..., None]
    return np.where(np.arange(shape[-1]) >= ends, EOS, tokens).astype(np.int32)

  corners = np.sort(rng.uniform(size=(rows, 3, 2, 2)), axis=2)
  valid = rng.uniform(size=(rows, 3)) < 0.7
  valid[-1] = False
  return {
    "caption": texts(rows, 6),
    "caption_valid": np.arange(rows) != rows - 1,
    "boxes": corners.reshape(rows, 3, 4).astype(np.float32),
    "box_phrase": texts(rows, 3, 4),
    "box_valid": valid,
    "patches": rng.normal(size=(rows, 4, 12)).astype(np.float32),
  }


@functools.partial(jax.jit, static_argnums=0)
def run(objective, params, batch, seed=0):
  """The loss, (terms, loss inputs), gradients to parameters and patches."""
  rows = len(batch["patches"])

  def loss(params, patches):
    encodings = {
      IMAGE: vit.ImageOutput(
        patches=patches[:, None],
        prefix=patches[:, None, :0],
        pooled=jnp.zeros((rows, 1, 6)),
        intermediates={},
      )
    }
    view = views.ViewBatch(
      images=None,
      box=jnp.tile(jnp.array([0.0, 0, 1, 1]), (rows, 1, 1)),
      flipped=jnp.zeros((rows, 1), bool),
    )
    keys = jax.random.split(jax.random.key(seed), rows)
    heads = base.BoundHeads(objective.heads(), {"caption_decoder": params})
    inputs = objective.loss_inputs(
      encodings,
      heads,
      {**batch, "views": {"image": view}, "keys": {"image": keys}},
    )
    terms = objective.loss(inputs, heads, base.Context(0, 1, {}))
    return terms.loss.value(), (terms, inputs)

  compute = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  return compute(params, batch["patches"])


# NumPy reference: one sequence at a time, without padding, in float64.


def np_log_probabilities(p, tokens, patches, *, causal):
  t = NumpyTransformer(SPEC.text)
  length = len(tokens)
  x = p["token_embedding"][tokens] + p["position_embedding"][:length]
  for i in range(len(p["blocks"]["norm1"]["scale"])):
    block = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
    own, cross = block["attention"], block["cross_attention"]
    qkv = t.split(t.dense(own["qkv"], t.norm(block["norm1"], x)), 3)
    x = x + t.dense(own["out"], t.heads(*qkv, causal=causal))
    q = t.dense(cross["q"], t.norm(block["norm2"], x))
    kv = t.split(t.dense(cross["kv"], patches), 2)
    x = x + t.dense(cross["out"], t.heads(q, *kv))
    x = x + t.mlp(block["mlp"], t.norm(block["norm3"], x))
  logits = t.dense(p["projection"], t.norm(p["norm"], x))
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def until_end(tokens):
  tokens = list(tokens)
  return tokens[: tokens.index(EOS) + 1]


def np_losses(p, batch, parallel, each=False):
  """Losses of all answers' tokens by task; one list per answer if `each`."""
  caption, referring, region, mask = range(VOCAB + BINS, VOCAB + BINS + 4)
  losses = {k: [] for k in ("caption", "parallel", "referring")}
  losses["region_caption"] = []

  def add(name, begin, prompt, answer, patches):
    row = [begin, *prompt, *answer]
    log_p = np_log_probabilities(p, row[:-1], patches, causal=True)
    indices = range(len(prompt), len(row) - 1)
    losses[name].append([-log_p[i, row[i + 1]] for i in indices])

  for i, patches in enumerate(batch["patches"]):
    tokens = until_end(batch["caption"][i])
    if batch["caption_valid"][i] and parallel[i]:
      masks = [mask] * batch["caption"].shape[1]
      log_p = np_log_probabilities(p, masks, patches, causal=False)
      losses["parallel"].append([-log_p[j, t] for j, t in enumerate(tokens)])
    elif batch["caption_valid"][i]:
      add("caption", caption, [], tokens, patches)
    for j in np.flatnonzero(batch["box_valid"][i])[:2]:
      phrase = until_end(batch["box_phrase"][i, j])
      box = VOCAB + np.round(batch["boxes"][i, j] * (BINS - 1)).astype(int)
      add("referring", referring, phrase, box, patches)
      add("region_caption", region, box, phrase, patches)
  return losses if each else {k: sum(v, []) for k, v in losses.items()}


@pytest.fixture(scope="module")
def example():
  """Arguments, results, and which captions are parallel."""
  batch, params = batch_of(), params_of()
  # Small boxes would be dropped.
  size = batch["boxes"][..., 2:] - batch["boxes"][..., :2]
  batch["box_valid"] &= (size > 1 / 50).all(-1)
  result = jax.device_get(run(OBJECTIVE, params, batch))
  parallel = result[0][1][1].sums["parallel"].count > 0
  # Both kinds occur, among those with a caption.
  assert 0 < parallel.sum() < 5 and not parallel[-1]
  return batch, params, result, parallel


def test_losses_equal_numpy(example):
  batch, params, ((loss, (terms, inputs)), _), parallel = example
  p = jax.tree.map(np.float64, params)
  losses = np_losses(p, batch, parallel)
  for name, values in losses.items():
    assert len(values) > 3, name
    got = terms.report[name]
    assert got.count == len(values)
    np.testing.assert_allclose(got.value(), np.mean(values), rtol=1e-5)
  every = [x for values in losses.values() for x in values]
  np.testing.assert_allclose(loss, np.mean(every), rtol=1e-5)
  np.testing.assert_array_equal(inputs.labelled, [1, 1, 1, 1, 1, 0])
  assert terms.report["labelled"].value() == 5 / 6


def test_answers_and_tasks_of_equal_weight(example):
  """Means over an answer's tokens, a task's answers, and tasks."""
  batch, params, _, parallel = example
  losses = np_losses(jax.tree.map(np.float64, params), batch, parallel, each=1)
  losses["caption"] += losses.pop("parallel")
  expected = np.mean([np.mean([*map(np.mean, x)]) for x in losses.values()])
  objective = build(average="answers")
  (loss, _), _ = run(objective, params, batch)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  # A task without an answer has no weight.
  none = {**batch, "box_valid": np.zeros_like(batch["box_valid"])}
  (loss, _), _ = run(objective, params, none)
  captions = np.mean([*map(np.mean, losses["caption"])])
  np.testing.assert_allclose(loss, captions, rtol=1e-5)


def test_gradients_equal_finite_differences(example):
  batch, params, (_, (grads, to_patches)), parallel = example
  rng = np.random.default_rng(1)
  p = jax.tree.map(np.float64, params)

  def loss(p, patches):
    losses = np_losses(p, {**batch, "patches": patches}, parallel)
    return np.mean([x for values in losses.values() for x in values])

  def check(name, grad, moved):
    step = 1e-5 * rng.normal(size=grad.shape)
    slope = (loss(*moved(step)) - loss(*moved(-step))) / 2
    assert np.linalg.norm(grad) > 1e-4, name
    scale = np.linalg.norm(grad) * np.linalg.norm(step)
    assert abs(slope - np.sum(grad * step)) <= 1e-5 * scale, name

  leaves, tree = jax.tree.flatten(p)
  named = flatten_with_names(grads)
  for i, (name, grad) in enumerate(named):

    def moved(step, i=i):
      new = [*leaves[:i], leaves[i] + step, *leaves[i + 1 :]]
      return jax.tree.unflatten(tree, new), batch["patches"]

    check(name, grad, moved)
  check("patches", to_patches, lambda step: (p, batch["patches"] + step))


@pytest.mark.parametrize("chunk", [4, 7, 14, 20])
def test_chunks_of_the_vocabulary_change_nothing(chunk):
  """14 columns, in chunks that divide them or don't."""
  rng = np.random.default_rng(2)
  logits = decoders.TokenLogits(
    *(jnp.asarray(rng.normal(size=s), jnp.float32)
      for s in ((3, 2, 5, 4), (4, 14), (14,)))
  )  # fmt: skip
  targets = jnp.asarray(rng.integers(0, 14, (3, 2, 5)))

  def loss(logits, chunk):
    losses, correct = captioning.cross_entropies(logits, targets, chunk=chunk)
    return jnp.sum(losses * jnp.arange(5)), (losses, correct)

  compute = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  (_, whole), expected = compute(logits, None)
  (_, parts), grads = compute(logits, chunk)
  assert 0 < whole[1].sum() < whole[1].size
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    (parts, grads),
    (whole, expected),
  )
  every = logits.chunk(logits.kernel, logits.bias)
  np.testing.assert_array_equal(whole[1], every.argmax(-1) == targets)


def test_without_labels_the_loss_is_zero(example):
  batch, params = example[:2]
  none = {k: np.zeros_like(batch[k]) for k in ("caption_valid", "box_valid")}
  (loss, (terms, _)), grads = jax.device_get(
    run(OBJECTIVE, params, {**batch, **none})
  )
  assert loss == 0 and terms.loss.count == 0
  assert all(mean.value() == 0 for mean in terms.report.values())
  assert not any(np.any(x) for x in jax.tree.leaves(grads))


def test_the_share_of_parallel_captions():
  keys = jax.random.split(jax.random.key(0), 4000)
  for share in (0.0, 0.5, 0.75, 1.0):
    drawn = captioning._draw_parallel(keys, share)
    bound = 4 * np.sqrt(share * (1 - share) / 4000)
    assert abs(np.mean(drawn) - share) <= bound


def test_needs_follow_the_tasks():
  assert set(build(tasks=["caption"]).needs().fields) == {
    "caption", "caption_valid",
  }  # fmt: skip
  assert set(build(tasks=["referring"]).needs().fields) == {
    "boxes", "box_phrase", "box_valid",
  }  # fmt: skip
  head = OBJECTIVE.head
  assert (head.width, head.depth, head.mlp_dim, head.length) == (8, 2, 10, 6)


def test_a_tokenizer_ends_texts_as_the_decoder_does():
  tokenizer = tokenizers.build_tokenizer("bytes")
  OBJECTIVE.head.check_tokenizer(tokenizer)
  with pytest.raises(ConfigError, match=r"ends them with 1: set .*eos_id"):
    build(eos_id=0).head.check_tokenizer(tokenizer)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(model=ModelSpec(image=SPEC.image)), "set config.model.text"),
    (dict(tasks=["captions"]), "tasks"),
    (dict(tasks=[]), "tasks is empty"),
    (dict(attention_heads=3), "not divisible by attention_heads 3"),
    (dict(ops="resize(64)|keep(0.25)"), "drops some. .* blocks and keep.$"),
  ],
)
def test_invalid_options_raise(options, message):
  with pytest.raises(ConfigError, match=message):
    build(**options)


@pytest.mark.slow
@pytest.mark.long
def test_flops_of_the_decoder_equal_the_formula():
  """Products of the forward pass times 3, for one caption and 2 x 2 regions."""
  spec = tiny_mtv.everything().select_objectives(("captioning",))
  batch = jax.eval_shape(tiny_mtv.rows)
  got = flops.step_flops(
    flops.without_recomputation(spec), batch, optax.sgd(1.0)
  ).parts["heads of captioning"]
  d, mlp, outputs, patches = 32, 64, 258 + 8, 16

  def forward(rows, length):
    tokens = rows * length
    own = 4 * d * d * tokens + 2 * d * rows * length**2
    cross = 2 * d * d * (tokens + patches) + 2 * d * tokens * patches
    return own + cross + 2 * d * mlp * tokens + d * outputs * tokens

  # The decoder has one layer. Gradients of biases are products with ones.
  want = 3 * 2 * (forward(1, 16) + forward(4, 12))
  biases = 3 * d + d + 2 * d + mlp + d + outputs
  want += 2 * (16 + 4 * 12) * biases + 2 * 2 * patches * 2 * d
  assert got == want


@pytest.mark.long
def test_captions_of_photos_are_learnt_by_heart(shared_data):
  """Eight COCO photos: generated captions equal the training captions."""
  file = shared_data / "coco" / "annotations" / "captions_val2017.json"
  data = registry.open_captions(file, max_captions=1)
  short = [i for i, text in enumerate(data.captions) if len(text) < 60][:8]
  texts = [data.captions[i].strip().lower() for i in short]
  assert len(set(texts)) == 8
  images = [
    np.asarray(PIL.Image.fromarray(data.images[i]).resize((32, 32)))
    for i in short
  ]
  text = dict(variant="mu", length=64, vocab_size=258)
  model = ModelSpec.from_config(dict(variant="mu/8", image_size=32, text=text))
  objective = build(model, "resize(32)", tasks=["caption"], bins=2)
  spec = step_samples.make_spec(
    model=model,
    objectives={"captioning": objective},
    weights={"captioning": ObjectiveWeight(1.0)},
    views=views.build_views({"image": dict(ops="resize(32)")}),
  )
  mesh = step_samples.mesh_of((1, 1, 1))
  train_step = make_train_step(spec, optax.adam(2e-3), mesh)
  state = train_step.init(step_samples.params_of(spec))
  tokenizer = tokenizers.build_tokenizer("bytes")
  batch = {
    "image": np.stack(images),
    "image_size": np.full((8, 2), 32, np.int32),
    "caption": tokenizer.encode(texts, 64),
    "caption_valid": np.ones(8, bool),
  }
  batch = shard_batch(batch, mesh)
  for _ in range(400):
    state, _ = train_step.update(state, batch)
  heads = {"caption": objective.head}
  encoder = Encoder(
    *(model, state.params, Preprocess(size=32), tokenizer, mesh),
    prediction_heads=heads,
  )
  assert encoder.predict("caption", images)["text"].tolist() == texts
