"""The study's image tower trained on labels, to compare its encoders with.

Cross-entropy on the class of the main object, with the model, images, batch
size, steps, rate and schedule of a run of `configs/study.py`, and AdamW. Prints
the top-1 accuracy on the scenes of its evaluations.

  python docs/study/supervised.py study:cache=runs/study/scenes
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtv_jax.config import recipes
from mtv_jax.data import registry
from mtv_jax.data.scenes.world import CLASS_NAMES
from mtv_jax.models import two_tower
from mtv_jax.utils import xla_flags


def main(recipe):
  xla_flags.retain_freed_memory()
  config = recipes.read_config(recipe)
  spec = two_tower.ModelSpec.from_config(config.model)
  tower = two_tower.image_tower(spec)
  rng = np.random.default_rng(config.seed)
  params = {
    "image": two_tower.init_params(spec, jax.random.key(config.seed))["image"],
    "bias": jnp.zeros(len(CLASS_NAMES)),
    "kernel": jnp.zeros((spec.embed_dim, len(CLASS_NAMES))),
  }
  steps, rate = config.total_steps, config.optim.lr
  warmup = round(config.schedule.warmup_percent / 100 * steps)
  tx = optax.adamw(
    optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps),
    b2=config.optim.b2,
    weight_decay=config.optim.weight_decay,
    mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
  )

  def logits(params, images):
    pooled = tower.apply({"params": params["image"]}, images / 127.5 - 1).pooled
    return pooled @ params["kernel"] + params["bias"]

  def loss(params, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(
      logits(params, images), labels
    ).mean()

  @jax.jit
  def update(params, state, images, labels):
    gradient = jax.grad(loss)(params, images, labels)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  def read(source, indices):
    records = [source[int(i)] for i in indices]
    images = np.stack([r["image"] for r in records]).astype(np.float32)
    return images, np.array([r["label"] for r in records])

  (train,) = config.data.to_dict()["train"]
  source, state, order = registry.build_source(train), tx.init(params), []
  for _ in range(steps):
    if len(order) < config.batch_size:
      order = rng.permutation(len(source))
    batch, order = np.split(order, [config.batch_size])
    params, state = update(params, state, *read(source, batch))

  held_out = registry.build_source(config.evals.zero_shot.to_dict()["data"])
  images, labels = read(held_out, range(len(held_out)))
  top1 = np.mean(np.argmax(logits(params, images), axis=1) == labels)
  error = np.sqrt(top1 * (1 - top1) / len(labels))
  print(f"supervised top-1: {100 * top1:.1f} ± {100 * error:.1f} %")


if __name__ == "__main__":
  main(sys.argv[1])
