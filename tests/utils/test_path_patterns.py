"""Expansion of file patterns in configs."""

import pytest

from mtv_jax.utils.path_patterns import expand_path


@pytest.fixture
def folder(tmp_path):
  for i in range(13):
    (tmp_path / f"{i:05d}.tar").touch()
  (tmp_path / "00000_stats.json").touch()
  return tmp_path


@pytest.mark.parametrize(
  ("pattern", "numbers"),
  [
    ("{00003..00005}.tar", [3, 4, 5]),
    ("{00007,00002}.tar", [7, 2]),
    ("*.tar", range(13)),
    ("0000{1..2}.tar, a/*9.tar, ~/00003.tar", [1, 2, 9, 3]),
    (["0000{1..2}.tar", "*9.tar"], [1, 2, 9]),
    ("00001.tar", [1]),
  ],
)
def test_range_list_glob_and_commas(folder, monkeypatch, pattern, numbers):
  monkeypatch.chdir(folder)
  monkeypatch.setenv("HOME", str(folder))
  (folder / "a").symlink_to(folder)
  files = [file.name for file in expand_path(pattern)]
  assert files == [f"{i:05d}.tar" for i in numbers]


def test_braces_multiply_and_keep_zeros(tmp_path):
  expected = []
  for set_name in ("b", "a"):
    (tmp_path / set_name).mkdir()
    for i in (8, 9, 10):
      (tmp_path / set_name / f"{i:02d}.tar").touch()
      expected.append(tmp_path / set_name / f"{i:02d}.tar")
  assert expand_path(f"{tmp_path}/{{b,a}}/{{08..10}}.tar") == expected
  # Brackets of an existing name are not a glob.
  for name in ("9.tar", "10.tar", "a[1].tar"):
    (tmp_path / name).touch()
  for pattern, names in (("{9..10}.tar", ["9", "10"]), ("a[1].tar", ["a[1]"])):
    files = expand_path(tmp_path / pattern)
    assert [file.stem for file in files] == names


@pytest.mark.parametrize(
  ("pattern", "error", "message"),
  [
    ("*.tgz", OSError, "13 of 14 .* end in '.tar'; names: 00000.* to 00012"),
    ("nowhere/*.tar", OSError, "no folder"),
    ("empty/*.tar", OSError, "is empty"),
    ("nowhere/0.tar", OSError, "no folder"),
    ("empty/0.tar", OSError, "is empty"),
    (
      "{00011..00014}.tar",
      FileNotFoundError,
      r"2 of 4 files are missing: [^ ]*00013.tar, [^ ]*00014.tar\. .*13 of 14",
    ),
    ("{00100..00199}.tar", OSError, "100 of 100 .* and 92 more"),
    ("{3..1}.tar", ValueError, "empty"),
    ("{00000.tar", ValueError, "unbalanced"),
    ("00000}.tar", ValueError, "unbalanced"),
    ("{00000}.tar", ValueError, "not a range"),
    ("", IsADirectoryError, r"write '.*/\*\.tar'"),
    ("00001.tar,*.tar", ValueError, r"00001\.tar is in the path twice"),
  ],
)
def test_what_is_wrong_with_a_pattern(
  folder, monkeypatch, pattern, error, message
):
  # Not in the fixture, since tests count its files.
  if pattern.startswith("empty"):
    (folder / "empty").mkdir()
  monkeypatch.chdir(folder)
  patterns = [f"{folder}/{part}" for part in pattern.split(",")]
  with pytest.raises(error, match=message):
    expand_path(patterns)


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("", "names no file"),
    ([], "names no file"),
    ("http://b/x.tar", r"expected a path, gs://BUCKET/PATH"),
    ("pipe:cat a.tar", r"expected a path, gs://BUCKET/PATH"),
    ("GS://b", r"expected a path, gs://BUCKET/PATH"),
    ("gs://b/", r"gs://b/ is a bucket; write 'gs://b/PATH/\*.tar'"),
  ],
)
def test_texts_that_are_no_pattern(path, message):
  with pytest.raises(ValueError, match=message):
    expand_path(path)
