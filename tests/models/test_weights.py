"""Weights from elsewhere: fetched once, whole, anew when they changed, checked, and what is said without network."""

import hashlib
import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from s3_endpoint import S3
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError, ConfigError, MaskmillError, StorageError
from pipeline.models import fetch
from pipeline.models.load import load_model
from pipeline.models.registry import MODELS
from pipeline.models.weights import checkpoint_spec, read_weights

BUNDLED = Path(str(resources.files("pipeline"))) / "checkpoints" / "unet_small_scenes"
COMMIT = "1" * 40
MOVED = "2" * 40


@dataclass
class Server:
    """Files served by path. cut: bytes of the body that are left out; refuse: the status that every request gets."""

    url: str
    files: dict[str, bytes]
    requests: list[tuple[str, str]] = field(default_factory=list)
    cut: int = 0
    refuse: int = 0
    etags: bool = True
    lengths: bool = True
    commit: str = COMMIT

    def count(self, method: str) -> int:
        return sum(one == method for one, _ in self.requests)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            given.requests.append((self.command, path))
            # As the Hub: REPO/resolve/REVISION/FILE, with the commit and an etag.
            repo, _, rest = path.partition("/resolve/")
            data = given.files.get(f"{repo}/{rest.partition('/')[2]}" if rest else path)
            if given.refuse or data is None:
                self.send_response(given.refuse or 404)
                if rest:
                    known = any(name.startswith(f"{repo}/") for name in given.files)
                    self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                    self.send_header("X-Repo-Commit", given.commit)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            if given.lengths:
                self.send_header("Content-Length", str(len(data)))
            if given.etags:
                self.send_header("ETag", f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"')
            if rest:
                self.send_header("X-Repo-Commit", given.commit)
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) - given.cut])

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    given = Server(f"http://127.0.0.1:{listening.server_port}", {})
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
    thread.start()
    yield given
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the copies; nothing of the machine's own settings is left."""
    for name in ("MASKMILL_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {"a.weight": torch.full((2, 3), value), "b": torch.arange(4)}


def packed(value: float = 1.0) -> bytes:
    return safetensors.torch.save(tensors(value))


def first(weights: str, **storage: Any) -> float:
    """The first value of what an address gives."""
    given = read_weights(weights, storage)
    assert given.keys() == tensors().keys()
    assert torch.equal(given["b"], torch.arange(4))
    return float(given["a.weight"][0, 0])


def refused(kind: type[MaskmillError], weights: str, **storage: Any) -> str:
    with pytest.raises(MaskmillError) as caught:
        read_weights(weights, storage)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.name != ".lock")


# --- files over HTTP


def test_a_file_is_fetched_once(server: Server, cache: Path) -> None:
    server.files["/w.safetensors"] = packed()
    assert first(f"{server.url}/w.safetensors") == 1.0
    assert (server.count("HEAD"), server.count("GET")) == (1, 1)
    assert first(f"{server.url}/w.safetensors") == 1.0
    assert (server.count("HEAD"), server.count("GET")) == (2, 1)
    (copy,) = kept(cache)
    assert copy.read_bytes() == packed()
    assert copy.name.endswith("-w.safetensors")


def test_a_changed_file_is_fetched_anew_and_replaces_the_old(server: Server, cache: Path) -> None:
    server.files["/w.safetensors"] = packed(1)
    assert first(f"{server.url}/w.safetensors") == 1.0
    server.files["/w.safetensors"] = packed(2)  # as long as the other
    assert first(f"{server.url}/w.safetensors") == 2.0
    assert server.count("GET") == 2
    assert [copy.read_bytes() for copy in kept(cache)] == [packed(2)]


def test_two_addresses_are_two_files(server: Server, cache: Path) -> None:
    server.files |= {"/a/w.safetensors": packed(1), "/b/w.safetensors": packed(2)}
    assert [first(f"{server.url}/{name}/w.safetensors") for name in "abab"] == [1, 2, 1, 2]
    assert server.count("GET") == len(kept(cache)) == 2


