"""Check of a checkpoint against its table: differing tensors, and why."""

import re
from collections.abc import Sequence

from mtv_jax.convert.tables import ConversionError, Rule, Store
from mtv_jax.utils.errors import did_you_mean


def check(
  rules: Sequence[Rule], store: Store, *, what: str, ignore: str = r"(?!)"
) -> None:
  """Compares the names and shapes of a file with a table.

  Args:
    rules: the table.
    store: the file.
    what: how to call the file in errors.
    ignore: a regular expression of names that may be there unused.

  Raises:
    ConversionError: naming every missing, unexpected or mismatched tensor.
  """
  expected = dict(pair for rule in rules for pair in rule.files())
  present = set(store.names)
  missing = [n for n in expected if n not in present]
  unexpected = sorted(
    n for n in present - set(expected) if not re.search(ignore, n)
  )
  mismatched = [
    f"{name}: {store.shape(name)} in the file, {shape} expected"
    for name, shape in expected.items()
    if name in present and tuple(store.shape(name)) != tuple(shape)
  ]
  if not (missing or unexpected or mismatched):
    return
  lines = [f"{what} does not hold the model that its config describes."]
  for title, names in (
    ("missing", missing),
    ("unexpected", unexpected),
    ("of another shape", mismatched),
  ):
    if names:
      lines.append(f"  {title} ({len(names)}):")
      lines.extend(f"    {name}" for name in names)
  lines.append("  " + _cause(missing, unexpected, mismatched))
  raise ConversionError("\n".join(lines))


_CAUSES = (
  (
    r"lora_|\.base_layer\.",
    "Adapters (LoRA) are not merged: merge them into the weights first.",
  ),
  (
    r"\.SCB$|absmax|quant_map|weight_scale|qweight|qzeros",
    "The weights are quantised: save them in float32, float16 or bfloat16.",
  ),
  (
    r"weights_in|weights_out",
    "The MLP is a SwiGLU (as in DINOv2 giant), and the config does not say so: "
    "set use_swiglu_ffn in it.",
  ),
  (r"classifier|^head/", "The file ends in a classifier's head."),
)


def _cause(
  missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str]
) -> str:
  """A guess at what went wrong, for the last line of the error."""
  for pattern, cause in _CAUSES:
    if any(re.search(pattern, name) for name in unexpected):
      return cause
  if mismatched and not missing and not unexpected:
    if all("position" in m or "pos_emb" in m for m in mismatched):
      return (
        "The position embedding is of another resolution or text length than "
        "the config's image_size, patch_size or max_position_embeddings."
      )
    return (
      "The config's sizes (hidden_size, intermediate_size, vocab_size, "
      "patch_size, ...) belong to another checkpoint than the weights."
    )
  layers = re.compile(r"\D(\d+)\D")
  pool = [*missing, *unexpected]
  if pool and all(layers.search(n) for n in pool) and not mismatched:
    return "The config's number of layers is not the file's."
  if missing and unexpected:
    hint = did_you_mean(missing[0], unexpected, limit=3)
    return f"Names differ: for {missing[0]!r}: {hint}"
  if missing:
    return "The file is not whole, or is of another kind than its config says."
  return "The file holds more than the model, or its config is of another one."
