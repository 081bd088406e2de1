"""Scoring of VQA benchmarks from answer files and truth files.

An answer file is a JSON list, or JSON lines, of rows with a question
(`question_id`, `questionId` or `id`) and an answer (`answer`, `prediction` or
`text`); or a JSON object from question to answer. A truth file is one of

  VQAv2, OK-VQA       {"annotations": [{question_id, answers: [{answer}, ...]}]}
  TextVQA, DocVQA     {"data": [{question_id or questionId, answers: [...]}]}
  GQA                 {ID: {answer}}
  a list, or lines    [{question_id or id, answer, answers or label, options}]

`options` (or `choices`) make a question multiple choice; its answer is a
letter or a 0-based integer.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from mtv_jax.config import foreign
from mtv_jax.config.options import shorten_repr
from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.utils.errors import InputError, MissingFileError, check_choice

# VQA's official evaluation with its quirks: periods are deleted except before a
# digit, "somebody'd" loses its apostrophe.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {
  word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())
}


def _build_contractions() -> dict[str, str]:
  """Maps contractions without an apostrophe to their correct spelling."""
  endings = {
    "n't": "ai are ca could did does do did had has have is might must need "
    "ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
  }
  table = {
    stem + ending.replace("'", ""): stem + ending
    for ending, stems in endings.items()
    for stem in stems.split()
  }
  # One of two apostrophes may be missing, but not both.
  negations = "couldn hadn mightn shouldn wouldn"
  subjects = "he it she somebody someone something there they we who you"
  for stems, middle in ((negations, "t"), (subjects, "d")):
    for stem in stems.split():
      word = f"{stem}'{middle}'ve"
      table[f"{stem}{middle}'ve"] = table[f"{stem}'{middle}ve"] = word
  table |= {
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
  return table


_CONTRACTIONS = _build_contractions()


def normalize_answer(answer: str) -> str:
  """Normalises an answer as in VQA's official evaluation.

  A punctuation mark is deleted if it is next to a space anywhere in the answer
  or if the answer has a number with a comma ("1,000"), else replaced by a
  space. Periods are deleted unless a digit follows. After lower-casing, number
  words up to ten become digits, articles are removed, contractions corrected.
  """
  answer = _strip(answer)
  has_number = _COMMA_IN_NUMBER.search(answer) is not None
  text = answer
  for mark in _PUNCTUATION:
    is_beside_space = f"{mark} " in answer or f" {mark}" in answer
    text = text.replace(mark, "" if is_beside_space or has_number else " ")
  words = _PERIOD.sub("", text).lower().split()
  words = [_NUMBERS.get(word, word) for word in words]
  words = [word for word in words if word not in _ARTICLES]
  return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def clean_textvqa(answer: str) -> str:
  """Normalises an answer as in TextVQA's evaluation, M4C (Hu et al. 2020)."""
  answer = answer.lower().replace(",", "").replace("?", "")
  return normalize_answer(answer.replace("'s", " 's"))


def _strip(answer: str) -> str:
  return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(
  answer: str,
  truths: Sequence[str],
  *,
  counting: str = "original",
  clean: Callable[[str], str] | None = None,
) -> float:
  """VQA accuracy (Antol et al. 2015), also for OK-VQA, 0..1.

  With c annotators giving this answer, `original` averages min(1, m / 3) over
  annotators, m counting matches without that annotator; for ten annotators 0,
  .3, .6, .9, 1, ... `simple` is min(1, c / 3), as in big_vision. By default
  answers are normalised if the annotators disagree; if all agree, the match
  must be exact. TextVQA always normalises, by `clean=clean_textvqa`.

  Raises InputError for empty truths or an unknown `counting`.
  """
  check_choice("counting", counting, ("original", "simple"))
  _require_truths(truths)
  is_disputed = len({*map(_strip, truths)}) > 1
  clean = clean or (normalize_answer if is_disputed else _strip)
  plain_answer = clean(answer)
  matches = [clean(truth) == plain_answer for truth in truths]
  count = sum(matches)
  if counting == "simple":
    return min(1.0, count / 3)
  return sum(min(1.0, (count - match) / 3) for match in matches) / len(matches)


def _require_truths(truths: Sequence[str]) -> None:
  if not truths:
    raise InputError("no truths; expected at least one answer")


