"""MTV ViT-B/16 at 512 pixels: a short second stage after mtv_b16_224.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/mtv_b16_512 --distributed \
    --config=configs/mtv_b16_512.py:init=/data/runs/mtv_b16,\
tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --config.data.train[0].labels.depth=/data/web_depth \
    --config.data.train[0].labels.boxes=/data/web_boxes

Hardware and time: an image has 1,024 patches, 5.2 times those of 224 pixels,
and batch 2,048 is meant for 64 chips or more, 32 images a chip. Not trained to
the end by us, so no time is given.

Expected: better depth, segmentation and grounding, zero-shot about as before,
as SigLIP 2 and DINOv2 report of theirs. Length, rate and batch are our choice.

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU, and starts from nothing unless `init` is given.
"""

import pathlib

from mtv_jax.config import schema as config_lib

BASE = pathlib.Path(__file__).with_name("mtv_b16_224.py")


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg, tiny=False, batch=0, init="", tokenizer="bytes"
  )
  batch = arg.batch or (16 if arg.tiny else 2048)
  config = config_lib.read(
    f"{BASE}:res=512,tiny={arg.tiny},batch={batch},tokenizer={arg.tokenizer}"
  )
  if arg.init or not arg.tiny:
    # Everything, heads included; position embeddings are resampled to the grid.
    config.init = dict(path=arg.init or "/data/runs/mtv_b16")
  if arg.tiny:
    return config

  config.total_examples = 50_000_000
  # Stored canvases of 384 pixels would have to be blown up.
  config.data.ops = config.data.ops.replace("canvas(384)", "canvas(640)")
  # Local crops grow with the global one.
  local = config.views.local.ops
  config.views.local.ops = local.replace("crop(96,", "crop(224,")
  config.optim.lr = 1e-4
  # 2,400 of 24,400 steps; moments start anew.
  config.schedule.warmup_percent = 10
  config.evals.zero_shot.every_percent = 25
  config.evals.retrieval.every_percent = 25
  return config
