"""Continues training a released encoder, or one of your own, on new data.

The checkpoint sets shapes, tokenizer, pixels and loss, see docs/continue.md:
  python -m mtv_jax.main --workdir=/data/runs/mine \
    --config=configs/continue_from.py:path=/data/siglip,data=/data/photos

Add `,images_only` (DINO, iBOT), `guards=False` (no guard against forgetting) or
`lora=8` (adapters). `:tiny`: random weights. Hardware: 16 GB at B/16, untested.
"""

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg
from mtv_jax.utils.errors import ConfigError


def get_config(arg=None):
  defaults = dict(
    tiny=False, path="", data="", images="", images_only=False, batch=0,
    steps=0, lr=1e-5, dtype="bfloat16", prototypes=8192, gauge="", bound=0.6,
    probe="", keep="", keep_share=0.5, guards=True, grow=5.0, warmup=2.0,
    anchor=1.0, layer_decay=0.85, features=0.0, lora=0,
  )  # fmt: skip
  text, arg = arg, parse_arg(arg, **defaults)
  defaults["features"] = 10.0 * arg.images_only  # See docs/continue.md.
  arg = parse_arg(text, **defaults)
  if not arg.guards:
    off = dict.fromkeys(("grow", "warmup", "anchor", "features", "bound"), 0.0)
    off |= dict(layer_decay=1.0, keep="")
    arg = parse_arg(text, **defaults | off)
    if conflicts := [key for key, value in off.items() if arg[key] != value]:
      raise ConfigError(f"guards=False and {conflicts[0]}=...: remove one.")
  if arg.tiny:
    arg.update(dtype="float32", prototypes=64, data=arg.data or "scenes")
  if not ((arg.path or arg.tiny) and arg.data):
    raise ConfigError("continue_from: pass path=CHECKPOINT and data=PATH.")
  if not 0 < arg.keep_share < 1:
    raise ConfigError(f"keep_share={arg.keep_share}: expected between 0 and 1.")
  if arg.keep_share != defaults["keep_share"] and not arg.keep:
    raise ConfigError("keep_share has no effect without keep=PATH.")
  config = ConfigDict(dict(seed=0, xla_flags="quick" if arg.tiny else ""))
  config.batch_size = arg.batch or (16 if arg.tiny else 256)
  config.total_steps = arg.steps or (20 if arg.tiny else 10_000)
  config.model, contrast, weights = read_model(arg)
  if arg.images_only:
    config.model.text = None
  elif config.model.text is None:
    raise ConfigError(f"{arg.path} has no text tower; add images_only.")
  size = config.model.preprocess["size"]
  # A crop of 32 % of this canvas has about the encoder's resolution.
  canvas = round(1.7 * size) if arg.images_only else size
  data_weight = 1 - arg.keep_share if arg.keep else 1
  train = [make_source(arg, arg.data, canvas, data_weight)]
  if arg.keep:
    train.append(make_source(arg, arg.keep, canvas, arg.keep_share))
  config.data = dict(train=train, ops=f"decode|canvas({canvas})")
  if arg.images_only:
    set_self_supervision(config, arg, size, config.model.patch_size)
  else:
    set_image_text(config, size, contrast)
  if arg.path:
    config.init = dict(path=arg.path, weights=weights, grow_heads=True)
    add_guards(config, arg, weights, size)
  if arg.lora:
    config.lora = dict(rank=arg.lora)
  tower = dict(layer_decay=arg.layer_decay) if arg.layer_decay != 1 else {}
  if arg.grow and (arg.images_only or not contrast):
    tower["start_percent"] = arg.grow
  config.optim = dict(name="adamw", lr=arg.lr, weight_decay=1e-2, b2=0.95)
  towers = ("image",) if config.model.text is None else ("image", "text")
  config.optim.rules = [(f"^{t}/", tower) for t in towers if tower]
  config.schedule = dict(name="cosine", warmup_percent=arg.warmup)
  config.checkpoint = dict(every_percent=5, keep=2)
  return config


