"""Every command of the guide and of the jobs' pages does what the page shows: in this process, on a local bucket."""

import contextlib
import importlib
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from docs_helpers import Shell
from ray.job_submission import JobStatus
from s3_endpoint import S3

from jobs import preflight, train
from pipeline import progress
from pipeline.dataflow import submission
from pipeline.observe.metrics import NoMetrics
from pipeline.preflight.measure import measure
from pipeline.trainer import Resumed
from pipeline.training.loop import TrainingLoop
from pipeline.training.workers import Workers

# The guide is one fixture: on a machine with other work it takes minutes.
pytestmark = pytest.mark.timeout(600)

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in (DOCS / "jobs").glob("*.md") if path.name != "index.md")

# What a test cannot run, by how it begins, and why.
EXCEPTIONS = {
    "export AWS_": "the test's bucket has an endpoint and credentials of its own",
    "git clone ": "there is no address that all readers share",
    "make ": "installs packages, or is a test of its own",
    "kubectl ": "needs a Kubernetes cluster",
    "docker ": "needs a container engine",
    "ray ": "starts or asks a cluster",
    "export RAY_": "names a cluster",
    "maskmill models --markdown --time": "runs every model of the registry: minutes",
    "maskmill preflight label.yaml --nodes": "measures again what the command before it measured",
}


class TrainingHere:
    """`pipeline.trainer.Training` with one worker: this process."""

    waits_for = ""

    def __init__(self, config: Any, pool: Any, plan: Any, validation_plan: Any, run_id: str) -> None:
        self._loop = TrainingLoop(
            config,
            workers=Workers(),
            device=torch.device("cpu"),
            run_id=run_id,
            plan=plan,
            validation_plan=validation_plan,
        )

    def events(self) -> Iterator[Any]:
        loop = self._loop
        yield Resumed(
            workers=1,
            from_checkpoint=loop.restore(),
            steps_per_epoch=loop.steps_per_epoch,
            done=loop.done,
            unfilled=tuple(loop.unfilled),
        )
        yield from loop.run()


class JobServer:
    """What `maskmill submit` and `drain` ask of Ray's job server; a job runs to its end when it is submitted."""

    def __init__(self) -> None:
        self._jobs: dict[str, Any] = {}
        self._logs: dict[str, str] = {}

    def submit_job(self, *, entrypoint: str, submission_id: str | None, runtime_env: Any, **_: Any) -> str:
        name = submission_id or f"raysubmit_{len(self._jobs)}"
        python, option, module, *arguments = shlex.split(entrypoint)
        assert (python, option) == ("python", "-m")
        log = io.StringIO()
        here = contextlib.chdir(runtime_env["working_dir"])
        with here, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = importlib.import_module(module).main(arguments)
        status = JobStatus.FAILED if code else JobStatus.SUCCEEDED
        message = f"Job failed with exit code {code}" if code else "Job finished successfully."
        self._jobs[name] = SimpleNamespace(submission_id=name, status=status, driver_exit_code=code, message=message)
        self._logs[name] = log.getvalue()
        return name

    def get_job_info(self, name: str) -> Any:
        if name not in self._jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {name} does not exist.")
        return self._jobs[name]

    def get_job_status(self, name: str) -> JobStatus:
        status: JobStatus = self.get_job_info(name).status
        return status

    def get_job_logs(self, name: str) -> str:
        return self._logs[name]

    def stop_job(self, name: str) -> bool:
        self.get_job_info(name)
        return False

    def list_jobs(self) -> list[Any]:
        return list(self._jobs.values())


@pytest.fixture(scope="module")
def shell(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """After the guide: its files in a folder, its bucket, and jobs without a cluster."""
    server = JobServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Training", TrainingHere)
        patch.setattr(train, "RayMetrics", NoMetrics)
        patch.setattr(preflight, "_measure_here", measure)
        patch.setattr(submission, "connect", lambda _: server)
        patch.setattr(progress, "LINE_EVERY_S", float("inf"))
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in {
            "AWS_ACCESS_KEY_ID": s3.options["key"],
            "AWS_SECRET_ACCESS_KEY": s3.options["secret"],
            "AWS_ENDPOINT_URL": s3.options["endpoint_url"],
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "RAY_API_SERVER_ADDRESS": "http://head:8265",
            "COLUMNS": "200",
        }.items():
            patch.setenv(name, value)
        s3.bucket("my-bucket")
        folder = tmp_path_factory.mktemp("docs")
        folder.joinpath("configs").symlink_to(REPOSITORY / "configs")
        shell = Shell(folder)
        shell.problems = list(shell.page(DOCS / "guide.md", EXCEPTIONS))
        yield shell


def test_the_guide(shell: Shell) -> None:
    assert not shell.problems, "\n\n".join(shell.problems)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_job(page: Path, shell: Shell) -> None:
    """Its page goes on where the guide ended."""
    problems = list(shell.page(page, EXCEPTIONS))
    assert not problems, "\n\n".join(problems)
