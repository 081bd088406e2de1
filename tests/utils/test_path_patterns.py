"""Expansion of file patterns in configs."""

import pytest

from mtv_jax.utils.path_patterns import expand_path


@pytest.fixture
def folder(tmp_path):
  for i in range(13):
    (tmp_path / f"{i:05d}.tar").touch()
  (tmp_path / "00000_stats.json").touch()
  return tmp_path


def names(files):
  return [file.name for file in files]


def test_range_list_glob_and_commas(folder):
  assert names(expand_path(f"{folder}/{{00003..00005}}.tar")) == [
    "00003.tar",
    "00004.tar",
    "00005.tar",
  ]
  assert names(expand_path(f"{folder}/{{00007,00002}}.tar")) == [
    "00007.tar",
    "00002.tar",
  ]
  assert names(expand_path(f"{folder}/*.tar")) == [
    f"{i:05d}.tar" for i in range(13)
  ]
  both = f"{folder}/0000{{1..2}}.tar, {folder}/*9.tar"
  assert names(expand_path(both)) == ["00001.tar", "00002.tar", "00009.tar"]
  assert expand_path(both) == expand_path(both.split(", "))
  assert names(expand_path(folder / "00001.tar")) == ["00001.tar"]


def test_braces_multiply_and_keep_zeros(tmp_path):
  expected = []
  for set_name in ("b", "a"):
    (tmp_path / set_name).mkdir()
    for i in (8, 9, 10):
      (tmp_path / set_name / f"{i:02d}.tar").touch()
      expected.append(tmp_path / set_name / f"{i:02d}.tar")
  assert expand_path(f"{tmp_path}/{{b,a}}/{{08..10}}.tar") == expected
  (tmp_path / "9.tar").touch()
  (tmp_path / "10.tar").touch()
  assert names(expand_path(f"{tmp_path}/{{9..10}}.tar")) == ["9.tar", "10.tar"]


def test_brackets_of_an_existing_name_are_not_a_glob(tmp_path):
  (tmp_path / "a[1].tar").touch()
  assert names(expand_path(tmp_path / "a[1].tar")) == ["a[1].tar"]


def test_home(folder, monkeypatch):
  monkeypatch.setenv("HOME", str(folder))
  assert expand_path("~/00001.tar") == [folder / "00001.tar"]


def test_missing_shards_are_counted_and_named(folder):
  (folder / "00004.tar").unlink()
  with pytest.raises(FileNotFoundError) as error:
    expand_path(f"{folder}/{{00002..00014}}.tar")
  message = str(error.value)
  assert "3 of 13 files are missing" in message
  for name in ("00004.tar", "00013.tar", "00014.tar"):
    assert name in message
  assert "00003.tar" not in message
  assert "12 of 13 names in '.tar', 00000.tar to 00012.tar" in message


def test_many_missing_shards_are_not_all_printed(folder):
  with pytest.raises(FileNotFoundError, match="100 of 100 .* and 92 more"):
    expand_path(f"{folder}/{{00100..00199}}.tar")


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("*.tgz", "13 of 14 names in '.tar', 00000.tar to 00012.tar"),
    ("nowhere/*.tar", "no folder"),
    ("empty/*.tar", "is empty"),
    ("nowhere/0.tar", "no folder"),
    ("empty/0.tar", "is empty"),
  ],
)
def test_no_match(folder, pattern, message):
  with pytest.raises(FileNotFoundError, match=message):
    # Not in the fixture, since tests count its files.
    if pattern.startswith("empty"):
      (folder / "empty").mkdir()
    expand_path(f"{folder}/{pattern}")


@pytest.mark.parametrize(
  ("pattern", "message"),
  [
    ("{3..1}.tar", "empty"),
    ("{00000.tar", "unbalanced"),
    ("00000}.tar", "unbalanced"),
    ("{00000}.tar", "not a range"),
  ],
)
def test_bad_braces(folder, pattern, message):
  with pytest.raises(ValueError, match=message):
    expand_path(f"{folder}/{pattern}")


def test_no_path():
  with pytest.raises(ValueError, match="names no file"):
    expand_path("")
  with pytest.raises(ValueError, match="names no file"):
    expand_path([])


def test_folder_is_not_a_path(folder):
  with pytest.raises(IsADirectoryError, match=r"write '.*/\*\.tar'"):
    expand_path(folder)


@pytest.mark.parametrize("url", ["http://b/x.tar", "pipe:cat a.tar", "GS://b"])
def test_urls_of_other_kinds(url):
  with pytest.raises(ValueError, match=r"expected a path, gs://BUCKET/PATH"):
    expand_path(url)


def test_a_file_twice(folder):
  with pytest.raises(ValueError, match=r"00001\.tar is in the path twice"):
    expand_path([f"{folder}/00001.tar", f"{folder}/*.tar"])