def test_without_anything_that_tells_versions_apart_it_is_fetched_each_time(server: Server, cache: Path) -> None:
    server.etags = False
    server.files["/w.safetensors"] = packed(1)
    assert first(f"{server.url}/w.safetensors") == 1.0
    server.files["/w.safetensors"] = packed(2)
    assert first(f"{server.url}/w.safetensors") == 2.0
    assert len(kept(cache)) == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_signed_address(suffix: str, server: Server, tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "w.pt")
    server.files[f"/w{suffix}"] = packed() if suffix == ".safetensors" else (tmp_path / "w.pt").read_bytes()
    assert first(f"{server.url}/w{suffix}?Signature=a%2Fb&Expires=5") == 1.0


@pytest.mark.parametrize("lengths", [True, False])
def test_a_truncated_body_leaves_nothing(lengths: bool, server: Server, cache: Path) -> None:
    server.files["/w.safetensors"] = packed()
    server.cut, server.lengths = 10, lengths
    if lengths:
        assert "w.safetensors" in refused(StorageError, f"{server.url}/w.safetensors")
        assert kept(cache) == []
    else:  # nothing says how long it should be, but the file itself
        assert "is no safetensors file" in refused(CheckpointError, f"{server.url}/w.safetensors")
    server.cut = 0
    server.lengths = True
    assert first(f"{server.url}/w.safetensors") == 1.0
    assert len(kept(cache)) == 1


def test_a_copy_that_an_earlier_process_left_half_is_removed(server: Server, cache: Path) -> None:
    server.files["/w.safetensors"] = packed(1)
    first(f"{server.url}/w.safetensors")
    (copy,) = kept(cache)
    (copy.parent / ".part-5").write_bytes(b"half")
    server.files["/w.safetensors"] = packed(2)
    first(f"{server.url}/w.safetensors")
    assert len(kept(cache)) == 1


@pytest.mark.parametrize(
    ("status", "kind", "part"),
    [
        (404, CheckpointError, "no weights at {}"),
        (410, CheckpointError, "no weights at {}"),
        (403, StorageError, "{}: ClientResponseError: 403"),
        (500, StorageError, "{}: ClientResponseError: 500"),
    ],
)
def test_refusals(status: int, kind: type[MaskmillError], part: str, server: Server, cache: Path) -> None:
    server.refuse = status
    assert part.format(f"{server.url}/w.safetensors") in refused(kind, f"{server.url}/w.safetensors")
    assert kept(cache) == []


@pytest.mark.parametrize("lengths", [True, False])
def test_a_file_that_is_too_large(lengths: bool, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/w.safetensors"] = packed()
    server.lengths = lengths
    monkeypatch.setattr("pipeline.models.weights.MAX_WEIGHTS_BYTES", 50)
    assert "bytes, expected at most 50" in refused(CheckpointError, f"{server.url}/w.safetensors")
    assert server.count("GET") == (0 if lengths else 2)  # the first asks for what HEAD did not say
    assert kept(cache) == []


def test_a_folder_that_cannot_be_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path / "file"))
    server.files["/w.safetensors"] = packed()
    assert [first(f"{server.url}/w.safetensors") for _ in range(2)] == [1, 1]
    assert server.count("GET") == 2
    assert "cannot be written" in caplog.text


