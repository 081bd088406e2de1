"""Settings that the multi-task recipes share, for a laptop and for a pod.

Losses, their weights, KoLeo, optimizer and views, with sizes as arguments. The
recipes are configs/study.py, configs/study_photos.py and
configs/mtv_b16_224.py; docs/study/recipes.md lists how they differ.
"""


def set_terms(
  config,
  *,
  weights,
  loss_type,
  init_bias,
  koleo_weight,
  optim,
  warmup_percent,
  momentum,
  prototypes,
  regions,
  views,
  decoder=None,
  depth_head=None,
  same_crop=None,
):
  """Sets objectives, views, teacher, optimizer and learning-rate schedule.

  Args:
    config: updated in place.
    weights: weight by objective; an objective without one is not trained.
    loss_type: loss of the image-text contrast, sigmoid or softmax.
    init_bias: initial bias of the contrastive and grounding sigmoids;
      log(1/pairs) balances the pairs of a batch.
    koleo_weight: weight of KoLeo in DINO.
    optim: optimizer's name, learning rate and weight decay.
    warmup_percent: warm-up of the cosine schedule.
    momentum: momentum of the EMA teacher, constant.
    prototypes: sizes and temperatures of the DINO and iBOT heads.
    regions: boxes per image.
    views: sizes and ops of views, see `make_views`.
    decoder: sizes of MAE's decoder.
    depth_head: sizes of the depth head.
    same_crop: DINO's option `same_crop`; None keeps its default.
  """
  bias = dict(init_bias=init_bias)
  terms = dict(
    contrastive=dict(
      loss_type=loss_type, **(bias if loss_type == "sigmoid" else {})
    ),
    dino=dict(koleo_weight=koleo_weight, **prototypes),
    ibot=dict(prototypes),
    mae=decoder or {},
    grounding=dict(regions=regions, **bias),
    depth=depth_head or {},
  )
  if same_crop:
    terms["dino"]["same_crop"] = same_crop
  config.objectives = {
    name: dict(weight=weight, **terms[name]) for name, weight in weights.items()
  }
  config.views = make_views(has_mae="mae" in weights, **views)
  config.teacher = dict(momentum=momentum)
  config.optim = optim
  config.schedule = dict(name="cosine", warmup_percent=warmup_percent)


def make_views(size, *, patch, crop, local, colours, masks, has_mae):
  """The whole image for text, regions and depth; crops for self-supervision.

  Captions mention left and right, so the whole image is not flipped. The
  student sees the global crop masked; DINO and iBOT share this encoding.

  Args:
    size: pixels per side of the whole image.
    patch: pixels per side of a patch.
    crop: side and minimum area of the global crop.
    local: number, side, minimum and maximum area of local crops.
    colours: flip and colour ops of the crops.
    masks: arguments of `blocks` before `patch`.
    has_mae: whether to add a view for MAE.
  """
  count, side, low, high = local
  ops = "crop({}, {}, 1.0)".format(*crop) + f"|{colours}"
  views = {
    "image": dict(count=1, ops=f"resize({size})"),
    "global": dict(count=1, ops=f"{ops}|blocks({masks}, patch={patch})"),
    "local": dict(count=count, ops=f"crop({side}, {low}, {high})|{colours}"),
  }
  if has_mae:
    ops = f"crop({size}, 0.5, 1.0)|flip|keep(0.25, patch={patch})"
    views["mae"] = dict(ops=ops)
  return views


def share_crop(config, size, patch):
  """Makes all objectives read the whole image.

  Masks every second image, as DINOv2 does.
  """
  del config.views["image"]
  masks = f"blocks(0.1, 0.5, p=0.5, patch={patch})"
  config.views["global"] = dict(count=1, ops=f"resize({size})|{masks}")
  config.objectives.contrastive.view = "global"
  for name in {"depth", "grounding"} & {*config.objectives}:
    config.objectives[name].update(view="global", allow_masked=True)


def distil(config, paths, ops):
  """Replaces all objectives by feature distillation from frozen teachers.

  Args:
    config: updated in place.
    paths: teacher folders by name; "" skips a teacher.
    ops: ops of the student's view.
  """
  config.teachers = {name: dict(path=p) for name, p in paths.items() if p}
  config.objectives = dict(feature_distillation=dict(view="student"))
  config.views.student = dict(ops=ops)
  config.model.text = config.interference = None
  # These need a text tower or heads.
  unavailable = {"zero_shot", "retrieval", "grounding", "relative_depth"}
  for name in unavailable & {*config.evals}:
    del config.evals[name]
