"""Registry whose classes are imported on lookup."""

import pkgutil
from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class LazyRegistry(Mapping[str, T]):
  """Classes by their names in configs.

  An entry is a class or "package.module:Class", which is imported when it is
  looked up or listed by `values` or `items`; `in` and `keys` import nothing.
  """

  def __init__(self, entries: Mapping[str, T | str]):
    self._entries = dict(entries)

  def __getitem__(self, name: str) -> T:
    entry = self._entries[name]
    return pkgutil.resolve_name(entry) if isinstance(entry, str) else entry

  def __contains__(self, name: object) -> bool:
    return name in self._entries

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)
