"""Numbers and names as short texts."""

import math

import pytest

from mtv_jax.utils import text


@pytest.mark.parametrize(
  ("got", "want"),
  [
    *(
      (text.format_short(value), want)
      for value, want in {
        0: "0", 0.25: "0.25", 2e-5: "2e-05", 400: "400", 12_000: "12k",
        1.5e6: "1.5M", 0.1 + 0.2: "0.3",
      }.items()
    ),
    *(
      (text.format_number(value), want)
      for value, want in {
        0.0: "0", 96.0: "96", 3.41234: "3.412", -0.4312: "-0.431",
        1234.56: "1234.6", 8.1e-4: "8.1e-04", -2.5e7: "-2.5e+07",
        math.inf: "inf", math.nan: "nan",
      }.items()
    ),
    *(
      (text.format_duration(seconds), want)
      for seconds, want in {
        0.2: "0s", 59.6: "1m00s", 192.0: "3m12s", 18_420.0: "5h07m",
        183_600.0: "2d03h", math.nan: "?",
      }.items()
    ),
    (text.format_metric(12.3456, "%"), "12.35"),
    (text.format_metric(0.0, "%"), "0.00"),
    (text.format_metric(0.0823, ""), "0.082"),
    (text.format_metric(0.0012345, "m"), "0.001234"),
    (text.format_metric(123456.7, ""), "1.235e+05"),
    (text.format_metric(0.0, ""), "0.000"),
    (text.format_metric(None, "m"), "-"),
    (text.format_metric(71.3, "%", 0.916), "71.30 ± 0.92"),
    (text.format_metric(-0.5, "m", 0.0123), "−0.500 ± 0.012"),
    (text.format_metric(0.002948, "m", signed=True), "+0.0029"),
    (text.format_metric(2.04, "%", digits=1, signed=True), "+2.0"),
    (text.format_percent(0.00123), "0.12 %"),
    (text.format_percent(0.111), "11.1 %"),
    (text.format_percent(None), "none"),
    (text.format_bytes(1000), "1000 B"),
    (text.format_bytes(1536), "1.5 KiB"),
    (text.format_bytes(3 * 2**30), "3.00 GiB"),
    (text.one_line("a\x1b[31m\ud800 b"), "a\ufffd[31m\ufffd b"),
    (text.truncate("abcdef", 6), "abcdef"),
    (text.truncate("abcdefg", 6), "abcdef…"),
    (text.list_first(["a", "b", "c"], 2), "a, b and 1 more"),
    (text.list_first(["a", "b"], 2), "a, b"),
    (text.first_lines("abc", 2), "  a\n  b\n  ... and 1 more"),
    (text.first_lines("ab", 2), "  a\n  b"),
    (text.format_setting({"a": 1}, 20), '{"a": 1}'),
    (text.file_name("a/b c", "..", "d.e"), "a-b-c_unnamed_d.e"),
  ],
)  # fmt: skip
def test_texts(got, want):
  assert got == want


def test_columns_are_aligned():
  rows = [["a", "1"], ["bcd", "234"]]
  assert text.align_columns(rows, left=(0,)) == ["a      1", "bcd  234"]
