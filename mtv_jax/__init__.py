"""Multi-task pretraining of vision encoders in JAX and Flax.

`mtv_jax.load(DIR)` gives an `mtv_jax.Encoder` from a training run, an export
or a Hugging Face folder. Both are imported on first use, so that a data worker
importing `mtv_jax.data` starts no JAX.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__", "load"]

_LAZY = {
  "Encoder": "mtv_jax.encoder.encoder",
  "load": "mtv_jax.encoder.loading",
}


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(
    f"module 'mtv_jax' has no attribute {name!r}; it has {__all__}"
  )


def __dir__() -> list[str]:
  return sorted(__all__)
