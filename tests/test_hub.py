"""Models by their hub id, from a server that answers like the hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_models import add_bpe_tokenizer, make_model

REPOSITORY = "somebody/tiny"
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository: its list of files, and each file. `asked` holds the files that were sent."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, *, send: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}/"):
            files = [
                {
                    "type": "file",
                    "path": file.name,
                    "rfilename": file.name,
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in sorted(self.folder.iterdir())
            ]
            found = {"id": REPOSITORY, "sha": COMMIT, "siblings": files}
            content = json.dumps(files if "/tree/" in path else found).encode()
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            name = path.rsplit("/", 1)[1]
            content = (self.folder / name).read_bytes()
            self.asked += [name] * send
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", hashlib.sha1(content).hexdigest())
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Address, and the names of the files that were fetched."""
    folder = make_model(tmp_path / "files")
    add_bpe_tokenizer(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    asked: list[str] = []
    handler = type("Served", (Hub,), {"folder": folder, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_settings_come_without_weights_and_nothing_that_runs(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = hub
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "longrope_export", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    assert json.loads(run("inspect", REPOSITORY, "--json").stdout)
    run("factors", "yarn", REPOSITORY, "--target-length", 1024, "-o", tmp_path / "f.json")
    stage = {"name": "yarn", "run": "factors", "method": "yarn", "target-length": 1024}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in stage.items())
    (tmp_path / "plan.toml").write_text(f"[[stage]]\n{lines}\n")
    assert "yarn" in run("extend", REPOSITORY, tmp_path / "plan.toml", "--dry-run").stdout
    assert "config.json" in asked and not any(name.endswith(".safetensors") for name in asked)
    run("gguf", REPOSITORY, "--factors", tmp_path / "f.json", "--pre", "gpt-2", "-o", tmp_path / "m.gguf")  # fmt: skip
    assert "model.safetensors" in asked
    count = len(asked)
    run("inspect", REPOSITORY, "--local-files-only")  # from the cache
    assert len(asked) == count == len(set(asked))
    assert not {"modeling_evil.py", "pytorch_model.bin"} & set(asked)
