"""Sequences, bins of coordinates, and greedy decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.data import tokenizers
from mtv_jax.models import heads as heads_lib
from mtv_jax.models import vit
from mtv_jax.models.heads import caption_decoder as sequences
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.errors import InputError

EOS = 1
SPEC = ModelSpec.from_config(
  dict(
    variant="mu/8", width=16, image_size=16, depth=1, mlp_dim=16,
    text=dict(
      variant="mu", width=16, depth=4, mlp_dim=16, length=6, vocab_size=11
    ),
  )
)  # fmt: skip
HEADS = heads_lib.HEADS["captioning"](bins=7).resolve(SPEC).predictions()
HEAD = HEADS["caption"]
PATCHES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 16)), "f4")
PROMPTS = np.array([[3, 4, EOS, EOS], [5, EOS, EOS, EOS], [6, 7, 8, EOS]])


@functools.cache
def params():
  module = HEAD.module()
  shapes = jax.eval_shape(
    lambda: module.init(
      jax.random.key(0), jnp.zeros((1, 1, 1), int), jnp.zeros((1, 1), bool),
      PATCHES[:1],
    )
  )  # fmt: skip
  rng = np.random.default_rng(1)
  values = jax.tree.map(
    lambda x: rng.normal(0, 0.7, x.shape).astype("f4"), shapes
  )
  values["params"]["projection"]["bias"][EOS] = 6.0  # Some texts end early.
  return values


@jax.jit
def full_logits(rows, patches):
  """All logits of one sequence of each image."""
  parallel = jnp.zeros((len(rows), 1), bool)
  logits = HEAD.module().apply(params(), rows[:, None], parallel, patches)
  return logits.chunk(logits.kernel, logits.bias)[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def predict(name, **inputs):
  image = vit.ImageOutput(
    patches=PATCHES,
    prefix=PATCHES[:, :0],
    pooled=PATCHES[:, 0],
    intermediates={},
  )
  apply = functools.partial(HEADS[name].module().apply, params())
  return HEADS[name].predict(apply, image, (2, 2), **inputs)


def follow(rows, patches, count, allowed, stop=None):
  """Greedy answers of one image, one forward pass per token."""
  answer = []
  for _ in range(count):
    # Padded on the right: one shape to compile. Later tokens are not seen.
    row = np.zeros(10, int)
    row[: len(rows) + len(answer)] = [*rows, *answer]
    logits = full_logits(row[None], patches[None])[0]
    logits = np.asarray(logits[len(rows) + len(answer) - 1])
    answer.append(allowed[np.argmax(logits[allowed])])
    if answer[-1] == stop:
      break
  return answer


TEXT, BINS = np.arange(11), np.arange(11, 18)
BEGIN = dict(zip(sequences.TASKS, (18, 19, 20), strict=True))


def test_captions_are_the_argmax_of_the_forward_pass():
  tokens = predict("caption")["tokens"]
  assert tokens.shape == (3, 6) and tokens.dtype == jnp.int32
  expected = [
    follow([BEGIN["caption"]], patches, 6, TEXT, EOS) for patches in PATCHES
  ]
  assert len({len(x) for x in expected}) > 1
  for got, want in zip(tokens, expected, strict=True):
    np.testing.assert_array_equal(got, [*want, *[EOS] * (6 - len(want))])


def test_region_captions_and_referred_boxes():
  boxes = np.float32([[[0, 0, 1, 1], [0.2, 0.5, 0.6, 0.9]]] * 3)
  tokens = predict("region_caption", boxes=jnp.asarray(boxes))["tokens"]
  assert tokens.shape == (3, 2, 6)
  prompt = [BEGIN["region_caption"], *(11 + np.array([1, 3, 4, 5]))]
  for got, patches in zip(tokens[:, 1], PATCHES, strict=True):
    want = follow(prompt, patches, 6, TEXT, EOS)
    np.testing.assert_array_equal(got[: len(want)], want)

  found = predict("referring", phrases=jnp.asarray(PROMPTS[:, None], "f4"))
  for got, patches, phrase in zip(
    found["boxes"][:, 0], PATCHES, PROMPTS, strict=True
  ):
    end = list(phrase).index(EOS) + 1
    ids = follow([BEGIN["referring"], *phrase[:end]], patches, 4, BINS)
    np.testing.assert_allclose(got, (np.array(ids) - 11) / 6, rtol=1e-6)


def test_padding_of_prompts_changes_nothing():
  rows = sequences.make_sequences(
    30,
    jnp.asarray(PROMPTS[:, None]),
    jnp.array([[3], [2], [4]]),
    jnp.arange(40, 44) * jnp.ones((3, 1, 1), int),
    jnp.full((3, 1), 4),
  )
  for i, prompt in enumerate(([3, 4, EOS], [5, EOS], [6, 7, 8, EOS])):
    row, length = [30, *prompt, 40, 41, 42, 43], len(prompt) + 4
    np.testing.assert_array_equal(rows.inputs[i, 0, :length], row[:-1])
    np.testing.assert_array_equal(rows.targets[i, 0, :length], row[1:])
    answer = rows.targets[i, 0][rows.is_answer[i, 0]]
    np.testing.assert_array_equal(answer, [40, 41, 42, 43])


def test_text_length_counts_the_first_end():
  tokens = jnp.array([[EOS, EOS, EOS], [4, EOS, 5], [4, 5, 6]])
  np.testing.assert_array_equal(sequences.text_length(tokens, EOS), [1, 2, 3])


def test_coordinates_are_quantised_to_the_nearest_bin():
  vocabulary = sequences.Vocabulary(text=10, bins=500)
  boxes = np.random.default_rng(0).uniform(-0.1, 1.1, (50, 4)).astype("f4")
  ids = vocabulary.quantize(jnp.asarray(boxes))
  assert ids.min() == 10 and ids.max() == 509
  error = vocabulary.dequantize(ids) - np.clip(boxes, 0, 1)
  assert np.abs(error).max() <= 0.5 / 499 + 1e-6
  assert vocabulary.inputs == 514 and vocabulary.mask == 513
  assert [vocabulary.begin(t) for t in sequences.TASKS] == [510, 511, 512]


def test_text_is_decoded_up_to_the_end():
  tokenizer = tokenizers.build_tokenizer("bytes")
  tokens = tokenizer.encode(["a cube", "", "é"], 8)
  out = HEAD.decode({"tokens": tokens}, tokenizer)
  assert out["text"].tolist() == ["a cube", "", "é"]
  nested = HEAD.decode({"tokens": tokens[:2, None]}, tokenizer)
  assert nested["text"].tolist() == [["a cube"], [""]]
  assert "text" not in HEAD.decode({"tokens": tokens}, None)


def test_too_long_sequences_raise():
  with pytest.raises(InputError, match=r"11 tokens.* takes 10"):
    full_logits(jnp.zeros((1, 11), int), PATCHES[:1])


def test_the_decoder_has_half_of_the_text_tower_s_layers():
  assert HEAD.depth == 2 and HEAD.width == 16
  assert dataclasses.replace(HEAD, depth=None).resolve(SPEC) == HEAD
