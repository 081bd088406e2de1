"""Captions of built-in scenes: every word true of what the picture shows.

"Left" and "right" are those of the picture; "in front of" and "behind" mean
clearly nearer and farther; "small" and "large" are sizes in the scene (half a
metre, 1.3 metres), whatever the distance. Class names never vary, so that
prompts built from them meet the words of the captions.
"""

import collections
import dataclasses
from collections.abc import Sequence

from mtv_jax.data.scenes.layout import Draw
from mtv_jax.data.scenes.world import Rect, Thing, World

_COUNTS = ("no", "one", "two", "three", "four", "five")
_NOUNS = {"striped": "stripes", "dotted": "dots", "zigzag": "zigzags"}
_LARGE = ("large", "big")
_SMALL = ("small", "little")
_PHOTOS = (
  "a photo of {}",
  "a picture of {}",
  "{}",
  "there is {} in the picture",
  "an image showing {}",
)


def article(phrase: str) -> str:
  """The phrase behind 'a' or 'an', by sound: 'an hourglass'."""
  vowel = phrase[0] in "aeiou" or phrase.startswith("hour")
  return ("an " if vowel else "a ") + phrase


def plural(name: str) -> str:
  if name == "fish":
    return name
  if name.endswith("man"):
    return name[:-3] + "men"
  return name + ("es" if name.endswith("s") else "s")


def look(thing: Thing) -> str:
  """Colour, texture and class: 'red ball with white dots'."""
  if thing.texture == "plain":
    return f"{thing.colour} {thing.name}"
  if thing.texture == "checkered":
    return f"{thing.colour} and {thing.second} checkered {thing.name}"
  if thing.second:
    noun = _NOUNS[thing.texture]
    return f"{thing.colour} {thing.name} with {thing.second} {noun}"
  return f"{thing.colour} {thing.texture} {thing.name}"


def phrase(thing: Thing) -> str:
  """The name of a thing's box: size (unless medium) and look."""
  if thing.size == "medium":
    return look(thing)
  return f"{thing.size} {look(thing)}"


def _described(thing: Thing, draw: Draw) -> str:
  """As `phrase`, in varying words, with its article."""
  words = look(thing)
  if thing.texture == "striped" and draw.uniform() < 0.5:
    words = f"{thing.colour} and {thing.second} striped {thing.name}"
  if thing.size == "large":
    words = f"{draw.choice(_LARGE)} {words}"
  elif thing.size == "small":
    words = f"{draw.choice(_SMALL)} {words}"
  return article(words)


def relations(things: Sequence[Thing], rects: Sequence[Rect], i: int, j: int):
  """What holds of thing i with respect to thing j, in the picture.

  Returns:
    Some of 'on top of', 'below', 'above', 'left of', 'right of',
    'in front of', 'behind'; none where nothing is clear.
  """
  if things[i].support == j:
    return ["on top of"]
  if things[j].support == i:
    return ["below"]
  a, b = rects[i], rects[j]
  found = []
  apart = abs(a.centre - b.centre)
  reach = (a.x1 - a.x0 + b.x1 - b.x0) / 2
  if apart < 0.5 * reach:
    if a.y1 < b.y0:
      found.append("above")
    elif b.y1 < a.y0:
      found.append("below")
  if apart > max(0.8 * reach, 0.1):
    found.append("left of" if a.centre < b.centre else "right of")
  radii = things[i].radius + things[j].radius
  if abs(a.depth - b.depth) > max(radii, 0.5):
    found.append("in front of" if a.depth < b.depth else "behind")
  return found


_TO_IT = {
  "left of": ("to its left", "left of it"),
  "right of": ("to its right", "right of it"),
  "in front of": ("in front of it", "closer than it"),
  "behind": ("behind it", "farther back"),
  "above": ("above it",),
  "below": ("below it",),
  "on top of": ("on top of it", "standing on it"),
}


def _place(world: World, main: Thing) -> str:
  over = "on" if main.base == 0 else "above"
  before = "under" if "sky" in world.backdrop else "in front of"
  return f"{over} {world.ground} {before} {world.backdrop}"


def _full(world: World, things, rects, draw: Draw) -> str:
  """All things, how they lie about the first, ground and backdrop."""
  parts = [_described(things[0], draw)]
  for i in range(1, len(things)):
    found = relations(things, rects, i, 0)
    words = _described(things[i], draw)
    if things[i].support > 0:
      below = things[things[i].support]
      words += f" on top of the {below.colour} {below.name}"
    elif found:
      words += f" {draw.choice(_TO_IT[draw.choice(found)])}"
    else:
      words += " beside it"
    parts.append(words)
  return ", ".join(parts) + f", {_place(world, things[0])}"


def _relation(world: World, things, rects, draw: Draw) -> str:
  """How two things lie, by colour and class alone."""
  short = [f"{t.colour} {t.name}" for t in things]
  pairs = [
    (i, j, found)
    for i in range(len(things))
    for j in range(len(things))
    if i != j
    and short.count(short[i]) == short.count(short[j]) == 1
    and (found := relations(things, rects, i, j))
  ]
  if not pairs:
    main = things[0]
    verb = "standing on" if main.base == 0 else "above"
    return f"{_described(main, draw)} {verb} {world.ground}"
  i, j, found = draw.choice(pairs)
  joint = draw.choice(found)
  if joint in ("left of", "right of"):
    joint = draw.choice((joint, f"to the {joint}"))
  first, second = short[i], short[j]
  form = draw.choice(("the {} is {} the {}", "the {} {} the {}"))
  return form.format(first, joint, second)


def _listed(things) -> str:
  """How many there are of each class."""
  names = collections.Counter(thing.name for thing in things)
  parts = [
    article(name) if n == 1 else f"{_COUNTS[n]} {plural(name)}"
    for name, n in names.items()
  ]
  if len(parts) == 1:
    return parts[0]
  return ", ".join(parts[:-1]) + " and " + parts[-1]


def captions(
  world: World, rects: list[Rect], visible: list[int], draw: Draw
) -> tuple[str, ...]:
  """Five captions of one view of a scene, the full one first.

  Args:
    world: the scene.
    rects: where its things appear in this view.
    visible: positions of the things to speak of, at least one; the first is
      the one that the others are related to.
    draw: picks among equivalent wordings.

  Returns:
    A full description; the first thing alone; a relation between two things;
    the things counted by class; the first thing and its surroundings.
  """
  renamed = {old: new for new, old in enumerate(visible)}
  things = [world.things[i] for i in visible]
  rects = [rects[i] for i in visible]
  if len(visible) < len(world.things):
    things = [
      dataclasses.replace(thing, support=renamed.get(thing.support, -1))
      for thing in things
    ]
  main = things[0]
  counted = _listed(things)
  if len(things) > 1 and draw.uniform() < 0.4:
    counted = f"{_COUNTS[len(things)]} objects: {counted}"
  return (
    _full(world, things, rects, draw),
    draw.choice(_PHOTOS).format(article(look(main))),
    _relation(world, things, rects, draw),
    draw.choice(_PHOTOS[:3]).format(counted),
    f"{article(f'{main.colour} {main.name}')} {_place(world, main)}",
  )
