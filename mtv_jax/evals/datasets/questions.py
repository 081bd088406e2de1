"""Questions about images: benchmarks as released, scenes, boxes, LLaVA's JSON.

VQAv2       v2_OpenEnded_mscoco_val2014_questions.json (Goyal et al. 2017) with
            v2_mscoco_val2014_annotations.json, beside val2014/. The test files
            have no annotations: their answers are written, not scored.
GQA         testdev_balanced_questions.json (Hudson and Manning 2019), images/
TextVQA     TextVQA_0.5.1_val.json (Singh et al. 2019), train_images/
POPE        coco_pope_{random,popular,adversarial}.json (Li et al. 2023),
            val2014/
ScienceQA   problems.json with pid_splits.json (Lu et al. 2022), SPLIT/ID/
            image.png; only questions with an image
LLaVA       [{id, image, conversations}, ...], or JSON lines: the first question
            and answer; `answer_type`, if any, is the question's type

`data` is a file or its folder. The image folder is beside the file or its
folder, or passed as `images`. Prompts are LLaVA-1.5's (Liu et al. 2024).
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from mtv_jax.config import foreign
from mtv_jax.data.scenes import questions as scene_questions
from mtv_jax.data.scenes.captions import article
from mtv_jax.data.scenes.layout import Draw
from mtv_jax.data.sources import conversations
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import coco, files, scenes
from mtv_jax.evals.vqa import Question, read_questions
from mtv_jax.utils.errors import InputError, MissingFileError

EXPECTED = (
  "Visual question answering reads scenes, question files of VQAv2, GQA, "
  "TextVQA, POPE or ScienceQA, and LLaVA's JSON; it asks about boxes of COCO's "
  "folder or of a source with labels of boxes."
)
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
_VQAV2 = "v2_OpenEnded_mscoco_*_questions.json"
# Question files by pattern, in order of preference.
_FILES = (
  "v2_OpenEnded_mscoco_val2014_questions.json",
  _VQAV2,
  "testdev_balanced_questions.json",
  "val_balanced_questions.json",
  "TextVQA_*_val.json",
  "coco_pope_*.json",
  "problems.json",
  "questions.json",
)
DEFAULT_SCENES = 500
CONTROLS = ("blank", "shuffled")  # see `evals/visual_questions.py`
# Questions about a box: text, the largest low and smallest high value, answers.
_BOX_QUESTIONS = {
  "where": (
    "is the {} on the left or the right of the photo?",
    *(0.4, 0.6),
    ("left", "right"),
  ),
  "how_large": (
    "does the {} fill more than a quarter of the photo?",
    *(0.2, 0.3),
    ("no", "yes"),
  ),
}


class QuestionRow(NamedTuple):
  """A question in a file."""

  key: str
  image: str  # file name
  text: str
  truth: Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionSet(examples.ImageSet):
  """Questions about images, in the order of the images."""

  keys: tuple[str, ...]
  texts: tuple[str, ...]
  owner: Int[np.ndarray, " m"]  # the image of each question
  truths: tuple[Question, ...]  # empty for a test set without truths
  rule: str  # of `vqa.RULES`
  prompt: str = ""  # appended to the texts
  # Names of several answer types.
  unions: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

  def protocol(self) -> dict[str, Any]:
    """Protocol entries."""
    return {**super().protocol(), "questions": len(self.texts)}


class _Layout(NamedTuple):
  """Rows of a question file, and how they are asked and scored."""

  rows: Sequence[QuestionRow]
  folder: str  # preferred name of the image folder
  rule: str
  prompt: str = ""


def matches(path: pathlib.Path) -> bool:
  """Whether a path is a question file, a folder with one, or COCO's."""
  return bool(_find_files(path)) or coco.matches(path)


def _find_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The question file, or the files in a folder that match one pattern."""
  if path.is_file():
    is_known = any(path.match(pattern) for pattern in _FILES)
    return [path] if is_known or _is_llava(path) else []
  for pattern in _FILES:
    for folder in (pattern, f"*/{pattern}"):
      if found := sorted(path.glob(folder)):
        return found if "pope" in pattern else found[:1]
  return []


def _is_llava(path: pathlib.Path) -> bool:
  """Whether a file has LLaVA's records, by its beginning."""
  if path.suffix not in (".json", ".jsonl"):
    return False
  with path.open("rb") as file:
    return b'"conversations"' in file.read(1 << 14)


