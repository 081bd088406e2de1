"""Reading and plotting the metrics of a run."""

import json

import pytest

from mtv_jax.utils import curves


def test_resumed_steps_count_once(tmp_path):
  rows = [
    {"step": 1, "a/loss": 3.0, "lr": 0.1},
    {"step": 2, "a/loss": 9.0},
    {"step": 2, "a/loss": 2.0},
    {"step": 3, "a/loss": 1.0, "b/loss": 4},
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "metrics.jsonl").write_text(text)
  series = curves.read_metrics(tmp_path)
  assert series["a/loss"] == [(1, 3.0), (2, 2.0), (3, 1.0)]
  figure = curves.plot_metrics(series)
  assert [axes.get_title() for axes in figure.axes] == ["a/loss", "b/loss"]
  line = figure.axes[0].lines[0]
  assert list(line.get_ydata()) == [3.0, 2.0, 1.0]
  with pytest.raises(ValueError, match=r"'c'.*a/loss.*lr"):
    curves.plot_metrics(series, "c")


def test_missing_metrics_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
    curves.read_metrics(tmp_path)
