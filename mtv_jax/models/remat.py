"""Rematerialisation: what each block saves for its backward pass.

A choice is a policy in `POLICIES`, or a comma-separated list of saved `NAMES`;
the rest is recomputed. 'mlp_hidden:host' offloads an array to host memory, for
steps that don't fit otherwise: a byte of a product over 768 channels takes 4 ps
to recompute at 197 TFLOP/s, but 60 ps each way at PCIe's 16 GB/s. A tower's
choice can differ by encoding, see `Remat`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax

from mtv_jax.utils.errors import ConfigError, did_you_mean, printable

# Arrays of a block that `checkpoint_name` marks, in order of computation. The
# backward pass recomputes everything else without matrix products, except for
# the attention weights.
NAMES = (
  "qkv",  # Queries, keys and values.
  "attention",  # Weighted sums of the values, input of `out`.
  "attention_out",  # Output of the projection `out`.
  "mlp_hidden",  # Input of the MLP's non-linearity; both halves of SwiGLU.
  "mlp_out",  # Output of the MLP; only layer scale and drop path read it.
)
# 'none' saves everything, 'full' only the block's input, 'dots' every matrix
# product and the attention logits; 'dots_no_batch' saves products with weights
# and recomputes attention.
POLICIES: dict[str, Callable | None] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Suffix of a name that is offloaded to host memory.
HOST = ":host"
# Config value: `perf/preflight/search.py` selects what fits the chip. A run
# records its choice as 'auto:CHOICE'.
AUTO = "auto"


def build_policy(choice: str, *, where: str = "remat") -> Callable | None:
  """Returns the `jax.checkpoint` policy of a choice; None saves everything."""
  choice = choice.strip()
  if choice in POLICIES:
    return POLICIES[choice]
  parts = [part.strip() for part in choice.split(",")]
  names = {p.removesuffix(HOST).strip(): p.endswith(HOST) for p in parts}
  for name in names:
    if name in (*POLICIES, AUTO):
      where_allowed = (
        "all of config.model.remat" if name == AUTO else "a whole choice"
      )
      raise ConfigError(
        f"{where} is {choice!r}: {name!r} can only be {where_allowed}."
      )
    if name not in NAMES:
      hint, name = did_you_mean(name, (*POLICIES, *NAMES)), printable(name)
      raise ConfigError(
        f"{where} is {printable(choice)!r}: unknown {name!r}. {hint}"
      )
  if len(names) < len(parts):
    raise ConfigError(f"{where} is {choice!r}, which names an array twice.")
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[n for n in names if not names[n]],
    names_which_can_be_offloaded=[n for n in names if names[n]],
    offload_src="device",
    offload_dst="pinned_host",
  )


@dataclasses.dataclass(frozen=True)
class Remat:
  """Remat choices by encoding, such as 'full|image=qkv|local=mlp_hidden'.

  The first part is the default. A key is a view or a text field ('caption'), or
  a tower ('image', 'text'), which applies to its encodings without an entry. A
  key that names both a view and a tower is the tower's entry.
  """

  default: str
  entries: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @classmethod
  def parse(cls, text: str, keys: Iterable[str] | None = None) -> Remat:
    """Parses `config.model.remat`; entries use only `keys`, or any if None."""
    where = "config.model.remat"
    text = text.removeprefix(f"{AUTO}:")
    if text.strip() == AUTO:
      raise ConfigError(
        f"{where} is {AUTO!r}: set the choice that `mtv-jax preflight` prints."
      )
    default, *parts = (part.strip() for part in text.split("|"))
    if "=" in default:
      default, parts = "full", [default, *parts]
    build_policy(default, where=where)
    entries = {}
    for part in parts:
      key, equals, choice = (word.strip() for word in part.partition("="))
      if not equals or (keys is not None and key not in keys):
        names = ", ".join(sorted(keys or ()))
        raise ConfigError(f"{where}: {part!r} is not NAME=CHOICE of {names}.")
      if key in entries:
        raise ConfigError(f"{where}: two entries for {key!r} in {text!r}.")
      build_policy(choice, where=where)
      entries[key] = choice
    return cls(default, entries)

  def __str__(self) -> str:
    parts = [f"{key}={choice}" for key, choice in self.entries.items()]
    return "|".join([self.default, *parts])

  def choose(self, tower: str, view: str) -> str:
    """Returns the choice for an encoding."""
    return self.entries.get(view, self.entries.get(tower, self.default))