def open_questions(
  path: pathlib.Path, *, images: pathlib.Path | None, split: str, count: Any
) -> QuestionSet:
  """Opens a benchmark, `count` of its questions; else COCO's boxes."""
  if not (question_files := _find_files(path)):
    boxes = coco.open_boxes(path, images=images, count=count)
    return from_boxes(boxes)
  layout = _read_layout(question_files, split)
  unions = scene_questions.KINDS if _is_llava(question_files[0]) else {}
  _check_rows(question_files[0], layout.rows, unions)
  rows = examples.subsample(layout.rows, count)
  if not rows:
    raise InputError(f"{question_files[0]} has no questions about images")
  names = list(dict.fromkeys(row.image for row in rows))
  paths = coco.find_images(question_files[0], images, layout.folder, names)
  sizes = files.file_sizes(paths)
  return make_set(
    rows,
    [*zip(names, paths, sizes, strict=True)],
    read=lambda record: examples.read_image(record[1]),
    hash_key=lambda record: (record[0], record[2]),
    name=str(path),
    rule=layout.rule,
    prompt=layout.prompt,
    unions=unions,
  )


def _check_rows(
  path: pathlib.Path, rows: Sequence[QuestionRow], unions: Mapping[str, Any]
) -> None:
  repeated = collections.Counter(row.key for row in rows)
  if repeated and (most := repeated.most_common(1)[0])[1] > 1:
    raise InputError(f"{path}: question {most[0]!r} occurs twice")
  empty = [row.key for row in rows if not row.truth.truths]
  if 0 < len(empty) < len(rows):
    raise InputError(f"{path}: question {empty[0]!r} has no answer")
  # A type's metric, `accuracy_KIND`, must not have another metric's name.
  others = rf"({'|'.join(unions)})|(.*_)?({'|'.join(CONTROLS)})"
  for kind in {row.truth.kind or "other" for row in rows}:
    if not re.fullmatch(rf"(?!({others})$)[\w/ .-]+", kind):
      raise InputError(f"{path}: rename the answer type {kind!r}")


def make_set(
  rows: Sequence[QuestionRow],
  records: Sequence[Any],
  *,
  hash_key: Callable[[Any], Any],
  **fields: Any,
) -> QuestionSet:
  """Builds a set of questions about `records`, whose first item is a name."""
  index = {record[0]: i for i, record in enumerate(records)}
  rows = sorted(rows, key=lambda row: index[row.image])
  keys, names, texts, truths = zip(*rows, strict=True)
  asked = [f"{row.text}\n{row.truth}" for row in rows]
  return QuestionSet.from_records(
    records,
    hash_key=hash_key,
    prefix=asked,
    keys=keys,
    texts=texts,
    owner=np.array([index[name] for name in names], np.int32),
    truths=truths if truths[0].truths else (),
    **fields,
  )


def _read_layout(paths: Sequence[pathlib.Path], split: str) -> _Layout:
  path = paths[0]
  if path.match("coco_pope_*.json"):
    return _Layout(_read_pope(paths), "val2014", "pope", SHORT)
  if not any(path.match(pattern) for pattern in _FILES[:-1]):
    return _Layout(_read_llava(path), "images", "exact")
  content = coco.read_annotations(path)
  if path.name == "problems.json":
    rows = _read_science_qa(path, content, split)
    return _Layout(rows, split, "option", LETTER)
  if path.match(_VQAV2):
    return _read_vqav2(path, content)
  if path.match("TextVQA_*.json"):
    return _Layout(
      _read_text_vqa(path, content), "train_images", "textvqa", SHORT
    )
  return _Layout(_read_gqa(path, content), "images", "exact", SHORT)


