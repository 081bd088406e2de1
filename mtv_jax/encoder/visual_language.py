"""A language model that answers questions about images, on a frozen encoder.

model = VisualLanguageModel.load(RUN)
features = model.encode(images)
answers = model.answer(questions, features, images=[0, 0, 1])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mtv_jax.encoder.encoder import Encoder


class VisualLanguageModel:
  """An encoder, and the connector and language model trained on its patches.

  The objective `next_token` trains both, see `configs/llava.py`.
  """

  encoder: Encoder

  @classmethod
  def load(
    cls, path: str | os.PathLike, *, dtype: str = "float32", **options: Any
  ) -> VisualLanguageModel:
    """Opens a run of `configs/llava.py`; `options` as in `loading.load`."""
    raise NotImplementedError

  def encode(
    self, images: Sequence[Any] | np.ndarray, *, batch_size: int = 64
  ) -> Float[np.ndarray, "n p d"]:
    """The patches of images that the connector reads, to cache on disk.

    `images` as for `Encoder.image`.
    """
    raise NotImplementedError

  def answer(
    self,
    questions: Sequence[str],
    features: Float[np.ndarray, "n p d"] | None = None,
    *,
    images: Sequence[int] | None = None,
    max_tokens: int = 16,
    batch_size: int = 64,
  ) -> list[str]:
    """Answers by batched greedy decoding.

    Args:
      questions: without `<image>`, which precedes each question in training.
      features: of `encode`; None answers from the questions alone.
      images: the row of `features` of each question; by default question i is
        about image i.
      max_tokens: an answer's most tokens; it ends before at the end of turn.
      batch_size: questions per step over the whole mesh.
    """
    raise NotImplementedError

  def protocol(self) -> dict[str, Any]:
    """Everything that the answers depend on, for JSON."""
    raise NotImplementedError
