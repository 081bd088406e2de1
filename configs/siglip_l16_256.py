"""SigLIP ViT-L/16 at 256 pixels: configs/siglip_b16_224.py, larger.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --config=configs/siglip_l16_256.py \
    --config.data.train[0].path='/data/web/{00000..09999}.tar' \
    --workdir=/data/runs/siglip_l16 --distributed

Hardware and time: batch 32,768 on a pod of 128 chips or more; see docs/pods.md
for what was measured. Not trained to the end by us.

Expected: the published SigLIP L/16-256 reaches 80.5 % zero-shot on ImageNet
after 10 billion pairs of WebLI (Zhai et al. 2023).

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU.
"""

from configs import siglip_b16_224
from mtv_jax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, tokenizer="bytes")
  config = siglip_b16_224.get_config(
    f"res=256,variant=L,tiny={arg.tiny},batch={arg.batch},"
    f"tokenizer={arg.tokenizer}"
  )
  # Parameters and moments of L don't fit a chip whole beside its activations.
  config.mesh.fsdp = 1 if arg.tiny else 8
  config.mesh.data = -1
  config.model.remat = "none" if arg.tiny else "dots"
  return config