def _read_vqav2(path: pathlib.Path, content: Any) -> _Layout:
  fields = {"question_id": int, "image_id": int, "question": str}
  rows = foreign.read_rows(path, content, "questions", fields)
  subset = foreign.read_field(content, "data_subtype", str)
  name = path.name.replace("OpenEnded_", "").replace("questions", "annotations")
  annotations = path.with_name(name)
  truths = {}
  if annotations.is_file():
    truths = read_questions(annotations)
  elif not subset.startswith("test"):
    raise MissingFileError(f"{path}: its truths, {name}, are not beside it.")
  images = subset.replace("-dev", "")  # test-dev2015 is a part of test2015.
  read = []
  for row in rows:
    key = str(row["question_id"])
    if truths and key not in truths:
      raise InputError(f"{annotations} has no annotation of question {key}")
    image = f"COCO_{images}_{row['image_id']:012d}.jpg"
    read.append(
      QuestionRow(key, image, row["question"], truths.get(key, Question(())))
    )
  return _Layout(read, images, "vqa", SHORT)


def _read_gqa(
  path: pathlib.Path, content: Mapping[str, Any]
) -> list[QuestionRow]:
  rows = [{**_as_row(path, row), "id": key} for key, row in content.items()]
  fields = {"question": str, "imageId": str, "answer": str}
  read = []
  for row in foreign.read_rows(path, {"questions": rows}, "questions", fields):
    types = row.get("types")
    kind = types.get("structural") if isinstance(types, Mapping) else None
    truth = Question((row["answer"],), kind=str(kind) if kind else None)
    image = f"{row['imageId']}.jpg"
    read.append(QuestionRow(row["id"], image, row["question"], truth))
  return read


def _as_row(path: pathlib.Path, row: Any) -> Mapping[str, Any]:
  if not isinstance(row, Mapping):
    raise InputError(f"{path}: a question is {row!r:.60}; expected an object")
  return row


def _read_text_vqa(path: pathlib.Path, content: Any) -> list[QuestionRow]:
  fields = {"question_id": int, "image_id": str, "question": str}
  rows = foreign.read_rows(path, content, "data", {**fields, "answers": list})
  return [
    QuestionRow(
      str(row["question_id"]),
      f"{row['image_id']}.jpg",
      row["question"],
      Question(foreign.read_field(row, "answers", tuple[str, ...])),
    )
    for row in rows
  ]


def _read_pope(paths: Sequence[pathlib.Path]) -> list[QuestionRow]:
  """Rows of each file; if several, ids begin with the kind of negatives."""
  read = []
  fields = {"question_id": int, "image": str, "text": str, "label": str}
  for path in paths:
    lines = foreign.read_json_or_lines(path)
    lines = [lines] if isinstance(lines, Mapping) else lines
    kind = path.stem.removeprefix("coco_pope_")
    for row in foreign.read_rows(path, {"lines": lines}, "lines", fields):
      truth = Question((row["label"],), kind=kind)
      key = f"{kind}-" * (len(paths) > 1) + str(row["question_id"])
      read.append(QuestionRow(key, row["image"], row["text"], truth))
  return read


def _read_science_qa(path: pathlib.Path, problems: Any, split: str):
  splits = path.with_name("pid_splits.json")
  if not splits.is_file():
    raise MissingFileError(f"{path}: pid_splits.json is not beside it.")
  with foreign.errors_of(splits):
    ids_by_split = foreign.read_object(splits)
    keys = foreign.read_field(ids_by_split, split, tuple[str, ...])
  missing = [key for key in keys if key not in problems]
  if missing:
    raise InputError(f"{path} has no problem {missing[0]} of {splits.name}")
  fields = {"question": str, "choices": list, "answer": int}
  rows = [
    {"hint": "", **_as_row(path, problems[key]), "id": key} for key in keys
  ]
  read = []
  for row in foreign.read_rows(path, {"problems": rows}, "problems", fields):
    if not row.get("image"):
      continue
    choices = foreign.read_field(row, "choices", tuple[str, ...])
    if len(choices) > 26:
      raise InputError(f"{path}: {row['id']} has more choices than letters")
    if row["answer"] not in range(len(choices)):
      raise InputError(f"{path}: the answer of {row['id']} is not a choice")
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    lines = [f"Context: {row['hint']}"] if row["hint"] else []
    lines += [row["question"], *map("{}. {}".format, letters, choices)]
    subject = row.get("subject")
    kind = str(subject) if subject else None
    truth = Question((letters[row["answer"]],), choices, kind)
    image = f"{row['id']}/{row['image']}"
    read.append(QuestionRow(row["id"], image, "\n".join(lines), truth))
  return read


