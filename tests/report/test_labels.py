"""Inspection of label sets: statistics, findings and page."""

import functools
import html
import json

import cv2
import label_samples
import numpy as np
import pytest
from page_checks import Outline, check_layout

from mtv_jax.cli.main import run_command
from mtv_jax.data.labels.join import AlignedLabels
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_values import make_boxes, make_depth, no_label
from mtv_jax.data.sources import array_record
from mtv_jax.experts import label_cards as cards
from mtv_jax.experts import label_statistics as statistics
from mtv_jax.experts.label_statistics import Histogram, PhraseCounts
from mtv_jax.utils import plots

main = functools.partial(run_command, "inspect_labels")

CELLS = np.arange(64).reshape(8, 8)
BAD = "<b>&\"'</b>"


@pytest.mark.parametrize("kind", ["fractions", "magnitudes", "whole"])
def test_histograms_match_numpy(kind):
  rng = np.random.default_rng(0)
  wide = rng.normal(size=5000) * 10 ** rng.uniform(-4, 4, 5000)
  histogram, values, error = {
    "fractions": (Histogram.of_fractions(), rng.beta(0.5, 3, 5000), 2e-3),
    "magnitudes": (Histogram.of_magnitudes(), wide, None),
    "whole": (Histogram.of_integers(64), rng.poisson(9, 5000), 0),
  }[kind]
  for part in np.array_split(values, 7):
    histogram.add(part)
  histogram.add(np.array([np.nan, np.inf]))
  stats = histogram.to_dict()
  assert stats["count"] == 5000
  assert (stats["min"], stats["max"]) == (values.min(), values.max())
  assert stats["mean"] == pytest.approx(values.mean(), rel=1e-9)
  for share, quantile in stats["quantiles"].items():
    expected = np.quantile(values, float(share), method="inverted_cdf")
    allowed = 0.012 * abs(expected) if error is None else error
    assert abs(quantile - expected) <= allowed, share
  edges, counts = stats["bars"]["edges"], stats["bars"]["counts"]
  assert len(edges) == len(counts) + 1 and sum(counts) == 5000
  expected, _ = np.histogram(values, edges)
  np.testing.assert_array_equal(counts, expected)


def test_values_outside_the_edges_have_separate_bars():
  histogram = Histogram.of_fractions()
  histogram.add(np.array([-3.0, 0.25, 1.0, 7.0, 8.0]))
  bars = histogram.bars()
  assert (bars["edges"][0], bars["edges"][-1]) == (-3, 8)
  assert (bars["counts"][0], bars["counts"][-1]) == (1, 2)
  assert sum(bars["counts"]) == 5
  assert histogram.quantile(0) == -3 and histogram.quantile(1) == 8
  assert Histogram.of_fractions().to_dict() == {"count": 0}


def test_phrase_counts_are_bounded():
  rng = np.random.default_rng(0)
  drawn = [f"phrase {i}" for i in rng.zipf(1.3, 20_000) % 5000]
  exact, bounded = PhraseCounts(), PhraseCounts(limit=300)
  for part in np.array_split(drawn, 50):
    exact.add(part.tolist())
    bounded.add(part.tolist())
  names, counts = np.unique(drawn, return_counts=True)
  expected = dict(zip(names.tolist(), counts.tolist(), strict=True))
  assert (exact.distinct, exact.short_by) == (len(names), 0)
  top = sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:50]
  assert exact.most_common(50) == top
  assert 0 < bounded.short_by <= len(drawn) / 300
  for phrase, count in bounded.most_common(600):
    assert count <= expected[phrase] <= count + bounded.short_by
  assert bounded.most_common(1)[0][0] == top[0][0]
  assert len(bounded.most_common(10_000)) <= 600
  assert bounded.distinct == pytest.approx(len(names), rel=0.1)


