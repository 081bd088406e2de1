"""Files of answers and of truths, in the forms of the benchmarks, and scores.

A file of answers is JSON, a list or one object a line, of rows with a question
(`question_id`, `questionId` or `id`) and an answer (`answer`, `prediction` or
`text`); or one object of answers by question. A file of truths is one of

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.evals.vqa import scoring as vqa
from mtv_jax.utils.errors import did_you_mean

_IDS = ("question_id", "questionId", "id")
_ANSWERS = ("answer", "prediction", "text")
_TRUTHS = ("answers", "answer", "label")
_OPTIONS = ("options", "choices")
_MISSING = ("error", "wrong")


@dataclasses.dataclass(frozen=True)
class Question:
  """What is right for a question.

  Attributes:
    truths: the answers, as many as people gave.
    options: of multiple choice, in the order of their letters.
    kind: of the answer, where the file tells kinds apart.
  """

  truths: tuple[str, ...]
  options: tuple[str, ...] = ()
  kind: str | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores over a file.

  Attributes:
    metrics: fractions by name, the benchmark's own figure first.
    protocol: what they depend on.
  """

  metrics: dict[str, float]
  protocol: dict[str, Any]


def read_answers(path: str | os.PathLike) -> dict[str, str]:
  """Answers by question.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a file of no known form, or a question that is answered
      twice.
  """
  content = _read(path)
  if isinstance(content, Mapping) and not _first(content, _IDS):
    content = [{"id": k, "answer": v} for k, v in content.items()]
  found = {}
  for row in _rows(path, content):
    key = str(_get(path, row, _IDS))
    if key in found:
      raise ValueError(f"{path}: question {key} is answered twice")
    found[key] = str(_get(path, row, _ANSWERS))
  return found


def read_questions(path: str | os.PathLike) -> dict[str, Question]:
  """What is right, by question.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for a file of no known form, or a question that is there twice.
  """
  content = _read(path)
  if isinstance(content, Mapping):
    for key in ("annotations", "data"):
      if isinstance(content.get(key), list):
        content = content[key]
        break
    else:
      by_id = all(isinstance(row, Mapping) for row in content.values())
      if by_id:
        content = [{**row, "id": key} for key, row in content.items()]
  found = {}
  for row in _rows(path, content):
    key = str(_get(path, row, _IDS))
    if key in found:
      raise ValueError(f"{path}: question {key} is there twice")
    found[key] = _question(path, row)
  return found


def _question(path: str | os.PathLike, row: Mapping[str, Any]) -> Question:
  options = tuple(map(str, row.get(_first(row, _OPTIONS) or "", ())))
  truths = _get(path, row, _TRUTHS)
  truths = truths if isinstance(truths, list) else [truths]
  plain = [t["answer"] if isinstance(t, Mapping) else t for t in truths]
  if options:
    plain = [chr(ord("A") + t) if isinstance(t, int) else t for t in plain]
  if not plain:
    raise ValueError(f"{path}: a question without an answer: {row}")
  kind = row.get("answer_type")
  return Question(tuple(map(str, plain)), options, kind and str(kind))


def score(
  answers: Mapping[str, str],
  questions: Mapping[str, Question],
  *,
  rule: str,
  missing: str = "error",
) -> Scores:
  """Scores answers by a benchmark's rule.

  Args:
    answers: by question.
    questions: what is right.
    rule: `vqa`, `vqa_simple`, `exact`, `option`, `pope` or `anls`; see
      `vqa.py`.
    missing: questions without an answer are an `error`, or `wrong`.

  Raises:
    ValueError: for an unknown rule, an answer to no question, or missing ones.
  """
  for name, value, known in (
    ("rule", rule, RULES),
    ("missing", missing, _MISSING),
  ):
    if value not in known:
      raise ValueError(f"{name}={value!r}. {did_you_mean(value, known)}")
  lost = [key for key in questions if key not in answers]
  odd = [key for key in answers if key not in questions]
  if odd or (lost and missing == "error"):
    raise ValueError(
      f"{len(lost)} of {len(questions)} questions have no answer"
      f"{f' (such as {lost[0]})' if lost else ''}, and {len(odd)} answers "
      f"belong to no question{f' (such as {odd[0]})' if odd else ''}. "
      "Unanswered ones can be counted as wrong (missing=wrong)."
    )
  asked = [(answers.get(key), questions[key]) for key in questions]
  digest = hashlib.sha256(
    json.dumps([[k, *q.truths] for k, q in questions.items()]).encode()
  )
  return Scores(
    RULES[rule](asked),
    {
      "rule": rule,
      "questions": len(questions),
      "unanswered": len(lost),
      "missing": missing,
      "data_hash": digest.hexdigest()[:16],
    },
  )