def _read_llava(path: pathlib.Path) -> list[QuestionRow]:
  records, read = foreign.read_json_or_lines(path), []
  for i, row in enumerate(records if isinstance(records, list) else [records]):
    try:
      (text, answer, *more), image = conversations.read_row(row)
    except InputError as error:
      raise InputError(f"{path}: record {i}: {error}") from None
    if more:
      raise InputError(
        f"{path}: record {i} has several questions, which could answer each"
        " other: give each its own record (make_questions without --merge)."
      )
    if image is not None:
      text = text.replace("<image>", "").strip()
      kind = row.get("answer_type")
      truth = Question((answer,), kind=str(kind) if kind else None)
      read.append(QuestionRow(str(row.get("id", i)), image, text, truth))
  return read


def open_scenes(data: examples.Data, *, count: int | None) -> QuestionSet:
  """Balanced questions about `count` scenes, 500 by default."""
  options = {"count": count, "size": 96}
  opened = scenes.open_range(data, "questions", DEFAULT_SCENES, **options)
  asked = scene_questions.balanced_questions(
    opened.numbers, opened.seed, opened.difficulty
  )
  return _from_generated(
    asked,
    {number: i for i, number in enumerate(opened.numbers)},
    read=lambda record: opened.render(record[1]).image,
    digest=opened.digest(),
    name="scenes",
    unions=scene_questions.KINDS,
  )


def from_boxes(data: examples.BoxSet) -> QuestionSet:
  """Questions about named boxes: which, where, and how large.

  Both answers are equally likely: the absent object of "which" is drawn as
  often as it occurs, the remaining answers are balanced by name. In an image
  with a dropped box, the box's class is neither absent nor single.
  """
  names = [name for row in data.phrases for name in sorted({*row})]
  questions = []
  for i, (boxes, phrases) in enumerate(
    zip(data.boxes, data.phrases, strict=True)
  ):
    draw = Draw(0, i)
    dropped = data.dropped[i] if data.dropped else ()
    pair = draw.choice(sorted({*phrases})), draw.choice(names)
    if pair[1] not in (*phrases, *dropped):
      shown_pair = pair[:: draw.choice((-1, 1))]
      text = "is there {} or {} in the photo?".format(*map(article, shown_pair))
      questions.append(
        scene_questions.SceneQuestion(i, "which", text, pair[0], "")
      )
    count = collections.Counter((*phrases, *dropped))
    single = [j for j, name in enumerate(phrases) if count[name] == 1]
    for kind, (text, low, high, answers) in _BOX_QUESTIONS.items():
      for j in single:
        y0, x0, y1, x1 = boxes[j].tolist()
        value = (x0 + x1) / 2 if kind == "where" else (y1 - y0) * (x1 - x0)
        if not low < value < high:
          questions.append(
            scene_questions.SceneQuestion(
              i,
              kind,
              text.format(phrases[j]),
              answers[value >= high],
              f"{kind} {phrases[j]}",
            )
          )
  return _from_generated(
    scene_questions.balance(questions),
    {i: i for i in range(len(data.images))},
    read=lambda record: data.images[record[1]],
    digest=data.digest,
    name=data.name,
  )


def _from_generated(
  questions: Sequence[scene_questions.SceneQuestion],
  indices: Mapping[int, int],
  *,
  digest: str,
  **fields: Any,
) -> QuestionSet:
  """A set of generated questions; `indices` has the image of a number."""
  if not questions:
    raise InputError(
      f"{fields['name']}: {len(indices)} images have no balanced questions; "
      "set a larger count"
    )
  rows = [
    QuestionRow(
      f"{i}-{q.number}-{q.kind}",
      str(q.number),
      q.text,
      Question((q.answer,), kind=q.kind),
    )
    for i, q in enumerate(questions)
  ]
  used = {q.number for q in questions}
  records = [(str(n), i) for n, i in indices.items() if n in used]
  return make_set(
    rows,
    records,
    hash_key=lambda record: (record[0], digest),
    rule="exact",
    **fields,
  )
