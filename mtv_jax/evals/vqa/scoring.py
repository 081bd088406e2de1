"""Scores of answers to questions about images: five benchmarks' rules.

Functions of strings. An encoder alone answers nothing: a language model that
reads its features does, elsewhere, and leaves a file of answers
(`answer_files.py`) which `tools/score_vqa.py` scores.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from mtv_jax.utils.errors import did_you_mean

_COUNTING = ("original", "simple")

# ---------------------------------------------------------------------------
# VQA (Antol et al. 2015; Goyal et al. 2017), also TextVQA and OK-VQA.

# Written as the rules of the official evaluation have them, quirks included:
# a period stays only before a digit, "somebody'd" loses its apostrophe.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
  "none": "0",
  "zero": "0",
  "one": "1",
  "two": "2",
  "three": "3",
  "four": "4",
  "five": "5",
  "six": "6",
  "seven": "7",
  "eight": "8",
  "nine": "9",
  "ten": "10",
}


def _contractions() -> dict[str, str]:
  """Words with a forgotten apostrophe, and what they are."""
  found = {}

  def add(stems: str, ending: str) -> None:
    for stem in stems.split():
      found[stem + ending.replace("'", "")] = stem + ending

  add(
    "ai are ca could did does do had has have is might must need ought sha "
    "should was were wo would",
    "n't",
  )
  add("could might must not should they we what where who would you", "'ve")
  add("he how it someone something there they where who you", "'d")
  add("how it somebody someone something they what who why you", "'ll")
  add("he how somebody someone that there what when where who why", "'s")
  add("there they what why you", "'re")
  # Of two apostrophes either may be forgotten, not both.
  nots = "couldn hadn mightn shouldn wouldn"
  subjects = "he it she somebody someone something there they we who you"
  for stems, middle in ((nots, "t"), (subjects, "d")):
    for stem in stems.split():
      word = f"{stem}'{middle}'ve"
      found[f"{stem}{middle}'ve"] = found[f"{stem}'{middle}ve"] = word
  found |= {
    "maam": "ma'am",
    "oclock": "o'clock",
    "twas": "'twas",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
  }
  return found


_CONTRACTIONS = _contractions()


def normalize_answer(answer: str) -> str:
  """An answer as VQA compares them.

  Punctuation goes: without a trace where it stands beside a space anywhere in
  the answer (or a comma is in a number: "1,000"), else as a space. Periods go
  unless a digit follows. In lower case, number words up to ten become digits,
  articles are dropped, and contractions get their apostrophe.
  """
  answer = _stripped(answer)
  number = _COMMA_IN_NUMBER.search(answer) is not None
  kept = answer
  for mark in _PUNCTUATION:
    beside_space = f"{mark} " in answer or f" {mark}" in answer
    kept = kept.replace(mark, "" if beside_space or number else " ")
  words = _PERIOD.sub("", kept).lower().split()
  words = [_NUMBERS.get(word, word) for word in words]
  words = [word for word in words if word not in _ARTICLES]
  return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def _stripped(answer: str) -> str:
  return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(
  answer: str, people: Sequence[str], *, counting: str = "original"
) -> float:
  """How far people agree with an answer, 0..1.

  `original`: the mean, over people, of min(1, m / 3) with m of the others
  giving that answer. With c of ten agreeing: 0, .3, .6, .9, 1, ... `simple`:
  min(1, c / 3), as big_vision counts. Answers are normalised where people
  disagree; where all of them say the same, the answer must be just that.

  Args:
    answer: of the model.
    people: their answers, ten as a rule.
    counting: `original` or `simple`.

  Raises:
    ValueError: for nobody's answers, or an unknown way of counting.
  """
  if counting not in _COUNTING:
    raise ValueError(
      f"counting={counting!r}. {did_you_mean(counting, _COUNTING)}"
    )
  if not people:
    raise ValueError("vqa_accuracy: nobody's answers to compare with")
  answer, people = _stripped(answer), [_stripped(p) for p in people]
  if len(set(people)) > 1:
    answer = normalize_answer(answer)
    people = [normalize_answer(p) for p in people]
  agree = [p == answer for p in people]
  count = sum(agree)
  if counting == "simple":
    return min(1.0, count / 3)
  others = [min(1.0, (count - mine) / 3) for mine in agree]
  return sum(others) / len(others)


# ---------------------------------------------------------------------------
# One right answer.


def exact_match(answer: str, truths: Sequence[str]) -> float:
  """1 if the answer is one of the truths, else 0 (GQA and its like).

  In lower case, with single spaces and without a period at the end.
  """
  return float(_plain(answer) in {_plain(truth) for truth in truths})


def _plain(answer: str) -> str:
  return " ".join(answer.lower().split()).rstrip(".").rstrip()


_LETTER = re.compile(r"^\W*(?:option\s+)?([A-Za-z])\s*(?:[).:,\]]|$)", re.I)
# A capital: "the answer is a dog" names no option.
_SAID = re.compile(
  r"\b(?i:answer|option|choice)(?i:\s+is)?\s*[:=]?\s*\W?([A-Z])\b(?!')"
)


def option_letter(
  answer: str, options: Sequence[str] = (), *, count: int | None = None
) -> str | None:
  """The letter of the option that an answer to multiple choice means.

  The first of these that gives a letter of one of the options: a letter that
  the answer is or begins with ("B", "(b)", "B. a cat"), a letter that it names
  ("the answer is B"), the words of exactly one option, alone or else within.

  Args:
    answer: of the model.
    options: what the letters stand for, in order; may be left out.
    count: how many letters there are, where `options` is left out; 26 if None.

  Returns:
    A capital letter, or None where the answer means none.
  """
  last = chr(ord("A") + (len(options) or count or 26) - 1)
  for pattern in (_LETTER, _SAID):
    for found in pattern.finditer(answer.strip()):
      letter = found[1].upper()
      if letter <= last:
        return letter
  said = _plain(answer)
  plain = [_plain(option) for option in options]
  equal = [i for i, option in enumerate(plain) if option == said]
  within = [
    i
    for i, option in enumerate(plain)
    if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)
  ]
  for places in (equal, within):
    if len(places) == 1:
      return chr(ord("A") + places[0])
  return None


# ---------------------------------------------------------------------------
# POPE: is a thing in the image? (Li et al. 2023)


@dataclasses.dataclass(frozen=True)
class YesNo:
  """Scores of answers to yes-or-no questions; 'yes' is what is looked for.

  Attributes:
    accuracy: share of right answers.
    precision: share of right ones among the answers 'yes'.
    recall: share of 'yes' among the questions whose answer is 'yes'.
    f1: harmonic mean of the two.
    yes_rate: share of 'yes' among the answers.
  """

  accuracy: float
  precision: float
  recall: float
  f1: float
  yes_rate: float


def says_yes(answer: str) -> bool:
  """Whether an answer is a yes, by POPE's rule.

  Of the first sentence: a no is what has the word "no" or "not" in it, and
  anything else is a yes.
  """
  sentence = answer.split(".")[0].replace(",", "")
  return not {"no", "not"} & set(sentence.lower().split())


def yes_or_no(answers: Sequence[str], truths: Sequence[str]) -> YesNo:
  """Accuracy and F1 of yes-or-no answers.

  A rate of nothing (the precision where no answer is 'yes') is 0.

  Args:
    answers: of the model.
    truths: 'yes' or 'no', one an answer.

  Raises:
    ValueError: for a truth that is neither, none at all, or other lengths.
  """
  if len(answers) != len(truths) or not truths:
    raise ValueError(f"{len(answers)} answers to {len(truths)} questions")
  plain = [_plain(truth) for truth in truths]
  odd = sorted({t for t in plain if t not in ("yes", "no")})
  if odd:
    raise ValueError(f"truths are 'yes' or 'no'; got {odd[0]!r}")
  said = np.array([says_yes(answer) for answer in answers])
  true = np.array([truth == "yes" for truth in plain])
  hits = float(np.sum(said & true))
  precision = hits / max(said.sum(), 1)
  recall = hits / max(true.sum(), 1)
  both = precision + recall
  return YesNo(
    accuracy=float(np.mean(said == true)),
    precision=float(precision),
    recall=float(recall),
    f1=float(2 * precision * recall / both) if both else 0.0,
    yes_rate=float(np.mean(said)),
  )


# ---------------------------------------------------------------------------
# ANLS: text that is read (Biten et al. 2019), for DocVQA and ST-VQA.


def anls(
  answer: str, truths: Sequence[str], *, threshold: float = 0.5
) -> float:
  """Average normalised Levenshtein similarity of one answer, 0..1.

  With NL the edit distance over the longer length, max over the truths of
  1 - NL where NL < threshold, and 0 elsewhere. In lower case, single spaces.

  Args:
    answer: of the model.
    truths: any of which is right.
    threshold: at and beyond it an answer is wrong and not misread.

  Raises:
    ValueError: for no truth.
  """
  if not truths:
    raise ValueError("anls: no truth to compare with")
  said = " ".join(answer.lower().split())
  best = 0.0
  for truth in truths:
    true = " ".join(truth.lower().split())
    longest = max(len(said), len(true))
    far = levenshtein(said, true) / longest if longest else 0.0
    if far < threshold:
      best = max(best, 1 - far)
  return best


def levenshtein(first: str, second: str) -> int:
  """Insertions, deletions and substitutions between two strings."""
  before = list(range(len(second) + 1))
  for i, a in enumerate(first, 1):
    row = [i]
    for j, b in enumerate(second, 1):
      row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    before = row
  return before[-1]
