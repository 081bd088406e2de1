"""Low-rank adapters of kernels (LoRA, Hu et al. 2022).

An adapted kernel W `[..., m, n]` has siblings `lora_a` `[..., m, r]` and
`lora_b` `[..., r, n]`, and the model computes with W + alpha / r * A B, see
`LoraConfig.merge`. W is frozen. B starts at zero, so that the first step sees
W itself.
"""

import dataclasses
import functools
import operator
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtv_jax.config import sections
from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import flatten_with_names, select_names

LEAVES = "lora_a", "lora_b"
PATTERN = r"/lora_[ab]$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """`config.lora`: adapters; other parameters of `modules` are frozen."""

  rank: PositiveInt = 8
  alpha: PositiveFloat = 16.0
  # Regexes over the names of kernels. The columns of fused q, k and v share A.
  targets: tuple[str, ...] = ("/blocks/",)
  train: tuple[str, ...] = ()  # Regexes of further parameters to train.
  # Prefixes of names: the towers, or a language model, which is
  # "heads/language_model/decoder".
  modules: tuple[str, ...] = sections.sparse(("image", "text"))

  def __post_init__(self):
    for name in ("targets", "modules"):
      if not getattr(self, name):
        raise InputError(f"config.lora.{name} is empty: name what to adapt.")
    for pattern in (*self.targets, *self.train):
      try:
        re.compile(f"x(?:{pattern})")  # Within the rule that freezes the rest.
      except re.error as error:
        raise InputError(f"config.lora: {pattern!r}: {error}.") from None

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  @property
  def freezing_rule(self) -> list[Any]:
    """The entry of `config.optim.rules` that freezes the modules.

    The mask token trains: released encoders often lack it, and inference never
    reads it.
    """
    trainable = "|".join([PATTERN, "^image/mask_token$", *self.train])
    modules = "|".join(self.modules)
    return [f"^(?!.*(?:{trainable}))({modules})/", {"lr": 0.0}]

  def add(self, params: Mapping[str, Any], rng: jax.Array) -> PyTree:
    """Adds adapters to the parameters; raises InputError for unused regexes.

    A is uniform in +-1 / sqrt(m), as in PEFT. Keys are derived from names.
    """
    flat = dict(flatten_with_names(params))
    prefixes = tuple(f"{module}/" for module in self.modules)
    names = [name for name in flat if name.startswith(prefixes)]
    options = dict(unused="error")
    select_names(names, self.train, what="config.lora.train", **options)
    kernels = [n for n in names if n.endswith("/kernel") and flat[n].ndim > 1]
    options["what"] = "config.lora.targets"
    params = jax.tree.map(lambda x: x, params)  # Copies the dictionaries.
    for name in select_names(kernels, self.targets, **options):
      *lead, m, n = flat[name].shape
      if self.rank > min(m, n):
        raise InputError(
          f"config.lora.rank is {self.rank}, but {name} is {m} x {n}: expected "
          f"at most {min(m, n)}."
        )
      key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
      down = jax.random.uniform(key, (*lead, m, self.rank), minval=-1.0)
      zeros = jnp.zeros((*lead, self.rank, n))
      parents = name.split("/")[:-1]
      layer = functools.reduce(operator.getitem, parents, params)
      layer |= zip(LEAVES, (down / m**0.5, zeros), strict=True)
    return params

  def merge(self, tree: PyTree) -> PyTree:
    """Replaces kernels with W + alpha / r * A B, and drops the adapters.

    The tree is any branch of the parameters, with JAX or NumPy arrays. Called
    by `encoder.loading.read_run` for export and evaluation, and by
    `StepSpec.merge_adapters` in the step.
    """
    if not isinstance(tree, Mapping):
      return tree
    tree = {name: self.merge(branch) for name, branch in tree.items()}
    if LEAVES[0] not in tree:
      return tree
    down, up = (tree.pop(name) for name in LEAVES)
    if isinstance(down, np.ndarray):
      product = down @ up
    else:
      product = jnp.matmul(down, up, precision="highest")
    return {**tree, "kernel": tree["kernel"] + self.scale * product}
