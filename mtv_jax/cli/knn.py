"""k-NN classification on frozen features, with DINOv2's protocol.

    mtv-jax knn --encoder=runs/a
    mtv-jax knn --encoder=runs/a --data=imagenet --json=knn.json \\
      --set=batch_size=512 --set=k='(10, 20)'

The data are scenes or a folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
`mtv-jax evaluate` runs this and all other evaluations.
"""

import functools

from mtv_jax.cli import probe

add_arguments = probe.add_arguments
run = functools.partial(probe.run, "knn")