_Asked = Sequence[tuple[str | None, Question]]


def _mean(
  asked: _Asked, one: Callable[[str, Question], float]
) -> dict[str, float]:
  """The mean over questions, and over those of each kind of answer."""
  points = [0.0 if a is None else one(a, q) for a, q in asked]
  kinds = collections.defaultdict(list)
  for point, (_, question) in zip(points, asked, strict=True):
    if question.kind:
      kinds[question.kind].append(point)
  by_kind = {f"accuracy_{k}": float(np.mean(v)) for k, v in kinds.items()}
  return {"accuracy": float(np.mean(points)), **by_kind}


def _vqa(counting: str) -> Callable[[_Asked], dict[str, float]]:
  return lambda asked: _mean(
    asked, lambda a, q: vqa.vqa_accuracy(a, q.truths, counting=counting)
  )


def _exact(asked: _Asked) -> dict[str, float]:
  return _mean(asked, lambda a, q: vqa.exact_match(a, q.truths))


def _option(asked: _Asked) -> dict[str, float]:
  def right(answer: str, question: Question) -> float:
    letter = vqa.option_letter(answer, question.options)
    return float(letter in {t.strip().upper() for t in question.truths})

  return _mean(asked, right)


def _pope(asked: _Asked) -> dict[str, float]:
  # What is not answered is a wrong answer: the other one.
  said = [
    a if a is not None else "no" if q.truths[0].lower() == "yes" else "yes"
    for a, q in asked
  ]
  scores = vqa.yes_or_no(said, [q.truths[0] for _, q in asked])
  return dataclasses.asdict(scores)


def _anls(asked: _Asked) -> dict[str, float]:
  points = [0.0 if a is None else vqa.anls(a, q.truths) for a, q in asked]
  return {"anls": float(np.mean(points))}


RULES = {
  "vqa": _vqa("original"),
  "vqa_simple": _vqa("simple"),
  "exact": _exact,
  "option": _option,
  "pope": _pope,
  "anls": _anls,
}


def _read(path: str | os.PathLike) -> Any:
  text = pathlib.Path(path).read_text(encoding="utf-8")
  try:
    return json.loads(text)
  except ValueError as whole:
    lines = [line for line in text.splitlines() if line.strip()]
    try:
      return [json.loads(line) for line in lines]
    except ValueError:
      raise ValueError(
        f"{path} is neither JSON ({whole}) nor one object a line"
      ) from None


def _rows(path: str | os.PathLike, content: Any) -> list[Mapping[str, Any]]:
  rows = [content] if isinstance(content, Mapping) else content
  good = isinstance(rows, list) and all(isinstance(r, Mapping) for r in rows)
  if not good or not rows:
    found = (
      f"keys {sorted(content)[:6]}"
      if isinstance(content, Mapping)
      else (f"a {type(content).__name__}")
    )
    raise ValueError(f"{path}: expected rows of questions; found {found}")
  return rows


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
  return next((name for name in names if name in row), None)


def _get(
  path: str | os.PathLike, row: Mapping[str, Any], names: Sequence[str]
) -> Any:
  name = _first(row, names)
  if name is None:
    raise ValueError(
      f"{path}: a row has {sorted(row)[:8]}, and none of {list(names)}"
    )
  return row[name]
