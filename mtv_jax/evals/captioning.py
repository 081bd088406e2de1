"""Captioning: objects and colours in generated captions, BLEU, CIDEr, boxes.

With the names (and colours) mentioned in a generated text,

    names    = mean over captions of  the fraction of names that match an
               annotated object; 0 for a caption without names
    colours  = mean over captions with colours of  the fraction of colours that
               match an annotated object
    region_names, region_colours
             = mean over boxes of  first name (colour) = the box's name (colour)
    referred = mean over (image, phrase) of  IoU >= 0.5 of the predicted box
               with any of the phrase's boxes in the image

Chance scores answers on different images. These protocols are ours;
`caption_metrics` defines BLEU and CIDEr.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from mtv_jax.config.options import PositiveInt
from mtv_jax.data.scenes import captions as scene_captions
from mtv_jax.data.scenes import world
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals import caption_metrics, grounding
from mtv_jax.evals.core import bootstrap, examples
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import BoxSet, CaptionSet, Data
from mtv_jax.evals.datasets import registry

COLOURS = tuple(world.COLOURS)
# Words between a colour and its object: "red and white striped ball".
_BETWEEN = {"and", *world.TEXTURES}
_FIXED_BOXES = 256  # Predicted boxes used for chance.
_TASKS = ("caption", "region_caption", "referring")

Scores = tuple[Estimate, dict[str, float]]  # Metrics with errors, and chance.


@dataclasses.dataclass(frozen=True)
class CaptioningEvaluator(Evaluator):
  """Names and colours in captions and region captions, BLEU, CIDEr, boxes.

  Attributes:
    data: named boxes, see `datasets/registry.py`.
    references: captioned images, as in `retrieval`, at most `count`; adds
      BLEU-1 to -4 and CIDEr.
    split: Karpathy's split of `references`.
    tasks: defaults to the decoder's training tasks.
  """

  requires = frozenset({"captioning"})
  _neutral = Evaluator._neutral | {"references"}

  data: Data = "scenes"
  images: str | None = None
  references: Data | None = None
  split: str = "test"
  tasks: tuple[Literal[_TASKS], ...] | None = None
  count: PositiveInt | None = None
  batch_size: PositiveInt = 32

  @functools.cached_property
  def _set(self) -> tuple[CaptionSet | None, BoxSet]:
    options, references = {"images": self.images, "count": self.count}, None
    if self.references is not None:
      references = registry.open_captions(
        self.references, split=self.split, **options
      )
    return references, registry.open_boxes(self.data, **options)

  def run(self, encoder: Encoder) -> Result:
    """Metrics of each task, with chance and sampling errors."""
    tasks = self.tasks or [t for t in _TASKS if encoder.can_predict(t)]
    if not tasks or encoder.tokenizer is None:
      raise NotApplicable(
        "this encoder has no captioning decoder with a tokenizer; use a run "
        "with the objective captioning"
      )
    references, data = self._set
    if data.classes is None:
      raise NotApplicable(f"{data.name} lacks class names to look for in texts")
    parser = Parser(data.classes)
    estimate, chance = Estimate({}, {}), {}
    for task in tasks:
      predict = functools.partial(
        encoder.predict, task, data.images, batch_size=self.batch_size
      )
      part, part_chance = _SCORES[task](predict, data, parser)
      estimate |= part
      chance |= part_chance
    reference_protocol, units = {}, {}
    if references is not None and encoder.can_predict("caption"):
      part, part_chance = self._score_references(encoder, references)
      estimate, chance = estimate | part, chance | part_chance
      fields = references.protocol().items()
      reference_protocol = {f"references_{k}": v for k, v in fields}
      units = {"cider": ""}
    protocol = {
      **encoder.protocol(),
      **data.protocol(),
      "boxes": sum(map(len, data.boxes)),
      "decoding": "greedy",
      "referred": "IoU >= 0.5 with any box of the phrase in the image",
      "chance": "the same answers in the other images",
      **reference_protocol,
    }
    return Result.from_estimate(estimate, protocol, chance, units=units)

  def _score_references(self, encoder: Encoder, data: CaptionSet) -> Scores:
    """BLEU and CIDEr; chance gives each image the next one's answer."""
    texts = encoder.predict("caption", data.images, batch_size=self.batch_size)
    answers = [*map(caption_metrics.tokenize, texts["text"])]
    references: list[list] = [[] for _ in data.images]
    for owner, caption in zip(data.owner, data.captions, strict=True):
      references[owner].append(caption_metrics.tokenize(caption))
    estimate = _score_texts(answers, references)
    chance = _score_texts([*answers[1:], *answers[:1]], references)
    return estimate, chance.metrics


def _score_texts(answers: Sequence, references: Sequence) -> Estimate:
  statistics = caption_metrics.bleu_statistics(answers, references)
  bleu = bootstrap.estimate(
    lambda weights: caption_metrics.bleu(weights @ statistics), len(answers)
  )
  cider = caption_metrics.cider(answers, references)
  return bleu | bootstrap.means({"cider": cider})


class Parser:
  """Finds the names of objects, and their colours, in texts."""

  def __init__(self, classes: Sequence[str]):
    self.size = len(classes)
    self._names = {}
    for i, name in enumerate(classes):
      for form in (name.lower(), scene_captions.plural(name.lower())):
        self._names.setdefault(tuple(_split_words(form)), i)
    self._longest = max(map(len, self._names))

  def mentions(self, text: str) -> list[tuple[int, int | None]]:
    """(class, colour) of each name in the text.

    The colour is an index into `COLOURS`: the first colour of the words right
    before the name, or None.
    """
    words, mentions, i = _split_words(text), [], 0
    while i < len(words):
      for length in range(min(self._longest, len(words) - i), 0, -1):
        if (name := tuple(words[i : i + length])) in self._names:
          mentions.append((self._names[name], _find_colour(words, i)))
          i += length - 1
          break
      i += 1
    return mentions