def test_many_at_once_fetch_once(server: Server, cache: Path) -> None:
    server.files["/w.safetensors"] = packed()
    found: list[float] = []
    threads = [threading.Thread(target=lambda: found.append(first(f"{server.url}/w.safetensors"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.0] * 6
    assert server.count("GET") == 1
    assert len(kept(cache)) == 1


def test_a_checkpoint_folder(server: Server, cache: Path) -> None:
    server.files |= {f"/run/model/{name}": (BUNDLED / name).read_bytes() for name in ("spec.json", "model.safetensors")}
    address = f"{server.url}/run/model"
    model = load_model(ModelConfig(weights=address), seed=0, tile_pixels=1 << 20)
    bundled = load_model(ModelConfig(weights="bundled:unet_small_scenes"), seed=0, tile_pixels=1 << 20)
    assert model.version == bundled.version
    assert model.describe()["weights"] == address
    assert server.count("GET") == 2
    assert {path.name[17:] for path in kept(cache)} == {"spec.json", "model.safetensors"}
    with pytest.raises(CheckpointError, match=r"expected a folder with spec\.json"):
        checkpoint_spec(f"{server.url}/nothing", {})


# --- checksums


def test_a_right_checksum_asks_nobody_twice(server: Server, cache: Path) -> None:
    server.files["/w.safetensors"] = packed(1)
    address = f"{server.url}/w.safetensors#sha256={hashlib.sha256(packed(1)).hexdigest().upper()}"
    assert first(address) == 1.0
    asked = len(server.requests)
    server.files["/w.safetensors"] = packed(2)
    assert first(address) == 1.0
    assert len(server.requests) == asked
    # Damaged on this machine: fetched again.
    (copy,) = kept(cache)
    copy.write_bytes(packed(3))
    server.files["/w.safetensors"] = packed(1)
    assert first(address) == 1.0
    assert copy.read_bytes() == packed(1)


def test_a_wrong_checksum_leaves_nothing(server: Server, cache: Path) -> None:
    server.files["/w.safetensors"] = packed(2)
    right, wrong = (hashlib.sha256(packed(value)).hexdigest() for value in (1, 2))
    said = refused(CheckpointError, f"{server.url}/w.safetensors#sha256={right}")
    assert f"expected sha256 {right}, got {wrong}" in said
    assert kept(cache) == []


def test_checksums_of_files_here(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(packed())
    right = hashlib.sha256(packed()).hexdigest()
    assert first(f"{tmp_path}/w.safetensors#sha256={right}") == 1.0
    assert "expected sha256 " in refused(CheckpointError, f"{tmp_path}/w.safetensors#sha256={'0' * 64}")
    assert (tmp_path / "w.safetensors").exists()
    assert "expected 64 hex digits" in refused(CheckpointError, f"{tmp_path}/w.safetensors#sha256=abc")
    shutil.copytree(BUNDLED, tmp_path / "folder")
    folder_sum = hashlib.sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()
    model = load_model(ModelConfig(weights=f"{tmp_path}/folder#sha256={folder_sum}"), seed=0, tile_pixels=1)
    assert model.spec is MODELS["unet_small"]


# --- without network


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("variable", ["MASKMILL_OFFLINE", "HF_HUB_OFFLINE", ""])
def test_without_network(
    variable: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Set, or really none: the same words, and a copy laid where they say is used."""
    address = f"{server.url if variable else f'http://127.0.0.1:{closed_port()}'}/w.safetensors"
    monkeypatch.setenv(variable or "UNUSED", "1")
    said = refused(CheckpointError, address)
    assert said.startswith(f"{address} cannot be fetched: ")
    assert ("is set" in said) if variable else ("ClientConnectorError" in said)
    assert "or give the path of a copy as weights" in said
    place = Path(said.partition("it is not at ")[2].partition(" either")[0])
    assert place.parent.parent == cache
    place.write_bytes(packed(5))
    with caplog.at_level(logging.WARNING):
        assert first(address) == 5.0
    assert f"using the copy {place}" in caplog.text
    assert server.requests == []
    assert "(its copy" in refused(CheckpointError, f"{address}#sha256={'0' * 64}")
    assert first(f"{address}#sha256={hashlib.sha256(packed(5)).hexdigest()}") == 5.0


def test_a_copy_serves_without_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/w.safetensors"] = packed()
    first(f"{server.url}/w.safetensors")
    asked = len(server.requests)
    monkeypatch.setenv("MASKMILL_OFFLINE", "1")
    assert first(f"{server.url}/w.safetensors") == 1.0
    assert len(server.requests) == asked


def test_torchvisions_weights_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MASKMILL_OFFLINE", "1")
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("fetched"))
    said = refused(CheckpointError, "torchvision:LRASPP_MobileNet_V3_Large_Weights.COCO_WITH_VOC_LABELS_V1")
    assert f"{tmp_path}/hub/checkpoints/lraspp_mobilenet_v3_large-d234d4ea.pth" in said
    assert "https://download.pytorch.org/models/lraspp" in said


def test_files_here_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("MASKMILL_OFFLINE", "1")
    (tmp_path / "w.safetensors").write_bytes(packed())
    assert first(f"{tmp_path}/w.safetensors") == first(f"file://{tmp_path}/w.safetensors") == 1.0
    assert not cache.exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(), True),
        (socket.gaierror(-2, "unknown name"), True),
        (OSError("disk full"), False),
        (TimeoutError(), False),
        (None, False),
    ],
)
def test_what_no_network_is(error: Exception | None, expected: bool) -> None:
    assert fetch.unreachable(error) == expected
    outer = ValueError("outer")
    outer.__cause__ = error
    assert fetch.unreachable(outer) == expected


# --- S3


def test_an_object(s3: S3, cache: Path) -> None:
    bucket = s3.bucket("weights")
    s3.client.put_object(Bucket=bucket, Key="run/w.safetensors", Body=packed(1))
    address = f"s3://{bucket}/run/w.safetensors"
    assert [first(address, **s3.options) for _ in range(2)] == [1, 1]
    assert sum('"GET /weights/run/w.safetensors' in line for line in s3.requests()) == 1
    s3.client.put_object(Bucket=bucket, Key="run/w.safetensors", Body=packed(2))
    assert first(address, **s3.options) == 2.0
    assert len(kept(cache)) == 1
    assert "no weights at" in refused(CheckpointError, f"s3://{bucket}/none.safetensors", **s3.options)


# --- the Hub


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server as HF_ENDPOINT, and an empty cache of the Hub's."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the attempts of its own
    return server


def test_a_repository(hub: Server) -> None:
    hub.files["/some/model/model.safetensors"] = packed()
    assert first("hf:some/model") == 1.0
    assert ("GET", "/some/model/resolve/main/model.safetensors") in hub.requests
    assert first("hf:some/model") == 1.0
    assert hub.count("GET") == 1
    assert first(f"hf:some/model#sha256={hashlib.sha256(packed()).hexdigest()}") == 1.0
    assert "expected sha256 " in refused(CheckpointError, f"hf:some/model#sha256={'0' * 64}")


def test_a_revision_and_a_file(hub: Server, tmp_path: Path) -> None:
    torch.save(tensors(3), tmp_path / "w.bin")
    hub.files["/some/model/deep/w.bin"] = (tmp_path / "w.bin").read_bytes()
    hub.commit = MOVED
    assert first("hf:some/model@v1:deep/w.bin") == 3.0
    assert ("GET", "/some/model/resolve/v1/deep/w.bin") in hub.requests
    hub.files["/some/model/deep/w.bin"] = b"\x80\x04." * 9
    hub.commit = COMMIT
    assert "weights_only=True" in refused(CheckpointError, "hf:some/model:deep/w.bin")


def test_the_commit_is_recorded(hub: Server) -> None:
    hub.files["/some/model/model.safetensors"] = (BUNDLED / "model.safetensors").read_bytes()
    model = load_model(ModelConfig(name="unet_small", weights="hf:some/model"), seed=0, tile_pixels=1)
    assert model.describe()["weights"] == f"hf:some/model@{COMMIT}"
    again = load_model(ModelConfig(name="unet_small", weights=model.weights), seed=0, tile_pixels=1)
    assert again.weights == model.weights


def test_weights_in_parts(hub: Server) -> None:
    parts = {"model-00001-of-00002.safetensors": ["a.weight"], "model-00002-of-00002.safetensors": ["b"]}
    for name, keys in parts.items():
        hub.files[f"/some/large/{name}"] = safetensors.torch.save({key: tensors()[key] for key in keys})
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    hub.files["/some/large/model.safetensors.index.json"] = json.dumps(index).encode()
    assert first("hf:some/large") == 1.0
    assert ("GET", f"/some/large/resolve/{COMMIT}/model-00002-of-00002.safetensors") in hub.requests
    assert "comes in 2 files" in refused(CheckpointError, f"hf:some/large#sha256={'0' * 64}")


@pytest.mark.parametrize(
    "index", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": "../x.safetensors"}}', b"[" * 10**5,
              b'{"weight_map": {"a": 5}}', b'{"weight_map": {"a": "x.bin"}}']
)  # fmt: skip
def test_an_index_that_is_none(index: bytes, hub: Server) -> None:
    hub.files["/some/large/model.safetensors.index.json"] = index
    assert "hf:some/large (model.safetensors.index.json)" in refused(CheckpointError, "hf:some/large")


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ("hf:some/model", "some/model has no file model.safetensors; name one, as in hf:some/model:pytorch_model.bin"),
        ("hf:some/model:none.safetensors", "has no file none.safetensors"),
        ("hf:some/model:config.json", "expected a .safetensors, .bin, .pt or .pth file, got 'config.json'"),
        ("hf:no/such", "there is no repository no/such"),
        ("hf:", "expected hf:REPO[@REVISION][:FILE]"),
        ("hf:a/b/c", "expected hf:REPO"),
        ("hf:a/b@", "expected hf:REPO"),
        ("hf:a/b:../../x.safetensors", "hf:a/b@main:../../x.safetensors"),
    ],
)
def test_what_the_hub_does_not_have(weights: str, part: str, hub: Server) -> None:
    hub.files["/some/model/config.json"] = b"{}"
    assert part in refused(CheckpointError, weights)


@pytest.mark.parametrize("variable", ["MASKMILL_OFFLINE", "HF_HUB_OFFLINE", ""])
def test_the_hub_without_network(variable: str, hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable or "UNUSED", "1")
    if not variable:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    said = refused(CheckpointError, "hf:some/model")
    assert said.startswith("hf:some/model@main:model.safetensors cannot be fetched: ")
    place = Path(said.partition("it is not at ")[2].partition(" either")[0])
    assert place == tmp_path / "hf" / "models--some--model" / "snapshots" / "main" / "model.safetensors"
    place.parent.mkdir(parents=True)
    place.write_bytes(packed(5))
    assert first("hf:some/model") == 5.0
    assert hub.requests == []


def test_what_was_fetched_serves_without_network(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["/some/model/model.safetensors"] = packed()
    first("hf:some/model")
    asked = len(hub.requests)
    monkeypatch.setenv("MASKMILL_OFFLINE", "1")
    assert first("hf:some/model") == 1.0
    assert len(hub.requests) == asked
    # The branch is at a known commit now, so that is where another file would have to be.
    assert f"snapshots/{COMMIT}/other.safetensors" in refused(CheckpointError, "hf:some/model:other.safetensors")


def test_a_hub_that_breaks(hub: Server) -> None:
    hub.files["/some/model/model.safetensors"] = packed()
    hub.cut = 10
    assert "cannot download hf:some/model@main:model.safetensors" in refused(CheckpointError, "hf:some/model")


@pytest.mark.parametrize(("weights", "extra"), [("hf:a/b", "hf"), ("timm:resnet18", "smp")])
def test_the_extra_is_named(weights: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("huggingface_hub", "timm", "timm.models"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    assert f'pip install "maskmill[{extra}]"' in refused(ConfigError, weights)


# --- timm


def test_timms_weights(hub: Server) -> None:
    pytest.importorskip("timm")
    hub.files["/timm/resnet18.a1_in1k/model.safetensors"] = packed()
    assert first("timm:resnet18") == first("timm:resnet18.a1_in1k") == 1.0
    assert ("GET", "/timm/resnet18.a1_in1k/resolve/main/model.safetensors") in hub.requests
    assert first(f"timm:resnet18.a1_in1k@{COMMIT}") == 1.0
    assert hub.count("GET") == 1
    assert "timm has no weights 'resnet18.nope'; did you mean resnet18." in refused(
        CheckpointError, "timm:resnet18.nope"
    )


def test_a_backbone_from_timm(hub: Server) -> None:
    """All of the encoder, by its own names, as `partial_weights` takes it."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(1)
    published = timm.create_model("resnet18", pretrained=False).state_dict()
    hub.files["/timm/resnet18.a1_in1k/model.safetensors"] = safetensors.torch.save(published)
    module = MODELS["unet"].build(8, encoder="tu-resnet18")
    wanted = module.state_dict()
    given = MODELS["unet"].adapt(read_weights("timm:resnet18", {}), wanted.keys())
    encoder = {name for name in wanted if name.startswith("encoder.")}
    assert given.keys() == encoder
    assert all(torch.equal(tensor, published[name.removeprefix("encoder.model.")]) for name, tensor in given.items())


def test_dpt_from_the_hub(hub: Server) -> None:
    """The library's own tensors, under the library's names, give every weight of ours."""
    pytest.importorskip("transformers")
    from test_hf_depth import OPTIONS, official, published

    torch.manual_seed(1)
    tensors = published(official())
    hub.files["/Intel/dpt-large/model.safetensors"] = safetensors.torch.save(tensors)
    model = load_model(
        ModelConfig(name="dpt_depth", weights=MODELS["dpt_depth"].weights[0], options=OPTIONS), seed=0, tile_pixels=1
    )
    assert model.weights == f"hf:Intel/dpt-large@{COMMIT}"
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.module.state_dict().items())
    assert os.environ["HF_ENDPOINT"] == hub.url
