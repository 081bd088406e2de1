"""Headless Chromium through the DevTools protocol, on a pair of pipes."""

import base64
import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TIMEOUT = 60.0  # Seconds, for one answer.


class Browser:
  """One page of a browser; `messages` come from its console and log."""

  def __init__(self, write, read):
    self._write, self._read = write, read
    self._numbers = itertools.count(1)
    self._rest, self._session = b"", None
    self.messages, self._events = [], []
    target = self.call("Target.createTarget", url="about:blank")
    self._session = self.call(
      "Target.attachToTarget", targetId=target["targetId"], flatten=True
    )["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method, **params):
    """Calls a method of the protocol and returns its result."""
    number = next(self._numbers)
    message = {"id": number, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._receive()
      if answer.get("id") == number:
        assert "error" not in answer, answer
        return answer["result"]
      self._note(answer)

  def open(self, path, *, width, dark=False):
    """Opens a file at a width of the window, and waits until it is loaded."""
    self.messages.clear()
    self._events.clear()
    size = dict(width=width, height=900, mobile=width < 600)
    method = "Emulation.setDeviceMetricsOverride"
    self.call(method, deviceScaleFactor=1, **size)
    scheme = {"name": "prefers-color-scheme"}
    scheme["value"] = "dark" if dark else "light"
    self.call("Emulation.setEmulatedMedia", features=[scheme])
    self.call("Page.navigate", url=path.resolve().as_uri())
    while "Page.loadEventFired" not in self._events:
      self._note(self._receive())

  def evaluate(self, expression):
    """The value of a JavaScript expression in the page."""
    result = self.call(
      "Runtime.evaluate", expression=expression, returnByValue=True
    )
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")

  def screenshot(self, path):
    """Writes the whole page as a PNG."""
    data = self.call("Page.captureScreenshot", captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(data["data"]))

  def _receive(self):
    end = time.monotonic() + _TIMEOUT
    while b"\0" not in self._rest:
      ready, _, _ = select.select([self._read], [], [], end - time.monotonic())
      assert ready, "the browser does not answer"
      chunk = os.read(self._read, 1 << 20)
      assert chunk, "the browser has exited"
      self._rest += chunk
    message, _, self._rest = self._rest.partition(b"\0")
    return json.loads(message)

  def _note(self, event):
    method = event.get("method", "")
    self._events.append(method)
    logged = "Runtime.consoleAPICalled", "Runtime.exceptionThrown"
    if method in (*logged, "Log.entryAdded"):
      self.messages.append(event["params"])
    if method == "Network.requestWillBeSent":
      url = event["params"]["request"]["url"]
      if not url.startswith(("data:", "file:", "about:")):
        self.messages.append({"request": url})


@contextlib.contextmanager
def launch(path):
  """Starts the browser at a path; yields its `Browser`."""
  to_browser, write = os.pipe()
  read, from_browser = os.pipe()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    # The protocol's pipes are descriptors 3 and 4.
    pipes = f"[({to_browser}, 213), ({from_browser}, 214), (213, 3), (214, 4)]"
    program = (
      f"import os, sys; [os.dup2(a, b) for a, b in {pipes}]; "
      "os.execv(sys.argv[1], sys.argv[1:])"
    )
    options = [
      "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
      "--disable-dev-shm-usage", "--remote-debugging-pipe",
      f"--user-data-dir={profile}",
    ]  # fmt: skip
    process = subprocess.Popen(
      [sys.executable, "-c", program, path, *options],
      pass_fds=(to_browser, from_browser),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
      browser = Browser(write, read)
      yield browser
      browser._session = None
      browser.call("Browser.close")
    finally:
      os.close(write)
      os.close(read)
      try:
        process.wait(10)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
