"""Zero-shot classification by prompts (Radford et al. 2021).

With e_ct the normalised text embedding of class c in template t,

    w_c  = normalize(mean_t e_ct)
    pred = argmax_c cos(image, w_c)

as in big_vision, open_clip and CLIP_benchmark. Embeddings are normalised before
the mean; temperature and bias change nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int

from mtv_jax.config.options import PositiveInt
from mtv_jax.data import tokenizers
from mtv_jax.encoder.encoder import Encoder, normalize
from mtv_jax.evals.classification.base import (
  chance_accuracies,
  rank_accuracies,
)
from mtv_jax.evals.core import prompts, ranking
from mtv_jax.evals.core.base import Evaluator, Result, require_text
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import ClassificationSet, Data
from mtv_jax.evals.datasets import registry
from mtv_jax.utils.errors import InputError, did_you_mean

# Classes embedded at a time: 64 x 80 prompts are 16 MB of embeddings.
_CLASSES = 64
_WNID = re.compile(r"n\d{8}")


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluator):
  """Zero-shot classification: top-1, top-5 and mean-per-class accuracy.

  Attributes:
    data: see `datasets/registry.py`.
    prompts: a file of class names and templates (see `prompts.py`); by
      default the data's own names and a few templates.
    classes: `all` scores every class of the prompt file, `present` those that
      have an image, which makes a subset easier.
    clean: `tokenizer` leaves prompts to the tokenizer's cleaning (SigLIP's
      canonicalises, CLIP's does not); `canonicalize` canonicalises them first,
      as big_vision does.
    count: images to use, evenly spaced; all by default.
  """

  data: Data = "scenes"
  prompts: str | None = None
  classes: Literal["all", "present"] = "all"
  clean: Literal["tokenizer", "canonicalize"] = "tokenizer"
  count: PositiveInt | None = None
  batch_size: PositiveInt = 64

  @functools.cached_property
  def _set(self) -> tuple[ClassificationSet, prompts.Prompts, np.ndarray]:
    """Images, prompts, and each image's label among the prompts' classes."""
    data = registry.open_classification(self.data, count=self.count)
    given = prompts.read_prompts(self.prompts) if self.prompts else None
    return data, *match_classes(data, given, keep=self.classes)

  def run(self, encoder: Encoder) -> Result:
    """Accuracies among the prompts' classes."""
    require_text(encoder)
    data, named, labels = self._set
    classifier = text_classifier(encoder, named, clean=self.clean)
    features = encoder.image(
      data.images, outputs=("pooled",), batch_size=self.batch_size
    )
    accuracies, chance = class_accuracies(
      normalize(features.pooled), classifier, labels
    )
    protocol = {
      **encoder.protocol(),
      "data": data.name,
      "data_hash": data.digest,
      "images": len(data.images),
      "classes": len(named.classes),
      "classes_scored": self.classes,
      **named.protocol(),
      "clean": self.clean,
      "similarity": "cosine, float32, highest matmul precision",
      "ties": ranking.TIE_RULE,
      "mean_per_class": "over classes that have an image",
    }
    return Result(
      accuracies.metrics, protocol, chance, errors=accuracies.errors
    )


def class_accuracies(
  embeddings: Float32[np.ndarray, "n e"],
  classifier: Float32[np.ndarray, "c e"],
  labels: Int[np.ndarray, " n"],
  *,
  groups: Int[np.ndarray, " n"] | None = None,
) -> tuple[Estimate, dict[str, float]]:
  """Accuracies of normalised embeddings among class vectors, and chance.

  `groups` are as for `rank_accuracies`.
  """
  count = len(classifier)
  ranks = ranking.ranks(
    embeddings, classifier, query_ids=labels, candidate_ids=np.arange(count)
  )
  accuracies = rank_accuracies(ranks, labels, groups=groups)
  return accuracies, chance_accuracies(accuracies.metrics, count)


