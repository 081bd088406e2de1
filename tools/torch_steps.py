"""Reference train steps in PyTorch with this project's weights.

Towers come from timm and open_clip. Losses come from open_clip, or are written
here from the papers: DINO (Caron et al. 2021), iBOT (Zhou et al. 2022),
Sinkhorn-Knopp (Caron et al. 2020), KoLeo (Sablayrolles et al. 2019).
"""

import copy
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mtv_jax.convert import tables
from mtv_jax.train.spec import StepSpec
from mtv_jax.utils.tree import flatten_with_names

# NumPy arrays of our step's initial state.
Batch = Mapping[str, np.ndarray]
Params = Mapping[str, Any]
VERSIONS = {
  "torch": torch.__version__,
  "open_clip": open_clip.__version__,
  "timm": timm.__version__,
}


class Step:
  """One AdamW update of a model; calling it returns the loss.

  `after` runs after each update. `parameters` is the number of trained
  parameters.
  """

  def __init__(
    self,
    modules: nn.Module,
    loss: Callable[[], torch.Tensor],
    optim: Mapping[str, Any],
    after: Callable[[], None] = lambda: None,
  ):
    self._params = list(modules.parameters())
    self._loss, self._after, self._clip = loss, after, optim["clip_norm"]
    self.parameters = sum(p.numel() for p in self._params)
    decay = optim["weight_decay"]
    groups = [
      dict(params=[p for p in self._params if p.ndim > 1], weight_decay=decay),
      dict(params=[p for p in self._params if p.ndim <= 1], weight_decay=0.0),
    ]
    self._tx = torch.optim.AdamW(
      groups, lr=optim["lr"], betas=(0.9, optim["b2"]), fused=True
    )

  def __call__(self) -> float:
    self._tx.zero_grad()
    loss = self._loss()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._params, self._clip)
    self._tx.step()
    self._after()
    return loss.item()


def _tensor(array: Any) -> torch.Tensor:
  return torch.from_numpy(np.array(array))


# (regex, replacement) pairs that map our names to timm's and open_clip's.
Renames = tuple[tuple[str, str], ...]
_TIMM: Renames = (
  (r"^blocks/", "blocks/{i}/"),
  (r"^patch_embed", "patch_embed/proj"),
  (r"^position_embedding", "pos_embed"),
  (r"^pool/probe", "attn_pool/latent"),
  (r"^pool/(attention/)?", "attn_pool/"),
  (r"attention/", "attn/"),
  (r"/out/", "/proj/"),
  (r"scale(\d)$", r"ls\1/gamma"),
)
_OPEN_CLIP: Renames = (
  (r"^blocks/", "transformer/resblocks/{i}/"),
  (r"^token_embedding", "token_embedding/weight"),
  (r"^position_embedding", "positional_embedding"),
  (r"^projection", "text_projection"),
  (r"^norm/", "ln_final/"),
  (r"norm(\d)", r"ln_\1"),
  (r"attention/qkv/", "attn/in_proj_"),
  (r"attention/out", "attn/out_proj"),
  (r"fc1", "c_fc"),
  (r"fc2", "c_proj"),
)


def _load(
  module: nn.Module, params: Params, renames: Renames, heads: int
) -> None:
  """Loads all parameters of a module; raises for unknown or missing names."""
  tensors, shapes = {}, {k: v.shape for k, v in module.state_dict().items()}
  for name, leaf in flatten_with_names(params):
    template = name
    for pattern, replacement in (*renames, (r"(kernel|scale)$", "weight")):
      template = re.sub(pattern, replacement, template)
    for i, array in enumerate(leaf if "{i}" in template else leaf[None]):
      key = template.replace("/", ".").replace("{i}", str(i))
      if fused := re.search(r"/(q?kv)/", name):
        # Columns (head, q|k|v, dim) to (q|k|v, head, dim).
        parts = tables.unfuse(array, len(fused[1]), heads)
        array = np.concatenate(parts, axis=-1)
      if name == "patch_embed/kernel":
        width, channels, *patch = shapes[key]
        array = array.reshape(*patch, channels, width).transpose(3, 2, 0, 1)
      elif name.endswith("kernel"):
        array = array.T
      tensors[key] = _tensor(array).reshape(shapes[key])
  module.load_state_dict(tensors)


def _trunk(spec: Any, params: Params) -> nn.Module:
  """timm's image tower of a `ViTSpec`, with our parameters."""
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
    # The norm precedes pooling, also without a CLS token.
    final_norm=True,
    fc_norm=False,
    dynamic_img_size=True,
  )
  params = {k: v for k, v in params["image"].items() if k != "mask_token"}
  _load(trunk, params, _TIMM, spec.heads)
  return trunk


