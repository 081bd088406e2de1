"""Visual question answering by a language model on the frozen encoder.

A `VisualLanguageModel` (LLaVA's recipe, `configs/llava.py`: frozen encoder,
connector, decoder-only language model) answers by greedy decoding; `vqa` scores
the answers by the benchmark's rule. Controls answer the same questions

    blank      from the text alone
    shuffled   about another image of the set

and `chance` is the score of the most frequent answer to each type of question.

With a folder of features, patches and answers are stored there span by span, so
that a killed command repeats at most one span and gives equal answers.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, UInt8

from mtv_jax.config import foreign
from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder import loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.visual_language import VisualLanguageModel
from mtv_jax.evals import store, vqa
from mtv_jax.evals.core import examples, feature_cache, global_features
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import Data
from mtv_jax.evals.datasets import questions, registry
from mtv_jax.evals.datasets.questions import CONTROLS, QuestionSet
from mtv_jax.parallel.distributed import any_process
from mtv_jax.utils import atomic, plots
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import fingerprint

_SPAN_BYTES = 2**28  # features in memory at once


@dataclasses.dataclass(frozen=True)
class VisualQuestions(Evaluator):
  """Accuracy of answers to questions about images, also by type.

  Attributes:
    model: a run of `configs/llava.py` that was trained on this encoder (not
      `pixels:SIZE`); by default, the encoder must be such a run itself.
    data: questions, see `datasets/questions.py`.
    split: split of ScienceQA.
    prompt: appended to each question; by default the benchmark's.
    controls: `blank` and `shuffled`, see above; `[]` for neither.
    max_tokens: maximum length of an answer.
    answers: also write the answers to this file, for `mtv-jax score_vqa`, in
      LLaVA's format, lines of question_id, prompt, text; or in VQA's result
      format, a list of question_id, answer, if the name ends in .json.
    batch_size: images per encoder batch, and questions per decoder batch.
  """

  title = "Visual questions"
  main = ("accuracy", "accuracy_semantic", "accuracy_spatial", "f1")
  _neutral = Evaluator._neutral | {"answers"}

  model: str | None = None
  data: Data = "scenes"
  images: str | None = None
  split: str = "test"
  prompt: str | None = None
  controls: tuple[Literal[CONTROLS], ...] = CONTROLS
  max_tokens: PositiveInt = 16
  answers: str | None = None
  count: PositiveInt | None = None
  batch_size: PositiveInt = 64
  pictures: NonNegativeInt = 0

  @property
  def reads_folder(self) -> bool:
    """Whether template and tokenizer come from the encoder's own run."""
    return self.model is None

  @functools.cached_property
  def _set(self) -> QuestionSet:
    return registry.open_questions(
      self.data, images=self.images, split=self.split, count=self.count
    )

  def run(self, encoder: Encoder) -> Result:
    """Returns accuracies, also of the controls, and the sheet `answers`."""
    if self.answers:
      _check_output(self.answers)
    data, model = self._set, self._load_model(encoder)
    if not (data.truths or self.answers):
      raise InputError(
        f"{data.name} has no truths to score answers against. Set answers=FILE"
        " to write the answers for the benchmark's server."
      )
    prompt = data.prompt if self.prompt is None else self.prompt
    questions = [text + prompt for text in data.texts]
    source = _Patches(
      model, data, self.batch_size, global_features.feature_cache(encoder)
    )
    estimate, chance, answers = Estimate({}, {}), {}, []
    for control in ("", *self.controls):
      if control == "shuffled" and len(data.images) == 1:
        continue
      options = dict(max_tokens=self.max_tokens, batch_size=self.batch_size)
      predicted = answer_questions(source, questions, control, **options)
      answers = answers or predicted
      part = _score(predicted, data, name=control)
      estimate, chance = estimate | part, chance | _chance(data, part, control)
    if self.answers and jax.process_index() == 0:
      text = format_answers(data.keys, questions, answers, self.answers)
      atomic.write_text(self.answers, text)
    model_protocol, encoder_protocol = model.protocol(), encoder.protocol()
    protocol = {
      **encoder_protocol,
      "language_model": {
        k: v for k, v in model_protocol.items() if encoder_protocol.get(k) != v
      },
      **data.protocol(),
      "prompt": prompt,
      "decoding": f"greedy, at most {self.max_tokens} tokens",
      "rule": data.rule,
      "chance": "the most frequent answer to each type of question",
    }
    sheets = {}
    if self.pictures and data.truths:
      sheets = {"answers": draw_answers(data, answers, self.pictures)}
    return Result.from_estimate(estimate, protocol, chance, sheets=sheets)

  def _load_model(self, encoder: Encoder) -> VisualLanguageModel:
    """Loads the language model; NotApplicable if it is another encoder's."""
    if self.model is None:
      if not encoder.can_predict(loading.LANGUAGE_MODEL):
        raise NotApplicable(
          "this encoder has no language model: train one on it with"
          " configs/llava.py and set model=RUN"
        )
      op = loading.read_conversation_op(encoder.source)
      return VisualLanguageModel(encoder, op)
    model = VisualLanguageModel.load(self.model, dtype=encoder.dtype)
    trees = (model.encoder.params["image"], encoder.params["image"])
    if len({*map(fingerprint, trees)}) > 1:
      raise NotApplicable(
        f"the language model {self.model} was trained on another encoder than"
        f" {encoder.source}"
      )
    return model


