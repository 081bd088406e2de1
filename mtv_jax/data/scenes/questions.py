"""Questions about built-in scenes, whose texts don't give the answer away.

Objects of a relation are named by colour alone and in random order. Colours are
drawn independently of shapes, sizes and poses, so that either answer is equally
likely whatever the text. Answers that are not equally likely by construction
are balanced within a group of questions, down to the count of the rarest. A
question is asked only if its answer is clear: plain objects with a unique
colour (or class), mostly visible, apart, and of clearly different depth or
size.
"""

import collections
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mtv_jax.data.scenes import captions, layout
from mtv_jax.data.scenes.layout import DIFFICULTIES, Draw, Level
from mtv_jax.data.scenes.world import (
  CLASS_NAMES,
  Rect,
  SceneObject,
  World,
  bounding_rect,
  hidden_share,
)

# Types of questions, by what they ask for.
KINDS = {
  "semantic": ("what", "colour", "count", "presence"),
  "spatial": ("left_right", "distance", "size"),
}
_STREAM = 1 << 32  # `Draw`'s stream; views and videos use the first ones.
_MAX_OCCLUSION = 0.3  # Maximum hidden share of an object that a question names.
_MIN_RATIO = 1.5  # Minimum ratio of the image areas of different sizes.
_COUNTS = ("zero", "one", "two", "three", "four")
_MAX_SAME = 2  # Maximum count of a question about objects of a colour.

# Phrases of relations, and the answers for clear relations of the captions.
_RELATIONS = {
  "left_right": (
    "is the {} object left or right of the {} object?",
    {"left of": "left", "right of": "right"},
  ),
  "distance": (
    "is the {} object closer or farther than the {} object?",
    {"in front of": "closer", "behind": "farther"},
  ),
  "size": (
    "does the {} object look larger or smaller than the {} object?",
    {"larger": "larger", "smaller": "smaller"},
  ),
}


class SceneQuestion(NamedTuple):
  """A question about image `number`, or about the scene of this number."""

  number: int
  kind: str  # see `KINDS`
  text: str
  answer: str
  group: str  # within which answers are equally frequent


def sample_questions(
  number: int, seed: int = 0, difficulty: Level = "hard"
) -> list[SceneQuestion]:
  """Samples at most one question of each type; answers aren't balanced."""
  world = layout.sample_world(number, seed, difficulty)
  draw, objects = Draw(seed, number, stream=_STREAM), world.objects
  rects = [bounding_rect(world.camera, obj) for obj in objects]
  plain = [
    i
    for i, obj in enumerate(objects)
    if not obj.second and hidden_share(rects, i) <= _MAX_OCCLUSION
  ]
  palette = DIFFICULTIES[difficulty].colours
  rows = [
    *_ask_what(objects, plain, draw),
    *_ask_count(objects, palette, draw),
    *_ask_presence(objects, plain, palette, draw),
    *_ask_relations(world, rects, _unique(objects, plain), draw),
  ]
  return [SceneQuestion(number, *row) for row in rows]


def balanced_questions(
  numbers: Iterable[int], seed: int = 0, difficulty: Level = "hard"
) -> list[SceneQuestion]:
  """Samples questions about scenes, with balanced answers in each group."""
  questions = (sample_questions(i, seed, difficulty) for i in numbers)
  return balance(itertools.chain.from_iterable(questions))


def balance(questions: Iterable[SceneQuestion]) -> list[SceneQuestion]:
  """Drops the last questions of frequent answers; "" is not a group."""
  questions = list(questions)
  counts = collections.defaultdict(collections.Counter)
  for row in questions:
    counts[row.group][row.answer] += 1
  quotas = {
    (group, answer): min(counter.values()) if len(counter) > 1 else 0
    for group, counter in counts.items()
    for answer in counter
  }
  balanced = []
  for row in questions:
    quotas[row.group, row.answer] -= 1
    if not row.group or quotas[row.group, row.answer] >= 0:
      balanced.append(row)
  return balanced


