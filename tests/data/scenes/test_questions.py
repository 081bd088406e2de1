"""Questions about scenes: balanced texts, and answers that the images show."""

import collections

import numpy as np
import pytest

from mtv_jax.data.scenes import questions, render
from mtv_jax.data.scenes.questions import balanced_questions
from mtv_jax.data.scenes.world import COLOURS
from mtv_jax.data.tokenizers import build_tokenizer

KINDS = {kind for kinds in questions.KINDS.values() for kind in kinds}


def read_text(question):
  return [question.text]


def read_words(question):
  words = question.text.split()
  return [(question.kind, i, word) for i, word in enumerate(words)]


def guess(train, test, read):
  """Naive Bayes answers from what `read` returns of each text."""
  answers = sorted({q.answer for q in train})
  parts = {
    part: i for i, part in enumerate({p for q in train for p in read(q)})
  }
  # Unknown parts have the last row.
  counts, prior = np.ones((len(parts) + 1, len(answers))), {}
  for question in train:
    column = answers.index(question.answer)
    counts[[parts[p] for p in read(question)], column] += 1
    prior.setdefault(question.kind, np.zeros(len(answers)))[column] += 1
  values = np.log(counts / counts.sum(axis=1, keepdims=True))
  for question in test:
    rows = [parts.get(part, -1) for part in read(question)]
    with np.errstate(divide="ignore"):
      scores = np.log(prior[question.kind]) + values[rows].sum(axis=0)
    yield answers[np.argmax(scores)]


@pytest.mark.parametrize(
  ("difficulty", "count"),
  [
    ("hard", 250),
    pytest.param("hard", 10_000, marks=pytest.mark.long),
    pytest.param("easy", 10_000, marks=pytest.mark.long),
  ],
)
def test_texts_do_not_give_the_answer_away(difficulty, count):
  train = balanced_questions(range(2_000_000, 2_000_000 + count), 0, difficulty)
  test = balanced_questions(range(1_000_000, 1_000_000 + count), 0, difficulty)
  assert {q.kind for q in test} == KINDS and len(test) > 2.5 * count
  answers = collections.defaultdict(collections.Counter)
  for question in test:
    answers[question.group][question.answer] += 1
  assert all(len({*counts.values()}) == 1 for counts in answers.values())
  chance = np.array([1 / len(answers[q.group]) for q in test])
  kinds = np.array([q.kind for q in test])
  for read in (read_text, read_words):
    given = guess(train, test, read)
    hits = np.array([a == q.answer for a, q in zip(given, test, strict=True)])
    for kind in KINDS:
      p = chance[kinds == kind]
      error = np.sqrt(np.sum(p * (1 - p))) / len(p)
      assert hits[kinds == kind].mean() < p.mean() + 4 * error, (read, kind)


def semantic_answers(question, objects):
  """All correct answers, from the objects."""
  *words, last = question.text.rstrip("?").split()
  if question.kind == "what":
    return [o.name for o in objects if words[-1] in (o.colour, o.second)]
  if question.kind == "colour":
    return [o.colour for o in objects if o.name == last]
  if question.kind == "presence":
    colours = {
      c for o in objects if o.name == last for c in (o.colour, o.second)
    }
    return ["yes" if words[-1] in colours else "no"]
  colour = words[2] if words[2] in COLOURS else None
  count = sum(colour in (None, o.colour, o.second) for o in objects)
  return [("zero", "one", "two", "three", "four")[count]]


def test_images_show_the_answers():
  """Answers from the objects or their rendered pixels; words of the texts."""
  tokenizer = build_tokenizer("question_words", clean="none")
  asked = balanced_questions(range(100))
  for question in asked:
    text = f"{question.text} {question.answer}"
    assert tokenizer.unk_id not in tokenizer.encode([text], 32), text
    scene = render.render(question.number, size=64)
    if question.kind in questions.KINDS["semantic"]:
      right = semantic_answers(question, scene.objects)
      assert right == [question.answer], question
      continue
    named = [w for w in question.text.split() if w in COLOURS]
    colours = [obj.colour for obj in scene.objects]
    values = []
    for index in map(colours.index, named):
      mask = scene.instances == 2 + index
      y0, x0, y1, x1 = scene.boxes[scene.box_objects.index(index)]
      values += [
        {
          "left_right": np.nonzero(mask)[1].mean(),
          "distance": np.median(scene.depth[mask]),
          "size": -(y1 - y0) * (x1 - x0),
        }[question.kind]
      ]
    first = question.answer in ("left", "closer", "larger")
    assert (values[0] < values[1]) == first, question
