"""DINOv3 (Siméoni et al. 2025), ViT-L/16: images alone, without distillation.

Command, on every host:

  python -m mtv_jax.main --config=configs/dinov3_l16.py \
    --config.data.train[0].path='/data/imagenet/{0000..1023}.tar' \
    --workdir=/data/runs/dinov3_l16 --distributed

then, each into a new folder, `:gram,init=/data/runs/dinov3_l16` (Gram
anchoring) and `:highres,init=/data/runs/dinov3_l16_gram` (high resolution).

Published values: facebookresearch/dinov3 at 6876159, configs/train:
vitl_im1k_lin834.yaml. The released L is distilled from the 7B instead. The two
later stages are published only for the 7B (dinov3_vit7b16_gram_anchor.yaml,
dinov3_vit7b16_high_res_adapt.yaml). Unlisted hyper-parameters follow the table
in configs/dinov2_l16.py (vitl16_short).

  hyper-parameter             vitl_im1k_lin834     ours
  positions                   RoPE, base 100,      =, in float32
                              in bfloat16
  heads of DINO and iBOT      two, 65,536          =
  targets                     Sinkhorn             =
  rate at batch 1024          4 x 1e-3, sqrt       =
  batch, steps                2048, 125,000        =
  KoLeo                       0.1 in 64 rows       =
  prototypes                  a linear layer, its  unit length times a scale,
                              columns' length free as in DINOv2
    length at the start       0.32 (normal, 0.02)  1: logits 3.1 times larger

                              7B, gram             ours, `gram`
  steps                       200,000 of 1.2M      25,000 (a fifth, as there)
  start                       resumes, with the    the run of `init`: student,
                              optimizer's moments  teacher; moments at zero
  batch                       4096                 2048
  rate at batch 1024          4 x 3e-5, constant   = (warm-up: 1,000 steps)
  weight decay, momentum      0.04, 0.999          =
  Gram loss                   0 to 2 in 1000       =
                              steps, half a cosine
  Gram teacher                early checkpoint; 3  the run of `init`; updates
                              updates, every       every 10,000 steps: 2
                              10,000 steps
  crops; of the Gram teacher  256; 512             224; 448
  KoLeo                       in 16 rows           =
  last layer frozen           no, by then          no
  local crops' share of DINO  falls to 0.5         unchanged
  RoPE's coordinates          scaled by 1/2 to 2   unchanged
  local crops                 112                  =
  flips                       none                 half of the crops
  b2, clipping                0.99, 30             0.999, 3
  layer decay, drop path      0.98, 0.4            0.9, 0.3
  heads of DINO and iBOT      262,144 and 98,304   65,536

                              7B, high_res_adapt   ours, `highres`
  steps, batch                30,000, 2048         10,000, 2048
  student, teacher, heads     the Gram run's       =
                              teacher
  rate at batch 1024          0 to 4 x 1.25e-5 in  =
                              a third, half cosine
  Gram loss                   1.5, not updated     =
  global, local, Gram crops   512, 112, 768 (0.3 of the images) and 768, 112 to
                              336, 1152 (0.7); ours: the first of these
  the rest                    as 7B, gram          as `gram`

Hardware and time: batch 2,048 is sized for 32 v5e chips. Not trained to
completion here; time unknown.

Expected: 82.2 % k-NN and 83.3 % linear on ImageNet after the first stage (the
yaml's header). The later stages are unpublished at size L.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.recipes import parse_arg, read_config
from mtv_jax.utils.errors import ConfigError


def get_config(arg=None):
  arg = parse_arg(
    arg, tiny=False, batch=0, variant="L", gram=False, highres=False, init=""
  )
  if arg.gram and arg.highres:
    raise ConfigError(
      "dinov3_l16: gram and highres are two runs, one after the other; pass "
      "one of them."
    )
  if arg.init and not (arg.gram or arg.highres):
    raise ConfigError(
      f"dinov3_l16: init={arg.init} is the run that the stages `gram` and "
      "`highres` start from; pass one of them, or set --config.init.path."
    )
  size = 512 if arg.highres else 224
  base = dict(tiny=arg.tiny, batch=arg.batch, variant=arg.variant)
  config = read_config("dinov2_l16", res=size, **base)
  config.model.init = "dinov3"
  config.model.positions = "rope"
  config.model.rope = dict(base=100.0, rescale=None)
  config.objectives.ibot.head = "ibot"
  for objective in config.objectives.values():
    objective.target = "sinkhorn"
  if arg.gram or arg.highres:
    set_later_stage(config, arg, 32 if arg.tiny else size)
  return config


def set_later_stage(config, arg, size):
  """Turns the config into the stage `gram` or `highres`."""
  previous = "dinov3_l16_gram" if arg.highres else "dinov3_l16"
  init = arg.init or f"/data/runs/{previous}"
  if arg.init or not arg.tiny:
    weights = "teacher" if arg.highres else "student"
    config.init = dict(path=init, weights=weights, teacher=True)
  teacher = dict(path=init, weights="teacher", update_every_steps=10_000)
  teacher["max_updates"] = 3
  weight = dict(value=2.0, ramp_steps=1000, ramp_shape="cosine")
  ratio, length, rate = 2.0, 25_000, 3e-5
  if arg.highres:
    teacher = dict(path=init, weights="teacher")
    weight, ratio, length, rate = 1.5, 1.5, 10_000, 1.25e-5
  if arg.tiny:
    # Uses the EMA teacher; smoke tests don't have a run to load.
    weight, ratio, teacher = 1.0, 2.0, dict(update_every_steps=10)
  else:
    config.total_steps = length
    config.optim.lr = 4 * rate
    config.data.ops = f"decode|canvas({round(1.25 * ratio * size)})"
    config.views["local"].ops = config.views["local"].ops.replace("96", "112")
    config.schedule = dict(name="constant", warmup_steps=1000)
    if arg.highres:
      config.schedule.update(warmup_steps=length // 3, warmup_shape="cosine")
  crop = f"crop({round(ratio * size)}, 0.32, 1.0, method='bicubic')|flip"
  config.views.gram = dict(count=2, ops=crop, crops_of="global")
  config.teachers = dict(gram=teacher)
  config.objectives.gram = dict(weight=weight, view_teacher="gram")
  config.optim.weight_decay_end = None
  config.teacher = dict(momentum=0.999)
  config.objectives.dino.koleo_group = 16
  for name in ("dino", "ibot"):
    config.objectives[name].freeze_last_layer_percent = 0.0
    config.objectives[name].teacher_temp_start = 0.07
