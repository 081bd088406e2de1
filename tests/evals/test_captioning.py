"""Captioning: names and colours in texts, scores and their chance."""

import itertools

import numpy as np
import pytest

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals import grounding
from mtv_jax.evals.captioning import COLOURS, CaptioningEvaluator, Parser
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import registry

SCENES = {"type": "scenes", "size": 32, "first": 1_000_000, "length": 6}
RED, WHITE, BLUE = (COLOURS.index(c) for c in ("red", "white", "blue"))


class Narrator(Encoder):
  """Answers with prepared texts and boxes, one list for each image."""

  tokenizer = "any"

  def __init__(self, captions=None, regions=None, boxes=None):
    self.answers = captions, regions, boxes

  def can_predict(self, name):
    return True

  def protocol(self):
    return {"encoder": "narrator"}

  def predict(self, name, images, *, batch_size=16, **inputs):
    captions, regions, boxes = self.answers
    if name == "caption":
      return {"text": np.array(captions, object)}
    rows = regions if name == "region_caption" else boxes
    (given,) = inputs.values()
    assert [*map(len, rows)] == [*map(len, given)]
    m = max(map(len, rows))
    valid = np.arange(m) < np.array([*map(len, rows)])[:, None]
    if name == "referring":
      out = np.zeros((*valid.shape, 4), np.float32)
      out[valid] = np.concatenate(rows)
      return {"boxes": out, "valid": valid}
    out = np.full(valid.shape, "", object)
    out[valid] = [text for texts in rows for text in texts]
    return {"text": out, "valid": valid}


def test_names_and_colours_are_found_in_texts():
  parser = Parser(("ball", "traffic light", "light", "fish", "snowman"))
  for text, expected in {
    "a photo of a red ball": [(0, RED)],
    "A red and white striped ball, on a blue carpet": [(0, RED)],
    "red ball with white dots": [(0, RED)],
    "two balls and a fish": [(0, None), (3, None)],
    "a blue traffic light, a light": [(1, BLUE), (2, None)],
    "the white wooden snowman; two snowmen": [(4, WHITE), (4, None)],
    "a large balloon in front of a white wall": [],
    "": [],
  }.items():
    assert parser.mentions(text) == expected, text


@pytest.fixture(scope="module")
def data():
  return registry.open_boxes(SCENES, count=None)


def test_perfect_answers_score_one(data):
  queries = [list(dict.fromkeys(phrases)) for phrases in data.phrases]
  boxes = [
    [data.boxes[i][phrases.index(q)] for q in queries[i]]
    for i, phrases in enumerate(data.phrases)
  ]
  captions = [", ".join(f"a {p}" for p in phrases) for phrases in data.phrases]
  encoder = Narrator(captions, data.phrases, boxes)
  result = CaptioningEvaluator(data=SCENES).run(encoder)
  names = {"names", "colours", "region_names", "region_colours"}
  assert result.metrics == dict.fromkeys(names | {"referred_iou50"}, 1.0)
  assert result.chance.keys() == result.metrics.keys() == result.errors.keys()
  assert all(0 < x < 0.7 for x in result.chance.values())
  only = CaptioningEvaluator(data=SCENES, tasks=("caption",)).run(encoder)
  assert only.metrics == {"names": 1.0, "colours": 1.0}


def test_reference_captions():
  references = registry.open_captions(SCENES)
  own = [
    references.captions[np.argmax(references.owner == i)] for i in range(6)
  ]
  options = dict(data=SCENES, references=SCENES, tasks=("caption",))
  evaluator = CaptioningEvaluator(**options)
  # Or `evaluate` would reuse a result of other references.
  assert references.digest in evaluator.data_digest()
  result = evaluator.run(Narrator(own))
  assert result.metrics["bleu4"] == pytest.approx(1)
  assert result.metrics["cider"] > 2 > result.chance["cider"] > 0
  assert {"bleu1", "cider"} <= result.errors.keys() == result.metrics.keys()
  assert result.protocol["references_images"] == 6
  assert result.units == {"cider": ""}


def test_scores_and_chance_equal_loops_over_pairs(data):
  rng = np.random.default_rng(0)
  parser, n = Parser(data.classes), len(data.images)
  pool = [p for phrases in data.phrases for p in phrases]

  def texts(count):
    return [rng.choice([*pool, "nothing"]) for _ in range(count)]

  captions = [" and a ".join(texts(2)) for _ in range(n)]
  captions[0], captions[1] = "nothing", f"two {data.classes[3]}s"
  regions = [texts(len(boxes)) for boxes in data.boxes]
  queries = [list(dict.fromkeys(phrases)) for phrases in data.phrases]
  boxes = [[data.boxes[rng.integers(n)][0] for _ in asked] for asked in queries]
  encoder = Narrator(captions, regions, boxes)
  result = CaptioningEvaluator(data=SCENES).run(encoder)

  def score(kind, caption, i):
    found = [m[kind] for m in parser.mentions(caption) if m[kind] is not None]
    truth = [parser.mentions(p)[0][kind] for p in data.phrases[i]]
    return np.mean([x in truth for x in found]) if found else 0.0

  for kind, name in enumerate(("names", "colours")):
    found = [[m[kind] for m in parser.mentions(text)] for text in captions]
    has = [i for i in range(n) if kind == 0 or {*found[i]} - {None}]
    pairs = itertools.permutations(has, 2)
    own = np.mean([score(kind, captions[i], i) for i in has])
    other = np.mean([score(kind, captions[i], j) for i, j in pairs])
    np.testing.assert_allclose(result.metrics[name], own)
    np.testing.assert_allclose(result.chance[name], other)

  told = [(i, t) for i, row in enumerate(regions) for t in row]
  truth = [(i, t) for i, row in enumerate(data.phrases) for t in row]
  for kind, name in enumerate(("region_names", "region_colours")):

    def right(said, true, kind=kind):
      first = (*parser.mentions(said), (None, None))[0][kind]
      return first is not None and first == parser.mentions(true)[0][kind]

    own = [right(a, b) for (_, a), (_, b) in zip(told, truth, strict=True)]
    other = [right(a, b) for i, a in told for j, b in truth if i != j]
    np.testing.assert_allclose(result.metrics[name], np.mean(own))
    np.testing.assert_allclose(result.chance[name], np.mean(other))

  def hit(box, i, query):
    same = data.boxes[i][[p == query for p in data.phrases[i]]]
    return grounding.ious(box, same).max() >= 0.5

  asked = [(i, q) for i, row in enumerate(queries) for q in row]
  given = [(i, b) for i, row in enumerate(boxes) for b in row]
  own = [hit(b, i, q) for (_, b), (i, q) in zip(given, asked, strict=True)]
  other = [hit(b, i, q) for j, b in given for i, q in asked if i != j]
  np.testing.assert_allclose(result.metrics["referred_iou50"], np.mean(own))
  np.testing.assert_allclose(result.chance["referred_iou50"], np.mean(other))


def test_an_encoder_without_a_decoder_is_not_applicable():
  class Bare(Narrator):
    def can_predict(self, name):
      return False

  with pytest.raises(NotApplicable, match="no captioning decoder"):
    CaptioningEvaluator(data=SCENES).run(Bare())
