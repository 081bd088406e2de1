"""Hostile data paths: unclosed braces, paths that are not files."""

import os

from hostile.harness import Cases, run_all

from mtv_jax.utils.path_patterns import expand_path

PATHS = Cases(__file__, "paths")


def _expand(folder, path):
  os.chdir(folder)
  return expand_path(path)


PATHS.add_table(
  _expand,
  {
    "empty": "",
    "commas alone": ", ,",
    "unbalanced brace": "a{00..02.tar",
    "closing brace alone": "a}.tar",
    "nested braces": "{a,{b,c}}.tar",
    "empty braces": "a{}.tar",
    "reversed range": "a{5..1}.tar",
    "a range of 10^30": "a{0.." + "9" * 30 + "}.tar",
    "a range of 10,000 digits": "a{0.." + "9" * 10_000 + "}.tar",
    "a negative range": "a{-5..5}.tar",
    "a product of ranges": "{0..999}{0..999}{0..999}.tar",
    "a product of a million lists": "{a,b}" * 1_000_000,
    "100,000 opening braces": "{" * 100_000,
    "100,000 commas": "a," * 100_000,
    "100,000 commas in a brace": "{" + "a," * 100_000 + "b}.tar",
    "100,000 stars": "*a" * 100_000,
    "100,000 brackets": "[" * 100_000,
    "a name of 100,000 letters": "a" * 100_000,
    "100,000 folders": "a/" * 100_000 + "x.tar",
    "50,000 missing files": "{00000..49999}.tar",
    "NUL": "a\0.tar",
    "NUL and a glob": "a\0*.tar",
    "a lone surrogate": "\ud800.tar",
    "a lone surrogate and a glob": "\ud800*.tar",
    "a home of nobody": "~no_such_user/x.tar",
    "missing file": "a.tar",
    "missing folder": "no/such/folder/*.tar",
    "a command": "pipe:cat /dev/zero",
    "a number": 3,
    "null": None,
    "a list of null": [None],
    "an empty list": [],
    "a map": {"a": 1},
    "bytes": b"a.tar",
    "a device": "/dev/zero",
    "a terminal": "/dev/tty",
    "a folder": "/tmp",
  },
)


def _pipe(folder, path):
  (folder / "b.tar").touch()
  os.mkfifo(folder / "a.tar")
  return _expand(folder, path)


PATHS.add_table(
  _pipe, {"a pipe": "a.tar", "a pipe in a glob": "*.tar"}, match="a pipe"
)


@PATHS.add("a symbolic link to itself")
def _loop(folder):
  os.symlink("a.tar", folder / "a.tar")
  expand_path(folder / "a.tar")


@PATHS.add("the same file twice", match="twice")
def _twice(folder):
  (folder / "a.tar").touch()
  expand_path(f"{folder}/a.tar,{folder}/./a.tar")


test_paths = run_all(PATHS)
