"""A train step of ours beside PyTorch's, on one CPU, in one run.

Both sides get the same weights and the same batch, so that the losses of their
first steps are equal: what is timed is the same work. Rounds alternate, so that
what else the machine does disturbs both alike.

  siglip         ViT-S/16 and its text tower, sigmoid loss; against open_clip's
                 model and loss
  distillation   DINO and iBOT on ViT-S/16, two global and eight local crops;
                 against a step written from the formulas, see `torch_steps`

Float32 throughout; clipping at 1 and AdamW (PyTorch's fused one) on both sides.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mtv_jax.config import schema
from mtv_jax.data import tokenizers
from mtv_jax.parallel.mesh import make_mesh, shard_batch
from mtv_jax.train import gradients, optim
from mtv_jax.train.experiment import build_data_ops, build_step_spec
from mtv_jax.train.step import make_program
from mtv_jax.train.step_spec import StepSpec, abstract_params, init_params
from mtv_jax.utils.errors import check_choice

WHAT = ("siglip", "distillation")
# Adam's settings and those of the step around it, of both sides.
OPTIM = dict(name="adamw", lr=1e-3, weight_decay=0.1, b2=0.95, clip_norm=1.0)
TEACHER_MOMENTUM = 0.994


@dataclasses.dataclass(frozen=True)
class Against:
  """What `bench_against` measured.

  Attributes:
    what: of `WHAT`.
    ours: milliseconds of a step, the median of the rounds'.
    torch: the same of PyTorch's.
    speed: theirs over ours, the median of the rounds' ratios.
    speeds: of every round.
    losses: of the first step, ours and theirs.
    parameters: that are trained, ours and theirs.
    batch_size: of a step.
    threads: that each side had.
    versions: of the libraries.
  """

  what: str
  ours: float
  torch: float
  speed: float
  speeds: tuple[float, ...]
  losses: tuple[float, float]
  parameters: tuple[int, int]
  batch_size: int
  threads: int
  versions: dict[str, str]

  def to_json(self) -> str:
    """As one line of JSON."""
    return json.dumps(dataclasses.asdict(self))

  def __str__(self) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in self.versions.items())
    lines = [
      f"{self.what}, ViT-S/16, float32, batch {self.batch_size},"
      f" {self.threads} threads ({versions})",
      f"{'':14}{'ms a step':>10}{'first loss':>12}{'parameters':>13}",
    ]
    sides = (("ours", self.ours), ("PyTorch", self.torch))
    for i, (name, ms) in enumerate(sides):
      lines.append(
        f"{name:14}{ms:10.0f}{self.losses[i]:12.4f}{self.parameters[i]:13,}"
      )
    low, high = min(self.speeds), max(self.speeds)
    lines.append(
      f"our speed over PyTorch's: {self.speed:.2f}  ({low:.2f} to {high:.2f} in"
      f" {len(self.speeds)} rounds)"
    )
    return "\n".join(lines)


def pin(threads: int) -> int:
  """Keeps this process to so many cores; returns how many there are of them.

  XLA takes a thread for each core that the process may use when JAX starts, so
  call it before anything computes.
  """
  cores = sorted(os.sched_getaffinity(0))[:threads]
  os.sched_setaffinity(0, cores)
  return len(cores)


def bench_against(
  what: str,
  *,
  batch_size: int = 16,
  rounds: int = 3,
  steps: int = 1,
  threads: int = 2,
  **model: Any,
) -> Against:
  """Times a step of ours and PyTorch's, by turns.

  Args:
    what: of `WHAT`.
    batch_size: images a step.
    rounds: of both; one more warms up and is not counted.
    steps: of a round.
    threads: of PyTorch; JAX's are those of the process, see `pin`.
    **model: instead of fields of the model, to try it small.
  """
  check_choice("what", what, WHAT)
  import torch

  from mtv_jax.perf.bench import torch_steps

  torch.set_num_threads(threads)
  recipe, ours, state, batch = _ours(what, batch_size, model)
  sides = (ours, torch_steps.make_step(recipe, state, batch, what))
  first = tuple(side() for side in sides)
  times = [[_timed(side, steps) for side in sides] for _ in range(rounds)]
  speeds = tuple(theirs / mine for mine, theirs in times)
  mine, theirs = map(statistics.median, zip(*times, strict=True))
  trained = sum(np.size(x) for x in jax.tree.leaves(state.params))
  return Against(
    what=what,
    ours=1e3 * mine,
    torch=1e3 * theirs,
    speed=statistics.median(speeds),
    speeds=speeds,
    losses=first,
    parameters=(trained, sides[1].parameters),
    batch_size=batch_size,
    threads=threads,
    versions={"jax": jax.__version__, **sides[1].versions},
  )


def _timed(side: Callable[[], float], steps: int) -> float:
  # The first step of a turn gets its memory back from the other side, which
  # took up to twice the time of a step here: neither side's to pay for.
  side()
  begin = time.perf_counter()
  for _ in range(steps):
    side()
  return (time.perf_counter() - begin) / steps


def _config(what: str, batch_size: int, model: dict[str, Any]) -> ConfigDict:
  """The recipe of a comparison, as a run would be configured."""
  size, local, patch = model.pop("image_size", 224), model.pop("local", 96), 16
  siglip = what == "siglip"
  base = dict(
    seed=0,
    batch_size=batch_size,
    total_steps=1000,
    data=dict(
      train=[dict(type="scenes", size=size)],
      ops=f"decode|canvas({size})" + ("|caption(64)" if siglip else ""),
    ),
    optim=OPTIM,
    schedule=dict(name="constant"),
  )
  shape = dict(variant="S/16", image_size=size, dtype="float32")
  if siglip:
    text = dict(variant="S", length=64, vocab_size=32_000)
    return ConfigDict(
      dict(
        **base,
        views=dict(image=dict(count=1, ops=f"resize({size})")),
        model=dict(**shape, pool="map", text=text, **model),
        objectives=dict(contrastive=dict(init_bias=-10.0)),
      )
    )
  # Crops and nothing else: PyTorch's step gets them ready-made.
  crop = f"crop({size}, 0.32, 1.0)|flip|blocks(0.1, 0.5, p=0.5, patch={patch})"
  prototypes = dict(prototypes=model.pop("prototypes", 65_536), chunk=None)
  views = {
    "global": dict(count=2, ops=crop),
    "local": dict(count=8, ops=f"crop({local}, 0.05, 0.32)|flip"),
  }
  return ConfigDict(
    dict(
      **base,
      views=views,
      # With DINOv2's 1e-5 all CLS tokens start alike: KoLeo would take the
      # logarithm of distances that are rounding errors, each side its own.
      model=dict(**shape, pool="cls", layer_scale=0.1, **model),
      objectives=dict(
        distillation=dict(
          koleo_weight=0.1, freeze_last_layer_percent=0.0, **prototypes
        ),
        masked_latent=dict(freeze_last_layer_percent=0.0, **prototypes),
      ),
      teacher=dict(momentum=TEACHER_MOMENTUM),
    )
  )


def _ours(what: str, batch_size: int, model: dict[str, Any]):
  """The recipe, a step as a function, its first state and its batch."""
  config = schema.check_config(_config(what, batch_size, dict(model)))
  recipe = build_step_spec(config, config.total_steps)
  tx = optim.make_optimizer(
    config.optim,
    config.schedule,
    total_steps=config.total_steps,
    batch_size=batch_size,
    params=abstract_params(recipe),
  ).tx
  mesh = make_mesh(dict(data=1), jax.devices()[:1])
  program = make_program(recipe, tx, mesh)
  state = program.init(
    jax.jit(lambda key: init_params(recipe, key))(jax.random.key(0))
  )
  first = jax.device_get(state)
  batch = _batch(config, recipe)
  placed = shard_batch(batch, mesh)

  def step() -> float:
    nonlocal state
    state, values = jax.block_until_ready(program.update(state, placed))
    return float(values["loss"])

  return recipe, step, first, batch


def _batch(config: ConfigDict, recipe: StepSpec) -> dict[str, np.ndarray]:
  """Random pixels and tokens in the shapes of the config's batches."""
  rng = np.random.default_rng(0)
  tokenizer = tokenizers.build_tokenizer("bytes")
  rows = config.batch_size
  fields = build_data_ops(config, recipe, tokenizer).fields
  batch = {
    name: np.ones((rows, *field.shape), field.dtype)
    for name, field in fields.items()
  }
  size = batch["image"].shape[1]
  batch["image"] = rng.integers(0, 256, batch["image"].shape, np.uint8)
  batch["image_size"] = np.full_like(batch["image_size"], size)
  if "caption" in batch:
    vocabulary = recipe.model.text.vocab_size
    batch["caption"] = rng.integers(
      0, vocabulary, batch["caption"].shape, batch["caption"].dtype
    )
  return batch


def first_views(
  recipe: StepSpec, batch: dict[str, np.ndarray]
) -> dict[str, Any]:
  """What the first step's views make of the batch, as NumPy arrays."""

  def make(image, size):
    keys = gradients.view_keys(
      recipe, jnp.zeros((), jnp.int32), len(image), None
    )
    return {
      name: recipe.views[name](image, size, of_rows, recipe.dtype)
      for name, of_rows in keys.items()
    }

  return jax.device_get(jax.jit(make)(batch["image"], batch["image_size"]))
