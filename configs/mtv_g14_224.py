"""MTV at the size of g/14, 224 pixels: configs/mtv_b16_224.py, larger.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/mtv_g14 --distributed \
    --config=configs/mtv_g14_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --config.data.train[0].labels.depth=/data/web_depth \
    --config.data.train[0].labels.boxes=/data/web_boxes

Hardware and time: meant for a pod of 256 chips, whose memory holds parameters
and moments in parts; docs/pods.md has what tools/preflight.py says of it. Not
trained by us, so no time is given.

Expected: nothing published is of this size.

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU.
"""

import pathlib

from mtv_jax.config import schema as config_lib

BASE = pathlib.Path(__file__).with_name("mtv_b16_224.py")


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, tiny=False, batch=0, tokenizer="bytes")
  config = config_lib.read(
    f"{BASE}:variant=g,tiny={arg.tiny},batch={arg.batch or 0},"
    f"tokenizer={arg.tokenizer}"
  )
  if arg.tiny:
    return config
  config.batch_size = arg.batch or 4096
  # A patch of 14, of crops whose sides it divides.
  config.model.variant = "g/14"
  config.model.text.variant = "L"
  for view in config.views.values():
    view.ops = view.ops.replace("patch=16", "patch=14").replace("(96", "(98")
  # Parameters, teacher and moments of g take 30 GB: split over 32 chips.
  config.mesh.fsdp = 32
  return config
