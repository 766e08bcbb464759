"""Weights by address, never unpickled: safetensors, or torch files read with weights_only=True, all tensors checked."""

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, ConfigError, StorageError
from pipeline.models.adapt import Adapt, as_named
from pipeline.models.fetch import OFFLINE, check_sha256, local_file, no_network, offline, unpinned
from pipeline.models.hub import hub_files, is_hub
from pipeline.storage import join, storage_errors

__all__ = ["CheckpointSpec", "checkpoint_spec", "fingerprint", "load_weights", "read_weights"]

MAX_SPEC_BYTES = 10_000_000
MAX_WEIGHTS_BYTES = 100_000_000_000
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
SCHEMES = (
    "none, bundled:NAME, torchvision:ENUM, hf:REPO[@REVISION][:FILE], timm:NAME[.TAG], "
    "or a path or URI of a checkpoint folder, .safetensors or .pt file"
)

CheckpointSpec = Mapping[str, Any]


def _bundled(name: str) -> str:
    folder = resources.files("pipeline") / "checkpoints"
    names = sorted(item.name for item in folder.iterdir() if item.is_dir())
    if name not in names:
        raise CheckpointError(f"no bundled checkpoint {name!r}; bundled: {', '.join(names)}")
    return str(folder / name)


def _folder(weights: str) -> str | None:
    """The checkpoint folder that `weights` names, or None where it names something else."""
    if weights.startswith("bundled:"):
        return _bundled(weights.removeprefix("bundled:"))
    if weights == "none" or weights.startswith("torchvision:") or is_hub(weights) or _name(weights).endswith(SUFFIXES):
        return None
    scheme, separator, rest = weights.partition(":")
    if separator and not rest.startswith("/"):
        raise CheckpointError(f"weights {weights!r}: {scheme!r} is not a kind of weights; expected {SCHEMES}")
    return weights


def _name(uri: str) -> str:
    """An address without the query that it may have over HTTP."""
    return uri.partition("?")[0] if uri.startswith(("http://", "https://")) else uri


def checkpoint_spec(weights: str, storage: Mapping[str, Any]) -> CheckpointSpec | None:
    """The spec.json of a checkpoint folder, None where `weights` is no folder.

    Raises CheckpointError where the folder is no maskmill checkpoint, StorageError where it cannot be read.
    """
    weights, _ = unpinned(weights)
    folder = _folder(weights)
    if folder is None:
        return None
    uri = join(folder, "spec.json")
    try:
        with local_file(uri, storage, max_bytes=MAX_SPEC_BYTES) as path, storage_errors(uri), open(path, "rb") as file:
            text = file.read()
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(f"no checkpoint at {weights}: expected a folder with spec.json") from error
        raise
    try:
        spec = json.loads(text)
        if not isinstance(spec, dict) or not isinstance(spec["model"], str):
            raise TypeError("expected an object with a field model")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{weights}/spec.json is no checkpoint spec: {error}") from error
    return spec


def load_weights(module: nn.Module, weights: str, storage: Mapping[str, Any], adapt: Adapt = as_named) -> str:
    """Load `weights` into `module`, strictly. adapt: the model's way to its own names (ModelSpec).

    Returns their address, with the commit that was read where they come from a repository. Raises CheckpointError where
    the weights are missing, need more than tensors to be read, or differ from the module in names or shapes (all
    differences are listed); StorageError where storage fails.
    """
    if weights == "none":
        return weights
    state, address = _read(weights, storage)
    _load_strictly(module, adapt(state, module.state_dict().keys()), weights)
    return address


def read_weights(weights: str, storage: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that `weights` names (not `none`). Raises CheckpointError, StorageError."""
    return _read(weights, storage)[0]


def _read(weights: str, storage: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    address, sha256 = unpinned(weights)
    if is_hub(address):
        return _hub(address, sha256)
    if address.startswith("torchvision:"):
        return _torchvision(address.removeprefix("torchvision:")), weights
    folder = _folder(address)
    return _read_file(address if folder is None else join(folder, "model.safetensors"), storage, sha256), weights


def _hub(weights: str, sha256: str) -> tuple[dict[str, Tensor], str]:
    found = hub_files(weights)
    if sha256 and len(found.paths) > 1:
        raise CheckpointError(f"{weights} comes in {len(found.paths)} files, a sha256 is of one; give @COMMIT instead")
    state: dict[str, Tensor] = {}
    for path in found.paths:
        check_sha256(path, sha256, weights)
        state |= _parse(path, path)
    return state, found.address


def _torchvision(enum: str) -> dict[str, Tensor]:
    from torchvision.models import get_weight

    try:
        chosen = get_weight(enum)
    except (ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"torchvision has no weights {enum!r}: {error}") from error
    place = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rpartition("/")[2]
    if offline() and not place.is_file():
        raise no_network(f"{enum} ({chosen.url})", place, f"{OFFLINE[0]} or {OFFLINE[1]} is set")
    try:
        state = chosen.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # URLError, a connection cut, a wrong hash, a damaged file in the cache
        name = chosen.url.rpartition("/")[2]
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"cannot download {enum}: {type(error).__name__}: {text}; on a machine without network, fetch {name} "
            "elsewhere and give its path as weights, or put it into the folder checkpoints of TORCH_HOME/hub"
        ) from error
    # Heads that only help training; our modules are built without them.
    return {name: tensor for name, tensor in state.items() if not name.startswith("aux_classifier.")}


def _read_file(uri: str, storage: Mapping[str, Any], sha256: str) -> dict[str, Tensor]:
    try:
        with local_file(uri, storage, max_bytes=MAX_WEIGHTS_BYTES, sha256=sha256) as path, storage_errors(uri):
            return _parse(path, _name(uri))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(f"no weights at {uri}") from error
        raise


def _parse(path: str, uri: str) -> dict[str, Tensor]:
    if uri.endswith(TORCH_SUFFIXES):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{uri} cannot be read with weights_only=True, and maskmill unpickles nothing else: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        for key in ("state_dict", "model"):
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                state = state[key]
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{uri} must hold a state dict of tensors")
        return dict(state)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{uri} is no safetensors file: {error}") from error


def _load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    expected = module.state_dict()
    differences = [f"{name} is missing" for name in expected if name not in state]
    differences += [f"{name} is not in the model" for name in state if name not in expected]
    differences += [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if differences:
        shown = "; ".join(differences[:8]) + (f"; and {len(differences) - 8} more" if len(differences) > 8 else "")
        raise CheckpointError(f"{where} does not fit the model: {shown}")
    module.load_state_dict(state)


def fingerprint(module: nn.Module, settings: Mapping[str, Any]) -> str:
    """16 hex digits over every tensor of the module (name, type, shape, bytes) and over `settings` (plain values)."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def require_known(options: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ConfigError for an option that nothing reads."""
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} in {where}; known: {', '.join(sorted(known))}")
