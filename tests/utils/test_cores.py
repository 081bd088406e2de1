"""Cores of this process, with and without Linux's CPU affinity."""

import os

from mtv_jax.utils.cores import available_cores


def test_available_cores(monkeypatch):
  affinity = {0, 2, 5}
  monkeypatch.setattr(
    os, "sched_getaffinity", lambda pid: affinity, raising=False
  )
  assert available_cores() == 3
  monkeypatch.delattr(os, "sched_getaffinity")
  monkeypatch.setattr(os, "cpu_count", lambda: 8)
  assert available_cores() == 8
