"""MTV ViT-g/14 at 224 pixels: configs/mtv_b16_224.py, larger.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/mtv_g14 --distributed \
    --config=configs/mtv_g14_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --config.data.train[0].labels.depth=/data/web_depth \
    --config.data.train[0].labels.boxes=/data/web_boxes

Hardware and time: sized for 256 chips with sharded parameters and optimizer
state (figures of `mtv-jax preflight`: docs/pods.md). Not trained here; time
unknown.

Expected: unknown; MTV was not published at this size.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, tokenizer="")
  config = read_config("mtv_b16_224", variant="g", **arg)
  if arg.tiny:
    return config
  config.batch_size = arg.batch or 4096
  # Sides of crops must be multiples of the patch, 14 pixels.
  config.model.variant = "g/14"
  config.model.text.variant = "L"
  for view in config.views.values():
    view.ops = view.ops.replace("patch=16", "patch=14").replace("(96", "(98")
  # Parameters, teacher and optimizer state of g take 30 GB: 32 shards.
  config.mesh.fsdp = 32
  return config
