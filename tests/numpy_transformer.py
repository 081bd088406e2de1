"""A plain transformer in float64, from the papers and the parameter layout."""

import jax
import numpy as np


class NumpyTransformer:
  """Layers of one example [T, D]; `spec` has width, heads, gelu, norm_eps."""

  def __init__(self, spec, rotate=lambda x: x):
    self.spec = spec
    self.rotate = rotate  # Rotates queries and keys [T, D] by position.

  def dense(self, p, x):
    y = x @ np.asarray(p["kernel"], np.float64)
    return y + np.asarray(p["bias"], np.float64) if "bias" in p else y

  def norm(self, p, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.spec.norm_eps)
    return x * np.float64(p["scale"]) + np.float64(p["bias"])

  def activation(self, x):
    from scipy.special import erf

    if self.spec.gelu == "quick":
      return x / (1 + np.exp(-1.702 * x))
    if self.spec.gelu == "exact":
      return x * 0.5 * (1 + erf(x / np.sqrt(2)))
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))

  def mlp(self, p, x):
    y = self.dense(p["fc1"], x)
    if "gate" in p:
      gate = self.dense(p["gate"], x)
      y = gate / (1 + np.exp(-gate)) * y
    else:
      y = self.activation(y)
    return self.dense(p["fc2"], self.norm(p["norm"], y) if "norm" in p else y)

  def heads(self, q, k, v, causal=False):
    """One head at a time: q [T, D], k and v [S, D] each by columns."""
    dim = self.spec.width // self.spec.heads
    out = np.zeros_like(q)
    for h in range(self.spec.heads):
      part = slice(h * dim, (h + 1) * dim)
      logits = q[:, part] @ k[:, part].T / np.sqrt(dim)
      if causal:
        logits[np.triu_indices(len(logits), 1)] = -np.inf
      p = np.exp(logits - logits.max(-1, keepdims=True))
      out[:, part] = p / p.sum(-1, keepdims=True) @ v[:, part]
    return out

  def split(self, x, parts):
    """Columns (head, part, dim) of x to `parts` arrays (head, dim)."""
    dim = self.spec.width // self.spec.heads
    columns = np.arange(x.shape[-1]).reshape(-1, parts, dim)
    return [x[:, columns[:, i].ravel()] for i in range(parts)]

  def blocks(self, stack, x):
    """All block outputs for one example [N, D]."""
    outputs = []
    for i in range(self.spec.depth):
      p = jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float64), stack)
      qkv = self.dense(p["attention"]["qkv"], self.norm(p["norm1"], x))
      causal = getattr(self.spec, "causal", False)
      q, k, v = self.split(qkv, 3)
      y = self.heads(self.rotate(q), self.rotate(k), v, causal=causal)
      y = self.dense(p["attention"]["out"], y)
      x = x + y * p.get("scale1", 1.0)
      y = self.mlp(p["mlp"], self.norm(p["norm2"], x))
      x = x + y * p.get("scale2", 1.0)
      outputs.append(x)
    return outputs

  def map_pool(self, p, x):
    q = self.dense(p["attention"]["q"], np.float64(p["probe"])[None])
    kv = self.dense(p["attention"]["kv"], x)
    y = self.dense(p["attention"]["out"], self.heads(q, *self.split(kv, 2)))
    return (y + self.mlp(p["mlp"], self.norm(p["norm"], y)))[0]
