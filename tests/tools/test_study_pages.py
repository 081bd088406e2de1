"""tools/study_pages.py: the tables of docs/study are of the archived runs."""

import tarfile

import pytest

from mtv_jax.utils.errors import UserError
from tools import study_pages


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
  return study_pages.Studies(tmp_path_factory.mktemp("studies"))


@pytest.mark.slow
def test_tables_of_the_study_are_of_its_archives(studies):
  tables = 0
  for path in study_pages.DOCS.glob("*.md"):
    lines = path.read_text().split("\n")
    assert [*study_pages.write_tables(lines, studies)] == lines, path.name
    for line in lines:
      # A comment that is not read would leave its table as it is.
      if line.startswith("<!--") and not line.startswith("<!-- charts: "):
        assert study_pages.COMMENT.fullmatch(line), line
        tables += 1
  assert tables
  page = (study_pages.DOCS / "controls.md").read_text()
  other = page.replace("| 82.9 |", "| 83.0 |", 1)
  assert other != page
  assert "\n".join(study_pages.write_tables(other.split("\n"), studies)) == page


@pytest.mark.parametrize(
  ("comment", "message"),
  [
    ("captions: depth", "an arm is 'depth'"),
    ("captions: vl_classes: intervals", "Did you mean 'interval'"),
    ("captions: depth_classes - vl_classes: verdicts", "mean 'verdict'"),
    ("caption: vl", "Did you mean 'captions'"),
  ],
)
def test_comments_with_typos_are_refused(studies, comment, message):
  lines = [f"<!-- {comment} -->", "| |", "|-|", "| knn/top1_k10 | 1 |", ""]
  with pytest.raises(UserError, match=message):
    [*study_pages.write_tables(lines, studies)]


def test_an_archive_has_results_of_finished_runs(
  studies, tmp_path, monkeypatch
):
  study = studies.unpack("captions")
  monkeypatch.chdir(tmp_path)
  archive = study_pages.pack(study, without=["vl_classes"])
  with (
    tarfile.open(archive) as tar,
    tarfile.open(study_pages.DOCS / "ssl" / archive.name) as expected,
  ):
    assert sorted(tar.getnames()) == sorted(expected.getnames())
    assert {entry.uname for entry in tar} == {""}