def boxes_of(i):
  """Boxes, phrases and scores of record i."""
  rng = np.random.default_rng(i)
  corners = np.sort(rng.random((i % 5, 2, 2)), axis=1).reshape(-1, 4)
  phrases = [("a dog", BAD, "A  dog.")[k] for k in rng.integers(0, 3, i % 5)]
  return corners, phrases, rng.random(i % 5).astype(np.float32)


def depth_of(i):
  inverse = label_samples.ramp(16, 16) * (1 + i)
  if i == 6:
    inverse = 1 + 1e-3 * inverse
  if i == 7:
    inverse[:] = 1 + 1e-2 * inverse
    inverse[15, 15] = 100
  valid = np.ones((16, 16), bool)
  valid[: i % 4] = False
  return make_depth(inverse, side=16, valid=valid)


def outcome(kind, i):
  if i == 3:
    return no_label(f"{kind}: none")
  return make_boxes(*boxes_of(i)) if kind == "boxes" else depth_of(i)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
  """Ten records in three tars, with labels of both kinds."""
  folder = tmp_path_factory.mktemp("labelled")
  base = label_samples.open_base(label_samples.make_base(folder))
  for kind in ("depth", "boxes"):
    label_samples.make_set(folder / kind, base, kind, of=outcome)
  return folder


def gathered(folder, kind, **options):
  return statistics.gather(LabelSet(folder / kind, kind=kind), **options)


@pytest.mark.parametrize("min_score", [0.0, 0.4])
def test_statistics_of_boxes(labelled, min_score):
  stats = gathered(labelled, "boxes", min_score=min_score)
  drawn = [boxes_of(i) for i in range(10) if i != 3]
  kept = [scores >= min_score for *_, scores in drawn]
  boxes, phrases, scores = (
    [np.array(x)[k] for x, k in zip(column, kept, strict=True)]
    for column in zip(*drawn, strict=True)
  )
  # Case, spaces and full stops are ignored, as in training.
  same = [["dog" if w != BAD else w for w in words] for words in phrases]
  repeated = sum(words.count(w) > 1 for words in same for w in words)
  count = sum(map(len, boxes))
  names = np.unique(np.concatenate(phrases), return_counts=True)
  boxes, scores = np.concatenate(boxes), np.concatenate(scores)
  sides = boxes[:, 2:] - boxes[:, :2]
  assert (stats["records"], stats["labelled"]) == (10, 9)
  assert stats["reasons"] == {"boxes: none": 1}
  read = dict(every=1, records=10, labelled=9, damaged=0, examples=[])
  assert stats["read"] == read
  assert stats["boxes"] == count
  assert stats["below_min_score"] == sum(len(k) for k in kept) - count
  empty = np.mean([not k.any() for k in kept])
  assert stats["images_without_boxes"] == pytest.approx(empty)
  assert stats["scores"]["max"] == pytest.approx(scores.max(), rel=1e-6)
  for name, mean in {
    "boxes_an_image": count / 9,
    "scores": scores.mean(),
    "shorter_sides": sides.min(1).mean(),
    "longer_sides": sides.max(1).mean(),
    "sides": np.sqrt(sides.prod(1)).mean(),
  }.items():
    assert stats[name]["mean"] == pytest.approx(mean, abs=2e-5), name
  small = (sides.min(1) < 16 / 384).mean()
  assert stats["small_boxes"] == pytest.approx(small)
  median = np.quantile(sides.prod(1), 0.5, method="inverted_cdf")
  assert stats["areas"]["quantiles"]["0.5"] == pytest.approx(median, abs=2e-3)
  frequent = [list(pair) for pair in stats["phrases"]["most_frequent"]]
  names = [x.tolist() for x in names]
  assert sorted(frequent) == sorted(map(list, zip(*names, strict=True)))
  assert stats["phrases"]["different"] == len(names[0])
  assert stats["boxes_with_repeated_phrase"] == repeated / count


