"""VQA metrics and answer files: golden values, scikit-learn, file forms."""

import json

import numpy as np
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.evals import vqa
from mtv_jax.utils.errors import InputError


@pytest.mark.parametrize(
  ("count", "original", "simple"),
  [(0, 0, 0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1), (4, 1, 1)],
)
def test_vqa_accuracy_golden(count, original, simple):
  annotators = ["cat"] * count + [f"word {i}" for i in range(10 - count)]
  assert vqa.vqa_accuracy("cat", annotators) == pytest.approx(original)
  got = vqa.vqa_accuracy("cat", annotators, counting="simple")
  assert got == pytest.approx(simple)


def test_vqa_accuracy_leaves_one_annotator_out():
  rng = np.random.default_rng(0)
  for _ in range(50):
    annotators = [f"w{k}" for k in rng.integers(0, 4, 10)]
    others = [annotators[:i] + annotators[i + 1 :] for i in range(10)]
    want = np.mean([min(1, o.count("w1") / 3) for o in others])
    assert vqa.vqa_accuracy("w1", annotators) == pytest.approx(want)


# The results of the official evaluation.
@pytest.mark.parametrize(
  ("answer", "want"),
  [
    ("The Cat.", "cat"),
    ("two", "2"),
    ("None", "0"),
    ("twenty one", "twenty 1"),
    ("1,000", "1000"),
    ("1,000 - 2", "1000 2"),
    ("red/blue", "red blue"),
    ("red/ blue", "red blue"),
    ("a-b -c", "ab c"),
    ("half-open", "half open"),
    ("3.5", "3.5"),
    ("U.S.A.", "usa"),
    (".5 p.m.", ".5 pm"),
    ("5:30", "5:30"),
    ("what?", "what"),
    ("dont", "don't"),
    ("it isnt", "it isn't"),
    ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"),
    ("somebody'd", "somebodyd"),
    ("its", "its"),
    ("yall", "y'all"),
    ("a\nb\tc ", "b c"),
    ("an", ""),
    ("$2.50", "$2.50"),
    ('"hi" (x)', "hi x"),
  ],
)
def test_normalize_answer(answer, want):
  assert vqa.normalize_answer(answer) == want


def test_answers_are_normalised_where_annotators_disagree():
  agree, disagree = ["The cat"] * 10, ["The cat"] * 9 + ["dog"]
  assert vqa.vqa_accuracy("cat", agree) == 0
  assert vqa.vqa_accuracy(" The cat\n", agree) == 1
  assert vqa.vqa_accuracy("cat", disagree) == 1
  score = vqa.RULES["textvqa"]
  assert score("Nike, the Dog's", vqa.Question(("nike dog 's",) * 10)) == 1
  assert score("nike dogs", vqa.Question(("nike dog 's",) * 10)) == 0
  with pytest.raises(ValueError, match="no truths"):
    vqa.vqa_accuracy("cat", [])
  with pytest.raises(ValueError, match="Did you mean 'original'"):
    vqa.vqa_accuracy("cat", agree, counting="orignal")


def test_exact_match():
  assert vqa.exact_match(" On the  left. ", ["on the left"]) == 1
  assert vqa.exact_match("left", ["on the left", "right"]) == 0


@pytest.mark.parametrize(
  ("answer", "want"),
  [
    ("B", "B"),
    ("(b)", "B"),
    ("b.", "B"),
    ("C) a red car", "C"),
    ("C: a red car", "C"),
    ("Option D.", "D"),
    ("The answer is B because of A", "B"),
    ("answer: (C)", "C"),
    ("a dog", "A"),
    ("I think it is a red car", "C"),
    ("The answer is a red car.", "C"),
    ("E", None),
    ("a dog or a cat", None),
    ("It's hard to tell", None),
    ("", None),
  ],
)
def test_option_letter(answer, want):
  options = ("a dog", "a cat", "a red car", "a car")
  assert vqa.option_letter(answer, options) == want


def test_option_letter_without_the_options():
  assert vqa.option_letter("E", [""] * 5) == "E"
  assert vqa.option_letter("E", [""] * 4) is None
  assert vqa.option_letter("Z.") == "Z"


def test_pope_scores():
  answers = ["Yes, there is.", "No.", "there is not", "Yes. No, wait", "maybe"]
  assert [i for i, s in enumerate(answers) if vqa.says_yes(s)] == [0, 3, 4]
  assert vqa.says_yes("nothing") and not vqa.says_yes("No, it is a dog")
  scores = vqa.pope_scores(answers, ["yes", "no", "yes", "no", "yes"])
  want = dict(precision=2 / 3, recall=2 / 3, f1=2 / 3)
  want |= dict(accuracy=3 / 5, yes_rate=3 / 5)
  assert scores.metrics == pytest.approx(want)
  none = vqa.pope_scores(["no"], ["yes"]).metrics
  assert none["accuracy"] == none["f1"] == none["precision"] == 0
  # Each score is the mean over files; errors resample images.
  truths = [vqa.Question((t,), kind=f) for t, f in (("yes", "a"), ("no", "b"))]
  truths *= 20
  images = np.arange(40) // 4
  got = vqa.estimate_scores("pope", ["yes"] * 40, truths, groups=images)
  assert got.metrics["f1_a"] == 1 and got.metrics["f1"] == 0.5
  assert got.errors["f1_a"] == got.errors["accuracy"] == 1 / 10
  with pytest.raises(ValueError, match="got 'maybe'"):
    vqa.pope_scores(["no"], ["maybe"])


