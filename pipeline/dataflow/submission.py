"""A job on a cluster, through Ray Jobs: what travels with it, its logs as they come, how it ended.

Sent are the config, checked and resolved, and maskmill's own code, so that the cluster needs its dependencies alone.
Whoever can ask the job server reads a job's metadata, so nothing that looks like a credential is put there.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import pipeline
from pipeline.config import Section
from pipeline.errors import EXIT_INTERRUPTED, EXIT_UNEXPECTED, ConfigError
from pipeline.redaction import is_secret_name, redact_text

__all__ = ["Submission", "connect", "exit_code", "extra_requirements", "follow", "send", "status", "stop", "travelling"]

CONFIG_NAME = "maskmill_job.yaml"
POLL_S = 1.0
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Private keys by the names that they have; whatever begins with a dot (.env, .aws, .git) stays too.
KEPT_HERE = re.compile(r"\..*|.*\.(pem|key|p12|pfx|jks)|id_(rsa|dsa|ecdsa|ed25519)", re.IGNORECASE)
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One job. config: checked, None for jobs that take none; arguments: what else stands on its command line.

    working_dir: a local folder whose files travel along and where the job runs (models of your own, taxonomies).
    requirements: what pip installs for it on the cluster. environment: variables of all its processes. installed: the
    cluster has this version of maskmill, so no code is sent. cpus, gpus: reserved for the driver.
    """

    job: str
    config: Section | None = None
    arguments: tuple[str, ...] = ()
    name: str = ""
    working_dir: Path | None = None
    requirements: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    installed: bool = False
    cpus: float | None = None
    gpus: float | None = None


def connect(address: str) -> JobSubmissionClient:
    """The cluster's job server, `http://HEAD:8265`. Raises ConfigError where there is none."""
    # Ray's client says on its log what we say ourselves.
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster at {address} asks for its token: set RAY_AUTH_MODE to token, with the token itself in "
            "RAY_AUTH_TOKEN or in ~/.ray/auth_token (Ray's token authentication)"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"no Ray job server at {address}: {_line(error)}") from error


def send(client: JobSubmissionClient, submission: Submission) -> str:
    """Upload what travels and start the job; returns its id.

    Raises ConfigError for what the server refuses, and for credentials where the job's metadata would show them.
    """
    _check_open(submission)
    if submission.name and not ID.fullmatch(submission.name):
        raise ConfigError(f"a job's id may hold letters, digits, '.', '_' and '-', got {submission.name!r}")
    arguments = list(submission.arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if submission.config is not None:
            text = yaml.safe_dump(submission.config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
            folder.joinpath(CONFIG_NAME).write_text(text, encoding="utf-8")
            arguments.insert(0, CONFIG_NAME)
        environment: dict[str, Any] = {"working_dir": str(_together(submission.working_dir, folder))}
        if not submission.installed:
            root = Path(pipeline.__file__).parent
            environment["py_modules"] = [str(root), str(root.parent / "jobs")]
            environment["excludes"] = ["__pycache__"]
        if submission.requirements:
            environment["pip"] = list(submission.requirements)
        if submission.environment:
            environment["env_vars"] = dict(submission.environment)
        try:
            name: str = client.submit_job(
                entrypoint=shlex.join(["python", "-m", f"jobs.{submission.job}", *arguments]),
                submission_id=submission.name or None,
                runtime_env=environment,
                metadata={"maskmill": pipeline.__version__, "maskmill_job": submission.job},
                entrypoint_num_cpus=submission.cpus,
                entrypoint_num_gpus=submission.gpus,
            )
            return name
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"the cluster did not take the job: {_line(error)}") from error


def follow(client: JobSubmissionClient, name: str, write: Callable[[str], None]) -> None:
    """Hand on the job's output until it has ended. A connection that breaks is taken up where it broke.

    Raises ConfigError where there is no such job, and where the server stays away for a minute.
    """
    shown = 0
    missing_since: float | None = None
    while True:
        try:
            status = client.get_job_status(name)
            rest = client.get_job_logs(name)[shown:] if status in ENDED else ""
            missing_since = None
        except (ConnectionError, OSError) as error:
            missing_since = missing_since or time.monotonic()
            if time.monotonic() - missing_since > 60:
                raise ConfigError(f"the job server does not answer any more: {_line(error)}") from error
            time.sleep(POLL_S)
            continue
        except RuntimeError as error:
            raise ConfigError(f"no job {name!r}: {_line(error)}") from error
        if status in ENDED:
            write(rest)
            return
        with contextlib.suppress(RuntimeError, ConnectionError, OSError):
            for text in _tail(client, name, shown):
                write(text)
                shown += len(text)
        time.sleep(POLL_S)


def exit_code(client: JobSubmissionClient, name: str) -> int:
    """That of a job that has ended: its driver's, 130 for one that was stopped, else 1. Raises ConfigError."""
    try:
        info = client.get_job_info(name)
    except RuntimeError as error:
        raise ConfigError(f"no job {name!r}: {_line(error)}") from error
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return EXIT_INTERRUPTED
    code = info.driver_exit_code
    # A driver that a signal ended has a negative one.
    return code if code is not None and 0 < code < 256 else EXIT_UNEXPECTED


def status(client: JobSubmissionClient, name: str) -> str:
    """How a job is, and why, in one line. Raises ConfigError."""
    try:
        info = client.get_job_info(name)
    except RuntimeError as error:
        raise ConfigError(f"no job {name!r}: {_line(error)}") from error
    why = " ".join((info.message or "").split())
    return f"{info.status.value} ({redact_text(why)})" if why else str(info.status.value)


def stop(client: JobSubmissionClient, name: str) -> bool:
    """Ask the job to end, as SIGTERM would; False where it has ended before. Raises ConfigError."""
    try:
        running: bool = client.stop_job(name)
    except RuntimeError as error:
        raise ConfigError(f"no job {name!r}: {_line(error)}") from error
    return running


def extra_requirements(extras: Sequence[str]) -> list[str]:
    """What pip installs for extras of this package. Raises ConfigError for one that it does not have."""
    known = importlib.metadata.metadata("maskmill").get_all("Provides-Extra") or []
    for extra in extras:
        if extra not in known:
            raise ConfigError(f"maskmill has no extra {extra!r}; it has {', '.join(known)}")
    found: list[str] = []
    for line in importlib.metadata.requires("maskmill") or ():
        requirement, _, marker = line.partition(";")
        if any(re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker) for extra in extras):
            found.append(requirement.strip())
    return sorted(set(found))