def test_statistics_of_depth(labelled):
  stats = gathered(labelled, "depth")
  labels = [depth_of(i).label for i in range(10) if i != 3]
  shares = [(label.values > 0).mean() for label in labels]
  assert stats["labelled_pixels"]["mean"] == pytest.approx(np.mean(shares))
  assert stats["low"]["min"] == min(label.low for label in labels)
  assert stats["high"]["mean"] == pytest.approx(
    np.mean([x.high for x in labels])
  )
  assert stats["sides"] == {16: 9}
  # Record 6 is nearly constant; so is record 7, except for one pixel.
  assert stats["constant_maps"] == stats["narrow_maps"] == pytest.approx(1 / 9)


def test_statistics_of_some_labels_and_shards(labelled):
  seen = []
  stats = gathered(
    labelled, "boxes", records=5, progress=lambda *at: seen.append(at)
  )
  assert stats["read"]["every"] == 2 and stats["read"]["records"] == 5
  assert stats["boxes"] == sum(i % 5 for i in range(0, 10, 2))
  assert (stats["records"], stats["labelled"]) == (10, 9)
  assert seen[-1] == (5, 5)
  stats = gathered(labelled, "boxes", shards=["00000"])
  assert (stats["records"], stats["labelled"], stats["shards"]) == (4, 3, 1)
  assert stats["boxes"] == 0 + 1 + 2
  with pytest.raises(ValueError, match="records is 0"):
    gathered(labelled, "boxes", records=0)


def test_damaged_labels_are_counted(labelled, monkeypatch):
  read = LabelSet.read

  def damaged(self, shard, at):
    if (shard, at) == (1, 2):
      raise cards.BadRecord("00001.array_record:2", "is damaged")
    return read(self, shard, at)

  monkeypatch.setattr(LabelSet, "read", damaged)
  stats = gathered(labelled, "boxes")
  assert stats["read"]["damaged"] == 1 and stats["read"]["labelled"] == 8
  (finding,) = [f for f in statistics.find(stats) if f["name"] == "damaged"]
  assert "00001.array_record:2" in finding["text"]


def finding_names(tmp_path, make, *, kind="boxes", **options):
  """Names of the findings in a set with the labels `make(i)`."""
  base = tmp_path / "base"
  base.mkdir()
  image = label_samples.png(0)
  entries = [{"key": f"{i}", "image": image} for i in range(30)]
  entries = [entry | {"captions": ["c"]} for entry in entries]
  array_record.write(base / "0.array_record", entries)
  source = label_samples.open_base(base)
  label_samples.make_set(tmp_path / kind, source, kind, of=lambda _, i: make(i))
  stats = gathered(tmp_path, kind, **options)
  return {finding["name"] for finding in statistics.find(stats)}


def good(i):
  """One to three boxes of side 0.3 with distinct phrases and scores."""
  count = 1 + i % 3
  corners = [[0, 0, 0.3, 0.3], [0.5, 0.1, 0.8, 0.4], [0, 0.6, 0.3, 0.9]]
  names = [f"thing {i} {j}" for j in range(count)]
  scores = np.linspace(0.2, 0.9, count)
  return make_boxes(np.array(corners[:count]), names, scores)


def bad_boxes(i):
  corners = np.array([[0, 0, 1, 1], [0, 0, 0.99, 1], [0, 0, 1, 0.99]])
  return make_boxes(corners, ["a"] * 3, np.array([1, 1, 1 + i % 2], "f4"))


NOTHING = make_boxes(np.zeros((0, 4)), [])
RAMP = label_samples.ramp(8, 8)
PEAK, FEW = np.where(CELLS == 9, 99, RAMP), CELLS < 20
SMALL = np.array([[0, 0, 0.04, 0.5]])
BAD_BOXES = "large_boxes at_most one_phrase repeated_phrases scores_beyond"