def text_classifier(
  encoder: Encoder, named: prompts.Prompts, *, clean: str = "tokenizer"
) -> Float32[np.ndarray, "c e"]:
  """One normalised vector per class.

  Equal names are embedded once, so that their vectors are bit-identical and
  the lowest index wins (ImageNet has "missile" and "sunglasses" twice).
  """
  names = list(dict.fromkeys(named.classes))
  vectors = {}
  for start in range(0, len(names), _CLASSES):
    chunk = names[start : start + _CLASSES]
    strings = [t.replace("{}", name) for name in chunk for t in named.templates]
    if clean == "canonicalize":
      strings = [tokenizers.canonicalize(string) for string in strings]
    embedded = normalize(encoder.text(strings))
    by_class = embedded.reshape(len(chunk), len(named.templates), -1)
    vectors.update(zip(chunk, normalize(by_class.mean(axis=1)), strict=True))
  return np.stack([vectors[name] for name in named.classes])


def match_classes(
  data: ClassificationSet, given: prompts.Prompts | None, *, keep: str
) -> tuple[prompts.Prompts, Int[np.ndarray, " n"]]:
  """The prompts to score against, and the images' labels among them.

  Classes are matched by id where the file has ids, else by canonical name. A
  full set of WordNet ids is matched in sorted order, which defines ImageNet's
  labels.

  Args:
    data: images and classes.
    given: a prompt file's content; None for prompts from the data's names.
    keep: `all` classes or those `present` in the data.

  Raises:
    InputError: a class of the data is not in the file, or two classes have one
      name and no ids: their prompts would be equal, and the second could never
      be predicted.
  """
  if given is None:
    given = _prompts_from_names(data)
    index = np.arange(len(given.classes))
  else:
    index = np.asarray(_match_to_file(data, given))
  labels = index[data.labels]
  if keep == "present":
    present, labels = np.unique(labels, return_inverse=True)
    given = dataclasses.replace(
      given,
      classes=tuple(given.classes[i] for i in present),
      ids=given.ids and tuple(given.ids[i] for i in present),
    )
  return given, labels.astype(np.int32)


def _prompts_from_names(data: ClassificationSet) -> prompts.Prompts:
  if data.classes is None:
    raise InputError(
      f"{data.name} has labels but no class names: give a prompt file "
      "(prompts=) with its classes in the order of the labels"
    )
  wordnet_ids = [name for name in data.classes if _WNID.fullmatch(name)]
  if wordnet_ids:
    raise InputError(
      f"{data.name}: folders such as {wordnet_ids[0]} are WordNet ids and not "
      "names. Give a prompt file: mtv-jax make_prompts writes ImageNet's"
    )
  _canonical_names(data)
  return prompts.Prompts(classes=data.classes)


def _canonical_names(data: ClassificationSet) -> list[str]:
  """Class names for the prompts; InputError if two classes share one."""
  first: dict[str, int] = {}
  names = [tokenizers.canonicalize(name) for name in data.classes or ()]
  for i, name in enumerate(names):
    if first.setdefault(name, i) != i:
      both = [(data.ids or data.classes)[k] for k in (first[name], i)]
      raise InputError(
        f"{data.name}: the classes {both[0]!r} and {both[1]!r} are both "
        f"{name!r} in prompts, so the second could never be predicted. Give a "
        "prompt file with 'ids', or rename one"
      )
  return names


def _match_to_file(
  data: ClassificationSet, given: prompts.Prompts
) -> Sequence[int]:
  """For each class of the data, its index in the prompt file."""
  total = len(given.classes)
  if data.ids is None and data.classes is None:
    largest = int(data.labels.max())
    if largest >= total:
      raise InputError(
        f"{data.name} has labels up to {largest} and {given.name} has {total} "
        "classes"
      )
    return range(total)
  if given.ids is not None and data.ids is not None:
    known, wanted = given.ids, data.ids
  elif len(data.ids or ()) == total and all(map(_WNID.fullmatch, data.ids)):
    return range(total)
  else:
    known = [tokenizers.canonicalize(name) for name in given.classes]
    wanted = _canonical_names(data)
  # The first of equal names.
  index = {key: i for i, key in reversed([*enumerate(known)])}
  missing = [key for key in wanted if key not in index]
  if missing:
    raise InputError(
      f"{len(missing)} of {len(wanted)} classes of {data.name} are not in "
      f"{given.name}, such as {missing[0]!r}. "
      f"{did_you_mean(missing[0], known)}"
    )
  return [index[key] for key in wanted]
