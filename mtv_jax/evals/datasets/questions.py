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
LLaVA       [{id, image, conversations}, ...], or JSON lines: one question and
            answer each; `answer_type`, if any, is the question's type

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
from mtv_jax.data import conversations
from mtv_jax.data.scenes import questions as scene_questions
from mtv_jax.data.scenes.captions import article
from mtv_jax.data.scenes.layout import Draw
from mtv_jax.evals.core import examples
from mtv_jax.evals.datasets import coco, files, scenes
from mtv_jax.evals.vqa import Question, read_questions
from mtv_jax.utils.errors import InputError, MissingFileError

EXPECTED = (
  "Visual question answering reads scenes, question files of VQAv2, GQA, "
  "TextVQA, POPE or ScienceQA, and LLaVA's JSON; it asks about the boxes of "
  "COCO's folder or of a source with named boxes."
)
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
_VQAV2 = "v2_OpenEnded_mscoco_*_questions.json"
# Question files by pattern, in order of preference.
_FILE_PATTERNS = (
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
# Question kinds about a box: text, limits of low and high values, answers.
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
  owner: Int[np.ndarray, " m"]  # index of each question's image
  truths: tuple[Question, ...]  # empty for a test set without answers
  rule: str  # key of `vqa.RULES`
  prompt: str = ""  # appended to the texts
  # Groups of answer types, each with an accuracy.
  unions: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

  def protocol(self) -> dict[str, Any]:
    """Protocol entries."""
    return {**super().protocol(), "questions": len(self.texts)}


class _Layout(NamedTuple):
  """Rows of a question file, its image folder, scoring rule and prompt."""

  rows: Sequence[QuestionRow]
  folder: str  # preferred name of the image folder
  rule: str
  prompt: str = ""


def matches(path: pathlib.Path) -> bool:
  """Whether a path is a question file, a folder with one, or COCO's folder."""
  return bool(_find_files(path)) or coco.matches(path)


def _find_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The question file, or the files in a folder that match one pattern."""
  if path.is_file():
    is_known = any(path.match(pattern) for pattern in _FILE_PATTERNS)
    return [path] if is_known or _is_llava(path) else []
  for pattern in _FILE_PATTERNS:
    for glob in (pattern, f"*/{pattern}"):
      if paths := sorted(path.glob(glob)):
        return paths if "pope" in pattern else paths[:1]
  return []


def _is_llava(path: pathlib.Path) -> bool:
  """Whether the beginning of a file looks like LLaVA's records."""
  if path.suffix not in (".json", ".jsonl"):
    return False
  with path.open("rb") as file:
    return b'"conversations"' in file.read(1 << 14)


def open_questions(
  path: pathlib.Path, *, images: pathlib.Path | None, split: str, count: Any
) -> QuestionSet:
  """Opens `count` questions of a benchmark, or questions about COCO's boxes."""
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
  key_counts = collections.Counter(row.key for row in rows)
  if key_counts and (most_common := key_counts.most_common(1)[0])[1] > 1:
    raise InputError(f"{path}: question {most_common[0]!r} occurs twice")
  unanswered = [row.key for row in rows if not row.truth.truths]
  if 0 < len(unanswered) < len(rows):
    raise InputError(f"{path}: question {unanswered[0]!r} has no answer")
  # A type's metric, `accuracy_KIND`, must not share another metric's name.
  reserved = rf"({'|'.join(unions)})|(.*_)?({'|'.join(CONTROLS)})"
  for kind in {row.truth.kind or "other" for row in rows}:
    if not re.fullmatch(rf"(?!({reserved})$)[\w/ .-]+", kind):
      raise InputError(
        f"{path}: answer type {kind!r} can't name a metric; rename it"
      )


def make_set(
  rows: Sequence[QuestionRow],
  records: Sequence[Any],
  *,
  hash_key: Callable[[Any], Any],
  **fields: Any,
) -> QuestionSet:
  """Builds a set of questions; a record's first item is its image's name."""
  index = {record[0]: i for i, record in enumerate(records)}
  rows = sorted(rows, key=lambda row: index[row.image])
  keys, names, texts, truths = zip(*rows, strict=True)
  prefix = [f"{row.text}\n{row.truth}" for row in rows]
  return QuestionSet.from_records(
    records,
    hash_key=hash_key,
    prefix=prefix,
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
  if not any(path.match(pattern) for pattern in _FILE_PATTERNS[:-1]):
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
    raise MissingFileError(f"{path}: its answers, {name}, are not beside it.")
  folder = subset.replace("-dev", "")  # test-dev2015 is part of test2015.
  questions = []
  for row in rows:
    key = str(row["question_id"])
    if truths and key not in truths:
      raise InputError(f"{annotations} has no annotation of question {key}")
    image = f"COCO_{folder}_{row['image_id']:012d}.jpg"
    questions.append(
      QuestionRow(key, image, row["question"], truths.get(key, Question(())))
    )
  return _Layout(questions, folder, "vqa", SHORT)


def _read_gqa(
  path: pathlib.Path, content: Mapping[str, Any]
) -> list[QuestionRow]:
  rows = [{**_as_row(path, row), "id": key} for key, row in content.items()]
  fields = {"question": str, "imageId": str, "answer": str}
  questions = []
  for row in foreign.read_rows(path, {"questions": rows}, "questions", fields):
    types = row.get("types")
    kind = types.get("structural") if isinstance(types, Mapping) else None
    truth = Question((row["answer"],), kind=str(kind) if kind else None)
    image = f"{row['imageId']}.jpg"
    questions.append(QuestionRow(row["id"], image, row["question"], truth))
  return questions


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
  """Rows of all files; if several, ids begin with the kind of negatives."""
  questions = []
  fields = {"question_id": int, "image": str, "text": str, "label": str}
  for path in paths:
    lines = foreign.read_json_or_lines(path)
    lines = [lines] if isinstance(lines, Mapping) else lines
    kind = path.stem.removeprefix("coco_pope_")
    for row in foreign.read_rows(path, {"lines": lines}, "lines", fields):
      truth = Question((row["label"],), kind=kind)
      key = f"{kind}-" * (len(paths) > 1) + str(row["question_id"])
      questions.append(QuestionRow(key, row["image"], row["text"], truth))
  return questions


def _read_science_qa(path: pathlib.Path, problems: Any, split: str):
  splits = path.with_name("pid_splits.json")
  if not splits.is_file():
    raise MissingFileError(f"{path}: pid_splits.json is not beside it.")
  with foreign.errors_of(splits):
    ids_by_split = foreign.read_object(splits)
    keys = foreign.read_field(ids_by_split, split, tuple[str, ...])
  missing = [key for key in keys if key not in problems]
  if missing:
    raise InputError(f"{path} lacks the problem {missing[0]} of {splits.name}")
  fields = {"question": str, "choices": list, "answer": int}
  rows = [
    {"hint": "", **_as_row(path, problems[key]), "id": key} for key in keys
  ]
  questions = []
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
    questions.append(QuestionRow(row["id"], image, "\n".join(lines), truth))
  return questions


def _read_llava(path: pathlib.Path) -> list[QuestionRow]:
  records, questions = foreign.read_json_or_lines(path), []
  for i, row in enumerate(records if isinstance(records, list) else [records]):
    try:
      (text, answer, *extra), image = conversations.read_row(row)
    except InputError as error:
      raise InputError(f"{path}: record {i}: {error}") from None
    if extra:
      raise InputError(
        f"{path}: record {i} has several questions, which could answer each"
        " other: put each in its own record (make_questions without --merge)."
      )
    if image is not None:
      text = text.replace("<image>", "").strip()
      kind = row.get("answer_type")
      truth = Question((answer,), kind=str(kind) if kind else None)
      questions.append(QuestionRow(str(row.get("id", i)), image, text, truth))
  return questions


def open_scenes(data: examples.Data, *, count: int | None) -> QuestionSet:
  """Balanced questions about `count` scenes, 500 by default."""
  options = {"count": count, "size": 96}
  scene_range = scenes.open_range(data, "questions", DEFAULT_SCENES, **options)
  questions = scene_questions.balanced_questions(
    scene_range.numbers, scene_range.seed, scene_range.difficulty
  )
  return _from_generated(
    questions,
    {number: i for i, number in enumerate(scene_range.numbers)},
    read=lambda record: scene_range.render(record[1]).image,
    digest=scene_range.digest(),
    name="scenes",
    unions=scene_questions.KINDS,
  )


def from_boxes(data: examples.BoxSet) -> QuestionSet:
  """Questions about named boxes: which, where, and how large.

  Both answers are equally likely: absent objects of "which" are drawn as often
  as they occur, and answers of the other kinds are balanced by name. The class
  of a dropped box is neither absent nor unique in its image.
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
    counts = collections.Counter((*phrases, *dropped))
    unique = [j for j, name in enumerate(phrases) if counts[name] == 1]
    for kind, (text, low, high, answers) in _BOX_QUESTIONS.items():
      for j in unique:
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
  """Builds a set of generated questions; `indices` maps numbers to images."""
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
  used_numbers = {q.number for q in questions}
  records = [(str(n), i) for n, i in indices.items() if n in used_numbers]
  return make_set(
    rows,
    records,
    hash_key=lambda record: (record[0], digest),
    rule="exact",
    **fields,
  )
