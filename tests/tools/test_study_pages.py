"""tools/study_pages.py: the tables of docs/study are of the archived runs."""

import tarfile

import pytest

from tools import study_pages


@pytest.mark.slow
def test_tables_of_the_study_are_of_its_archives(tmp_path):
  studies = study_pages.Studies(tmp_path)
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


def test_an_archive_has_results_of_finished_runs(tmp_path, monkeypatch):
  study = study_pages.Studies(tmp_path).unpack("captions")
  monkeypatch.chdir(tmp_path)
  archive = study_pages.pack(study, without=["vl_classes"])
  with (
    tarfile.open(archive) as tar,
    tarfile.open(study_pages.DOCS / "ssl" / archive.name) as expected,
  ):
    assert sorted(tar.getnames()) == sorted(expected.getnames())
    assert {entry.uname for entry in tar} == {""}
