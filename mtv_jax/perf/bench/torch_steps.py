"""The same train steps in PyTorch, to be timed against; imported by need.

Towers are timm's and open_clip's, losses open_clip's or written here from the
formulas (DINO: Caron et al. 2021; iBOT: Zhou et al. 2022; Sinkhorn-Knopp: Caron
et al. 2020; KoLeo: Sablayrolles et al. 2019), with the settings of our recipe.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mtv_jax.perf.bench import against_torch
from mtv_jax.train.state import TrainState
from mtv_jax.train.step_spec import StepSpec

Batch = Mapping[str, np.ndarray]


class Step:
  """One update of a model; calling it returns the loss.

  Args:
    modules: whose parameters are trained.
    loss: of one batch, differentiable.
    after: called after each update.
  """

  versions = {
    "torch": torch.__version__,
    "open_clip": open_clip.__version__,
    "timm": timm.__version__,
  }

  def __init__(self, modules: nn.Module, loss: Any, after: Any = None):
    self._params = list(modules.parameters())
    self._loss, self._after = loss, after
    optim = against_torch.OPTIM
    decayed = [p for p in self._params if p.ndim > 1]
    others = [p for p in self._params if p.ndim <= 1]
    self._clip = optim["clip_norm"]
    self._tx = torch.optim.AdamW(
      [
        dict(params=decayed, weight_decay=optim["weight_decay"]),
        dict(params=others, weight_decay=0.0),
      ],
      lr=optim["lr"],
      betas=(0.9, optim["b2"]),
      fused=True,
    )

  @property
  def parameters(self) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in self._params)

  def __call__(self) -> float:
    self._tx.zero_grad()
    loss = self._loss()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._params, self._clip)
    self._tx.step()
    if self._after is not None:
      self._after()
    return loss.item()


def make_step(
  recipe: StepSpec, state: TrainState, batch: Batch, what: str
) -> Step:
  """PyTorch's side of a comparison, with our weights.

  Args:
    recipe: ours.
    state: ours at the start, NumPy arrays.
    batch: as ours.
    what: of `against_torch.WHAT`.
  """
  if what == "siglip":
    return _siglip(recipe, state.params, batch)
  return _distillation(recipe, state.params, batch)


def _tensor(array: Any) -> torch.Tensor:
  return torch.from_numpy(np.array(array))


# ---------------------------------------------------------------------------
# Our weights under their names.


def _dense(tree: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
  found = {f"{name}.weight": np.swapaxes(tree["kernel"], -1, -2)}
  if "bias" in tree:
    found[f"{name}.bias"] = tree["bias"]
  return found


def _norm(tree: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
  return {f"{name}.weight": tree["scale"], f"{name}.bias": tree["bias"]}


def _fused(tree: Mapping[str, Any], heads: int, parts: int):
  """(head, part, dim) columns to torch's (part, head, dim) rows."""

  def turned(x):
    lead, size = x.shape[:-1], x.shape[-1]
    x = x.reshape(*lead, heads, parts, size // heads // parts)
    return np.swapaxes(x, -2, -3).reshape(*lead, size)

  kernel, bias = turned(tree["kernel"]), turned(tree["bias"])
  return dict(kernel=kernel, bias=bias)


def _blocks(stack: Mapping[str, Any], heads: int, names: Mapping[str, str]):
  """A stack's parameters, one entry a layer, by `names`' template."""
  attention, mlp = stack["attention"], stack["mlp"]
  qkv = _dense(_fused(attention["qkv"], heads, 3), "qkv")
  found = {
    names["qkv"] + "weight": qkv["qkv.weight"],
    names["qkv"] + "bias": qkv["qkv.bias"],
    **_dense(attention["out"], names["out"]),
    **_norm(stack["norm1"], names["norm1"]),
    **_norm(stack["norm2"], names["norm2"]),
    **_dense(mlp["fc1"], names["fc1"]),
    **_dense(mlp["fc2"], names["fc2"]),
  }
  for key in ("scale1", "scale2"):
    if key in stack:
      found[names[key]] = stack[key]
  return {
    template.replace("#", str(i)): layer
    for template, layers in found.items()
    for i, layer in enumerate(layers)
  }


_TIMM = {
  "qkv": "blocks.#.attn.qkv.",
  "out": "blocks.#.attn.proj",
  "norm1": "blocks.#.norm1",
  "norm2": "blocks.#.norm2",
  "fc1": "blocks.#.mlp.fc1",
  "fc2": "blocks.#.mlp.fc2",
  "scale1": "blocks.#.ls1.gamma",
  "scale2": "blocks.#.ls2.gamma",
}
_OPEN_CLIP = {
  "qkv": "transformer.resblocks.#.attn.in_proj_",
  "out": "transformer.resblocks.#.attn.out_proj",
  "norm1": "transformer.resblocks.#.ln_1",
  "norm2": "transformer.resblocks.#.ln_2",
  "fc1": "transformer.resblocks.#.mlp.c_fc",
  "fc2": "transformer.resblocks.#.mlp.c_proj",
}


def _load(module: nn.Module, found: Mapping[str, Any]) -> None:
  """All of a module's parameters; missing and unknown names raise."""
  module.load_state_dict({k: _tensor(v) for k, v in found.items()})


def _trunk(spec: Any, tree: Mapping[str, Any]) -> nn.Module:
  """timm's image tower of an `ImageSpec`, with our weights."""
  trunk = timm.create_model(
    "vit_base_patch16_siglip_224",
    img_size=spec.image_size,
    embed_dim=spec.width,
    depth=spec.depth,
    num_heads=spec.heads,
    mlp_ratio=spec.mlp_dim / spec.width,
    norm_layer=functools.partial(nn.LayerNorm, eps=spec.norm_eps),
    act_layer="gelu_tanh",
    num_classes=0,
    class_token=spec.cls_token,
    no_embed_class=True,
    init_values=spec.layer_scale,
    global_pool="map" if spec.pool == "map" else "token",
    # Where there is no CLS token, pooling comes after the norm as well.
    final_norm=True,
    fc_norm=False,
    dynamic_img_size=True,
  )
  kernel, p = tree["patch_embed"]["kernel"], spec.patch_size
  kernel = kernel.reshape(p, p, 3, -1)
  found = {
    "patch_embed.proj.weight": kernel.transpose(3, 2, 0, 1),
    "patch_embed.proj.bias": tree["patch_embed"]["bias"],
    "pos_embed": tree["position_embedding"][None],
    **_norm(tree["norm"], "norm"),
    **_blocks(tree["blocks"], spec.heads, _TIMM),
  }
  if spec.cls_token:
    found["cls_token"] = tree["cls_token"].reshape(1, 1, -1)
  if spec.pool == "map":
    pool = tree["pool"]
    found |= {
      "attn_pool.latent": pool["probe"][None, None],
      **_dense(pool["attention"]["q"], "attn_pool.q"),
      **_dense(_fused(pool["attention"]["kv"], spec.heads, 2), "attn_pool.kv"),
      **_dense(pool["attention"]["out"], "attn_pool.proj"),
      **_norm(pool["norm"], "attn_pool.norm"),
      **_dense(pool["mlp"]["fc1"], "attn_pool.mlp.fc1"),
      **_dense(pool["mlp"]["fc2"], "attn_pool.mlp.fc2"),
    }
  _load(trunk, found)
  return trunk


# ---------------------------------------------------------------------------
# open_clip's SigLIP.


def _siglip(recipe: StepSpec, params: Mapping[str, Any], batch: Batch) -> Step:
  spec, text = recipe.model.image, recipe.model.text
  model = open_clip.model.CustomTextCLIP(
    embed_dim=spec.embed_dim,
    # Of any size: its trunk is replaced.
    vision_cfg=dict(
      timm_model_name="vit_tiny_patch16_224", timm_pool="", timm_proj="none"
    ),
    text_cfg=dict(
      context_length=text.length,
      vocab_size=text.vocab_size,
      width=text.width,
      heads=text.heads,
      layers=text.depth,
      mlp_ratio=text.mlp_dim / text.width,
      no_causal_mask=True,
      proj_bias=True,
      pool_type="last",
      norm_kwargs=dict(eps=text.norm_eps),
      act_kwargs=dict(approximate="tanh"),
    ),
    init_logit_bias=-10.0,
    output_dict=True,
  )
  model.visual.trunk = _trunk(spec, params["image"])
  tree, heads = params["text"], params["heads"]["contrastive"]
  _load(
    model.text,
    {
      "token_embedding.weight": tree["token_embedding"],
      "positional_embedding": tree["position_embedding"],
      **_blocks(tree["blocks"], text.heads, _OPEN_CLIP),
      **_norm(tree["norm"], "ln_final"),
      **_dense(tree["projection"], "text_projection"),
    },
  )
  with torch.no_grad():
    model.logit_scale.copy_(_tensor(heads["logit_scale"]))
    model.logit_bias.copy_(_tensor(heads["logit_bias"]))
  images = _tensor(batch["image"]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
  images, tokens = images.contiguous(), _tensor(batch["caption"]).long()
  criterion = open_clip.loss.SigLipLoss()

  def loss() -> torch.Tensor:
    return criterion(**model(images, tokens))

  return Step(model, loss)


# ---------------------------------------------------------------------------
# DINO and iBOT.


class Encoder(nn.Module):
  """A ViT with a mask token, and the projection heads of both losses."""

  def __init__(self, recipe: StepSpec, params: Mapping[str, Any]):
    super().__init__()
    self.trunk = _trunk(recipe.model.image, params["image"])
    self.mask_token = nn.Parameter(_tensor(params["image"]["mask_token"]))
    self.heads = nn.ModuleDict(
      {n: Head(params["heads"][n]) for n in ("dino", "ibot")}
    )

  def forward(
    self, images: torch.Tensor, mask: torch.Tensor | None = None
  ) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS tokens and patches after the final norm.

    Args:
      images: `[n, 3, h, w]`.
      mask: True where the mask token stands for a patch, `[n, patches]`.
    """
    trunk = self.trunk
    x = trunk.patch_embed(images)
    if mask is not None:
      grid = mask.reshape(*x.shape[:3], 1)
      x = torch.where(grid, self.mask_token.to(x.dtype), x)
    x = (x + self._positions(x.shape[1])).flatten(1, 2)
    x = torch.cat([trunk.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = trunk.norm(trunk.blocks(x))
    return x[:, 0], x[:, 1:]

  def _positions(self, grid: int) -> torch.Tensor:
    """The position embedding of a square grid, `[1, grid, grid, d]`."""
    table = self.trunk.pos_embed
    side = round(table.shape[1] ** 0.5)
    table = table.unflatten(1, (side, side))
    if side == grid:
      return table
    # As DINOv2 resamples it; timm's own way is antialiased.
    table = table.permute(0, 3, 1, 2)
    table = F.interpolate(table, (grid, grid), mode="bicubic")
    return table.permute(0, 2, 3, 1)


class Head(nn.Module):
  """An MLP to a unit bottleneck, and prototypes of learnt length."""

  def __init__(self, tree: Mapping[str, Any]):
    super().__init__()
    layers = []
    for name in sorted(tree["mlp"]):
      kernel = tree["mlp"][name]["kernel"]
      dense = nn.Linear(*kernel.shape)
      _load(dense, {"weight": kernel.T, "bias": tree["mlp"][name]["bias"]})
      layers += [dense, nn.GELU()]
    self.mlp = nn.Sequential(*layers[:-1])
    self.direction = nn.Parameter(_tensor(tree["last_layer"]["kernel"].T))
    self.length = nn.Parameter(_tensor(tree["last_layer"]["scale"]))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Logits before the temperature."""
    prototypes = F.normalize(self.direction, dim=1) * self.length[:, None]
    return F.linear(F.normalize(self.mlp(x), dim=-1), prototypes)


@torch.no_grad()
def sinkhorn(logits: torch.Tensor, *, iterations: int = 3) -> torch.Tensor:
  """Rows of equal mass over prototypes of equal mass.

  As DINOv2 has it, less the constants that cancel; the maximum is taken off so
  that float32 holds.
  """
  q = torch.exp(logits - logits.max())
  for _ in range(iterations):
    q /= q.sum(dim=0, keepdim=True)
    q /= q.sum(dim=1, keepdim=True)
    q[q.isnan()] = 0.0
  return q


def _koleo(pooled: torch.Tensor) -> torch.Tensor:
  x = F.normalize(pooled, dim=-1)
  with torch.no_grad():
    cosines = (x @ x.T).fill_diagonal_(-2.0)
    nearest = cosines.argmax(dim=1)
  return -torch.log((x - x[nearest]).norm(dim=1) + 1e-8).mean()


def _distillation(
  recipe: StepSpec, params: Mapping[str, Any], batch: Batch
) -> Step:
  made = against_torch.first_views(recipe, batch)

  def images(view):
    # Crop by crop, so that a chunk is one crop of all images.
    x = _tensor(made[view].images).permute(1, 0, 4, 2, 3)
    return x.reshape(-1, *x.shape[2:]).contiguous()

  mask = _tensor(made["global"].mask).transpose(0, 1).flatten(0, 1)
  crops, count = images("global"), made["global"].images.shape[1]
  local, several = images("local"), made["local"].images.shape[1]
  student = Encoder(recipe, params)
  teacher = copy.deepcopy(student).requires_grad_(False)
  dino = recipe.objectives["distillation"]
  ibot = recipe.objectives["masked_latent"]
  # Each crop's hidden patches count as one, and all crops alike.
  weights = (1.0 / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(mask)
  weights = weights[mask] / len(mask)

  def loss() -> torch.Tensor:
    cold = dino.teacher_temp_start
    with torch.no_grad():
      pooled, patches = teacher(crops)
      targets = sinkhorn(teacher.heads["dino"](pooled) / cold).chunk(count)
      hidden = sinkhorn(teacher.heads["ibot"](patches[mask]) / cold)
    pooled, patches = student(crops, mask)
    few, _ = student(local)
    logits = student.heads["dino"](torch.cat([pooled, few]))
    logs = F.log_softmax(logits / dino.student_temp, dim=-1)
    logs = logs.chunk(count + several)
    pairs = [
      -(q * log).sum(dim=-1).mean()
      for i, q in enumerate(targets)
      for j, log in enumerate(logs)
      if i != j
    ]
    total = sum(pairs) / len(pairs)
    total = total + dino.koleo_weight * sum(map(_koleo, pooled.chunk(count)))
    logits = student.heads["ibot"](patches[mask])
    logs = F.log_softmax(logits / ibot.student_temp, dim=-1)
    return total - ((hidden * logs).sum(dim=-1) * weights).sum()

  old, new = list(teacher.parameters()), list(student.parameters())

  @torch.no_grad()
  def follow() -> None:
    torch._foreach_lerp_(old, new, 1.0 - recipe.teacher_momentum)

  return Step(student, loss, follow)