def exact_match(answer: str, truths: Sequence[str]) -> float:
  """1 if the answer is one of the truths, else 0 (GQA).

  Ignores case, repeated spaces and final periods.
  """
  return float(_clean(answer) in {_clean(truth) for truth in truths})


def _clean(answer: str) -> str:
  return " ".join(answer.lower().split()).rstrip(".").rstrip()


_LETTER = re.compile(r"^\W*(?:option\s+)?([A-Za-z])\s*(?:[).:,\]]|$)", re.I)
# Capitals only: "the answer is a dog" doesn't name an option.
_NAMED_LETTER = re.compile(
  r"\b(?i:answer|option|choice)(?i:\s+is)?\s*[:=]?\s*\W?([A-Z])\b(?!')"
)


def option_letter(answer: str, options: Sequence[str] = ()) -> str | None:
  """The option selected by an answer to a multiple-choice question.

  The first matching rule decides: a letter that is or starts the answer ("B",
  "(b)", "B. a cat"); a letter that it names ("the answer is B"); the text of
  exactly one option, equal or else contained. Returns a capital letter, or None
  without a match.
  """
  letters = string.ascii_uppercase[: len(options) or 26]
  for pattern in (_LETTER, _NAMED_LETTER):
    for match in pattern.finditer(answer.strip()):
      if match[1].upper() in letters:
        return match[1].upper()
  plain_answer, plain = _clean(answer), [_clean(option) for option in options]
  is_equal = [option == plain_answer for option in plain]
  is_contained = [
    option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", plain_answer)
    for option in plain
  ]
  for matches in (is_equal, is_contained):
    matching = [*itertools.compress(letters, matches)]
    if len(matching) == 1:
      return matching[0]
  return None


def says_yes(answer: str) -> bool:
  """Whether an answer is a yes by POPE's rule.

  An answer is a no if its first sentence contains the word "no" or "not".
  """
  sentence = answer.split(".")[0].replace(",", "")
  return not {"no", "not"} & set(sentence.lower().split())


def pope_scores(
  answers: Sequence[str],
  truths: Sequence[str],
  *,
  files: Sequence[str] | None = None,
  groups: Int[np.ndarray, " n"] | None = None,
) -> Estimate:
  """POPE scores of yes-or-no questions (Li et al. 2023); "yes" is positive.

  `files` names the file of each question. Standard errors are bootstrapped over
  `groups`, such as images; by default over questions.

  Returns:
    `accuracy`, `precision`, `recall`, `f1` and `yes_rate`, means over the
    files, and `f1_FILE`, ... of each named file; x / 0 is 0.
  """
  if len(answers) != len(truths) or not truths:
    raise InputError(f"{len(answers)} answers to {len(truths)} questions")
  plain = np.array([_clean(truth) for truth in truths])
  if unknown := {*plain.tolist()} - {"yes", "no"}:
    raise InputError(f"truths are 'yes' or 'no'; got {min(unknown)!r}")
  predicted = np.array([says_yes(answer) for answer in answers])
  is_yes = plain == "yes"
  groups = np.arange(len(is_yes)) if groups is None else groups
  _, group = np.unique(groups, return_inverse=True)
  names = np.array(files or [""] * len(is_yes))

  def file_scores(weights):
    hits = weights @ (predicted & is_yes)
    precision = hits / max(weights @ predicted, 1)
    recall = hits / max(weights @ is_yes, 1)
    total = precision + recall
    return {
      "accuracy": weights @ (predicted == is_yes) / weights.sum(),
      "precision": precision,
      "recall": recall,
      "f1": 2 * precision * recall / total if total else 0,
      "yes_rate": weights @ predicted / weights.sum(),
    }

  def scores(weights):
    weights, metrics = weights[group], collections.defaultdict(list)
    for name in np.unique(names[weights > 0]):  # A resample may lack a file.
      for key, value in file_scores(weights * (names == name)).items():
        metrics[key].append(value)
        if name:
          metrics[f"{key}_{name}"].append(value)
    return {key: np.mean(values) for key, values in metrics.items()}

  return bootstrap.estimate(scores, 1 + int(group.max()))


def anls(answer: str, truths: Sequence[str]) -> float:
  """Average normalised Levenshtein similarity (Biten et al. 2019), 0..1.

  For DocVQA and ST-VQA. With NL the edit distance over the longer length: the
  maximum over truths of 1 - NL if NL < 0.5, else 0. Ignores case and repeated
  spaces.

  Raises InputError for empty truths.
  """
  _require_truths(truths)
  plain_answer, *plain = (
    " ".join(text.lower().split()) for text in (answer, *truths)
  )
  length = len(plain_answer)
  dists = (levenshtein(plain_answer, t) / max(1, length, len(t)) for t in plain)
  return max(1 - distance if distance < 0.5 else 0.0 for distance in dists)


