"""Linear classification on an encoder's features, as DINOv2 measures it.

    python tools/linear_probe.py --encoder=runs/a
    python tools/linear_probe.py --encoder=runs/a --data=imagenet \\
      --set=batch_size=512 --json=linear.json
    python tools/linear_probe.py --encoder=runs/a --data=imagenet \\
      --set=augment=cached --set=select=train_split

The data are scenes or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
Published figures are trained on random crops, which are encoded anew at every
step; with augment=cached features are computed once.
"""

import functools

from mtv_jax.cli import probe as door

main = functools.partial(door.main, "linear_probe", __doc__)

if __name__ == "__main__":
  main()
