"""A language model that answers questions about images, on a frozen encoder.

model = VisualLanguageModel.load(RUN)
features = model.encode(images)
answers = model.answer(questions, features, images=[0, 0, 1])
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from mtv_jax.config.options import shorten_repr
from mtv_jax.data.conversations import IMAGE, ConversationOp
from mtv_jax.encoder import apply_fns, batched, loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.models.heads.language_model import LanguageHead
from mtv_jax.utils.errors import InputError

HEAD = LanguageHead.params_key
_MULTIPLE = 16  # Prompts are padded to a multiple of this, to compile less.


class VisualLanguageModel:
  """An encoder, and the connector and language model trained on its features.

  The objective `next_token` trains both, see `configs/llava.py`.
  """

  def __init__(self, encoder: Encoder, op: ConversationOp):
    """Wraps an encoder with the head `language_model`.

    `op`: the op `conversation` that the head was trained with.
    """
    if not encoder.can_predict(HEAD):
      raise InputError(
        f"{encoder!r} has no language model; pass a run of configs/llava.py."
      )
    head = encoder.prediction_heads[HEAD]
    self.encoder, self.head, self.op = encoder, head, op

  @classmethod
  def load(
    cls, path: str | os.PathLike, *, dtype: str = "float32", **options: Any
  ) -> VisualLanguageModel:
    """Opens a run of `configs/llava.py`; `options` as in `loading.load`."""
    op = loading.read_conversation_op(path)
    return cls(loading.load(path, dtype=dtype, **options), op)

  def encode(
    self, images: Sequence[Any] | np.ndarray, *, batch_size: int = 64
  ) -> Float[np.ndarray, "n p d"]:
    """The features of images that the connector reads, to cache on disk.

    `images` as for `Encoder.image`.
    """
    head, squashed_preprocess = self.head, self.encoder.preprocess.squashed()
    outputs = ("pooled",) if head.select == "pooled" else ("prefix", "patches")
    features = self.encoder.with_preprocess(squashed_preprocess).image(
      images,
      layers=head.taps,
      outputs=() if head.taps else outputs,
      batch_size=batch_size,
    )
    if head.select == "pooled":
      return features.pooled[:, None]
    prefixes, patches = [features.prefix], [features.patches]
    if head.taps:
      prefixes = [features.prefix_layers[i] for i in head.taps]
      patches = [features.layers[i] for i in head.taps]
    patches = [x.reshape(len(x), -1, x.shape[-1]) for x in patches]
    return head.join_features(prefixes, patches, np)

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

    Raises InputError for questions longer than in training, and for questions
    other than "" if the template leaves them out, as `plain` does, which only
    describes images.

    Args:
      questions: without `<image>`, which precedes each question in training.
      features: result of `encode`; None answers from the questions alone.
      images: the row of `features` for each question; by default, row i for
        question i.
      max_tokens: maximum tokens of an answer, which an end of turn also ends.
      batch_size: questions per step over the whole mesh.
    """
    if not len(questions):
      return []
    has_question = features is None or any(questions)
    if has_question and not self.op.text.template.question:
      raise InputError(
        f"The template {self.op.template!r} leaves out questions, so the "
        "language model can't answer them. Train it with another template."
      )
    image_prefix = IMAGE
    rows = range(len(questions)) if images is None else images
    if features is None:
      channels = self.head.num_channels(self.encoder.spec)
      image_prefix, rows = "", [0] * len(questions)
      features = np.zeros((1, 1, channels), np.float32)
    if len(rows) != len(questions) or max(rows) >= len(features):
      raise InputError(
        f"{len(questions)} questions about {len(features)} images: pass the "
        "row of `features` for each question as `images`."
      )
    prompts = [
      self.op.text.encode_prompt(image_prefix + text) for text in questions
    ]
    for prompt, text in zip(prompts, questions, strict=True):
      if len(prompt) > self.op.length or IMAGE in text:
        raise InputError(
          f"The question {shorten_repr(text)} has {len(prompt)} tokens; "
          f"expected at most {self.op.length}, and no {IMAGE}."
        )
    longest = max(map(len, prompts))
    tokens = np.zeros((len(prompts), -(-longest // _MULTIPLE) * _MULTIPLE))
    tokens = tokens.astype(np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt

    def prepare(i):
      length = np.int32(len(prompts[i]))
      patches = np.asarray(features[rows[i]], np.float32)
      return {"tokens": tokens[i], "length": length, "patches": patches}

    blank = {**jax.tree.map(np.zeros_like, prepare(0)), "length": np.int32(1)}
    function = apply_fns.generate_function(
      self.head, max_tokens, self.op.text.stop_id,
      self.encoder.dtype, self.encoder.mesh,
    )  # fmt: skip
    params = self.encoder.params["heads"][HEAD]
    ids = batched.in_batches(
      functools.partial(function, params), prepare, count=len(prompts),
      blank=blank, batch_size=batch_size, mesh=self.encoder.mesh,
    )["tokens"]  # fmt: skip
    return self.op.text.decode(ids)

  def protocol(self) -> dict[str, Any]:
    """Everything that the answers depend on, for JSON."""
    return {
      **self.encoder.protocol(),
      "language_model": dataclasses.asdict(self.head),
      "template": self.op.template,
      "tokenizer": pathlib.PurePath(self.op.tokenizer).name,
    }