def _together(given: Path | None, scratch: Path) -> Path:
    """One folder of the user's files and the config: Ray takes one."""
    if given is None:
        return scratch
    files, _ = travelling(given)
    for name in files:
        place = scratch / name
        if place.exists():
            raise ConfigError(f"{given / name}: a file of this name is maskmill's own; expected another name")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to((given / name).resolve())
    return scratch


def travelling(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a working directory that are sent, and what stays (hidden files, private keys), below `folder`.

    Raises ConfigError where there is no such folder, and for a link that leads out of it: it would take along what
    nobody meant to send.
    """
    if not folder.is_dir():
        raise ConfigError(f"expected a folder to send along, got {folder}")
    root = folder.resolve()
    sent: list[Path] = []
    kept: list[Path] = []
    for place, folders, files in os.walk(root):
        here = Path(place)
        for name in sorted([*folders, *files]):
            path = here / name
            below = path.relative_to(root)
            if KEPT_HERE.fullmatch(name):
                kept.append(below)
            elif path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ConfigError(
                    f"{folder / below} is a link out of the folder that is sent; expected its content or nothing"
                )
            elif name in folders and path.is_symlink():
                kept.append(below)  # its files are in the folder, under their own names
            elif path.is_file():
                sent.append(below)
        folders[:] = sorted(name for name in folders if not KEPT_HERE.fullmatch(name) and name != "__pycache__")
    return sent, kept


def _check_open(submission: Submission) -> None:
    """Raises ConfigError for a credential in what becomes the job's entrypoint and runtime environment."""
    instead = "whoever reaches the job server could read it; expected it in the config or on the cluster's nodes"
    for argument in submission.arguments:
        # `storage.token=...` as a whole, and any address in it.
        name, _, value = argument.partition("=")
        if (value and is_secret_name(name.rpartition(".")[2])) or redact_text(argument) != argument:
            raise ConfigError(f"{name if value else 'an argument'} holds a credential: {instead}")
    for name, value in submission.environment.items():
        if is_secret_name(name) or redact_text(value) != value:
            raise ConfigError(f"--env {name} holds a credential: {instead}")
    for requirement in submission.requirements:
        if redact_text(requirement) != requirement:
            raise ConfigError(f"--pip {redact_text(requirement)} holds a credential: {instead}")


def _tail(client: JobSubmissionClient, name: str, skip: int) -> Iterator[str]:
    """The job's output from its `skip`-th character on, as it comes, until the server closes."""
    loop = asyncio.new_event_loop()
    stream = client.tail_job_logs(name)
    try:
        while True:
            try:
                text: str = loop.run_until_complete(anext(stream))
            except StopAsyncIteration:
                return
            kept = text[skip:]
            skip = max(0, skip - len(text))
            if kept:
                yield kept
    finally:
        loop.run_until_complete(stream.aclose())
        loop.close()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
