"""Rematerialisation: what each block saves for its backward pass.

A choice is the name of a policy in `POLICIES`, or names of `NAMES` with commas,
which are saved while the rest is recomputed. 'mlp_hidden:host' saves an array
in the host's memory: for steps that don't fit otherwise, since a byte of a
product of 768 channels takes 4 ps to recompute at 197 TFLOP/s, and 60 each way
at PCIe's 16 GB/s. A tower's choice can differ by encoding, see `Remat`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax

from mtv_jax.utils.errors import ConfigError, did_you_mean

# Arrays of a block that `checkpoint_name` marks, in the order in which they are
# computed. What else a backward pass reads follows from them without a product
# of matrices, except for the attention's weights.
NAMES = (
  "qkv",  # Queries, keys and values.
  "attention",  # Weighted sums of the values, which `out` projects.
  "attention_out",  # Output of the projection `out`.
  "mlp_hidden",  # Input of the MLP's non-linearity, of both halves of SwiGLU.
  "mlp_out",  # Output of the MLP; read by layer scale and drop path alone.
)
# 'none' saves everything, 'full' only the block's input, 'dots' every matrix
# product, the attention logits too; 'dots_no_batch' saves products with weights
# and recomputes attention.
POLICIES: dict[str, Callable | None] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# Suffix of a name that is saved in the host's memory.
HOST = ":host"
# As a config's value: what fits the chip, see `perf/preflight/remat.py`. A run
# records its choice as 'auto:CHOICE'.
AUTO = "auto"


def build_policy(choice: str, *, where: str = "remat") -> Callable | None:
  """The policy of `jax.checkpoint` for a choice; None to save everything."""
  choice = choice.strip()
  if choice in POLICIES:
    return POLICIES[choice]
  parts = [part.strip() for part in choice.split(",")]
  names = {
    part.removesuffix(HOST).strip(): part.endswith(HOST) for part in parts
  }
  for name in names:
    if name in (*POLICIES, AUTO):
      whole = "all of config.model.remat" if name == AUTO else "a whole choice"
      raise ConfigError(f"{where} is {choice!r}: {name!r} can be {whole} only.")
    if name not in NAMES:
      raise ConfigError(
        f"{where} is {choice!r}, expected one of {', '.join(POLICIES)} or, "
        f"with commas, arrays of a block: {', '.join(NAMES)}, with {HOST!r} to "
        f"save them in the host's memory. {name!r} is none of them. "
        f"{did_you_mean(name, (*POLICIES, *NAMES))}"
      )
  if len(names) < len(parts):
    raise ConfigError(f"{where} is {choice!r}, which names an array twice.")
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[n for n, on_host in names.items() if not on_host],
    names_which_can_be_offloaded=[n for n, on_host in names.items() if on_host],
    offload_src="device",
    offload_dst="pinned_host",
  )


@dataclasses.dataclass(frozen=True)
class Remat:
  """Choices of a config's towers, such as 'full|image=qkv|local=mlp_hidden'.

  The first part is that of all encodings without an entry. An entry's key is a
  view, a text field ('caption'), or a tower ('image', 'text'), for its
  encodings without an entry of their own. A view named as its tower is the
  tower's entry.
  """

  default: str
  entries: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @classmethod
  def parse(cls, text: str, keys: Iterable[str] | None = None) -> Remat:
    """Parses the value of `config.model.remat`.

    `keys` are those that entries may have; any by default.
    """
    where = "config.model.remat"
    text = text.removeprefix(f"{AUTO}:")
    if text.strip() == AUTO:
      raise ConfigError(
        f"{where} is {AUTO!r}, which `mtv-jax train` and `mtv-jax preflight` "
        "replace by what fits the chip, and print. Set it to that value."
      )
    default, *rest = (part.strip() for part in text.split("|"))
    if "=" in default:
      default, rest = "full", [default, *rest]
    build_policy(default, where=where)
    entries = {}
    for part in rest:
      key, equals, choice = (word.strip() for word in part.partition("="))
      if not equals or (keys is not None and key not in keys):
        expected = "" if keys is None else f": {', '.join(sorted(keys))}"
        raise ConfigError(
          f"{where}: {part!r} is not VIEW=CHOICE or TOWER=CHOICE of an "
          f"encoding that this config trains{expected}."
        )
      if key in entries:
        raise ConfigError(f"{where}: two entries of {key!r} in {text!r}.")
      build_policy(choice, where=where)
      entries[key] = choice
    return cls(default, entries)

  def __str__(self) -> str:
    parts = [f"{key}={choice}" for key, choice in self.entries.items()]
    return "|".join([self.default, *parts])

  def choose(self, tower: str, view: str) -> str:
    """The choice of an encoding."""
    tower_choice = self.entries.get(tower, self.default)
    return self.entries.get(view, tower_choice)
