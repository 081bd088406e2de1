"""Probe heads in PyTorch, with the parameters of ours."""

import numpy as np
import torch
from torch import nn

from mtv_jax.evals.core import probe_heads


def random_head(head, channels, *, seed=0):
  """Parameters and running statistics, never zero or one."""
  rng = np.random.default_rng(seed)
  params, state = probe_heads.init_head(head, channels, rng.standard_normal)

  def perturb(tree):
    if isinstance(tree, dict):
      return {key: perturb(value) for key, value in tree.items()}
    return tree + rng.uniform(0, 0.3, tree.shape).astype(np.float32)

  return perturb(params), perturb(state)


def as_torch(x):
  """A tensor; images and features get their channels first."""
  x = np.asarray(x)
  return torch.from_numpy(
    np.array(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x)
  )


def torch_head(head, params, state):
  """The head as an nn.Sequential on features `[b, c, h, w]`."""

  def batch_norm(name):
    stats = state["batch_stats"][name]
    layer = nn.BatchNorm2d(
      len(stats["mean"]), eps=head.epsilon, affine=head.affine
    )
    values = {"running_mean": stats["mean"], "running_var": stats["var"]}
    if head.affine:
      values |= {"weight": params[name]["scale"], "bias": params[name]["bias"]}
    for target, value in values.items():
      getattr(layer, target).data.copy_(as_torch(value))
    return layer

  layers = [batch_norm("norm")] if head.batch_norm else []
  for i in range(1, head.convs + 1):
    kernel = np.asarray(params[f"conv{i}"]["kernel"])
    conv = nn.Conv2d(*kernel.shape[2:], 3, padding=1, bias=False)
    conv.weight.data.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    layers += [conv, batch_norm(f"norm{i}"), nn.ReLU()]
  kernel = np.asarray(params["logits"]["kernel"])
  last = nn.Conv2d(*kernel.shape, 1)
  last.weight.data.copy_(torch.from_numpy(kernel.T[..., None, None].copy()))
  last.bias.data.copy_(as_torch(params["logits"]["bias"]))
  layers.append(last)
  if head.upsample > 1:
    layers.append(nn.Upsample(scale_factor=head.upsample, mode="bilinear"))
  return nn.Sequential(*layers)


def eval_biased(model, start, vectors):
  """Evaluation mode with Flax's running variances, which are biased.

  Args:
    model: the head, after updates on batches of `vectors` vectors.
    start: weight of the initial variances that is left, and their values.
    vectors: vectors of a batch.
  """
  weight, values = start
  norms = [m for m in model if isinstance(m, nn.BatchNorm2d)]
  for norm, value in zip(norms, values, strict=True):
    drawn = norm.running_var - weight * as_torch(value)
    norm.running_var.copy_(norm.running_var - drawn / vectors)
  return model.eval()
