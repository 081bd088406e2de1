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

Chance scores answers on different images. These protocols are ours.

BLEU and CIDEr of captions against several references per image.

    BLEU-n = BP (prod_{k <= n} c_k / g_k)^(1 / n),  BP = min(1, exp(1 - r / l))

over the whole set: c_k of the g_k k-grams of the answers match, each at most as
often as in one reference; l is the answers' length, r the length of the closest
references (Papineni et al. 2002). CIDEr-D (Vedantam et al. 2015, section
5) of an image, with g_k(x) its k-grams' counts times
log(images / images with the k-gram in a reference), is

    10 mean_k mean_ref  exp(-d^2 / 72) min(g_k(x), g_k(ref)) . g_k(ref)
                        / (|g_k(x)| |g_k(ref)|)

with d the difference of lengths. On equal tokens, both equal pycocoevalcap's.
Its tokenizer is Stanford's, in Java; `tokenize` agrees on common English.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int

from mtv_jax.config.options import PositiveInt
from mtv_jax.data.scenes import captions as scene_captions
from mtv_jax.data.scenes import world
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals import grounding
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
    answers = [*map(tokenize, texts["text"])]
    references: list[list] = [[] for _ in data.images]
    for owner, caption in zip(data.owner, data.captions, strict=True):
      references[owner].append(tokenize(caption))
    estimate = _score_texts(answers, references)
    chance = _score_texts([*answers[1:], *answers[:1]], references)
    return estimate, chance.metrics


def _score_texts(answers: Sequence, references: Sequence) -> Estimate:
  statistics = bleu_statistics(answers, references)
  estimate = bootstrap.estimate(
    lambda weights: bleu(weights @ statistics), len(answers)
  )
  return estimate | bootstrap.means({"cider": cider(answers, references)})


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


_MAX_N = 4
_SIGMA = 6.0
# As in pycocoevalcap, to avoid 0 / 0; BLEU without a match is almost 0.
_TINY, _SMALL = 1e-15, 1e-9

_CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_TOKENS = re.compile(
  r"n't|'(?:s|m|d|re|ve|ll)(?!\w)"
  r"|(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|no(?=\. ?\d))\."
  r"|(?:[^\W\d_]\.){2,}"  # u.s.
  r"|\d+(?:[.,:/-]\d+)+"
  r"|\w+(?:['/-]\w+)*"
  r"|-[lr][rsc]b-|[!?]{2,}"
  r"|[^\s\w.?!,:;`'\"\u2013\u2014\u2018-\u201d\u2026-]"
)
# The Penn Treebank's names, which pycocoevalcap keeps in lower case.
_BRACKETS = str.maketrans(
  {
    bracket: f" -{side}{kind}b- "
    for kind, pair in (("r", "()"), ("s", "[]"), ("c", "{}"))
    for side, bracket in zip("lr", pair, strict=True)
  }
  | {"\u2019": "'"}
)

Tokens = Sequence[str]
_Counts = collections.Counter[tuple[str, ...]]


def tokenize(text: str) -> list[str]:
  """Lower-case tokens without punctuation, close to the Penn Treebank's."""
  text = text.lower().translate(_BRACKETS).replace("cannot", "can not")
  return _TOKENS.findall(_CLITICS.sub(r" \1", text))


def _count_ngrams(words: Tokens) -> _Counts:
  return collections.Counter(
    tuple(words[i : i + n])
    for n in range(1, _MAX_N + 1)
    for i in range(len(words) - n + 1)
  )


def bleu_statistics(
  answers: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> Float64[np.ndarray, "n 10"]:
  """Per image: matches and k-grams for k = 1..4, length, closest length."""
  rows = []
  for words, image_references in zip(answers, references, strict=True):
    max_counts: _Counts = collections.Counter()
    for reference in image_references:
      max_counts |= _count_ngrams(reference)
    matched = [0] * _MAX_N
    for ngram, count in (_count_ngrams(words) & max_counts).items():
      matched[len(ngram) - 1] += count
    totals = [max(0, len(words) - k) for k in range(_MAX_N)]
    lengths = [len(reference) for reference in image_references]
    closest = min(lengths, key=lambda n: (abs(n - len(words)), n))
    rows.append([*matched, *totals, len(words), closest])
  return np.asarray(rows, np.float64)


def bleu(statistics: Float64[np.ndarray, "10"]) -> dict[str, float]:
  """BLEU-1 to -4 of the sum of images' `bleu_statistics`."""
  matched, total = statistics[:_MAX_N], statistics[_MAX_N : 2 * _MAX_N]
  length, closest = statistics[2 * _MAX_N :]
  ratio = (length + _TINY) / (closest + _SMALL)
  penalty = math.exp(min(0.0, 1 - 1 / ratio))
  precisions = np.cumprod((matched + _TINY) / (total + _SMALL))
  return {
    f"bleu{n}": float(penalty * precisions[n - 1] ** (1 / n))
    for n in range(1, _MAX_N + 1)
  }


def cider(
  answers: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> Float64[np.ndarray, " n"]:
  """CIDEr-D of each image, 0 to 10; the references define the frequencies."""
  ref_counts = [[_count_ngrams(t) for t in texts] for texts in references]
  images_with = collections.Counter(
    ngram for image_counts in ref_counts for ngram in set().union(*image_counts)
  )

  def weigh_ngrams(counts: _Counts) -> tuple[list[dict], list[float]]:
    vectors: list[dict] = [{} for _ in range(_MAX_N)]
    for ngram, count in counts.items():
      frequency = max(1, images_with[ngram])
      weight = count * math.log(len(references) / frequency)
      vectors[len(ngram) - 1][ngram] = weight
    return vectors, [math.hypot(*v.values()) for v in vectors]

  def similarity(answer, reference) -> float:
    total = 0.0
    for a, x, b, y in zip(*answer, *reference, strict=True):
      products = (min(w, b[g]) * b[g] for g, w in a.items() if g in b)
      total += sum(products) / (x * y) if x and y else 0.0
    return total / _MAX_N

  scores = []
  for words, image_counts, texts in zip(
    answers, ref_counts, references, strict=True
  ):
    vectors, values = weigh_ngrams(_count_ngrams(words)), []
    for counts, reference in zip(image_counts, texts, strict=True):
      # pycocoevalcap's length is the number of bigrams.
      difference = max(1, len(words)) - max(1, len(reference))
      penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
      values.append(penalty * similarity(vectors, weigh_ngrams(counts)))
    scores.append(10 * np.mean(values))
  return np.asarray(scores, np.float64)
