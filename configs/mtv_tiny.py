"""Every objective on the built-in scenes, sized for a laptop CPU.

Command:

  python -m mtv_jax.main --config=configs/mtv_tiny.py --workdir=runs/tiny

Hardware, time and result: two CPU cores, see docs/results.md.
"""

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=64, steps=400)

  config = ConfigDict()
  config.seed = 0
  config.batch_size = 32 if arg.tiny else arg.batch
  config.total_steps = 30 if arg.tiny else arg.steps
  config.xla_flags = "quick" if arg.tiny else ""

  config.data = dict(
    train=[dict(type="scenes", size=64, length=20_000)],
    ops="decode|canvas(64)|caption(64)|depth(32)|regions(2, phrase_length=32)",
  )
  # The whole image for text and dense labels, crops for self-supervision. The
  # student sees the global crop masked; DINO and iBOT share this encoding.
  colours = "flip|jitter(0.8)|grey(0.2)"
  config.views = {
    "image": dict(count=1, ops="resize(64)"),
    "global": dict(
      count=1, ops=f"crop(48, 0.4, 1.0)|{colours}|blocks(0.2, 0.5, patch=8)"
    ),
    "local": dict(count=2, ops=f"crop(32, 0.1, 0.4)|{colours}"),
    "mae": dict(count=1, ops="crop(64, 0.4, 1.0)|flip|keep(0.25, patch=8)"),
  }
  config.model = dict(
    variant="mu/8",
    image_size=64,
    pool="map",
    dtype="float32",
    text=dict(variant="mu", length=64, tokenizer="bytes", clean="lower"),
  )
  # For a few hundred steps: few prototypes, which small batches can separate,
  # and a sharp teacher.
  prototypes = dict(
    prototypes=64,
    hidden=128,
    bottleneck=64,
    teacher_temp=0.03,
    teacher_temp_start=0.03,
    chunk=None,
  )
  config.objectives = dict(
    # Near log(1/64), which balances the pairs of a batch.
    contrastive=dict(weight=1.0, loss_type="sigmoid", init_bias=-4.0),
    dino=dict(weight=0.5, koleo_weight=0.1, **prototypes),
    ibot=dict(weight=0.5, **prototypes),
    mae=dict(weight=0.5, decoder_width=64, decoder_depth=1, decoder_heads=4),
    depth=dict(weight=0.5, features=16, channels=(16, 16, 16, 16)),
    grounding=dict(weight=1.0, regions=2, init_bias=-4.0),
  )
  config.teacher = dict(momentum=0.98)
  config.optim = dict(
    name="adamw", lr=2e-3, weight_decay=1e-2, b2=0.95, clip_norm=1.0
  )
  config.schedule = dict(name="cosine", warmup_percent=10)
  config.evals = dict(
    zero_shot=dict(type="zero_shot"),
    retrieval=dict(type="retrieval"),
    grounding=dict(type="grounding"),
    relative_depth=dict(type="relative_depth", at_start=True),
  )
  config.checkpoint = dict(every_steps=200, keep=2)
  config.log = dict(every_steps=20, gradients_steps=100)
  return config
