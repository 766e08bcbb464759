"""Weights by the name that others published them under: repositories of the Hugging Face Hub, and timm's table."""

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.models.extras import import_extra
from pipeline.models.fetch import OFFLINE, no_network, offline, reason, unreachable

__all__ = ["HF", "TIMM", "HubFiles", "hub_files", "is_hub", "timm_weights"]

HF, TIMM = "hf:", "timm:"
EXTRAS = {HF: "hf", TIMM: "smp"}
ADDRESS = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w.\-/]+))?(?::(?P<file>[\w.\-/+=]+))?", re.ASCII
)
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 10_000_000
PART = r"[\w-][\w.-]*\.safetensors"
MAX_SHARDS = 1000


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files on this machine that together hold the weights. address: theirs, with the commit that they are of."""

    paths: tuple[str, ...]
    address: str


class _NoSuchFileError(CheckpointError):
    """The repository is there, the file is not."""


def is_hub(weights: str) -> bool:
    """Whether weights are `hf:REPO[@REVISION][:FILE]` or `timm:NAME[.TAG][@REVISION]`."""
    return weights.startswith((HF, TIMM))


def timm_weights(weights: str) -> Any:
    """timm's entry (a PretrainedCfg) for an address. Raises CheckpointError, ConfigError without the extra."""
    name = weights.removeprefix(TIMM).partition("@")[0]
    models = import_extra("timm.models", EXTRAS[TIMM])
    try:
        return models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        close = difflib.get_close_matches(name, models.list_pretrained(), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise CheckpointError(f"timm has no weights {name!r}{hint}") from error


def hub_files(weights: str) -> HubFiles:
    """The files that `weights` name, fetched into the Hub's own cache (HF_HOME) where they are not there yet.

    By default model.safetensors, or all parts that model.safetensors.index.json lists. HF_ENDPOINT and HF_TOKEN mean
    what they mean to huggingface_hub. Raises CheckpointError, and ConfigError without the extra.
    """
    try:
        return _files(weights)
    except _NoSuchFileError as error:
        raise CheckpointError(str(error)) from error


def _files(weights: str) -> HubFiles:
    if weights.startswith(TIMM):
        entry = timm_weights(weights)
        if not entry.hf_hub_id:
            raise CheckpointError(f"{weights}: timm gives no repository for them, only {entry.url or 'no address'}")
        repo, file, revision = str(entry.hf_hub_id), entry.hf_hub_filename or "", weights.partition("@")[2]
        name, extra = f"{TIMM}{entry.architecture}" + (f".{entry.tag}" if entry.tag else ""), EXTRAS[TIMM]
    else:
        match = ADDRESS.fullmatch(weights.removeprefix(HF))
        if match is None:
            raise CheckpointError(f"weights {weights!r}: expected hf:REPO[@REVISION][:FILE], as in hf:Intel/dpt-large")
        repo, revision, file = (match[group] or "" for group in ("repo", "revision", "file"))
        name, extra = f"{HF}{repo}", EXTRAS[HF]
    if file and not file.endswith((".safetensors", ".bin", ".pt", ".pth")):
        raise CheckpointError(f"weights {weights!r}: expected a .safetensors, .bin, .pt or .pth file, got {file!r}")
    library = _Library(extra, repo, revision or "main")
    if file:
        path = library.get(file)
        return HubFiles((path,), f"{name}@{_commit(path)}" + (f":{file}" if weights.startswith(HF) else ""))
    try:
        path = library.get(ONE_FILE)
        return HubFiles((path,), f"{name}@{_commit(path)}")
    except _NoSuchFileError as error:
        try:
            index = Path(library.get(INDEX))
        except _NoSuchFileError:
            raise error from None
    parts = _parts(index, f"{weights} ({INDEX})")
    # Of the commit that the index is of, should the branch move on in between.
    library.revision = _commit(index)
    return HubFiles(tuple(library.get(part) for part in parts), f"{name}@{_commit(index)}")


def _commit(path: str | Path) -> str:
    """The commit of a file in the Hub's cache, `.../snapshots/COMMIT/FILE`."""
    return str(path).rpartition("/snapshots/")[2].partition("/")[0]


def _parts(index: Path, where: str) -> list[str]:
    """The files that an index lists. Raises CheckpointError."""
    with index.open("rb") as file:
        text = file.read(MAX_INDEX_BYTES + 1)
    try:
        parts = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is no index of weights: {reason(error)}") from error
    if not 1 <= len(parts) <= MAX_SHARDS or not all(re.fullmatch(PART, str(part)) for part in parts):
        raise CheckpointError(f"{where} must list 1 to {MAX_SHARDS} safetensors files, got {str(parts)[:200]}")
    return parts


class _Library:
    """huggingface_hub, asked for files of one repository."""

    def __init__(self, extra: str, repo: str, revision: str) -> None:
        self._hub = import_extra("huggingface_hub", extra)
        self._errors = import_extra("huggingface_hub.errors", extra)
        self._constants = import_extra("huggingface_hub.constants", extra)
        self._bars = import_extra("huggingface_hub.utils", extra)
        self.repo, self.revision = repo, revision

    def get(self, file: str) -> str:
        """The path of a file on this machine. Raises CheckpointError."""
        where = f"{HF}{self.repo}@{self.revision}:{file}"
        try:
            if offline():
                return self._kept(file, where, f"{OFFLINE[0]} or {OFFLINE[1]} is set")
            return self._download(file)
        except CheckpointError:
            raise
        except self._errors.HFValidationError as error:
            raise CheckpointError(f"{where}: {reason(error)}") from error
        except self._errors.GatedRepoError as error:
            raise CheckpointError(
                f"{where}: {self.repo} asks you to accept its terms on its page; do that, then set HF_TOKEN"
            ) from error
        except self._errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{where}: there is no repository {self.repo}, or it is not public (set HF_TOKEN)"
            ) from error
        except self._errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{where}: {self.repo} has no revision {self.revision}") from error
        except self._errors.LocalEntryNotFoundError as error:
            cause = error.__cause__ or error
            if not unreachable(error):
                raise CheckpointError(f"cannot download {where}: {reason(cause)}") from error
            return self._kept(file, where, reason(cause), error)
        except self._errors.EntryNotFoundError as error:
            raise _NoSuchFileError(
                f"{where}: {self.repo} has no file {file}; name one, as in {HF}{self.repo}:pytorch_model.bin"
            ) from error
        except Exception as error:  # its HTTP client's own, a full disk, a cut connection
            if unreachable(error):
                return self._kept(file, where, reason(error), error)
            raise CheckpointError(f"cannot download {where}: {reason(error)}") from error

    def _download(self, file: str) -> str:
        shown = not self._bars.are_progress_bars_disabled()
        self._bars.disable_progress_bars()
        try:
            return str(
                self._hub.hf_hub_download(
                    self.repo, file, revision=self.revision, endpoint=os.environ.get("HF_ENDPOINT") or None
                )
            )
        finally:
            if shown:
                self._bars.enable_progress_bars()

    def _kept(self, file: str, where: str, why: str, error: Exception | None = None) -> str:
        """The copy in the Hub's cache, also one that was laid there by hand. Raises CheckpointError."""
        found = self._hub.try_to_load_from_cache(self.repo, file, revision=self.revision)
        if isinstance(found, str):
            return found
        # A _NoSuchFileError, because the parts may be there where the one file is not.
        raise _NoSuchFileError(str(no_network(where, self._place(file), why))) from error

    def _place(self, file: str) -> Path:
        """Where the Hub's cache looks for a file of a revision."""
        folder = Path(self._constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"
        try:
            revision = (folder / "refs" / self.revision).read_text()
        except OSError:
            revision = self.revision
        return folder / "snapshots" / revision / file
