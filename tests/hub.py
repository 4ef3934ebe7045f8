"""A stand-in for the Hugging Face hub at its HTTP boundary: repositories in memory, served to the
real huggingface_hub on an address of this machine."""

import base64
import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager

TOKEN = "hf_of_the_tests"


class Hub:
    """repositories: {USER/NAME: {commit: {file: bytes}}}, the last commit being main"""

    def __init__(self):
        self.repositories = {}

    def revision(self, repo, name):
        """(commit, its files) by its own name, or main."""
        commits = self.repositories[repo]
        name = list(commits)[-1] if name == "main" else name
        return name, commits[name]

    def commit(self, repo, files):
        """Make the files the last commit, and return its name."""
        commits = self.repositories.setdefault(repo, {})
        known = repr((repo, len(commits), sorted(files.items())))
        name = hashlib.sha1(known.encode()).hexdigest()
        commits[name] = files
        return name

    def answer(self, method, path, headers, body):
        """(status, headers, body) of a request."""
        path = path.split("?")[0]
        if method == "POST" and headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {}, {"error": "who are you?"}
        if path == "/api/validate-yaml":  # of the model card
            return 200, {}, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if not repo.startswith("me/"):
                return 403, {}, {"error": "you are me"}
            if repo not in self.repositories:
                self.commit(repo, {})
            return 200, {}, {"url": f"{self.address}/{repo}"}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/([^/]+)", path):
            repo, what, name = found.groups()
            return self.of_repository(repo, what, name, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, name, file = found.groups()
            sha, files = self.revision(repo, name)
            if file not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, {}
            tag = hashlib.sha256(files[file]).hexdigest()
            return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": sha}, files[file]
        return 404, {}, {}

    def of_repository(self, repo, what, name, body):
        if repo not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        sha, files = self.revision(repo, name)
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            return 200, {}, {"id": repo, "sha": sha, "siblings": siblings, "private": False}
        if what == "tree":
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                for file, content in files.items()
            ]
            return 200, {}, tree
        if what == "preupload":
            wanted = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {}, {"files": [{"path": file["path"]} | modes for file in wanted]}
        assert what == "commit", what
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        sha = self.commit(repo, files)
        url = f"{self.address}/{repo}/commit/{sha}"
        return 200, {}, {"success": True, "commitOid": sha, "commitUrl": url}


@contextmanager
def serve():
    """A `Hub` that answers at its `address`."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            status, headers, content = hub.answer(self.command, self.path, self.headers, body)
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
                headers = {"Content-Type": "application/json"} | headers
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = answer

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
