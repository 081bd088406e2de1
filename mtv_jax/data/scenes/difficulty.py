"""Difficulty of built-in scenes: what varies, and over which range."""

import dataclasses
import math
from typing import Literal

from mtv_jax.data.scenes.world import (
  BACKDROPS,
  COLOURS,
  GROUNDS,
  SIZES,
  TEXTURES,
)

Level = Literal["easy", "medium", "hard"]
Span = tuple[float, float]
# Caption kinds, in the order of `captions.captions`.
CAPTIONS = ("full", "main", "relation", "count", "surroundings")


@dataclasses.dataclass(frozen=True)
class Difficulty:
  """Sampling ranges of scenes; the defaults are the hardest.

  Lengths are in metres, angles in radians. Positions and apparent sizes are
  fractions of the image side.
  """

  others: tuple[int, ...] = (0, 1, 1, 2, 2, 2, 3, 3, 4)  # Besides the main one.
  colours: tuple[str, ...] = tuple(COLOURS)
  textures: tuple[str, ...] = TEXTURES
  sizes: tuple[str, ...] = tuple(SIZES)
  yaw: Span = (0.0, 2 * math.pi)  # Of solids.
  board_yaw: float = 0.6  # Maximum turn of a board away from the camera.
  main_height: Span = (0.36, 0.58)
  main_column: Span = (0.25, 0.75)
  other_height: float = 0.13  # Minimum, on the ground.
  # Probabilities: the main or an additional object floats; an additional object
  # copies the main one, or stands on an object.
  floats: Span = (0.25, 0.35)
  copies: float = 0.12
  stacks: float = 0.5
  turn: float = 0.35  # Maximum, of the backdrop.
  distance: Span = (6.0, 11.0)  # To the backdrop.
  camera_height: Span = (0.65, 1.15)
  camera_pitch: Span = (0.12, 0.3)
  grounds: tuple[str, ...] = tuple(GROUNDS)
  backdrops: tuple[str, ...] = tuple(BACKDROPS)
  captions: tuple[str, ...] = CAPTIONS


DIFFICULTIES: dict[str, Difficulty] = {
  "easy": Difficulty(
    others=(0, 1, 1),
    colours=("red", "orange", "yellow", "turquoise", "blue", "purple"),
    textures=("plain",),
    sizes=("medium",),
    yaw=(-0.5, 0.5),
    board_yaw=0.3,
    main_height=(0.56, 0.7),
    main_column=(0.38, 0.62),
    other_height=0.25,
    floats=(0.0, 0.0),
    copies=0.0,
    stacks=0.0,
    turn=0.1,
    distance=(5.0, 7.0),
    camera_height=(0.8, 1.0),
    camera_pitch=(0.16, 0.24),
    grounds=("grass", "sand", "a tiled floor", "snow"),
    backdrops=("a brick wall", "a white wall", "a hedge", "a cloudy sky"),
    # Captions that name only classes teach the classes soonest.
    captions=("full", "main", "count"),
  ),
  "medium": Difficulty(
    others=(0, 1, 1, 2),
    textures=("plain", "striped", "dotted", "checkered"),
    yaw=(-0.8, 0.8),
    board_yaw=0.4,
    main_height=(0.42, 0.62),
    main_column=(0.3, 0.7),
    other_height=0.18,
    floats=(0.15, 0.2),
    copies=0.06,
    stacks=0.25,
    turn=0.2,
    distance=(5.0, 9.0),
  ),
  "hard": Difficulty(),
}
