"""A local stand-in of the Hugging Face hub: repositories, by commit."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator

import pytest

EMPTY = "0" * 40


def _digest(data: bytes) -> str:
  return hashlib.sha1(data).hexdigest()


class Hub:
  """Repositories as `{repo: {revision: commit}}` and `{commit: {path: bytes}}`.

  Those of data sets are named `datasets/ORG/NAME`.
  """

  def __init__(self):
    self.revisions: dict[str, dict[str, str]] = {}
    self.commits: dict[str, dict[str, bytes]] = {EMPTY: {}}
    self.gated: set[str] = set()  # Repositories that need a token.
    self.requests: list[str] = []

  def create(self, repo: str) -> None:
    self.revisions.setdefault(repo, {"main": EMPTY})

  def commit(self, repo: str, revision: str, files: dict[str, bytes]) -> str:
    old = self.commits[self.revisions[repo].get(revision, EMPTY)]
    content = old | files
    digest = _digest(repr(sorted(content.items())).encode())
    self.commits[digest] = content
    self.revisions[repo][revision] = digest
    return digest

  def find(self, repo: str, revision: str) -> str | None:
    commit = self.revisions.get(repo, {}).get(revision, revision)
    return commit if commit in self.commits else None


class Handler(http.server.BaseHTTPRequestHandler):
  """The endpoints that huggingface_hub uses to download and to upload."""

  hub: Hub

  def log_message(self, *args):
    pass

  def reply(self, status, content, **headers):
    data = content if isinstance(content, bytes) else json.dumps(content)
    data = data if isinstance(data, bytes) else data.encode()
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(data)

  def missing(self, code):
    self.reply(404, {"error": code}, X_Error_Code=code)

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    url = urllib.parse.urlparse(self.path)
    self.hub.requests.append(f"{self.command} {urllib.parse.unquote(url.path)}")
    # A quoted slash is part of a name.
    parts = [urllib.parse.unquote(p) for p in url.path.strip("/").split("/")]
    if parts[0] == "storage":
      return self.send_range(self.hub.commits[parts[1]]["/".join(parts[2:])])
    if parts[0] == "api":
      repo, rest = "/".join(parts[2:4]), parts[4:]
      if parts[1] == "datasets":
        repo = f"datasets/{repo}"
      if repo not in self.hub.revisions:
        return self.missing("RepoNotFound")
      revision = rest[1] if len(rest) > 1 else "main"
      commit = self.hub.find(repo, revision)
      if commit is None:
        return self.missing("RevisionNotFound")
      files = self.hub.commits[commit]
      if rest[:1] == ["tree"]:
        recursive = "recursive=true" in url.query.lower()
        return self.send_tree(files, "/".join(rest[2:]), recursive)
      names = [{"rfilename": name} for name in files]
      return self.reply(200, {"id": repo, "sha": commit, "siblings": names})
    count = 3 if parts[0] == "datasets" else 2
    repo, revision = "/".join(parts[:count]), parts[count + 1]
    name = "/".join(parts[count + 2 :])
    if repo in self.hub.gated and not self.headers["Authorization"]:
      return self.reply(401, {"error": "gated"}, X_Error_Code="GatedRepo")
    commit = self.hub.find(repo, revision)
    data = self.hub.commits.get(commit, {}).get(name)
    if data is None:
      return self.missing("EntryNotFound")
    if count == 3:
      # Large files are in another store.
      return self.reply(302, b"", Location=f"/storage/{commit}/{name}")
    etag = f'"{_digest(data)}"'
    return self.reply(200, data, ETag=etag, X_Repo_Commit=commit)

  def send_tree(self, files, folder, recursive):
    prefix = f"{folder}/" if folder else ""
    rows = {}
    for name, data in files.items():
      if not name.startswith(prefix):
        continue
      parts = name.removeprefix(prefix).split("/")
      for depth in range(1, len(parts) if recursive else 2):
        if depth < len(parts):
          path = prefix + "/".join(parts[:depth])
          rows[path] = dict(type="directory", path=path, size=0, oid=EMPTY)
      if recursive or len(parts) == 1:
        oid = _digest(data)
        rows[name] = dict(type="file", path=name, size=len(data), oid=oid)
    return (
      self.reply(200, [*rows.values()])
      if rows
      else self.missing("EntryNotFound")
    )

  def send_range(self, data):
    if not (span := self.headers["Range"]):
      return self.reply(200, data)
    start, end = map(int, span.removeprefix("bytes=").split("-"))
    part = data[start : end + 1]
    where = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
    return self.reply(206, part, Content_Range=where)

  def do_POST(self):
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
    self.hub.requests.append(f"{self.command} {path}")
    parts = path.strip("/").split("/")
    if "authorization" not in {name.lower() for name in self.headers}:
      return self.reply(401, {"error": "log in"})
    if path == "/api/repos/create":
      fields = json.loads(body)
      names = fields.get("organization"), fields["name"]
      repo = "/".join(filter(None, names))
      self.hub.create(repo)
      return self.reply(200, {"url": f"http://{self.headers['Host']}/{repo}"})
    if path == "/api/validate-yaml":
      return self.reply(200, {"warnings": [], "errors": []})
    repo, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
    if action == "preupload":
      files = [
        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
        for f in json.loads(body)["files"]
      ]
      return self.reply(200, {"files": files})
    rows = [json.loads(line) for line in body.splitlines()]
    values = [row["value"] for row in rows if row["key"] == "file"]
    files = {v["path"]: base64.b64decode(v["content"]) for v in values}
    commit = self.hub.commit(repo, revision, files)
    url = f"http://{self.headers['Host']}/{repo}/commit/{commit}"
    return self.reply(200, {"commitUrl": url, "commitOid": commit})


@contextlib.contextmanager
def serve(cache) -> Iterator[Hub]:
  """Runs a hub, at which `HF_ENDPOINT` points, with an empty cache."""
  constants = pytest.importorskip("huggingface_hub.constants")
  handler = type("BoundHandler", (Handler,), {"hub": Hub()})
  server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HF_ENDPOINT", f"http://localhost:{server.server_port}")
    patch.setenv("HF_TOKEN", "hf_test")
    options = dict(CACHE=str(cache), OFFLINE=False, DISABLE_PROGRESS_BARS=True)
    for name, value in options.items():
      patch.setattr(constants, f"HF_HUB_{name}", value)
    yield handler.hub
  server.shutdown()
  server.server_close()
  thread.join()
