"""Reading the numbers of a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from mtv_jax.convert.tables import ConversionError

GELUS = {
  "gelu_pytorch_tanh": "tanh",
  "gelu_new": "tanh",
  "gelu_fast": "tanh",
  "gelu": "exact",
  "gelu_python": "exact",
  "quick_gelu": "quick",
}
HIDDEN_ACT = {
  "tanh": "gelu_pytorch_tanh",
  "exact": "gelu",
  "quick": "quick_gelu",
}


def filled(
  config: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """A config with the library's defaults where the file is silent.

  Published configs often hold only what differs from the defaults.
  """
  given = {k: v for k, v in (config or {}).items() if v is not None}
  return {**defaults, **given}


def gelu(config: Mapping[str, Any]) -> str:
  """The activation's name in our specs."""
  name = config["hidden_act"]
  if name not in GELUS:
    raise ConversionError(
      f"hidden_act={name!r} is not an activation of our towers, which have "
      f"{sorted(GELUS)}."
    )
  return GELUS[name]


def side(value: Any, field: str) -> int:
  """An integer, or a pair of equal ones."""
  if isinstance(value, (list, tuple)):
    if len(set(value)) != 1:
      raise ConversionError(
        f"{field}={list(value)}: only square images and patches convert."
      )
    value = value[0]
  return int(value)


def square(config: Mapping[str, Any]) -> dict[str, int]:
  """image_size and patch_size, checked."""
  if config.get("num_channels", 3) != 3:
    raise ConversionError(
      f"num_channels={config['num_channels']}: only RGB models convert."
    )
  sizes = {k: side(config[k], k) for k in ("image_size", "patch_size")}
  # Theirs drop the pixels that don't fill a patch; a grid is what is stored.
  patch = sizes["patch_size"]
  sizes["image_size"] = sizes["image_size"] // patch * patch
  return sizes
