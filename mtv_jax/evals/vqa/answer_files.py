"""Answer files and truth files of VQA benchmarks, and their scores.

An answer file is JSON, a list or one object per line, of rows with a question
(`question_id`, `questionId` or `id`) and an answer (`answer`, `prediction` or
`text`); or one object of answers by question. A truth file is one of

  VQAv2, OK-VQA       {"annotations": [{question_id, answers: [{answer}, ...]}]}
  TextVQA, DocVQA     {"data": [{question_id or questionId, answers: [...]}]}
  GQA                 {ID: {answer}}
  a list, or lines    [{question_id or id, answer, answers or label, options}]

`options` (or `choices`) are those of multiple choice; its answer is a letter,
or an integer that counts from 0.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.config.options import shorten_repr
from mtv_jax.evals.core import bootstrap
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.vqa import metrics as metrics_lib
from mtv_jax.utils.errors import InputError, MissingFileError, check_choice

_IDS = ("question_id", "questionId", "id")
_ANSWERS = ("answer", "prediction", "text")
_TRUTHS = ("answers", "answer", "label")
_OPTIONS = ("options", "choices")


@dataclasses.dataclass(frozen=True)
class Question:
  """The truths of a question."""

  truths: tuple[str, ...]  # correct answers, one from each annotator
  options: tuple[str, ...] = ()  # multiple-choice options, by their letters
  kind: str | None = None  # the answer's kind, if the file distinguishes kinds


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of an answer file, and everything that they depend on."""

  metrics: dict[str, float]  # fractions, the benchmark's main metric first
  errors: dict[str, float]  # their standard errors over the questions
  protocol: dict[str, Any]


def read_answers(path: str | os.PathLike) -> dict[str, str]:
  """Answers by question; InputError for other files, or a repeated question."""
  content = _read_json_or_lines(path)
  if isinstance(content, Mapping) and not {*_IDS} & {*content}:
    content = [{"id": k, "answer": v} for k, v in content.items()]
  rows = _rows_by_question(path, content)
  return {
    key: _text(path, _get(path, row, _ANSWERS), f"the answer of {key!r}")
    for key, row in rows.items()
  }


def read_questions(path: str | os.PathLike) -> dict[str, Question]:
  """Truths by question; InputError for other files, or a repeated question."""
  content = _read_json_or_lines(path)
  if isinstance(content, Mapping):
    lists = [content.get(key) for key in ("annotations", "data")]
    lists = [rows for rows in lists if isinstance(rows, list)]
    if lists:
      content = lists[0]
    elif all(isinstance(row, Mapping) for row in content.values()):
      content = [{**row, "id": key} for key, row in content.items()]
  rows = _rows_by_question(path, content)
  return {key: _make_question(path, row) for key, row in rows.items()}


def _rows_by_question(
  path: str | os.PathLike, content: Any
) -> dict[str, Mapping[str, Any]]:
  rows = [content] if isinstance(content, Mapping) else content
  valid = isinstance(rows, list) and all(isinstance(r, Mapping) for r in rows)
  if not valid or not rows:
    got = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
      got = f"keys {sorted(content)[:6]}"
    raise InputError(f"{path}: expected rows of questions; got {got}")
  by_question = {}
  for row in rows:
    key = _text(path, _get(path, row, _IDS), "the id of a question")
    if key in by_question:
      raise InputError(f"{path}: question {key!r} occurs twice")
    by_question[key] = row
  return by_question


def _make_question(path: str | os.PathLike, row: Mapping[str, Any]) -> Question:
  options = next((row[name] for name in _OPTIONS if name in row), None) or []
  if not isinstance(options, list):
    raise InputError(
      f"{path}: expected a list of options, got {shorten_repr(options)}"
    )
  truths = _get(path, row, _TRUTHS)
  truths = truths if isinstance(truths, list) else [truths]
  plain = [
    _get(path, t, ("answer",)) if isinstance(t, Mapping) else t for t in truths
  ]
  if options:
    beyond = [
      t for t in plain if type(t) is int and t not in range(len(options))
    ]
    if beyond:
      raise InputError(
        f"{path}: {shorten_repr(beyond[0])} is no index of the options of "
        f"{shorten_repr(row)}"
      )
    plain = [chr(ord("A") + t) if type(t) is int else t for t in plain]
  if not plain:
    raise InputError(
      f"{path}: a question without an answer: {shorten_repr(row)}"
    )
  kind = row.get("answer_type")
  return Question(
    tuple(_text(path, truth, "a correct answer") for truth in plain),
    tuple(_text(path, option, "an option") for option in options),
    None if kind is None else _text(path, kind, "an answer_type"),
  )