def _check_output(file: str) -> None:
  path = pathlib.Path(file)
  if path.is_dir() or not path.parent.is_dir():
    raise InputError(f"answers: {file} is not a file in an existing folder")
  if questions.matches(path):
    raise InputError(f"answers: {file} contains questions; name another file")


class _Patches:
  """Patches of a set's images for a model, in spans that fit into memory."""

  def __init__(
    self,
    model: VisualLanguageModel,
    data: QuestionSet,
    batch_size: int,
    cache: feature_cache.FeatureCache,
  ):
    self.model, self.data, self._batch_size = model, data, batch_size
    example = self._encode(range(1))
    self._nbytes, count = example.nbytes, len(data.images)
    limit = _SPAN_BYTES // self._nbytes
    self.spans = [*feature_cache.spans(count, batch_size, max_rows=limit)]
    self.answers = cache.folder and cache.folder.path / "answers"
    self._folder = cache.open_folder(self._nbytes * count)
    # The model's encoder may preprocess differently.
    description = json.dumps(model.protocol(), sort_keys=True, default=str)
    path = getattr(model.encoder, "source", "")
    self._key = cache.key(model.encoder, data)
    self.identity = (self._key, description, store.describe_weights(path))
    self._name = f"vqa{examples.hash_rows([(description,)])}"

  def __getitem__(self, span: range) -> Float[np.ndarray, "n p d"]:
    folder = self._folder
    features = folder and folder.read(self._key, self._name, span)
    if any_process(features is None or len(features) != len(span)):
      features = self._encode(span)
      if folder is not None and jax.process_index() == 0:
        folder.make_room(self._nbytes * len(span))
        folder.write(self._key, self._name, span, features)
    return features

  def _encode(self, span: range) -> Float[np.ndarray, "n p d"]:
    images = examples.select_images(self.data.images, span)
    return self.model.encode(images, batch_size=self._batch_size)


def answer_questions(
  source: _Patches, questions: Sequence[str], control: str = "", **options: Any
) -> list[str]:
  """Answers in the order of the questions; stored span by span."""
  data, answers = source.data, [""] * len(questions)
  image_indices = data.owner
  if control == "shuffled":  # The image half the set away.
    image_indices = (image_indices + len(data.images) // 2) % len(data.images)
  key = [*source.identity, questions, image_indices.tolist(), control, options]
  digest = examples.hash_rows([key])
  folder = source.answers and source.answers / digest
  for span in source.spans:
    question_indices = np.flatnonzero(np.isin(image_indices, span))
    file = folder and folder / f"{span.start}-{span.stop}.json"
    stored = _read_answers(file, len(question_indices))
    if any_process(stored is None):
      features = None if control == "blank" else source[span]
      images = (
        None
        if control == "blank"
        else image_indices[question_indices] - span.start
      )
      stored = source.model.answer(
        [questions[i] for i in question_indices],
        features,
        images=None if images is None else images.tolist(),
        **options,
      )
      if file is not None and jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, json.dumps(stored))
    for i, answer in zip(question_indices, stored, strict=True):
      answers[i] = answer
  return answers


