"""Fine-tuning: mixing, layer decay, the optimizer, training end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dataset_samples import write_colours

from mtv_jax.encoder import baselines
from mtv_jax.evals.classification import finetune
from mtv_jax.evals.classification.finetune import PROTOCOLS, Finetune
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
  image = {"patch_embed": {"kernel": draw(4, 4)}, "cls_token": draw(4)}
  image |= {"blocks": blocks, "norm": {"scale": draw(4)}}
  return {"image": image, "head": {"kernel": draw(4, 2), "bias": draw(2)}}


def test_layer_factors():
  factors = finetune.layer_factors(toy_params(), 0.5)
  blocks = factors["image"]["blocks"]["mlp"]
  assert blocks["kernel"].ravel().tolist() == [1 / 8, 1 / 4, 1 / 2]
  assert blocks["bias"].shape == (3, 1)
  assert factors["image"]["patch_embed"]["kernel"] == 1 / 16
  assert factors["image"]["cls_token"] == 1 / 16
  assert factors["image"]["norm"]["scale"] == factors["head"]["bias"] == 1


@pytest.mark.reference
@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_updates_match_torch(name):
  """Twelve updates of parameter groups in PyTorch, one per layer and decay."""
  import torch

  recipe = dataclasses.replace(PROTOCOLS[name], train_batch=64)
  steps, warmup = 12, 3 * bool(recipe.warmup)
  params, rng = toy_params(), np.random.default_rng(1)
  factors = finetune.layer_factors(params, recipe.layer_decay)
  groups, tensors = [], []
  names = [n for n, _ in flatten_with_names(params)]
  leaves = zip(jax.tree.leaves(params), jax.tree.leaves(factors), strict=True)
  rate = recipe.rate * 64 / 256
  for key, (x, factor) in zip(names, leaves, strict=True):
    for part, scale in zip(
      x if np.ndim(factor) else x[None], np.ravel(factor), strict=True
    ):
      tensors.append(torch.tensor(part, requires_grad=True))
      decay = recipe.weight_decay * key.endswith("kernel")
      groups.append(
        dict(params=[tensors[-1]], lr=rate * scale, weight_decay=decay)
      )
  if name == "mae":
    optimizer = torch.optim.AdamW(groups, lr=rate)
  else:
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)

  def factor_of(step):
    if step < warmup:
      return step / warmup
    return (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))) / 2

  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor_of)
  tx = finetune.build_optimizer(recipe, params, steps=steps, warmup=warmup)
  state = tx.init(params)
  for _ in range(steps):
    grads = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), params
    )
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    parts = []
    for x, f in zip(
      jax.tree.leaves(grads), jax.tree.leaves(factors), strict=True
    ):
      parts += list(x if np.ndim(f) else x[None])
    for tensor, part in zip(tensors, parts, strict=True):
      tensor.grad = torch.tensor(part)
    optimizer.step()
    schedule.step()
  got = []
  for x, f in zip(
    jax.tree.leaves(params), jax.tree.leaves(factors), strict=True
  ):
    got += list(np.asarray(x) if np.ndim(f) else np.asarray(x)[None])
  for x, tensor in zip(got, tensors, strict=True):
    np.testing.assert_allclose(x, tensor.detach().numpy(), atol=2e-6)


def test_resolved_recipes():
  assert Finetune(data="x")._resolve(10**6) == PROTOCOLS["mae"]
  small = Finetune(data="x", rate=0.1)._resolve(1000)
  assert (small.rate, small.train_batch, small.epochs) == (0.1, 333, 100)
  assert Finetune(data="x", train_batch=64)._resolve(1000).train_batch == 64


def test_pixels_have_nothing_to_train():
  with pytest.raises(NotApplicable, match="no parameters to fine-tune"):
    Finetune(count=2, train_count=2).run(baselines.load("pixels:32/8"))


@pytest.mark.slow
def test_end_to_end(tmp_path):
  """Two colours, with mixing: learnt in 30 steps, the encoder unchanged."""
  write_colours(tmp_path, noise=5)
  encoder = baselines.load("random:mu/16@32")
  before = jax.tree.map(np.array, encoder.params)
  options = dict(train_batch=8, epochs=6, rate=0.02, protocol="mae")
  result = Finetune(data=str(tmp_path), **options).run(encoder)
  assert result.metrics["top1"] == 0.75
  assert result.protocol["steps"] == 30
  jax.tree.map(np.testing.assert_array_equal, before, encoder.params)
