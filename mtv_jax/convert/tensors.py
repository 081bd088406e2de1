"""Reads, checks and writes a checkpoint's tensors by conversion rules."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.text import first_lines
from mtv_jax.utils.tree import unflatten_names


@runtime_checkable
class TensorFile(Protocol):
  """Named tensors of `path`, read one at a time."""

  path: Any

  @property
  def names(self) -> Iterable[str]: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def read(self, name: str) -> np.ndarray: ...


def load(
  rules: Sequence[Rule], store: TensorFile, *, ignore: str = r"(?!)"
) -> dict[str, Any]:
  """Reads our parameter tree as contiguous float32 arrays.

  `ignore` is a regular expression for unused tensors. Errors name all missing,
  unexpected and mismatched tensors.
  """
  check_tensors(rules, store, ignore=ignore)
  file_names = set(store.names)
  leaves: dict[str, np.ndarray] = {}
  for rule in rules:
    for i in range(max(rule.depth, 1)):
      names = [name.replace("{i}", str(i)) for name in rule.tensors]
      is_default = rule.default and not file_names.intersection(names)
      arrays = (
        rule.default
        if is_default
        else [read_float(store, name) for name in names]
      )
      for name, value in zip(rule.leaves, rule.read(*arrays), strict=True):
        if not rule.depth:
          leaves[name] = np.ascontiguousarray(value).reshape(value.shape)
          continue
        if name not in leaves:
          leaves[name] = np.empty((rule.depth, *value.shape), np.float32)
        leaves[name][i] = value
  return unflatten_names(leaves)


def read_float(store: TensorFile, name: str) -> Float32[np.ndarray, "..."]:
  """Reads a floating-point tensor as float32; it must be finite."""
  array = store.read(name)
  if not jnp.issubdtype(array.dtype, np.floating):
    raise ConversionError(
      f"{store.path}: {name!r} is of type {array.dtype}; expected a floating-"
      "point type. Quantized weights are not supported."
    )
  with np.errstate(over="ignore"):  # Checked below.
    array = np.asarray(array, np.float32)
  if not (is_finite := np.isfinite(array)).all():
    raise ConversionError(
      f"{store.path}: {name!r} has {array.size - is_finite.sum():,} of"
      f" {array.size:,} values that are not finite in float32."
    )
  return array


def save(
  rules: Sequence[Rule], leaves: Mapping[str, Float[np.ndarray, "..."]]
) -> dict[str, np.ndarray]:
  """Converts our flat leaves to the file's tensors; the inverse of `load`."""
  tensors: dict[str, np.ndarray] = {}
  for rule in rules:
    for i in range(max(rule.depth, 1)):
      arrays = [leaves[n][i] if rule.depth else leaves[n] for n in rule.leaves]
      values = rule.write(*arrays)
      for name, value in zip(rule.tensors, values, strict=True):
        # safetensors ignores the strides of a view.
        contiguous = np.ascontiguousarray(value).reshape(value.shape)
        tensors[name.replace("{i}", str(i))] = contiguous
  return tensors


def check_tensors(
  rules: Sequence[Rule], store: TensorFile, *, ignore: str
) -> None:
  """Checks a file's names and shapes against the rules; see `load`."""
  expected = dict(pair for rule in rules for pair in rule.expected_shapes())
  file_names = set(store.names)
  optional = {name for rule in rules if rule.default for name in rule.tensors}
  missing = [n for n in expected if n not in file_names | optional]
  unexpected = sorted(
    n for n in file_names - set(expected) if not re.search(ignore, n)
  )
  mismatched = [
    f"{name}: {store.shape(name)} in the file, {shape} expected"
    for name, shape in expected.items()
    if name in file_names and tuple(store.shape(name)) != shape
  ]
  if not (missing or unexpected or mismatched):
    return
  lines = [f"{store.path} doesn't match its config."]
  for title, names in (
    ("missing", missing),
    ("unexpected", unexpected),
    ("mismatched", mismatched),
  ):
    if names:
      lines.append(f"{title} ({len(names)}):\n{first_lines(names, 10)}")
  lines.append(_guess_cause(missing, unexpected, mismatched))
  raise ConversionError("\n".join(lines))


_CAUSES = (
  (r"lora_|\.base_layer\.", "Merge the adapters (LoRA) into the weights."),
  (
    r"\.SCB$|absmax|quant_map|weight_scale|qweight|qzeros",
    "The weights are quantised: save them in float32, float16 or bfloat16.",
  ),
  (
    r"weights_in|weights_out",
    "The MLP is a SwiGLU (DINOv2 giant): set use_swiglu_ffn in the config.",
  ),
  (r"classifier|^head/", "The model is a classifier."),
)


def _guess_cause(
  missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str]
) -> str:
  """Returns the last line of the error."""
  for pattern, cause in _CAUSES:
    if any(re.search(pattern, name) for name in unexpected):
      return cause
  if mismatched and not missing and not unexpected:
    if all("position" in m or "pos_emb" in m for m in mismatched):
      return (
        "The position embedding has another resolution or text length than "
        "the config's image_size, patch_size or max_position_embeddings."
      )
    return (
      "The config's sizes (hidden_size, intermediate_size, vocab_size, "
      "patch_size, ...) belong to another checkpoint than the weights."
    )
  names = [*missing, *unexpected]
  if not mismatched and all(re.search(r"\D\d+\D", n) for n in names):
    return "The config's number of layers differs from the file's."
  if missing and unexpected:
    hint = did_you_mean(missing[0], unexpected, limit=3)
    return f"Names differ: for {missing[0]!r}: {hint}"
  if missing:
    return "The file is incomplete, or its config belongs to another model."
  return "The file has more arrays than the model, or another model's config."
