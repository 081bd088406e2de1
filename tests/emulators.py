"""Emulators of object stores, in subprocesses.

`python tests/emulators.py gs|s3 PORT` runs one. Google's adds to
gcp-storage-emulator the features that tensorstore's conditional writes need:
the header of an object's generation, and the condition on it of writes and
deletions. It refuses to write objects whose names match the regular expression
that `REFUSED` contains, and fails as `fail_requests` says. Both log their
requests, see `count_requests`.
"""

import contextlib
import ctypes
import http
import http.server
import importlib.util
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pytest

REFUSED = ".refused"  # An object of the bucket.
_FAULTS = "MTV_JAX_TEST_FAULTS"  # The path of their file.
LATENCY = "MTV_JAX_TEST_LATENCY"  # Seconds of each request; then in threads.


def _require(*modules: str) -> None:
  # Without an import: gcsfs reads its variables then.
  if missing := [m for m in modules if importlib.util.find_spec(m) is None]:
    pytest.skip(f"no {missing[0]}: pip install -e '.[buckets,emulators]'")


def _log_variable(store: str) -> str:
  """The environment variable with the path of a store's log."""
  return f"MTV_JAX_TEST_REQUESTS_{store}"


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def _run_server(
  store: str, *, port: int, env: dict[str, str]
) -> Iterator[None]:
  """Runs a server with these variables in this process's environment."""
  with (
    tempfile.TemporaryFile() as log,
    tempfile.NamedTemporaryFile(prefix="requests") as requests,
    tempfile.NamedTemporaryFile(prefix="faults") as faults,
    pytest.MonkeyPatch.context() as patch,
  ):
    env |= {_log_variable(store): requests.name}
    if store == "gs":
      env |= {_FAULTS: faults.name}
    process = subprocess.Popen(
      [sys.executable, __file__, store, str(port)],
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, **env, "PYTHONWARNINGS": "default"},
    )
    try:
      deadline = time.monotonic() + 60
      while True:
        try:
          urllib.request.urlopen(f"http://localhost:{port}", timeout=5).close()
          break
        except urllib.error.HTTPError as error:
          error.close()
          break
        except OSError:
          assert process.poll() is None and time.monotonic() < deadline
          time.sleep(0.1)
      for name, value in env.items():
        patch.setenv(name, value)
      yield
    finally:
      process.kill()
      process.wait()


@contextlib.contextmanager
def count_requests(
  store: str = "gs",
) -> Iterator[list[tuple[str, str, int]]]:
  """A list of method, path and response bytes, filled at the end of a block.

  The path of a request of a range ends in `#bytes=FIRST-LAST`.
  """
  with open(os.environ[_log_variable(store)], encoding="utf-8") as log:
    log.seek(0, os.SEEK_END)
    requests = []
    yield requests
    for line in log:
      method, path, size = line.split()
      requests.append((method, path, int(size)))


@contextlib.contextmanager
def fail_requests(*faults: str, path: str) -> Iterator[None]:
  """Google's store fails once per fault, for paths that match the pattern.

  A fault is a status, `short` (half of the announced bytes), `cut` (half,
  announced as such) or `slow` (after a second). All must occur in the block.
  """
  file = pathlib.Path(os.environ[_FAULTS])
  before = json.loads(file.read_text() or "[]")
  file.write_text(json.dumps([*before, *([path, fault] for fault in faults)]))
  yield
  left = json.loads(file.read_text())
  file.write_text(json.dumps([row for row in left if row[0] != path]))
  assert path not in [pattern for pattern, _ in left], left


def _take_fault(path: str, lock: threading.Lock) -> str:
  """Returns and removes the first fault of a path; '' without one."""
  file = pathlib.Path(os.environ[_FAULTS])
  with lock:
    faults = json.loads(file.read_text() or "[]")
    for i, (pattern, fault) in enumerate(faults):
      if re.search(pattern, path):
        file.write_text(json.dumps(faults[:i] + faults[i + 1 :]))
        return fault
  return ""


@contextlib.contextmanager
def google_storage(*, latency: float = 0.0) -> Iterator[str]:
  """The URL of a bucket of Google's store, which answers after `latency` s."""
  _require("gcsfs", "gcp_storage_emulator")
  port = free_port()
  url = f"http://localhost:{port}"
  env = {
    LATENCY: str(latency),
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    # Only asks Google which kind a bucket is.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "NO_GCE_CHECK": "true",
  }
  with _run_server("gs", port=port, env=env):
    yield "gs://bucket"