def levenshtein(first: str, second: str) -> int:
  """Edit distance: insertions, deletions and substitutions."""
  previous = list(range(len(second) + 1))
  for i, a in enumerate(first, 1):
    row = [i]
    for j, b in enumerate(second, 1):
      row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    previous = row
  return previous[-1]


_IDS = ("question_id", "questionId", "id")
_ANSWERS = ("answer", "prediction", "text")
_TRUTHS = ("answers", "answer", "label")
_OPTIONS = ("options", "choices")


class Question(NamedTuple):
  """Truths of a question."""

  truths: tuple[str, ...]  # correct answers, one per annotator
  options: tuple[str, ...] = ()  # multiple-choice options A, B, ...
  kind: str | None = None  # answer type, if the file has types


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of an answer file, and their protocol."""

  metrics: dict[str, float]  # fractions, the benchmark's main metric first
  errors: dict[str, float]  # standard errors over questions
  protocol: dict[str, Any]


def read_answers(path: str | os.PathLike) -> dict[str, str]:
  """Reads answers by question; InputError for a bad file or a duplicate."""
  content = _read_json_or_lines(path)
  if isinstance(content, Mapping) and not {*_IDS} & {*content}:
    content = [{"id": k, "answer": v} for k, v in content.items()]
  rows = _index_rows(path, content)
  return {
    key: _to_text(path, _get(path, row, _ANSWERS), f"the answer of {key!r}")
    for key, row in rows.items()
  }


def read_questions(path: str | os.PathLike) -> dict[str, Question]:
  """Reads truths by question; InputError for a bad file or a duplicate."""
  content = _read_json_or_lines(path)
  if isinstance(content, Mapping):
    lists = [content.get(key) for key in ("annotations", "data")]
    lists = [rows for rows in lists if isinstance(rows, list)]
    if lists:
      content = lists[0]
    elif all(isinstance(row, Mapping) for row in content.values()):
      content = [{**row, "id": key} for key, row in content.items()]
  rows = _index_rows(path, content)
  return {key: _make_question(path, row) for key, row in rows.items()}


def _index_rows(
  path: str | os.PathLike, content: Any
) -> dict[str, Mapping[str, Any]]:
  rows = [content] if isinstance(content, Mapping) else content
  valid = isinstance(rows, list) and all(isinstance(r, Mapping) for r in rows)
  if not valid or not rows:
    got = shorten_repr(content)
    raise InputError(f"{path}: expected rows of questions; got {got}")
  by_question = {}
  for row in rows:
    key = _to_text(path, _get(path, row, _IDS), "the id of a question")
    if key in by_question:
      raise InputError(f"{path}: question {key!r} occurs twice")
    by_question[key] = row
  return by_question


def _make_question(path: str | os.PathLike, row: Mapping[str, Any]) -> Question:
  options = next((row[name] for name in _OPTIONS if name in row), None) or []
  row_text = shorten_repr(row)
  if not isinstance(options, list) or len(options) > 26:
    raise InputError(f"{path}: expected a list of up to 26 options: {row_text}")
  truths = _get(path, row, _TRUTHS)
  texts = []
  for truth in truths if isinstance(truths, list) else [truths]:
    if isinstance(truth, Mapping):
      truth = _get(path, truth, ("answer",))
    if options and type(truth) is int:
      if truth not in range(len(options)):
        raise InputError(f"{path}: expected an index of options: {row_text}")
      truth = chr(ord("A") + truth)
    texts.append(_to_text(path, truth, "a correct answer"))
  if not texts:
    raise InputError(f"{path}: a question without an answer: {row_text}")
  kind = row.get("answer_type")
  return Question(
    tuple(texts),
    tuple(_to_text(path, option, "an option") for option in options),
    None if kind is None else _to_text(path, kind, "an answer_type"),
  )


def _to_text(path: str | os.PathLike, value: Any, what: str) -> str:
  """Converts a string, number or bool to text."""
  if not isinstance(value, str | int | float):
    raise InputError(
      f"{path}: {what} is {shorten_repr(value)}; expected text or a number"
    )
  return str(value)


def _read_json_or_lines(path: str | os.PathLike) -> Any:
  if not os.path.isfile(path):
    raise MissingFileError(f"There is no file {path}.")
  return foreign.read_json_or_lines(pathlib.Path(path))


def _get(
  path: str | os.PathLike, row: Mapping[str, Any], names: Sequence[str]
) -> Any:
  for name in names:
    if name in row:
      return row[name]
  keys = sorted(row)[:8]
  raise InputError(f"{path}: a row has {keys}, but none of {list(names)}")


def _score_option(answer: str, question: Question) -> float:
  letter = option_letter(answer, question.options)
  return float(letter in {t.strip().upper() for t in question.truths})


# Scores of one answer, by rule; None for POPE, which scores a whole file.
RULES = {
  "vqa": lambda a, q: vqa_accuracy(a, q.truths),
  "vqa_simple": lambda a, q: vqa_accuracy(a, q.truths, counting="simple"),
  "textvqa": lambda a, q: vqa_accuracy(a, q.truths, clean=clean_textvqa),
  "exact": lambda a, q: exact_match(a, q.truths),
  "option": _score_option,
  "pope": None,
  "anls": lambda a, q: anls(a, q.truths),
}


def is_correct(answer: str, question: Question, rule: str) -> bool:
  """Whether an answer has a score above 0."""
  if rule == "pope":
    return says_yes(answer) == (_clean(question.truths[0]) == "yes")
  return RULES[rule](answer, question) > 0


def score(
  answers: Mapping[str, str],
  questions: Mapping[str, Question],
  *,
  rule: str,
  missing: str = "error",
) -> Scores:
  """Scores answers by a benchmark's rule."""
  check_choice("rule", rule, RULES)
  check_choice("missing", missing, ("error", "wrong"))
  unanswered = [key for key in questions if key not in answers]
  unknown = [key for key in answers if key not in questions]
  if unknown or (unanswered and missing == "error"):
    raise InputError(
      f"{len(unanswered)} of {len(questions)} questions have no answer "
      f"{f'(such as {unanswered[0]})' if unanswered else ''}, and "
      f"{len(unknown)} answers belong to no question "
      f"{f'(such as {unknown[0]})' if unknown else ''}. Set missing=wrong "
      "to count unanswered questions as wrong."
    )
  truths = json.dumps([[k, *q.truths] for k, q in questions.items()])
  ordered_answers = [answers.get(key) for key in questions]
  estimate = estimate_scores(rule, ordered_answers, questions.values())
  protocol = {
    "rule": rule,
    "questions": len(questions),
    "unanswered": len(unanswered),
    "missing": missing,
    "data_hash": hashlib.sha256(truths.encode()).hexdigest()[:16],
  }
  return Scores(estimate.metrics, estimate.errors, protocol)


