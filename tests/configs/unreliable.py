"""The smallest config, with a source that fails or stops answering.

`FAIL_IN` is the process of two whose source fails at step 6, `STALL_AT` the
step at which every source stalls.
"""

import os
import pathlib
import threading

from mtv_jax.data import pipeline, stats

SMALLEST = pathlib.Path(__file__).with_name("smallest.py")


def get_config(arg=None):
  scope = {}
  exec(SMALLEST.read_text(), scope)
  read, process = pipeline.HostBatches.__getitem__, os.environ.get("FAIL_IN")
  stall_at = float(os.environ.get("STALL_AT", "inf"))

  def get(self, index):
    step = self.start_step + index
    if step >= stall_at:
      threading.Event().wait()
    if step >= 6 and process == str(int(self.first_row > 0)):
      raise stats.CorruptDataError("too many records are bad")
    return read(self, index)

  pipeline.HostBatches.__getitem__ = get
  return scope["get_config"](arg)
