"""The smallest config, with a source that fails in one of two processes."""

import os
import pathlib

from mtv_jax.data import pipeline, stats

SMALLEST = pathlib.Path(__file__).with_name("smallest.py")


def get_config(arg=None):
  scope = {}
  exec(SMALLEST.read_text(), scope)
  read, process = pipeline.HostBatches.__getitem__, os.environ["FAILS"]

  def fail(self, index):
    if self.start_step + index >= 6 and int(self.first_row > 0) == int(process):
      raise stats.CorruptDataError("too many records are bad")
    return read(self, index)

  pipeline.HostBatches.__getitem__ = fail
  return scope["get_config"](arg)
