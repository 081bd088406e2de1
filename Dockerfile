# The image of the commands in docs/pods.md.
#
#   docker build -t $IMAGE --build-arg REVISION=$(git rev-parse HEAD) .
#
# On GPUs with --build-arg EXTRA=cuda --build-arg RUN_AS=mtv. A TPU's device
# files belong to root.
# JAX 0.12 needs Python 3.12; pip installs an older JAX on 3.11.
FROM python:3.13-slim

ARG EXTRA=tpu
ARG REVISION=
# Recorded in a run's run.json, as the image has no .git.
ENV MTV_JAX_REVISION=$REVISION PYTHONUNBUFFERED=1

COPY . /opt/mtv_jax
RUN pip install --no-cache-dir "/opt/mtv_jax[$EXTRA,buckets,trackers]"

ARG RUN_AS=root
RUN useradd --create-home mtv
USER $RUN_AS

CMD ["mtv-jax", "--help"]