def _text(path: str | os.PathLike, value: Any, what: str) -> str:
  """A string, a number or a bool as text."""
  if not isinstance(value, str | int | float):
    raise InputError(
      f"{path}: {what} is {shorten_repr(value)}; expected a text or a number"
    )
  return str(value)


def _read_json_or_lines(path: str | os.PathLike) -> Any:
  if not os.path.isfile(path):
    raise MissingFileError(f"There is no file {path}.")
  text = foreign.read_text(pathlib.Path(path))
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    try:
      return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
      raise InputError(
        f"{path} is neither JSON ({error}) nor one object per line"
      ) from None


def _get(
  path: str | os.PathLike, row: Mapping[str, Any], names: Sequence[str]
) -> Any:
  for name in names:
    if name in row:
      return row[name]
  raise InputError(
    f"{path}: a row has {sorted(row)[:8]}, and none of {list(names)}"
  )


def _score_option(answer: str, question: Question) -> float:
  letter = metrics_lib.option_letter(answer, question.options)
  return float(letter in {t.strip().upper() for t in question.truths})


# The score of one answer by rule; None for POPE, which scores a whole file.
RULES = {
  "vqa": lambda a, q: metrics_lib.vqa_accuracy(a, q.truths),
  "vqa_simple": lambda a, q: metrics_lib.vqa_accuracy(
    a, q.truths, counting="simple"
  ),
  "exact": lambda a, q: metrics_lib.exact_match(a, q.truths),
  "option": _score_option,
  "pope": None,
  "anls": lambda a, q: metrics_lib.anls(a, q.truths),
}


def score(
  answers: Mapping[str, str],
  questions: Mapping[str, Question],
  *,
  rule: str,
  missing: str = "error",
) -> Scores:
  """Scores answers by a benchmark's rule.

  Args:
    answers, questions: by the id of the question.
    rule: one of `RULES`, see `metrics`.
    missing: whether a question without an answer is an `error` or `wrong`.

  Raises:
    InputError: for an unknown rule, an answer without a question, or missing
      answers.
  """
  check_choice("rule", rule, RULES)
  check_choice("missing", missing, ("error", "wrong"))
  unanswered = [key for key in questions if key not in answers]
  unknown = [key for key in answers if key not in questions]
  if unknown or (unanswered and missing == "error"):
    raise InputError(
      f"{len(unanswered)} of {len(questions)} questions have no answer "
      f"{f'(such as {unanswered[0]})' if unanswered else ''}, and "
      f"{len(unknown)} answers belong to no question "
      f"{f'(such as {unknown[0]})' if unknown else ''}. missing=wrong counts "
      "unanswered ones as wrong."
    )
  digest = hashlib.sha256(
    json.dumps([[k, *q.truths] for k, q in questions.items()]).encode()
  )
  estimate = _score_rule(
    rule, list(map(answers.get, questions)), questions.values()
  )
  return Scores(
    estimate.metrics,
    estimate.errors,
    {
      "rule": rule,
      "questions": len(questions),
      "unanswered": len(unanswered),
      "missing": missing,
      "data_hash": digest.hexdigest()[:16],
    },
  )


def _score_rule(
  rule: str, answers: Sequence[str | None], questions: Collection[Question]
) -> Estimate:
  """The metrics of a rule; a missing answer is wrong."""
  if rule == "pope":
    truths = [q.truths[0] for q in questions]
    wrong = ["no" if t.lower() == "yes" else "yes" for t in truths]
    said = [w if a is None else a for a, w in zip(answers, wrong, strict=True)]
    return metrics_lib.pope_scores(said, truths)
  scores, kinds = [], collections.defaultdict(list)
  for answer, question in zip(answers, questions, strict=True):
    scores.append(0.0 if answer is None else RULES[rule](answer, question))
    if question.kind:
      kinds[f"accuracy_{question.kind}"].append(scores[-1])
  kinds = {"accuracy": scores, **kinds} if rule != "anls" else {rule: scores}
  return bootstrap.means({name: np.array(x) for name, x in kinds.items()})
