"""Captions of built-in scenes; true of every image.

"Left" and "right" are in image coordinates. "In front of" and "behind" mean
clearly nearer and farther. "Small" and "large" are sizes in the scene (0.5 m,
1.3 m), whatever the distance. Class names never vary, so prompts built from
them use the captions' words.
"""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from mtv_jax.data.scenes.layout import CAPTIONS, Draw
from mtv_jax.data.scenes.world import Rect, SceneObject, World

_COUNTS = ("no", "one", "two", "three", "four", "five")
_NOUNS = {"striped": "stripes", "dotted": "dots", "zigzag": "zigzags"}
_SIZES = {"large": ("large", "big"), "small": ("small", "little")}
_TEMPLATES = (
  "a photo of {}",
  "a picture of {}",
  "{}",
  "there is {} in the picture",
  "an image showing {}",
)


def article(phrase: str) -> str:
  """Prepends 'a' or 'an' by sound: 'an hourglass'."""
  is_vowel = phrase[0] in "aeiou" or phrase.startswith("hour")
  return ("an " if is_vowel else "a ") + phrase


def plural(name: str) -> str:
  if name == "fish":
    return name
  if name.endswith("man"):
    return name[:-3] + "men"
  return name + ("es" if name.endswith("s") else "s")


def appearance(obj: SceneObject) -> str:
  """Colour, texture and class: 'red ball with white dots'."""
  if obj.texture == "plain":
    return f"{obj.colour} {obj.name}"
  if obj.texture == "checkered":
    return f"{obj.colour} and {obj.second} checkered {obj.name}"
  if obj.second:
    noun = _NOUNS[obj.texture]
    return f"{obj.colour} {obj.name} with {obj.second} {noun}"
  return f"{obj.colour} {obj.texture} {obj.name}"


def phrase(obj: SceneObject) -> str:
  """Label of an object's box: size (unless medium) and appearance."""
  if obj.size == "medium":
    return appearance(obj)
  return f"{obj.size} {appearance(obj)}"


def _describe(obj: SceneObject, draw: Draw) -> str:
  """Like `phrase`, with varying words and an article."""
  words = appearance(obj)
  if obj.texture == "striped" and draw.uniform() < 0.5:
    words = f"{obj.colour} and {obj.second} striped {obj.name}"
  if obj.size in _SIZES:
    words = f"{draw.choice(_SIZES[obj.size])} {words}"
  return article(words)


def relations(
  objects: Sequence[SceneObject], rects: Sequence[Rect], i: int, j: int
):
  """Lists clear relations of object i to j, as keys of `_RELATION_PHRASES`."""
  if objects[i].support == j:
    return ["on top of"]
  if objects[j].support == i:
    return ["below"]
  a, b = rects[i], rects[j]
  words = []
  distance = abs(a.centre - b.centre)
  reach = (a.x1 - a.x0 + b.x1 - b.x0) / 2
  if distance < 0.5 * reach:
    if a.y1 < b.y0:
      words.append("above")
    elif b.y1 < a.y0:
      words.append("below")
  if distance > max(0.8 * reach, 0.1):
    words.append("left of" if a.centre < b.centre else "right of")
  if abs(a.depth - b.depth) > max(objects[i].radius + objects[j].radius, 0.5):
    words.append("in front of" if a.depth < b.depth else "behind")
  return words


_RELATION_PHRASES = {
  "left of": ("to its left", "left of it"),
  "right of": ("to its right", "right of it"),
  "in front of": ("in front of it", "closer than it"),
  "behind": ("behind it", "farther back"),
  "above": ("above it",),
  "below": ("below it",),
  "on top of": ("on top of it", "standing on it"),
}


def _surroundings(world: World, main: SceneObject) -> str:
  over = "on" if main.base == 0 else "above"
  before = "under" if "sky" in world.backdrop else "in front of"
  return f"{over} {world.ground} {before} {world.backdrop}"


def _full_caption(world: World, objects, rects, draw: Draw) -> str:
  """Names all objects, their relations to the first, ground and backdrop."""
  parts = [_describe(objects[0], draw)]
  for i, obj in enumerate(objects[1:], 1):
    words = _describe(obj, draw)
    if obj.support > 0:
      below = objects[obj.support]
      words += f" on top of the {below.colour} {below.name}"
    elif related := relations(objects, rects, i, 0):
      words += f" {draw.choice(_RELATION_PHRASES[draw.choice(related)])}"
    else:
      words += " beside it"
    parts.append(words)
  return ", ".join(parts) + f", {_surroundings(world, objects[0])}"


def _relation_caption(world: World, objects, rects, draw: Draw) -> str:
  """States a relation of two objects, named only by colour and class."""
  names = [f"{t.colour} {t.name}" for t in objects]
  unique = [i for i, words in enumerate(names) if names.count(words) == 1]
  pairs = [
    (i, j, related)
    for i, j in itertools.permutations(unique, 2)
    if (related := relations(objects, rects, i, j))
  ]
  if not pairs:
    main = objects[0]
    verb = "standing on" if main.base == 0 else "above"
    return f"{_describe(main, draw)} {verb} {world.ground}"
  i, j, related = draw.choice(pairs)
  word = draw.choice(related)
  if word in ("left of", "right of"):
    word = draw.choice((word, f"to the {word}"))
  template = draw.choice(("the {} is {} the {}", "the {} {} the {}"))
  return template.format(names[i], word, names[j])


def _count_caption(objects) -> str:
  names = collections.Counter(obj.name for obj in objects)
  parts = [
    article(name) if n == 1 else f"{_COUNTS[n]} {plural(name)}"
    for name, n in names.items()
  ]
  *first, last = parts
  return f"{', '.join(first)} and {last}" if first else last


def captions(
  world: World, rects: list[Rect], visible: list[int], draw: Draw
) -> tuple[str, ...]:
  """Returns captions of one view of a scene, filtered by `caption_kinds`.

  They mention only the objects in `visible` (indices, at least one). `rects`
  are the bounds of all objects in the view. `draw` selects among wordings.
  """
  objects = [world.objects[i] for i in visible]
  rects = [rects[i] for i in visible]
  if len(visible) < len(world.objects):
    indices = {old: new for new, old in enumerate(visible)}
    objects = [
      dataclasses.replace(obj, support=indices.get(obj.support, -1))
      for obj in objects
    ]
  main = objects[0]
  count_caption = _count_caption(objects)
  if len(objects) > 1 and draw.uniform() < 0.4:
    count_caption = f"{_COUNTS[len(objects)]} objects: {count_caption}"
  texts = (
    _full_caption(world, objects, rects, draw),
    draw.choice(_TEMPLATES).format(article(appearance(main))),
    _relation_caption(world, objects, rects, draw),
    draw.choice(_TEMPLATES[:3]).format(count_caption),
    f"{article(f'{main.colour} {main.name}')} {_surroundings(world, main)}",
  )
  named = zip(CAPTIONS, texts, strict=True)
  return tuple(text for kind, text in named if kind in world.caption_kinds)