def estimate_scores(
  rule: str,
  answers: Sequence[str | None],
  questions: Collection[Question],
  *,
  groups: Int[np.ndarray, " n"] | None = None,
  unions: Mapping[str, Collection[str]] | None = None,
) -> Estimate:
  """Metrics of a rule, also by answer type; missing answers are wrong.

  Errors resample `groups` (images). `unions` adds the accuracy over several
  answer types, by name. POPE's answer types are its files.
  """
  if rule == "pope":
    truths = [q.truths[0] for q in questions]
    wrong = ["no" if t.lower() == "yes" else "yes" for t in truths]
    texts = [w if a is None else a for a, w in zip(answers, wrong, strict=True)]
    kinds = [q.kind or "" for q in questions]
    return pope_scores(texts, truths, files=kinds, groups=groups)
  rows = zip(answers, questions, strict=True)
  values = np.array([0.0 if a is None else RULES[rule](a, q) for a, q in rows])
  kinds = np.array([q.kind or "" for q in questions])
  names = {kind: [kind] for kind in dict.fromkeys(kinds.tolist()) if kind}
  masks = {"accuracy" if rule != "anls" else rule: np.ones(len(kinds), bool)}
  for name, members in ({**(unions or {}), **names}).items():
    if rule != "anls" and (mask := np.isin(kinds, [*members])).any():
      masks[f"accuracy_{name}"] = mask
  estimate = Estimate({}, {})
  for name, mask in masks.items():
    # An answer type's errors are over the images that have it.
    images = None if groups is None else np.asarray(groups)[mask]
    estimate |= bootstrap.means({name: values[mask]}, groups=images)
  return estimate