def test_anls():
  # NL < 0.5 is strict: half of the letters wrong scores 0.
  assert vqa.anls("abcd", ["abxy"]) == 0
  assert vqa.anls("abcd", ["abcx"]) == 0.75
  assert vqa.anls("Hello  World", ["zzz", "hello world"]) == 1
  assert vqa.anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
  assert vqa.anls("", [""]) == 1
  assert vqa.anls("", ["a"]) == 0
  with pytest.raises(ValueError, match="no truths"):
    vqa.anls("a", [])


def write(path, content):
  path.write_text(
    "\n".join(map(json.dumps, content))
    if path.suffix == ".jsonl"
    else json.dumps(content)
  )
  return path


def test_vqa_files(tmp_path, capsys):
  annotators = [["cat"] * 10, ["two"] * 2 + ["three"] * 8, ["red"] + ["x"] * 9]
  rows = [
    {
      "question_id": i,
      "answer_type": "number" if i == 1 else "other",
      "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(answers)],
    }
    for i, answers in enumerate(annotators)
  ]
  truths = write(tmp_path / "truths.json", {"annotations": rows})
  said = {2: "Red!", 1: "2", 0: "cat"}
  rows = [{"question_id": i, "answer": answer} for i, answer in said.items()]
  answers = write(tmp_path / "answers.jsonl", rows)
  files = [f"--answers={answers}", f"--truths={truths}"]
  out = tmp_path / "scores.json"
  run_command("score_vqa", ["--rule=vqa", *files, f"--json={out}"])
  scores = json.loads(out.read_text())["metrics"]
  assert scores["accuracy"] == pytest.approx((1 + 0.6 + 0.3) / 3)
  assert scores["accuracy_number"] == pytest.approx(0.6)
  assert scores["accuracy_other"] == pytest.approx(0.65)
  printed = capsys.readouterr().out
  assert "63.33 ± 20.28 %" in printed and "data_hash" in printed
  answers.write_text('{"question_id": 0, "answer": "cat"}\n')
  with pytest.raises(SystemExit, match=r"2 of 3 questions .*such as 1"):
    run_command("score_vqa", ["--rule=vqa", *files])
  run_command("score_vqa", ["--rule=vqa_simple", *files, "--missing=wrong"])
  assert "33.33 %" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("truths", "answers", "rule", "want"),
  [
    (  # GQA, answers by question
      {"7": {"answer": "left"}, "8": {"answer": "no"}},
      {"7": "Left.", "8": "yes"},
      "exact",
      {"accuracy": 0.5},
    ),
    (  # DocVQA
      {"data": [{"questionId": 1, "answers": ["$ 12", "kitten"]}]},
      [{"questionId": 1, "answer": "sitting"}],
      "anls",
      {"anls": pytest.approx(4 / 7)},
    ),
    (  # multiple choice
      [
        {"id": "a", "answer": 1, "choices": ["x", "y"]},
        {"id": "b", "answer": "A", "options": ["x", "y"]},
      ],
      [{"id": "a", "text": "(B) y"}, {"id": "b", "text": "It is y"}],
      "option",
      {"accuracy": 0.5},
    ),
  ],
)
def test_file_forms_of_other_benchmarks(tmp_path, truths, answers, rule, want):
  answers = vqa.read_answers(write(tmp_path / "answers.json", answers))
  questions = vqa.read_questions(write(tmp_path / "truths.json", truths))
  assert vqa.score(answers, questions, rule=rule).metrics == want


def test_pope_from_lines_with_a_missing_answer(tmp_path):
  rows = [{"question_id": i, "label": t} for i, t in enumerate(("yes", "no"))]
  questions = vqa.read_questions(write(tmp_path / "pope.jsonl", rows))
  got = vqa.score({"1": "No."}, questions, rule="pope", missing="wrong")
  assert got.metrics["accuracy"] == 0.5 and got.metrics["f1"] == 0


@pytest.mark.parametrize(
  ("read", "content", "message"),
  [
    ("answers", b'{"id": 1, "answer": "x"}\n' * 2, "question .1. occurs twice"),
    ("answers", b'[{"id": 1, "anwser": 2}]', r"\['anwser', 'id'\].*'text'"),
    ("answers", b"yes\nno", "neither JSON"),
    ("answers", b'{"1": "caf\xe9"}', "not UTF-8"),
    ("answers", b"[]", "expected rows of questions"),
    (
      "questions",
      b'[{"id": 1, "answer": 2, "options": ["x", "y"]}]',
      "expected an index of options",
    ),
    ("questions", b'[{"id": 1, "answer": 0, "options": "x"}]', "up to 26 opt"),
    ("questions", b'[{"id": 1, "answers": [{"a": 1}]}]', "none of .'answer'"),
    (
      "questions",
      b'[{"id": 1, "answers": []}]',
      "a question without an answer",
    ),
  ],
)
def test_malformed_files(tmp_path, read, content, message):
  path = tmp_path / "file.json"
  path.write_bytes(content)
  with pytest.raises(InputError, match=message):
    getattr(vqa, f"read_{read}")(path)


def test_answers_without_a_question_and_unknown_rules():
  with pytest.raises(ValueError, match="1 answers belong to no question"):
    vqa.score({"1": "x", "2": "y"}, {"1": vqa.Question(("x",))}, rule="exact")
  with pytest.raises(ValueError, match="Did you mean 'exact'"):
    vqa.score({}, {}, rule="exakt")