@contextlib.contextmanager
def amazon_s3() -> Iterator[str]:
  """The URL of a bucket of Amazon's store."""
  _require("s3fs", "moto")
  port = free_port()
  env = {
    "AWS_ENDPOINT_URL": f"http://localhost:{port}",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
  }
  with _run_server("s3", port=port, env=env):
    import fsspec

    fsspec.filesystem("s3").mkdir("s3://bucket")
    yield "s3://bucket"


def _serve_google_storage(port: int) -> None:
  from gcp_storage_emulator import server
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects

  def read_generation(storage, bucket, name):
    try:
      return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
      return "0"

  def download(request, response, storage, *args, **kwargs):
    send(request, response, storage, *args, **kwargs)
    where = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = read_generation(storage, *where)

  def is_refused(request, storage):
    bucket, data = request.params["bucket_name"], request.data
    metadata = data.get("meta", data) if isinstance(data, dict) else {}
    (name,) = request.query.get("name", [metadata.get("name")])
    try:
      pattern = storage.get_file(bucket, REFUSED).decode()
    except NotFound:
      return False
    return re.search(pattern, name) is not None

  def insert(request, response, storage, *args, **kwargs):
    if is_refused(request, storage):
      response.status = http.HTTPStatus.FORBIDDEN
      return
    (wanted,) = request.query.get("ifGenerationMatch", [None])
    if wanted is not None:
      where = request.params["bucket_name"], request.query["name"][0]
      if read_generation(storage, *where) != wanted:
        response.status = http.HTTPStatus.PRECONDITION_FAILED
        return
    write(request, response, storage, *args, **kwargs)

  def delete(request, response, storage, *args, **kwargs):
    (wanted,) = request.query.get("ifGenerationMatch", [None])
    where = request.params["bucket_name"], request.params["object_id"]
    if wanted not in (None, read_generation(storage, *where)):
      response.status = http.HTTPStatus.PRECONDITION_FAILED
      return
    remove(request, response, storage, *args, **kwargs)

  def close(response):
    time.sleep(latency)
    handler = response._handler
    bytes_ = handler.headers.get("Range")
    log(handler.command, handler.path, bytes_, len(response._content))
    fault = _take_fault(handler.path, fault_lock)
    half = response._content[: len(response._content) // 2]
    if fault.isdigit():
      response.status, response._content = http.HTTPStatus(int(fault)), ""
    elif fault == "cut":
      response._content = half
    elif fault == "slow":
      time.sleep(1.0)
    elif fault == "short":
      handler.wfile = _ShortFile(handler.wfile, len(half))
    close_response(response)

  if latency := float(os.environ[LATENCY]):
    server.server.HTTPServer = http.server.ThreadingHTTPServer
    server.server.HTTPServer.request_queue_size = 256
  log, fault_lock = _open_log("gs"), threading.Lock()
  close_response, server.Response.close = server.Response.close, close
  send, write, remove = objects.download, objects.insert, objects.delete
  objects.download, objects.insert = download, insert
  replaced = {send: download, write: insert, remove: delete}
  for _, handlers in server.HANDLERS:
    for method, handler in handlers.items():
      handlers[method] = replaced.get(handler, handler)
  thread = server.create_server("localhost", port, True, "bucket")
  thread.run()


class _ShortFile:
  """A stream that writes `size` bytes of the body only, then ends."""

  def __init__(self, stream: BinaryIO, size: int):
    self._stream, self._size = stream, size

  def write(self, data: bytes) -> None:
    is_body = not data.startswith(b"HTTP/")
    self._stream.write(data[: self._size] if is_body else data)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def _open_log(store: str) -> Callable[[str, str, str | None, int], None]:
  """Returns a function that logs a request."""
  file = os.open(os.environ[_log_variable(store)], os.O_WRONLY | os.O_APPEND)

  def log(method: str, path: str, bytes_: str | None, size: int) -> None:
    path += f"#{bytes_}" if bytes_ else ""
    os.write(file, f"{method} {path} {size}\n".encode())

  return log


def _serve_amazon_s3(port: int) -> None:
  from moto import server

  class Application(server.DomainDispatcherApplication):
    def __call__(self, environ, start_response):
      parts = [*super().__call__(environ, start_response)]
      method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
      log(method, path, environ.get("HTTP_RANGE"), sum(map(len, parts)))
      return parts

  log = _open_log("s3")
  server.DomainDispatcherApplication = Application
  server.main(["-p", str(port)])


if __name__ == "__main__":
  # Linux: PR_SET_PDEATHSIG, SIGKILL. A test that is killed leaves no server.
  ctypes.CDLL(None).prctl(1, 9)
  serve = {"gs": _serve_google_storage, "s3": _serve_amazon_s3}
  serve[sys.argv[1]](int(sys.argv[2]))
