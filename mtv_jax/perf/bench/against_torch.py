"""Train step benchmark against PyTorch, on one CPU.

  siglip         ViT-S/16 and text tower, sigmoid loss; against open_clip
  distillation   DINO and iBOT on ViT-S/16, two global and eight local crops;
                 against a PyTorch step written from the papers

Both start from equal weights and batches, in float32, with gradient clipping at
1 and AdamW (fused in PyTorch). Rounds alternate.
"""

import functools
import os
import statistics
from typing import Any

import jax
import numpy as np

from mtv_jax.parallel.mesh import make_mesh, shard_batch
from mtv_jax.perf import flops
from mtv_jax.perf.bench import harness
from mtv_jax.train.config import RunConfig, resolve
from mtv_jax.train.run import build_run
from mtv_jax.train.spec import StepSpec, init_params
from mtv_jax.utils.errors import check_choice

BENCHMARKS = ("siglip", "distillation")
OPTIM = dict(name="adamw", lr=1e-3, weight_decay=0.1, b2=0.95, clip_norm=1.0)


def pin(threads: int) -> int:
  """Pins this process to cores before JAX starts; returns their number."""
  cores = sorted(os.sched_getaffinity(0))[:threads]
  os.sched_setaffinity(0, cores)
  return len(cores)


def run(
  what: str = "siglip",
  *,
  batch_size: int = 16,
  rounds: int = 3,
  steps: int = 1,
  threads: int = 2,
) -> harness.BenchResult:
  """Pins the process to some cores and times both steps; see `compare`.

  Args:
    what: siglip or distillation (DINO and iBOT).
    batch_size: images per step.
    rounds: rounds per framework.
    steps: steps per round.
    threads: number of cores, and of PyTorch threads.
  """
  return compare(what, batch_size, rounds, pin(threads), steps)


def compare(
  benchmark: str,
  batch_size: int,
  rounds: int,
  threads: int,
  steps: int = 1,
  **model: Any,
) -> harness.BenchResult:
  """Times our step and PyTorch's in alternating rounds.

  `threads` are PyTorch threads, see `pin`; `model` overrides model fields.
  """
  check_choice("what", benchmark, BENCHMARKS)
  torch_steps = harness.import_oracle("torch_steps")
  torch_steps.torch.set_num_threads(threads)
  spec, ours, params, batch = _build_our_step(benchmark, batch_size, model)
  if benchmark == "siglip":
    theirs = torch_steps.siglip_step(spec, params, batch, OPTIM)
  else:
    make_views = functools.partial(flops.make_views, spec)
    views = jax.device_get(jax.jit(make_views)(batch))
    theirs = torch_steps.distillation_step(spec, params, views, OPTIM)
  step_fns = (ours, theirs)
  losses = tuple(step_fn() for step_fn in step_fns)

  def time_step(step_fn):
    # The first step reclaims memory from the other framework: not timed.
    step_fn()
    return harness.time_call(lambda: [step_fn() for _ in range(steps)]) / steps

  times = np.array([[time_step(s) for s in step_fns] for _ in range(rounds)])
  num_params = sum(np.size(x) for x in jax.tree.leaves(params))
  parameters = (num_params, theirs.parameters)
  result = harness.BenchResult(
    what=benchmark,
    batch_size=batch_size,
    threads=threads,
    versions={"jax": jax.__version__, **torch_steps.VERSIONS},
    losses=losses,
    parameters=parameters,
  )
  for i, (name, label) in enumerate((("ours", "ours"), ("torch", "PyTorch"))):
    text = f"first loss {losses[i]:.4f}, {parameters[i]:,} parameters"
    median = 1e3 * statistics.median(times[:, i])
    result.add(name, median, label, f"{{:.0f}} ms per step, {text}")
  label = "our speed over PyTorch's"
  result.add_ratio("speed", times[:, 1], times[:, 0], label, ".2f")
  return result


def _make_config(
  benchmark: str, batch_size: int, model: dict[str, Any]
) -> dict[str, Any]:
  size, local_size = model.pop("image_size", 224), model.pop("local", 96)
  config = dict(
    seed=0,
    batch_size=batch_size,
    total_steps=1000,
    data=dict(
      train=[dict(type="scenes", size=size)], ops=f"decode|canvas({size})"
    ),
    model=dict(variant="S/16", image_size=size, dtype="float32"),
    optim=OPTIM,
    schedule=dict(name="constant"),
  )
  if benchmark == "siglip":
    text = dict(variant="S", length=64, vocab_size=32_000)
    config["data"]["ops"] += "|caption(64)"
    config["model"] |= dict(pool="map", text=text)
    config["views"] = dict(image=dict(count=1, ops=f"resize({size})"))
    config["objectives"] = dict(contrastive=dict(init_bias=-10.0))
  else:
    # No photometric ops: PyTorch's step gets these crops.
    crop = f"crop({size}, 0.32, 1.0)|flip|blocks(0.1, 0.5, p=0.5, patch=16)"
    head = dict(
      prototypes=model.pop("prototypes", 65_536),
      chunk=None,
      freeze_last_layer_percent=0.0,
    )
    # With DINOv2's layer scale of 1e-5, initial CLS tokens are nearly equal:
    # KoLeo would take logarithms of rounding errors.
    config["model"] |= dict(pool="cls", layer_scale=0.1)
    config["views"] = {
      "global": dict(count=2, ops=crop),
      "local": dict(count=8, ops=f"crop({local_size}, 0.05, 0.32)|flip"),
    }
    config["objectives"] = dict(dino=dict(koleo_weight=0.1, **head), ibot=head)
    config["teacher"] = dict(momentum=0.994)
  config["model"] |= model
  return config


def _build_our_step(benchmark: str, batch_size: int, model: dict[str, Any]):
  """Returns the spec, a step function, the initial parameters and the batch."""
  config = resolve(_make_config(benchmark, batch_size, model))
  mesh = make_mesh(dict(data=1), jax.devices()[:1])
  run = build_run(config, mesh, 1)
  spec, train_step = run.spec, run.train_step
  params = jax.jit(lambda key: init_params(spec, key))(jax.random.key(0))
  state = train_step.init(params)
  batch = _draw_batch(config, spec)
  device_batch = shard_batch(batch, mesh)

  def step() -> float:
    nonlocal state
    state, values = jax.block_until_ready(
      train_step.update(state, device_batch)
    )
    return float(values["loss"])

  return spec, step, jax.device_get(state.params), batch


def _draw_batch(config: RunConfig, spec: StepSpec) -> dict[str, np.ndarray]:
  """Draws pixels and tokens in the shapes of the config's batches."""
  rng = np.random.default_rng(0)
  batch = {
    name: np.ones((config.batch_size, *field.shape), field.dtype)
    for name, field in flops.batch_fields(config, spec).items()
  }
  image, size = batch["image"], batch["image_size"]
  batch["image"] = rng.integers(0, 256, image.shape, np.uint8)
  batch["image_size"] = np.full_like(size, image.shape[1])
  if "caption" in batch:
    vocabulary, tokens = spec.model.text.vocab_size, batch["caption"]
    batch["caption"] = rng.integers(0, vocabulary, tokens.shape, tokens.dtype)
  return batch
