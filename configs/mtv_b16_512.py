"""MTV ViT-B/16 at 512 pixels: a short second stage after mtv_b16_224.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/mtv_b16_512 --distributed \
    --config=configs/mtv_b16_512.py:init=/data/runs/mtv_b16,\
tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --config.data.train[0].labels.depth=/data/web_depth \
    --config.data.train[0].labels.boxes=/data/web_boxes

Hardware and time: an image has 1,024 patches, 5.2 times as many as at 224
pixels; batch 2,048 is sized for 64 or more chips, 32 images per chip. Not
trained to completion here; time unknown.

Expected: better depth, segmentation and grounding at similar zero-shot
accuracy, as SigLIP 2 and DINOv2 report. Length, rate and batch are our choice.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes,
with random initial weights unless `init` is given.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, init="", tokenizer="")
  init = arg.init
  del arg["init"]
  config = read_config("mtv_b16_224", res=512, **arg)
  if init or not arg.tiny:
    # Loads all parameters, heads included, and the teacher; resamples position
    # embeddings.
    config.init = dict(path=init or "/data/runs/mtv_b16", teacher=True)
  if arg.tiny:
    return config

  config.batch_size = arg.batch or 2048
  config.total_examples = 50_000_000
  # A canvas of 384 pixels would be upsampled.
  config.data.ops = config.data.ops.replace("canvas(384)", "canvas(640)")
  # Scales local crops with the global crop.
  local = config.views.local.ops
  config.views.local.ops = local.replace("crop(96,", "crop(224,")
  config.optim.lr = 1e-4
  # 2,400 of 24,400 steps; optimizer state starts from zero.
  config.schedule.warmup_percent = 10
  config.evals.zero_shot.every_percent = 25
  config.evals.retrieval.every_percent = 25
  return config