@pytest.mark.parametrize(
  ("kind", "make", "expected"),
  [
    ("boxes", good, ""),
    ("boxes", lambda i: good(i) if i % 4 else no_label("x"), "without_label"),
    ("boxes", lambda i: good(i) if i % 5 else no_label("x"), ""),
    ("boxes", lambda i: NOTHING if i % 3 else good(i), "images_without_boxes"),
    ("boxes", bad_boxes, BAD_BOXES),
    ("boxes", lambda i: make_boxes(SMALL, [f"{i}"]), "small_boxes scores_of_1"),
    ("depth", lambda i: make_depth(RAMP, side=8), ""),
    ("depth", lambda i: make_depth(1 + 1e-2 * RAMP, side=8), "constant_maps"),
    ("depth", lambda i: make_depth(PEAK, side=8 + i % 2), "narrow_maps sides"),
    ("depth", lambda i: make_depth(RAMP, side=8, valid=FEW), "sparse_maps"),
  ],
)
def test_findings(tmp_path, kind, make, expected):
  assert finding_names(tmp_path, make, kind=kind) == {*expected.split()}


@pytest.mark.parametrize(
  ("make", "least", "text"),
  [
    (good, 0.95, "No box scores 0.95 or more."),
    (lambda i: NOTHING, 0.0, "No box is in any label."),
  ],
)
def test_labels_without_boxes(tmp_path, make, least, text):
  assert finding_names(tmp_path, make, min_score=least) == {"no_boxes"}
  (finding,) = statistics.find(gathered(tmp_path, "boxes", min_score=least))
  assert finding["text"] == text


def grey_card(folder, make, *, kind, image=None):
  """The card of one record, a grey image twice as wide as high."""
  base = folder / "base"
  base.mkdir()
  if image is None:
    grey = np.full((60, 120, 3), 128, np.uint8)
    image = cv2.imencode(".png", grey)[1].tobytes()
  # A second record, as a set needs a label.
  record = {"image": image, "captions": ["its caption"]}
  records = [record | {"key": key} for key in ("one", "two")]
  array_record.write(base / "0.array_record", records)
  source = label_samples.open_base(base)
  of = lambda kind, i: make if i == 0 else outcome(kind, 4)  # noqa: E731
  label_samples.make_set(folder / kind, source, kind, of=of)
  labels = AlignedLabels(LabelSet(folder / kind, kind=kind), source)
  return cards.draw_card(source, {kind: labels}, 0, size=240)


def test_boxes_are_drawn_at_their_coordinates(tmp_path):
  corners = np.array([[0.25, 0.5, 0.75, 1.0]])
  label = make_boxes(corners, ["a thing"], np.array([0.5], np.float32))
  card = grey_card(tmp_path, label, kind="boxes")
  image = card.images["boxes"]
  assert image.shape == (120, 240, 3)
  changed = (image != 128).any(-1)
  # Rim and outline are 3 pixels; the plate is above the box.
  assert changed[30:90, 120].all() and changed[89, 120:240].all()
  assert not changed[:, :119].any() and not changed[92:].any()
  assert not changed[34:86, 124:236].any()
  assert changed[16:30, 121:150].all() and not changed[:14].any()
  assert dict(card.names) == {"a thing 0.50": 1}
  assert (card.key, card.size) == ("one", "120 x 60")
  assert card.captions == ("its caption",)


def test_pixels_without_depth_are_striped(tmp_path):
  valid = np.ones((60, 120), bool)
  valid[:, :60] = False
  label = make_depth(label_samples.ramp(60, 120), side=12, valid=valid)
  card = grey_card(tmp_path, label, kind="depth")
  assert list(card.images) == ["image", "depth"]
  image = card.images["depth"].astype(int)
  spread = image.max(-1) - image.min(-1)
  assert (spread[:, :118] < 8).all() and len(np.unique(image[:, :118])) > 1
  assert (spread[:, 122:] > 40).all()
  # Far is blue and near is red; inverse depth grows downwards.
  assert image[5, 130, 2] > image[5, 130, 0]
  assert image[115, 230, 0] > image[115, 230, 2]


@pytest.mark.parametrize("kind", ["boxes", "depth"])
def test_record_without_a_label(tmp_path, kind, monkeypatch):
  titles, add_title_bar = [], plots.add_title_bar
  monkeypatch.setattr(
    plots,
    "add_title_bar",
    lambda image, text: titles.append(text) or add_title_bar(image, text),
  )
  card = grey_card(tmp_path, no_label("none"), kind=kind)
  assert titles == [f"no {kind} label"]
  assert (card.images[kind][:20] < 80).any()


