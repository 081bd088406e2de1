"""Decoding benchmark, compared with DINOv2's views of equal files."""

import io
import json
import tarfile

import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.perf.bench import decoding
from mtv_jax.utils.errors import InputError


@pytest.mark.reference
def test_canvases_are_timed_beside_views_of_the_same_files(tmp_path, capsys):
  path = tmp_path / "result.json"
  run_command(
    "bench",
    ["decoding", "--size=64", "--megapixels=0,1", "--images=2", "--rounds=3"]
    + [f"--json={path}"],
  )
  printed, result = capsys.readouterr().out, json.loads(path.read_text())
  for key, title in (("0", "as they are"), ("1", "1 megapixels")):
    ratios = result[f"{key}_canvas_ratios"]
    assert len(ratios) == 3
    assert result[f"{key}_canvas_ratio"] == sorted(ratios)[1]
    times = result[key]["cpu_ms"]
    assert 0 < times["canvas"] < times["views"]
    assert title in printed
  # An eighth of the resolution takes less than all of it.
  assert result["1"]["cpu_ms"]["canvas"] < result["1"]["cpu_ms"]["exact"]


@pytest.mark.reference
def test_views_have_the_sizes_of_dinov2():
  (file,) = decoding._read_files(None, 64, 1)
  views = decoding.harness.import_oracle("dinov2_views").make_dinov2_views()(
    file
  )
  assert [v.shape[-1] for v in views] == [224] * 2 + [96] * 8


@pytest.mark.parametrize(
  "text", ["", "one", "1,-4", "nan", "0,inf", "1e-9", "1e9"]
)
def test_megapixels_that_are_no_sizes(text):
  with pytest.raises(InputError, match="megapixels"):
    decoding._parse_megapixels(text)


def test_photos_need_no_captions(tmp_path):
  with tarfile.open(tmp_path / "photos.tar", "w") as tar:
    member = tarfile.TarInfo("a.jpg")
    member.size = 5
    tar.addfile(member, io.BytesIO(b"photo"))
  files = decoding._read_files(str(tmp_path / "photos.tar"), 64, 4)
  assert files == [b"photo"]
