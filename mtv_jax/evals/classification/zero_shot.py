"""Zero-shot classification by prompts (Radford et al. 2021).

With e_ct the normalised text embedding of class c in template t,

    w_c  = normalize(mean_t e_ct)
    pred = argmax_c cos(image, w_c)

as in big_vision, open_clip and CLIP_benchmark. Embeddings are normalised before
the mean; temperature and bias don't affect the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from mtv_jax.config.options import PositiveInt
from mtv_jax.data import tokenizers
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.classification.probe_evaluators import rank_accuracies
from mtv_jax.evals.core import bootstrap, global_features, prompts, ranking
from mtv_jax.evals.core.base import Evaluator, Result, require_text
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import ClassificationSet, Data
from mtv_jax.evals.datasets import class_folders, imagenet, registry
from mtv_jax.utils.errors import InputError, did_you_mean

# 64 x 80 prompts are 16 MB of embeddings.
_CLASSES_PER_BATCH = 64
# Cleanings of prompts before the tokenizer's own.
_CLEANERS = {
  "canonicalize": tokenizers.canonicalize,
  "clip": tokenizers.clean_for_clip,
}


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluator):
  """Zero-shot classification: top-1, top-5 and mean-per-class accuracy.

  Attributes:
    prompts: a file or folder of class names and templates (see `prompts.py`);
      defaults to the data's names, and to its templates or `DEFAULT_TEMPLATES`.
    prompt_set: data set to read from CLIP_benchmark's prompts in a language.
    templates: a text file with one template per line, or `tcl` (TIPS's);
      replaces the templates.
    classes: `all` scores every class of the prompt file, `dataset` the data
      set's classes, `present` only classes with an image, which is easier.
      Defaults to `all`, but to `dataset` for 200 WordNet ids (ImageNet-A, -R)
      and for ObjectNet, as published.
    real: ReaL's real.json; adds ReaL accuracy on ImageNet's validation images,
      without unlabelled images.
    clean: `tokenizer` leaves the cleaning of prompts to the tokenizer (SigLIP's
      canonicalises, CLIP's doesn't); `canonicalize` canonicalises them first,
      as big_vision does, and `clip` cleans them as openai/CLIP does.
    view: the encoder's own preprocessing, or big_vision's `squash_center`; see
      `global_features.with_view`.
  """

  title = "Zero-shot classification"
  requires = frozenset({"text"})

  data: Data = "scenes"
  prompts: str | None = None
  prompt_set: str = "imagenet1k"
  templates: str | None = None
  classes: Literal["all", "dataset", "present"] | None = None
  real: str | None = None
  clean: Literal["tokenizer", *_CLEANERS] = "tokenizer"
  view: global_features.ViewName = "encoder"
  count: PositiveInt | None = None
  batch_size: PositiveInt = 64

  @functools.cached_property
  def _set(self) -> tuple[ClassificationSet, Candidates]:
    """Images, and their candidate classes."""
    data = registry.open_classification(
      self.data, count=self.count, real=self.real
    )
    file_prompts = self.prompts and prompts.read_prompts(
      self.prompts, prompt_set=self.prompt_set
    )
    candidates = match_candidates(data, file_prompts, keep=self.classes)
    if self.templates:
      class_prompts = prompts.replace_templates(
        candidates.prompts, self.templates
      )
      candidates = candidates._replace(prompts=class_prompts)
    return data, candidates

  def run(self, encoder: Encoder) -> Result:
    """Returns accuracies among the candidate classes."""
    require_text(encoder)
    data, candidates = self._set
    class_prompts, labels = candidates.prompts, candidates.labels
    encoder = global_features.with_view(encoder, self.view)
    classifier = text_classifier(encoder.text, class_prompts, clean=self.clean)
    embeddings = normalize(
      global_features.embed(encoder, data, batch_size=self.batch_size)
    )
    accuracies, chance = class_accuracies(
      embeddings, classifier, labels, candidate_ids=candidates.ids
    )
    protocol = {
      **encoder.protocol(),
      "view": self.view,
      **data.protocol(),
      "classes": len(class_prompts.classes),
      "classes_scored": candidates.keep,
      **class_prompts.protocol(),
      "clean": self.clean,
      "similarity": "cosine, float32, highest matmul precision",
      "ties": ranking.TIE_RULE,
      "mean_per_class": "over classes that have an image",
    }
    if data.groups is not None:
      protocol["border"] = "2 pixels removed on each side"
    if candidates.accepted is not None:
      real, real_chance = real_accuracy(
        embeddings, classifier, candidates.accepted
      )
      accuracies, chance = accuracies | real, chance | real_chance
      protocol["real"] = "right if among the image's labels"
      protocol["real_images"] = sum(map(bool, candidates.accepted))
    return Result.from_estimate(accuracies, protocol, chance)


def class_accuracies(
  embeddings: Float32[np.ndarray, "n e"],
  classifier: Float32[np.ndarray, "c e"],
  labels: Int[np.ndarray, " n"],
  *,
  groups: Int[np.ndarray, " n"] | None = None,
  candidate_ids: Int[np.ndarray, " c"] | None = None,
) -> tuple[Estimate, dict[str, float]]:
  """Accuracies of normalised embeddings among class vectors, and chance.

  `groups`: see `rank_accuracies`. `candidate_ids` is the label of each class
  vector, by default its index. Several vectors may share a label; the best
  counts.
  """
  count = len(classifier)
  ids = np.arange(count) if candidate_ids is None else candidate_ids
  ranks = ranking.ranks(
    embeddings, classifier, query_ids=labels, candidate_ids=ids
  )
  num_correct = np.bincount(ids[ids >= 0], minlength=1 + int(labels.max()))
  by_image, by_class = num_correct[labels], num_correct[np.unique(labels)]
  chance = {
    "top1": ranking.chance(by_image, count, 1),
    "top5": ranking.chance(by_image, count, 5),
    "mean_per_class": ranking.chance(by_class, count, 1),
  }
  return rank_accuracies(ranks, labels, groups=groups), chance


def real_accuracy(
  embeddings: Float32[np.ndarray, "n e"],
  classifier: Float32[np.ndarray, "c e"],
  accepted: Sequence[Sequence[int]],
) -> tuple[Estimate, dict[str, float]]:
  """ReaL accuracy (Beyer et al. 2020, section 3), and chance.

  Fraction of images whose best class is in `accepted`; images without accepted
  labels are ignored.
  """
  accepted = [sorted({*labels}) for labels in accepted]
  counts = np.array([len(labels) for labels in accepted])
  owner = np.repeat(np.arange(len(accepted)), counts)
  ranks = ranking.ranks(
    embeddings[owner],
    classifier,
    query_ids=np.concatenate([np.asarray(a, np.int32) for a in accepted]),
    candidate_ids=np.arange(len(classifier)),
  )
  is_correct = np.zeros(len(accepted), bool)
  is_correct[owner[ranks == 0]] = True
  is_labelled = counts > 0
  chance = float(np.mean(counts[is_labelled])) / len(classifier)
  estimate = bootstrap.means({"real_top1": is_correct[is_labelled]})
  return estimate, {"real_top1": chance}


def text_classifier(
  embed: Callable[[list[str]], Float32[np.ndarray, "n e"]],
  class_prompts: prompts.Prompts,
  *,
  clean: str = "tokenizer",
) -> Float32[np.ndarray, "c e"]:
  """One normalised vector per class; `embed` is `Encoder.text` or `.phrases`.

  Equal names are embedded once, so that their vectors are bit-identical and
  ties go to the lowest index (ImageNet has "missile" and "sunglasses" twice).
  """
  names = list(dict.fromkeys(class_prompts.classes))
  vectors = {}
  for start in range(0, len(names), _CLASSES_PER_BATCH):
    chunk = names[start : start + _CLASSES_PER_BATCH]
    strings = [
      t.replace("{}", name) for name in chunk for t in class_prompts.templates
    ]
    if clean in _CLEANERS:
      strings = [_CLEANERS[clean](string) for string in strings]
    embeddings = normalize(embed(strings))
    by_class = embeddings.reshape(len(chunk), len(class_prompts.templates), -1)
    vectors.update(zip(chunk, normalize(by_class.mean(axis=1)), strict=True))
  return np.stack([vectors[name] for name in class_prompts.classes])


class Candidates(NamedTuple):
  """Candidate classes, and the images' labels."""

  prompts: prompts.Prompts
  labels: Int[np.ndarray, " n"]  # of the images
  # Label of each class, -1 if absent from the data; None: the class index.
  ids: Int[np.ndarray, " c"] | None
  keep: str  # scored classes, for the protocol
  # Per image, the indices of all its correct classes (ReaL).
  accepted: tuple[tuple[int, ...], ...] | None = None


def match_candidates(
  data: ClassificationSet,
  file_prompts: prompts.Prompts | None,
  *,
  keep: str | None,
) -> Candidates:
  """Matches the data's classes to a prompt file, see `match_classes`.

  ObjectNet is scored against ImageNet's classes if the prompt file has 1000
  classes, else against its own.
  """
  is_imagenet = (
    file_prompts is not None
    and len(file_prompts.classes) == imagenet.CLASS_COUNT
  )
  if data.groups is not None and is_imagenet:
    return _match_groups(data, file_prompts, keep=keep or "dataset")
  keep = keep or ("dataset" if data.subset else "all")
  class_prompts, labels = match_classes(data, file_prompts, keep=keep)
  accepted = data.accepted
  if accepted is not None:
    if not is_imagenet or keep != "all":
      raise InputError(
        f"ReaL's labels are ImageNet's {imagenet.CLASS_COUNT} classes; "
        "pass their prompt file (mtv-jax make_prompts) and classes='all'"
      )
    if not any(accepted):
      raise InputError(
        f"none of the {len(accepted)} images of {data.name} has a ReaL "
        "label; use more images (count=)"
      )
    order = _imagenet_order(file_prompts)
    accepted = tuple(
      tuple(order[i] for i in candidate_ids) for candidate_ids in accepted
    )
  return Candidates(class_prompts, labels, None, keep, accepted)


def _match_groups(
  data: ClassificationSet, class_prompts: prompts.Prompts, *, keep: str
) -> Candidates:
  """Matches ObjectNet's classes to ImageNet's prompts."""
  order = _imagenet_order(class_prompts)
  ids = np.full(len(class_prompts.classes), -1, np.int32)
  for label, group in enumerate(data.groups):
    ids[[order[i] for i in group]] = label
  if keep == "present":
    ids[~np.isin(ids, data.labels)] = -1
  if keep != "all":
    class_prompts = _select_classes(class_prompts, np.flatnonzero(ids >= 0))
    ids = ids[ids >= 0]
  return Candidates(class_prompts, data.labels, ids, keep)


def _imagenet_order(names: prompts.Prompts) -> list[int]:
  """Index in the prompt file of each ImageNet label."""
  indices = range(len(names.classes))
  return sorted(indices, key=names.ids.__getitem__) if names.ids else [*indices]


def _select_classes(
  class_prompts: prompts.Prompts, indices: Int[np.ndarray, " c"]
) -> prompts.Prompts:
  classes = tuple(class_prompts.classes[i] for i in indices)
  ids = class_prompts.ids and tuple(class_prompts.ids[i] for i in indices)
  return dataclasses.replace(class_prompts, classes=classes, ids=ids)


def match_classes(
  data: ClassificationSet, class_prompts: prompts.Prompts | None, *, keep: str
) -> tuple[prompts.Prompts, Int[np.ndarray, " n"]]:
  """Prompts to score against, and the images' labels among them.

  Classes are matched by id if the file has ids, else by canonical name. A full
  set of WordNet ids is matched in sorted order, which defines ImageNet's
  labels.
  """
  if class_prompts is None:
    class_prompts = _prompts_from_names(data)
    index = np.arange(len(class_prompts.classes))
  else:
    index = np.asarray(_match_to_file(data, class_prompts))
  labels = index[data.labels]
  if keep != "all":
    kept_classes = np.unique(labels if keep == "present" else index)
    class_prompts = _select_classes(class_prompts, kept_classes)
    labels = np.searchsorted(kept_classes, labels)
  return class_prompts, labels.astype(np.int32)


def _prompts_from_names(data: ClassificationSet) -> prompts.Prompts:
  if data.classes is None:
    raise InputError(
      f"{data.name} has labels but no class names: pass a prompt file "
      "(prompts=) with its classes in the order of the labels"
    )
  classes, ids = data.classes, class_folders.WORDNET_ID
  # Up to ten numbers may be digit classes.
  too_many_digits = class_folders.are_numbers(classes) and classes[10:]
  numeric_names = classes if too_many_digits else ()
  if bad_names := [*filter(ids.fullmatch, classes), *numeric_names]:
    raise InputError(
      f"{data.name}: folders such as {bad_names[0]} are WordNet ids or numbers "
      "rather than names. Pass a prompt file: mtv-jax make_prompts writes "
      "ImageNet's"
    )
  if data.templates is None:
    _canonicalize_names(data)
    return prompts.Prompts(classes=classes)
  return prompts.Prompts(classes, data.templates, name=data.name)


def _canonicalize_names(data: ClassificationSet) -> list[str]:
  """Canonicalizes class names; raises InputError for duplicates."""
  first: dict[str, int] = {}
  names = [tokenizers.canonicalize(name) for name in data.classes or ()]
  for i, name in enumerate(names):
    if first.setdefault(name, i) != i:
      pair = [(data.ids or data.classes)[k] for k in (first[name], i)]
      raise InputError(
        f"{data.name}: the classes {pair[0]!r} and {pair[1]!r} are both "
        f"{name!r} in prompts, so the second could never be predicted. Pass a "
        "prompt file with 'ids', or rename one"
      )
  return names


def _match_to_file(
  data: ClassificationSet, file_prompts: prompts.Prompts
) -> Sequence[int]:
  """Index in the prompt file of each class of the data."""
  total, ids = len(file_prompts.classes), data.ids or ()
  is_unnamed = data.ids is None and data.classes is None
  # Numeric ids that the file doesn't list: ImageNet-V2's folders.
  is_numbered = class_folders.are_numbers(ids) and not (
    {*ids} <= {*(file_prompts.ids or file_prompts.classes)}
  )
  if is_unnamed or is_numbered:
    largest = int(data.labels.max() if is_unnamed else ids[-1])
    if largest >= total:
      raise InputError(
        f"{data.name} has labels up to {largest}, but {file_prompts.name} has "
        f"{total} classes"
      )
    return range(total) if is_unnamed else [*map(int, ids)]
  if data.templates is not None and len(data.classes) == total:
    # CLIP_benchmark's lists are in the order of the labels.
    return range(total)
  if file_prompts.ids is not None and data.ids is not None:
    file_keys, data_keys = file_prompts.ids, data.ids
  elif len(ids) == total and all(map(class_folders.WORDNET_ID.fullmatch, ids)):
    return range(total)
  else:
    file_keys = [tokenizers.canonicalize(name) for name in file_prompts.classes]
    data_keys = _canonicalize_names(data)
  # Equal names map to the first.
  index = {key: i for i, key in reversed([*enumerate(file_keys)])}
  missing = [key for key in data_keys if key not in index]
  if missing:
    example = missing[0]
    raise InputError(
      f"{len(missing)} of {len(data_keys)} classes of {data.name} are not in "
      f"{file_prompts.name}, such as {example!r}. "
      f"{did_you_mean(example, file_keys)}"
    )
  return [index[key] for key in data_keys]
