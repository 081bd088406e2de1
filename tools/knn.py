"""k-NN classification on an encoder's features, as DINOv2 measures it.

    python tools/knn.py --encoder=runs/a
    python tools/knn.py --encoder=runs/a --data=imagenet --json=knn.json \\
      --set=batch_size=512 --set=k='(10, 20)'

The data are scenes or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
tools/evaluate.py runs this and all other evaluations.
"""

import functools

from mtv_jax.cli import probe as door

main = functools.partial(door.main, "knn", __doc__)

if __name__ == "__main__":
  main()