def conversation(
  pairs: Iterable[tuple[str, str]], image: str, **fields: Any
) -> dict[str, Any]:
  """Makes a record in LLaVA's format, of questions and answers on an image."""
  turns = []
  for question, answer in pairs:
    prefix = "" if turns else "<image>\n"
    turns.append({"from": "human", "value": prefix + question})
    turns.append({"from": "gpt", "value": answer})
  return {**fields, "image": image, "conversations": turns}


def _unique(objects: Sequence[SceneObject], plain: Sequence[int]) -> list[int]:
  """Lists plain objects whose colour no other object has."""
  colours = collections.Counter(
    itertools.chain.from_iterable({o.colour, o.second} for o in objects)
  )
  return [i for i in plain if colours[objects[i].colour] == 1]


def _ask_what(objects, plain: Sequence[int], draw: Draw):
  """Asks for the class of a colour, and for the colour of a class."""
  if unique := _unique(objects, plain):
    obj = objects[draw.choice(unique)]
    yield "what", f"what is the {obj.colour} object?", obj.name, "what"
  names = collections.Counter(obj.name for obj in objects)
  if unique := [i for i in plain if names[objects[i].name] == 1]:
    obj = objects[draw.choice(unique)]
    yield "colour", f"what colour is the {obj.name}?", obj.colour, "colour"


def _ask_count(objects, palette: Sequence[str], draw: Draw):
  if draw.uniform() < 0.5:
    if len(objects) < len(_COUNTS):
      text, count = "how many objects are there?", len(objects)
      yield "count", text, _COUNTS[count], "count objects"
    return
  second_colours = {obj.second for obj in objects}
  counts = dict.fromkeys([c for c in palette if c not in second_colours], 0)
  for obj in objects:
    if obj.colour in counts:
      counts[obj.colour] += 1
  # Prefer the rarest answer, so that fewer questions are dropped.
  target = _MAX_SAME if _MAX_SAME in counts.values() else draw.choice((0, 1))
  if colours := [c for c, n in counts.items() if n == target]:
    text = f"how many {draw.choice(colours)} objects are there?"
    yield "count", text, _COUNTS[target], "count colour"


def _ask_presence(objects, plain, palette: Sequence[str], draw: Draw):
  """Asks whether an object exists; an absent one differs in colour or class."""
  if not plain:
    return
  obj = objects[draw.choice(plain)]
  colour, name = obj.colour, obj.name
  is_present, changes_colour = draw.uniform() < 0.5, draw.uniform() < 0.5
  if not is_present and changes_colour:
    colour = draw.choice(palette)
  elif not is_present:
    name = draw.choice(CLASS_NAMES)
  if not is_present and any(
    o.name == name and colour in (o.colour, o.second) for o in objects
  ):
    return
  text = f"is there {captions.article(f'{colour} {name}')}?"
  yield "presence", text, "yes" if is_present else "no", f"presence {name}"


def _ask_relations(
  world: World, rects: Sequence[Rect], unique: Sequence[int], draw: Draw
):
  pairs = {
    (i, j): [
      *captions.relations(world.objects, rects, i, j),
      *_compare_sizes(rects[i], rects[j]),
    ]
    for i, j in itertools.permutations(unique, 2)
  }
  for kind, (text, answers) in _RELATIONS.items():
    clear_pairs = [
      (pair, answers[word])
      for pair, words in pairs.items()
      for word in words
      if word in answers
    ]
    if clear_pairs:
      pair, answer = draw.choice(clear_pairs)
      names = (world.objects[i].colour for i in pair)
      yield kind, text.format(*names), answer, kind


def _compare_sizes(a: Rect, b: Rect) -> list[str]:
  """Whether the first looks larger or smaller, if area and height agree."""
  ratio, is_taller = a.area / b.area, (a.y1 - a.y0) > (b.y1 - b.y0)
  if ratio > _MIN_RATIO and is_taller:
    return ["larger"]
  return ["smaller"] if ratio < 1 / _MIN_RATIO and not is_taller else []
