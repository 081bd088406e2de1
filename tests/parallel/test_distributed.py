"""Agreement of the processes of a run; real ones are in test_processes.py."""

import pytest

from mtv_jax.parallel import distributed
from mtv_jax.parallel.distributed import ProcessMismatchError, agree


def test_agree_names_what_differs_and_where(monkeypatch):
  facts = [
    {
      "config": {"optim": {"lr": 1e-3 if i != 3 else 2e-3}, "seed": 0},
      "data": [{"records": 10}, {"records": 20 + (i > 3)}],
      "checkpoints": [10, 20],
    }
    for i in range(6)
  ]
  monkeypatch.setattr(distributed, "gather_json", lambda _: facts)
  with pytest.raises(ProcessMismatchError) as raised:
    agree(facts[0])
  assert str(raised.value) == (
    "The processes of this run differ in config.optim.lr (0.001 on processes"
    " 0-2, 4-5; 0.002 on process 3), data[1].records (20 on processes 0-3; 21"
    " on processes 4-5). Start all of them with the same command, code, data"
    " and workdir."
  )
  facts[:] = facts[:3]
  agree(facts[0])