def test_undecodable_image(tmp_path):
  label = make_depth(label_samples.ramp(60, 120), side=12)
  card = grey_card(tmp_path, label, kind="depth", image=b"\xff\xd8\xffno image")
  assert card.size == "" and "are not an image" in card.notes[0]
  assert card.images["depth"].shape == card.images["image"].shape


def test_tool_writes_page_and_statistics(labelled, capsys):
  out = labelled / "out"
  options = [f"--data={labelled}/base/*.tar", f"--output={out}"]
  both = [f"--depth={labelled}/depth", f"--boxes={labelled}/boxes"]
  main([*options, *both, "--count=9", "--size=96", "--seed=1"])
  output = capsys.readouterr().out
  assert "boxes from boxes: 9 of 10 records have a label (90.0 %)" in output
  assert "look at depth: 11.1 % of the maps are nearly constant" in output
  text = (out / "index.html").read_text(encoding="utf-8")
  page = Outline(text)
  assert page.tags.count("img") == 2 * 9 and page.tags.count("svg") == 11
  assert all(source.startswith("data:image/") for source in page.addresses)
  assert not {"script", "link", "iframe"} & set(page.tags)
  assert "url(" not in text and "@import" not in text
  assert BAD not in text and html.escape(BAD) in text
  assert "the test" in text
  stats = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
  assert set(stats["sets"]) == {"boxes", "depth"} and stats["records"] == 10
  assert {entry["name"] for entry in stats["look_at"]} >= {"constant_maps"}
  # Fewer records of one kind, as JSON.
  main([*options, both[1], "--count=2", "--records=4", "--json"])
  printed = json.loads(capsys.readouterr().out)
  assert printed["sets"]["boxes"]["read"]["every"] == 3
  assert set(printed["sets"]) == {"boxes"}
  assert printed == json.loads((out / "statistics.json").read_text())


def test_tool_errors(labelled, tmp_path):
  other = label_samples.make_base(tmp_path, first=50)
  data, out = f"--data={labelled}/base/*.tar", f"--output={tmp_path}/out"
  boxes = f"--boxes={labelled}/boxes"
  for options, expected in (
    ([data, out], "No label set is given"),
    ([data, out, "--boxes=nowhere"], "There is no folder of labels nowhere"),
    ([data, out, f"--depth={labelled}/boxes"], "labels of kind 'boxes'"),
    ([f"--data={other}/*.tar", boxes, out], "belongs to other images"),
    ([f"--data={tmp_path}/x*.tar", boxes, out], "x*.tar"),
  ):
    with pytest.raises(SystemExit, match="^inspect_labels: ") as raised:
      main(options)
    assert expected in str(raised.value)
  for option in ("--count=0", "--records=0"):
    with pytest.raises(SystemExit, match="2"):
      main([data, boxes, out, option])
  assert not (tmp_path / "out" / "index.html").exists()


def test_join_by_key_inspects_the_whole_set(labelled, tmp_path):
  folder = label_samples.make_copy(tmp_path)
  options = [f"--data={labelled}/base/00000.tar", f"--boxes={folder}/boxes"]
  options += [f"--index_dir={tmp_path}/index", f"--output={tmp_path}/out"]
  main([*options, "--join=key", "--count=1"])
  text = (tmp_path / "out" / "statistics.json").read_text()
  assert json.loads(text)["sets"]["boxes"]["records"] == 6


def test_page_in_a_browser(labelled, tmp_path, browser):
  data, out = f"--data={labelled}/base/*.tar", f"--output={tmp_path}"
  both = [f"--depth={labelled}/depth", f"--boxes={labelled}/boxes"]
  main([data, out, *both, "--count=4", "--size=96"])
  for width, dark in ((1280, False), (390, True)):
    check_layout(browser, tmp_path / "index.html", width, dark=dark)
