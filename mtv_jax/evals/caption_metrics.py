"""BLEU and CIDEr of captions against several references per image.

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
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

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
