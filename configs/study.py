"""Study recipe: contrast, self-supervision, grounding and depth on scenes.

Trains for a few minutes on two CPU cores, on built-in scenes of one difficulty.
`mtv-jax study` compares runs of this recipe.

Command (scenes are rendered once into `cache`, which all runs share):

  python -m mtv_jax.main --workdir=runs/study/full \
    --config=configs/study.py:cache=runs/study/scenes

Tune hyper-parameters with split=validation and report split=test; their scenes
are disjoint.

shared_crop uses one crop for all objectives (configs/mtv_b16_224.py).
vl=RUN,ssl=RUN replaces all objectives by feature distillation from runs of this
recipe; `mtv-jax study teachers` compares each teacher with both, see
docs/study.md.

Hardware, time and result: two CPU cores, see docs/study/world.md.
"""

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg
from mtv_jax.configs import _multi_task
from mtv_jax.data.tokenizers.builtin import EMBEDDING_ROWS
from mtv_jax.utils.errors import ConfigError

# First evaluation scene. Probes train on scenes 2,000,000 later.
FIRST = dict(validation=4_000_000, test=7_000_000)

# Settings of both study recipes; docs/study/recipes.md says which are measured.
TERMS = dict(
  weights=dict(
    contrastive=1.0, dino=0.2, ibot=0.2, mae=0.2, grounding=0.5, depth=0.5
  ),
  loss_type="softmax",
  init_bias=-4.0,
  koleo_weight=0.0,
  # Better after 1,500 steps than AdamW after 2,500 (docs/study/world.md).
  optim=dict(name="muon", lr=2e-3, weight_decay=1e-4, b2=0.95),
  warmup_percent=5,
  momentum=0.99,
  prototypes=dict(
    prototypes=128, hidden=128, bottleneck=64, teacher_temp=0.04,
    teacher_temp_start=0.04, chunk=None,
  ),
  decoder=dict(decoder_width=32, decoder_depth=1, decoder_heads=4),
  depth_head=dict(features=8, channels=(8, 8, 8, 8), head_features=8),
)  # fmt: skip
# Small, cheap crops for self-supervision.
VIEWS = dict(
  local=(2, 16, 0.15, 0.4), colours="flip|jitter(0.4)", masks="0.2, 0.5"
)


def get_config(arg=None):
  arg = parse_arg(
    arg,
    tiny=False,
    steps=2000,
    batch=32,
    difficulty="easy",
    cache="",
    images=30_000,
    size=48,
    split="test",
    shared_crop=False,
    vl="",
    ssl="",
  )
  if arg.tiny:
    arg.update(steps=20, batch=16, images=100)

  config = ConfigDict()
  config.seed = 0
  config.batch_size = arg.batch
  config.total_steps = arg.steps
  config.xla_flags = "quick" if arg.tiny else ""

  scenes = dict(type="scenes", size=arg.size, difficulty=arg.difficulty)
  train = dict(scenes, length=arg.images)
  if arg.cache:
    name = f"{arg.difficulty}-{arg.size}-{arg.images}"
    train["cache"] = f"{arg.cache}/{name}"
  ops = f"decode|canvas({arg.size})|caption(20)|depth({arg.size // 2})"
  config.data = dict(train=[train], ops=f"{ops}|regions(2, phrase_length=10)")
  tower = dict(width=64, heads=4, mlp_dim=256)
  config.model = dict(
    variant="mu/8",
    image_size=arg.size,
    pool="map",
    dtype="float32",
    depth=3,
    **tower,
    text=dict(
      variant="mu", length=20, tokenizer="words", vocab_size=EMBEDDING_ROWS,
      depth=1, **tower,
    ),
  )  # fmt: skip

  sizes = dict(size=arg.size, patch=8, crop=(32, 0.4))
  _multi_task.set_terms(config, **TERMS, regions=2, views=VIEWS | sizes)
  if arg.shared_crop:
    _multi_task.share_crop(config, arg.size, patch=8)
  config.interference = dict(every_steps=100)
  config.evals = evaluations(arg, scenes)
  config.checkpoint = dict(every_steps=2000, keep=1)
  config.log = dict(every_steps=200)
  if arg.vl or arg.ssl:
    crop = f"crop({arg.size}, 0.4, 1.0)|flip|jitter(0.4)"
    _multi_task.distil(config, dict(vl=arg.vl, ssl=arg.ssl), crop)
  return config


def evaluations(arg, scenes):
  """Evaluations on held-out scenes; each takes seconds."""
  if arg.split not in FIRST:
    raise ConfigError(f"split={arg.split}: expected one of {', '.join(FIRST)}")
  scenes = dict(scenes, first=FIRST[arg.split], length=40 if arg.tiny else 1000)
  views = {k: v for k, v in scenes.items() if k not in ("size", "length")}
  evals = dict(
    knn=dict(train=dict(scenes, length=3 * scenes["length"])),
    linear_probe=dict(steps=200, rates=(0.01, 0.1, 1.0), blocks=(1,)),
    segmentation=dict(train_count=1024, count=400),
    depth_probe=dict(train_count=384, count=400),
    geometric_correspondence=dict(data=dict(views, length=48)),
    semantic_correspondence=dict(data=dict(views, length=120)),
    zero_shot={},
    retrieval=dict(max_captions=1),
    grounding=dict(count=300),
    relative_depth=dict(count=200),
    feature_rank=dict(count=256, views=8),
  )
  return {
    name: dict(type=name, data=scenes) | entry for name, entry in evals.items()
  }