def siglip_step(
  spec: StepSpec, params: Params, batch: Batch, optim: Mapping[str, Any]
) -> Step:
  """Sigmoid contrastive training of both towers."""
  image, text = spec.model.image, spec.model.text
  model = open_clip.model.CustomTextCLIP(
    embed_dim=image.embed_dim,
    # A placeholder: its trunk is replaced.
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
  model.visual.trunk = _trunk(image, params)
  _load(model.text, params["text"], _OPEN_CLIP, text.heads)
  heads = params["heads"]["contrastive"]
  for name in ("logit_scale", "logit_bias"):
    getattr(model, name).data.copy_(_tensor(heads[name]))
  images = _tensor(batch["image"]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
  images, captions = images.contiguous(), _tensor(batch["caption"]).long()
  criterion = open_clip.loss.SigLipLoss()
  return Step(model, lambda: criterion(**model(images, captions)), optim)


class Encoder(nn.Module):
  """A ViT with a mask token and the projection heads of both losses."""

  def __init__(self, spec: StepSpec, params: Params):
    super().__init__()
    self.mask_token = nn.Parameter(_tensor(params["image"]["mask_token"]))
    self.trunk = _trunk(spec.model.image, params)
    self.heads = nn.ModuleDict(
      {n: Head(params["heads"][n]) for n in ("dino", "ibot")}
    )

  def forward(
    self, images: torch.Tensor, mask: torch.Tensor | None = None
  ) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS tokens `[n, d]` and patch tokens `[n, patches, d]` after the norm.

    The mask token replaces patches where `mask` `[n, patches]` is True.
    """
    trunk = self.trunk
    x = trunk.patch_embed(images)  # [n, rows, columns, d]
    if mask is not None:
      grid = mask.reshape(*x.shape[:3], 1)
      x = torch.where(grid, self.mask_token.to(x.dtype), x)
    x = (x + self._positions(x.shape[1])).flatten(1, 2)
    x = torch.cat([trunk.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = trunk.norm(trunk.blocks(x))
    return x[:, 0], x[:, 1:]

  def _positions(self, grid: int) -> torch.Tensor:
    """Position embeddings of a square grid, `[1, grid, grid, d]`."""
    table = self.trunk.pos_embed
    side = round(table.shape[1] ** 0.5)
    table = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if side != grid:
      # DINOv2's resampling; timm's is antialiased.
      table = F.interpolate(table, (grid, grid), mode="bicubic")
    return table.permute(0, 2, 3, 1)


class Head(nn.Module):
  """DINO's projection head: an MLP and weight-normalised prototypes."""

  def __init__(self, tree: Params):
    super().__init__()
    layers = []
    for _, dense in sorted(tree["mlp"].items()):
      layers += [nn.Linear(*dense["kernel"].shape), nn.GELU()]
      layers[-2].weight.data = _tensor(dense["kernel"].T)
      layers[-2].bias.data = _tensor(dense["bias"])
    self.mlp = nn.Sequential(*layers[:-1])
    self.direction = nn.Parameter(_tensor(tree["last_layer"]["kernel"].T))
    self.length = nn.Parameter(_tensor(tree["last_layer"]["scale"]))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Logits before the temperature."""
    prototypes = F.normalize(self.direction, dim=1) * self.length[:, None]
    return F.linear(F.normalize(self.mlp(x), dim=-1), prototypes)


@torch.no_grad()
def sinkhorn(logits: torch.Tensor, *, iterations: int = 3) -> torch.Tensor:
  """Sinkhorn-Knopp: equal mass per row and per prototype.

  As in DINOv2, without constants that cancel. Subtracting the maximum avoids
  overflow in float32.
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


def distillation_step(
  spec: StepSpec,
  params: Params,
  views: Mapping[str, Any],
  optim: Mapping[str, Any],
) -> Step:
  """DINO and iBOT with an EMA teacher on `global` and `local` views."""

  def images(view):
    # Crop-major order, so that a chunk is one crop of all images.
    x = _tensor(views[view].images).permute(1, 0, 4, 2, 3)
    return x.reshape(-1, *x.shape[2:]).contiguous()

  mask = _tensor(views["global"].mask).transpose(0, 1).flatten(0, 1)
  global_crops, local_crops = images("global"), images("local")
  count = views["global"].images.shape[1]
  student = Encoder(spec, params)
  teacher = copy.deepcopy(student).requires_grad_(False)
  dino = spec.objectives["dino"]
  ibot = spec.objectives["ibot"]
  # Averages over the masked patches of a crop, then over crops.
  weights = (1.0 / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(mask)
  weights = weights[mask] / len(mask)

  def loss() -> torch.Tensor:
    temperature = dino.teacher_temp_start
    with torch.no_grad():
      pooled, patches = teacher(global_crops)
      targets = sinkhorn(teacher.heads["dino"](pooled) / temperature)
      masked = sinkhorn(teacher.heads["ibot"](patches[mask]) / temperature)
    pooled, patches = student(global_crops, mask)
    local_pooled, _ = student(local_crops)
    logits = student.heads["dino"](torch.cat([pooled, local_pooled]))
    logs = F.log_softmax(logits / dino.student_temp, dim=-1)
    pairs = [
      -(q * log).sum(dim=-1).mean()
      for i, q in enumerate(targets.chunk(count))
      for j, log in enumerate(logs.split(len(pooled) // count))
      if i != j
    ]
    koleo = sum(map(_koleo, pooled.chunk(count)))
    logits = student.heads["ibot"](patches[mask])
    logs = F.log_softmax(logits / ibot.student_temp, dim=-1)
    ibot_loss = -((masked * logs).sum(dim=-1) * weights).sum()
    return sum(pairs) / len(pairs) + dino.koleo_weight * koleo + ibot_loss

  old, new = list(teacher.parameters()), list(student.parameters())

  @torch.no_grad()
  def update_teacher() -> None:
    torch._foreach_lerp_(old, new, 1.0 - spec.teacher_momentum)

  return Step(student, loss, optim, update_teacher)