def _split_words(text: str) -> list[str]:
  return re.findall(r"\w+", text.lower())


def _find_colour(words: Sequence[str], i: int) -> int | None:
  colour = None
  while i and (words[i - 1] in COLOURS or words[i - 1] in _BETWEEN):
    i -= 1
    colour = COLOURS.index(words[i]) if words[i] in COLOURS else colour
  return colour


def agreement(
  answers: Float[np.ndarray, "r c"],
  truth: Float[np.ndarray, "r c"],
  image: Int[np.ndarray, " r"],
) -> tuple[Float[np.ndarray, " r"], float]:
  """`answers[i] . truth[i]`, and its mean over rows of different images."""
  values = np.sum(answers * truth, axis=1)
  sums = []
  for rows in (answers, truth, np.ones((len(image), 1))):
    by_image = np.zeros((image.max() + 1, rows.shape[1]))
    np.add.at(by_image, image, rows)
    sums.append(by_image)
  a, t, n = sums
  pairs = n.sum() ** 2 - np.sum(n**2)
  total = a.sum(0) @ t.sum(0) - np.sum(a * t)
  return values, float(total / pairs) if pairs else 0.0


def _one_hot(indices: Sequence[int | None], size: int) -> np.ndarray:
  """One-hot rows `[r, size]`; None is a row of zeros."""
  rows = [size if i is None else i for i in indices]
  return np.eye(size + 1)[rows, :size]


def _fractions(indices: Sequence[int | None], size: int) -> np.ndarray:
  """Fraction of each index, `[size]`; None is ignored."""
  counts = _one_hot(indices, size).sum(axis=0)
  return counts / max(counts.sum(), 1)


def _score_rows(name: str, answers, truth, image, mask) -> Scores:
  """Scores a metric over the rows of `mask`, if any."""
  if not mask.any():
    return Estimate({}, {}), {}
  image = np.unique(image[mask], return_inverse=True)[1]
  values, chance = agreement(answers[mask], truth[mask], image)
  return bootstrap.means({name: values}, groups=image), {name: chance}


def _score_captions(predict: Callable, data: BoxSet, parser: Parser) -> Scores:
  mentions = [parser.mentions(text) for text in predict()["text"]]
  objects = [
    [m for phrase in phrases for m in parser.mentions(phrase)]
    for phrases in data.phrases
  ]
  image = np.arange(len(mentions))
  size, colour_count = parser.size, len(COLOURS)
  names = np.stack([_fractions([n for n, _ in m], size) for m in mentions])
  truth = np.stack([_one_hot(i.tolist(), size).max(0) for i in data.labels])
  estimate, chance = _score_rows("names", names, truth, image, image >= 0)
  colours = [_fractions([c for _, c in m], colour_count) for m in mentions]
  colours = np.stack(colours)
  truth = [_fractions([c for _, c in m], colour_count) > 0 for m in objects]
  truth = np.stack(truth).astype(float)
  if truth.any():  # Class names as phrases lack colours.
    has_colour = colours.any(axis=1)
    mask = has_colour if has_colour.any() else image >= 0
    part, part_chance = _score_rows("colours", colours, truth, image, mask)
    estimate, chance = estimate | part, chance | part_chance
  return estimate, chance


def _score_region_captions(
  predict: Callable, data: BoxSet, parser: Parser
) -> Scores:
  out, empty = predict(boxes=data.boxes), (None, None)
  answers = [(*parser.mentions(t), empty)[0] for t in out["text"][out["valid"]]]
  phrases = itertools.chain.from_iterable(data.phrases)
  refs = [(*parser.mentions(phrase), empty)[0] for phrase in phrases]
  image = np.repeat(np.arange(len(data.boxes)), [*map(len, data.boxes)])
  labels = np.concatenate(data.labels).tolist()
  names = [_one_hot(x, parser.size) for x in ([n for n, _ in answers], labels)]
  estimate, chance = _score_rows("region_names", *names, image, image >= 0)
  colours = [_one_hot([c for _, c in x], len(COLOURS)) for x in (answers, refs)]
  mask = colours[1].any(axis=1)
  part, part_chance = _score_rows("region_colours", *colours, image, mask)
  return estimate | part, chance | part_chance


def _score_referring(predict: Callable, data: BoxSet, parser: Parser) -> Scores:
  del parser
  queries = [list(dict.fromkeys(phrases)) for phrases in data.phrases]
  out = predict(phrases=queries)
  pairs = zip(out["boxes"], out["valid"], strict=True)
  boxes = [rows[valid] for rows, valid in pairs]
  image = np.repeat(np.arange(len(queries)), [*map(len, queries)])
  hits = grounding.best_overlaps(boxes, queries, data) >= 0.5
  indices = np.asarray(examples.subsample(range(len(image)), _FIXED_BOXES))
  answers = np.concatenate(boxes)[indices][:, None]
  others = grounding.best_overlaps([answers] * len(queries), queries, data)
  elsewhere = image[indices][:, None] != image
  chance = float(np.mean(others[elsewhere] >= 0.5)) if elsewhere.any() else 0.0
  estimate = bootstrap.means({"referred_iou50": hits}, groups=image)
  return estimate, {"referred_iou50": chance}


_SCORES = {
  "caption": _score_captions,
  "region_caption": _score_region_captions,
  "referring": _score_referring,
}