def format_answers(
  keys: Sequence[str], asked: Sequence[str], answers: Sequence[str], file: str
) -> str:
  """Formats answers as VQA's results for a .json file, else as LLaVA's."""
  if file.endswith(".json"):
    ids = [int(k) if k.isdecimal() and str(int(k)) == k else k for k in keys]
    pairs = zip(ids, answers, strict=True)
    return json.dumps([{"question_id": i, "answer": a} for i, a in pairs])
  names = ("question_id", "prompt", "text")
  rows = zip(keys, asked, answers, strict=True)
  return "".join(
    json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows
  )


def _read_answers(file: pathlib.Path | None, count: int) -> list[str] | None:
  """Stored answers to `count` questions; None if missing or damaged."""
  if file is not None and file.exists() and not file.is_file():
    raise InputError(f"{file} is not a file of answers; remove it")
  if file is not None and file.is_file():
    with contextlib.suppress(InputError):
      content = {"answers": foreign.read_untrusted_json(file)}
      answers = foreign.read_field(content, "answers", tuple[str, ...])
      return [*answers] if len(answers) == count else None
  return None


def _score(answers: Sequence[str], data: QuestionSet, *, name: str) -> Estimate:
  """Metrics of the answers; controls lack metrics per question type."""
  if not data.truths:
    return Estimate({}, {})
  estimate = vqa.estimate_scores(
    data.rule, answers, data.truths, groups=data.owner, unions=data.unions
  )
  if not name:
    return estimate
  names = ("accuracy", "f1", *(f"accuracy_{union}" for union in data.unions))
  values = (estimate.metrics, estimate.errors, estimate.resamples)
  parts = ({k: v for k, v in x.items() if k in names} for x in values)
  return Estimate(*parts).rename(f"{{}}_{name}")


def _chance(data: QuestionSet, part: Estimate, name: str) -> dict[str, float]:
  """Scores of the most frequent answer to each type of question."""
  if not data.truths:
    return {}
  counts = collections.defaultdict(collections.Counter)
  for truth in data.truths:
    counts[truth.kind].update(truth.truths)
  top_answers = {kind: c.most_common(1)[0][0] for kind, c in counts.items()}
  answers = [top_answers[truth.kind] for truth in data.truths]
  scores = _score(answers, data, name=name).metrics
  return {k: v for k, v in scores.items() if k in part.metrics}


def draw_answers(
  data: QuestionSet, answers: Sequence[str], count: int
) -> UInt8[np.ndarray, "h w 3"]:
  """Sheet of images with their questions, answers and truths.

  Correct answers are green, wrong ones red, with the truth in parentheses.
  """
  owner, rows = data.owner, []
  size = plots.SHEET_TEXT
  text_width = plots.SHEET_WIDTH - plots.THIRD - plots.GAP
  for i in examples.subsample(range(len(data.images)), count):
    lines = []
    for j in np.flatnonzero(owner == i)[:4]:
      lines += [(t, plots.INK) for t in _wrap_text(data.texts[j], text_width)]
      is_correct = vqa.is_correct(answers[j], data.truths[j], data.rule)
      truth = collections.Counter(data.truths[j].truths).most_common(1)[0][0]
      text = answers[j] if is_correct else f"{answers[j] or '-'} ({truth})"
      ink = plots.CORRECT if is_correct else plots.WRONG
      lines += [(f"  {t}", ink) for t in _wrap_text(text, text_width)]
    image = plots.image_grid([[data.images[i]]], size=plots.THIRD)
    text = plots.draw_lines(lines or [("", plots.INK)], text_width, size=size)
    rows.append(plots.hstack([image, text]))
  return plots.vstack(rows)


def _wrap_text(text: str, width: int) -> list[str]:
  return plots.wrap(text, width - 16, lines=2, size=plots.SHEET_TEXT)
