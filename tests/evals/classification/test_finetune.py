"""Fine-tuning: mixing, layer decay, the optimizer, training end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dataset_samples import write_colours

from mtv_jax.encoder import baselines
from mtv_jax.evals.classification import finetune
from mtv_jax.evals.classification.finetune import Finetune
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.utils.tree import flatten_with_names


@pytest.mark.parametrize("options", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_are_the_shares_of_the_images(options):
  """Images of one colour each: the mean colour is the label."""
  y = jnp.eye(4)
  x = jnp.broadcast_to(y[:, None, None], (4, 12, 8, 4))
  m, c = options
  mix = jax.jit(lambda key: finetune.mix(key, x, y, mixup=m, cutmix=c))
  kinds, weights = set(), set()
  for seed in range(10):
    mixed, labels = map(np.asarray, mix(jax.random.key(seed)))
    np.testing.assert_allclose(mixed.mean((1, 2)), labels, atol=1e-6)
    np.testing.assert_allclose(labels + labels[::-1], y + y[::-1], atol=1e-6)
    weight = labels[0, 0]
    weights.add(round(float(weight), 4))
    if 0 < weight < 1:
      kinds.add("mixup" if mixed.std((1, 2)).max() < 1e-6 else "cutmix")
  assert kinds == {k for k, on in (("mixup", m), ("cutmix", c)) if on}
  assert len(weights) > 4


def toy_params():
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  blocks = {"mlp": {"kernel": draw(3, 4, 4), "bias": draw(3, 4)}}
  tower = {"patch_embed": {"kernel": draw(4, 4)}, "cls_token": draw(4)}
  tower |= {"blocks": blocks, "norm": {"scale": draw(4)}}
  return {"tower": tower, "head": {"kernel": draw(4, 2), "bias": draw(2)}}


def by_layer(tree, factors):
  """Arrays of a tree, those of blocks split by layer."""
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(factors), strict=True)
  return [part for x, f in pairs for part in (x if np.ndim(f) else [x])]


@pytest.mark.reference
def test_updates_match_torch():
  """Parameter groups of AdamW in PyTorch, one per layer, decayed or not."""
  import torch

  params, rng = toy_params(), np.random.default_rng(1)
  factors = finetune.layer_factors(params, 0.5)
  # Embeddings, blocks 0 to 2, all that follows.
  depth = {"blocks": (1 / 8, 1 / 4, 1 / 2)}
  depth |= dict.fromkeys(("embed", "token"), (1 / 16,))
  groups = []
  for name, x in flatten_with_names(params):
    scales = next((depth[k] for k in depth if k in name), (1,))
    decay = 0.05 * name.endswith("kernel")
    for scale, part in zip(scales, x if len(scales) > 1 else [x], strict=True):
      tensor = torch.tensor(np.asarray(part), requires_grad=True)
      groups.append(dict(params=[tensor], lr=0.01 * scale, weight_decay=decay))
  optimizer = torch.optim.AdamW(groups)
  tx = finetune.build_optimizer(params, lambda step: 0.01, 0.05, 0.5)
  state = tx.init(params)
  for _ in range(8):
    grads = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), params
    )
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    parts = by_layer(grads, factors)
    for group, part in zip(groups, parts, strict=True):
      group["params"][0].grad = torch.tensor(part)
    optimizer.step()
  for x, group in zip(by_layer(params, factors), groups, strict=True):
    want = group["params"][0].detach().numpy()
    np.testing.assert_allclose(x, want, atol=2e-6)


def test_pixels_have_nothing_to_train():
  with pytest.raises(NotApplicable, match="no parameters to fine-tune"):
    Finetune(count=2, train_count=2).run(baselines.load("pixels:32/8"))


@pytest.mark.slow
def test_end_to_end(tmp_path):
  """Two colours, with mixing: learnt in 30 steps, the encoder unchanged."""
  write_colours(tmp_path, noise=5)
  encoder = baselines.load("random:mu/16@32")
  before = jax.tree.map(np.array, encoder.params)
  options = dict(train_batch=8, epochs=6, rate=0.02)
  result = Finetune(data=str(tmp_path), **options).run(encoder)
  assert result.metrics["top1"] == 0.75
  assert result.protocol["steps"] == 30
  jax.tree.map(np.testing.assert_array_equal, before, encoder.params)
