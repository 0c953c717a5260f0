"""`torch/` datasets are downloaded once by any number of processes, here from a local server."""

import gzip
import hashlib
import http.server
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from torchvision.datasets import FashionMNIST

from tnt_timm.data.datasets import open_dataset
from tnt_timm.errors import UserError

NAME = "torch/fashion_mnist"
ASKED = 2  # torchvision requests a file twice: for its location, then for its content
processes = multiprocessing.get_context("fork")  # they inherit the address of the test's server


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of small versions of FashionMNIST's four files. Its `requests` count what was requested."""
    files, resources = {}, []
    for prefix, count in (("train", 24), ("t10k", 12)):
        images = np.random.default_rng(0).integers(0, 255, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(header + images.tobytes())
        labels = bytes(i % 10 for i in range(count))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(struct.pack(">2i", 0x801, count) + labels)
    for name, content in files.items():
        resources.append((name, hashlib.md5(content).hexdigest()))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            self.server.requests[name] += 1
            time.sleep(0.2)  # long enough for requests of other processes
            self.send_response(200 if name in files else 404)
            self.end_headers()
            self.wfile.write(files.get(name, b""))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = Counter()
        server.names = sorted(files)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(FashionMNIST, "resources", resources)
        yield server
        server.shutdown()


def together(work, count):
    """Run work(number) in so many processes at once; return their exit codes."""
    started = [processes.Process(target=work, args=(number,)) for number in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def test_concurrent_processes_download_once(server, tmp_path):
    """Into a new folder. The processes of validate.py do not wait for each other."""
    root = tmp_path / "new" / "folder"

    def work(number):
        for split, length in (("train", 24), ("validation", 12)):
            assert len(open_dataset(NAME, str(root), split, split == "train", download=True)) == length

    assert together(work, 3) == [0, 0, 0]
    assert server.requests == dict.fromkeys(server.names, ASKED)


def test_existing_files_are_not_requested(server, tmp_path, monkeypatch):
    open_dataset(NAME, str(tmp_path), "train", True, download=True)
    server.requests.clear()
    monkeypatch.setattr(FashionMNIST, "download", lambda self: pytest.fail("requested again"))
    (tmp_path / ".download.lock").unlink()
    for split in ("train", "validation"):
        open_dataset(NAME, str(tmp_path), split, False, download=True)
    assert not server.requests and not (tmp_path / ".download.lock").exists()


@pytest.mark.parametrize("download", [False, True])
def test_nothing_to_download(download, server, tmp_path, monkeypatch):
    """Without --dataset-download, or from a server that does not have it."""
    if download:
        monkeypatch.setattr(FashionMNIST, "resources", [("nothing.gz", "0")])
    with pytest.raises(UserError, match=r"^dataset: torch/fashion_mnist, split train, in ") as caught:
        open_dataset(NAME, str(tmp_path), "train", True, download=download)
    assert "\n" not in str(caught.value)
    assert download or ("Dataset not found" in str(caught.value) and not server.requests)


def test_two_processes_train_on_a_fresh_download(server, tmp_path, tiny):
    """As torchrun starts them. (A fork of this process could not train if a test before has used autograd's threads.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""
import sys
from torchvision.datasets import FashionMNIST
FashionMNIST.mirrors, FashionMNIST.resources = {FashionMNIST.mirrors!r}, {FashionMNIST.resources!r}
from tnt_timm.commands.train import main
sys.exit(main())
"""
    settings = (
        "--dataset-download --device cpu -b 4 --lr 1e-3 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --workers 0"
    )
    argv = [tmp_path / "data", "--dataset", NAME, *tiny, *settings.split(), "--output", tmp_path / "out"]
    argv += ["--experiment", "run"]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, argv)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert server.requests == dict.fromkeys(server.names, ASKED)
    assert (tmp_path / "out" / "run" / "summary.csv").is_file()
