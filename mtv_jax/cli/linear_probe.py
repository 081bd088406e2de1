"""Linear classification on frozen features, with DINOv2's protocol.

    mtv-jax linear_probe --encoder=runs/a
    mtv-jax linear_probe --encoder=runs/a --data=imagenet \\
      --set=batch_size=512 --json=linear.json
    mtv-jax linear_probe --encoder=runs/a --data=imagenet \\
      --set=augment=cached --set=select=train_split

The data are scenes or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
Published figures train on random crops, encoded anew at every step; with
augment=cached features are computed once.
"""

import functools

from mtv_jax.cli import probe

add_arguments = probe.add_arguments
run = functools.partial(probe.run, "linear_probe")
