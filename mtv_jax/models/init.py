"""Initialisation schemes of the towers, from published codebases.

The modules declare the `big_vision` initialisation. Any other scheme replaces
the parameters that its regular expressions match. In CLIP and DINOv2 the CLS
token has a position embedding; ours is part of the token, whose variance is the
sum of both.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax.linen import initializers
from jaxtyping import Array

from mtv_jax.utils.errors import check_choice
from mtv_jax.utils.tree import first_match, map_with_names

Initializer = Callable[[Array, Sequence[int]], Array]
Rules = list[tuple[str, Initializer]]  # The first match wins.

_zeros = initializers.zeros


# Some references truncate at +-2, a hundred standard deviations.
_normal = initializers.normal


def _uniform(limit: float) -> Initializer:
  def init(key, shape):
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

  return init


def _torch_default(fan_in: int) -> Initializer:
  """Default of torch's linear and convolutional layers, including biases."""
  return _uniform(fan_in**-0.5)


def _torch_patch_default(spec: Any) -> Initializer:
  return _torch_default(3 * spec.image.patch_size**2)


def _xavier_uniform(key: Array, shape: Sequence[int]) -> Array:
  """Xavier-uniform over the last two dimensions (Glorot and Bengio 2010)."""
  return _uniform((6 / (shape[-2] + shape[-1])) ** 0.5)(key, shape)


def _dino_rules(spec: Any, register_std: float) -> Rules:
  return [
    ("^image/patch_embed/", _torch_patch_default(spec)),
    ("^image/(position_embedding|cls_token)$", _normal(0.02)),
    ("^image/registers$", _normal(register_std)),
    ("^image/.*/kernel$", _normal(0.02)),
    ("^image/.*/bias$", _zeros),
  ]


def _mae_rules(spec: Any) -> Rules:
  """MAE: Xavier-uniform, also for the fused QKV kernel."""
  return [
    ("^image/patch_embed/bias$", _torch_patch_default(spec)),
    ("^image/(cls_token|mask_token)$", _normal(0.02)),
    ("^image/.*kernel$", _xavier_uniform),
    ("^image/.*bias$", _zeros),
  ]


def _clip_rules(spec: Any) -> Rules:
  """CLIP: torch's defaults for the ViT, its own for the text transformer."""
  image, text = spec.image, spec.text
  std = image.width**-0.5
  rules = [
    ("^image/patch_embed/", _torch_patch_default(spec)),
    ("^image/cls_token$", _normal(2**0.5 * std)),
    ("^image/(position_embedding|projection/kernel)$", _normal(std)),
    ("^image/blocks/attention/qkv/kernel$", _xavier_uniform),
    ("^image/blocks/attention/.*bias$", _zeros),
    ("^image/blocks/(attention/out|mlp/fc1)/", _torch_default(image.width)),
    ("^image/blocks/mlp/fc2/", _torch_default(image.mlp_dim)),
  ]
  if text is None:
    return rules
  std = text.width**-0.5
  residual_init = _normal(std * (2 * text.depth) ** -0.5)
  return [
    *rules,
    ("^text/token_embedding$", _normal(0.02)),
    ("^text/position_embedding$", _normal(0.01)),
    ("^text/blocks/attention/qkv/kernel$", _normal(std)),
    ("^text/blocks/(attention/out|mlp/fc2)/kernel$", residual_init),
    ("^text/blocks/attention/.*bias$", _zeros),
    ("^text/blocks/mlp/fc1/kernel$", _normal((2 * text.width) ** -0.5)),
    ("^text/blocks/mlp/fc1/bias$", _torch_default(text.width)),
    ("^text/blocks/mlp/fc2/bias$", _torch_default(text.mlp_dim)),
    ("^text/projection/kernel$", _normal(std)),
  ]


def _siglip_rules(spec: Any) -> Rules:
  """big_vision's text tower: Flax's `nn.Embed` default, also for positions."""
  std = spec.text.width**-0.5 if spec.text else 1.0
  return [("^text/(token|position)_embedding$", _normal(std))]


SCHEMES: dict[str, Callable[[Any], Rules]] = {
  # big_vision's ViT; CLIP's embeddings for the text tower.
  "big_vision": lambda spec: [],
  "siglip": _siglip_rules,
  "clip": _clip_rules,
  "dinov2": functools.partial(_dino_rules, register_std=1e-6),
  "dinov3": functools.partial(_dino_rules, register_std=0.02),
  "mae": _mae_rules,
}


def reinitialize(
  params: Mapping[str, Any], spec: Any, rng: Array, scheme: str
) -> dict[str, Any]:
  """Reinitialises the towers' parameters that match a rule of the scheme."""
  check_choice("config.model.init", scheme, SCHEMES)
  rules = [*SCHEMES[scheme](spec), (".", None)]

  def replace(name, leaf):
    rule = first_match(name, rules)
    if rule is None:
      return leaf
    # crc32, since hash() differs between processes.
    key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
    return rule(key, leaf.shape).astype(leaf.dtype)

  return map_with_names(replace, dict(params))