def add_guards(config, arg, weights, size):
  """Adds the drift evaluation, the probe and the anchors."""
  timing = dict(at_start=True, every_percent=5)
  drift = dict(data=arg.gauge or dict(config.data.train[-1]), **timing)
  drift |= dict(reference=arg.path, reference_weights=weights)
  if arg.bound:
    bound = dict(metric="neighbours", min=arg.bound, beyond_noise=True)
    drift["bound"] = bound | dict(then="return")
  config.evals = dict(drift=drift)
  if arg.probe:
    bound = dict(metric="top1_k20", drop=0.03, then="return")
    timing |= dict(bound=bound if arg.bound else None)
    config.evals.probe = dict(type="knn", data=arg.probe, **timing)
  if not (arg.anchor or arg.features):
    return
  config.teachers = dict(start=dict(path=arg.path, weights=weights, size=size))
  if arg.images_only:
    # Global crops have masked patches, whose features the anchor can't match.
    config.views.image = dict(ops=f"resize({size}, method='bicubic')")
  anchor = dict(type="gram", teacher="start", view="image", weight=arg.anchor)
  if arg.anchor:
    config.objectives.anchor = anchor
  if arg.features:
    config.objectives.features = dict(
      type="feature_distillation", adaptor="none", normalize="none",
      view="image", weight=arg.features, sources=(1,) if arg.keep else None,
    )  # fmt: skip


def read_model(arg):
  """Reads the `model` section, contrastive options and initial weights."""
  from mtv_jax.encoder import loading  # Deferred: imports JAX.

  if not arg.path:
    text = dict(variant="mu", length=64, tokenizer="bytes", vocab_size=258)
    model = dict(variant="mu/8", patch_size=8, image_size=32, text=text)
    model |= dict(preprocess=dict(size=32), dtype=arg.dtype)
    return ConfigDict(model), {}, "student"
  info = loading.read_model_info(arg.path)
  model = ConfigDict(info.model_config() | dict(dtype=arg.dtype))
  return model, info.contrast, info.weights


def make_source(arg, path, size, weight):
  """Makes an entry of `data.train`."""
  images = dict(images=arg.images) if arg.images and path == arg.data else {}
  if path == "scenes":
    return dict(type="scenes", size=size, weight=weight, **images)
  captions = dict(captions="ignored") if arg.images_only else {}
  return dict(path=path, weight=weight, **captions, **images)


def set_image_text(config, size, contrast):
  """Sets image-text contrast on whole images, as in siglip_b16_224."""
  method = config.model.preprocess.get("interpolation", "bilinear")
  config.views = dict(image=dict(ops=f"resize({size}, method={method!r})"))
  config.data.ops += f"|caption({config.model.text.length})"
  config.objectives = dict(contrastive=dict(weight=1.0) | contrast)


def set_self_supervision(config, arg, size, patch):
  """Sets DINO and iBOT, as in dinov2_l16, with smaller heads."""
  local = max(patch, round(0.43 * size / patch) * patch)
  crop = f"crop({size}, 0.32, 1.0, method='bicubic')|flip|jitter(0.4)"
  min_ratio = max(0.1, 1.5 * (patch / size) ** 2)  # One patch.
  masks = f"|blocks({min_ratio:.3g}, 0.5, p=0.5, patch={patch})"
  small = dict(count=4, ops=f"crop({local}, 0.05, 0.32)|flip|jitter(0.4)")
  config.views = {"local": small, "global": dict(count=2, ops=crop + masks)}
  head = dict(prototypes=arg.prototypes, target="sinkhorn")
  if arg.prototypes < 1024:
    head |= dict(hidden=64, bottleneck=32, chunk=None)
  config.objectives = dict(dino=dict(koleo_weight=0.1, **head), ibot=head)
  config.teacher = dict(momentum=0.994)
  config.weights = "teacher"
