"""A cluster that is about to go: its jobs are asked to stop, and given the time to commit."""

import time
from collections.abc import Callable

from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.errors import ConfigError

__all__ = ["drain"]

POLL_S = 0.5


def drain(client: JobSubmissionClient, timeout_s: float, say: Callable[[str], None]) -> list[str]:
    """Ask every job that has not ended to stop, as SIGTERM would; wait until all have. Gives the ids of those that
    have not within `timeout_s` seconds. How long Ray itself waits before it kills one is RAY_JOB_STOP_WAIT_TIME_S of
    the head's environment. Raises ConfigError where the job server does not answer.
    """
    deadline = time.monotonic() + timeout_s
    asked: set[str] = set()
    while True:
        left = _unfinished(client)
        for name in left:
            # One that has only now begun is asked as well.
            if name not in asked:
                asked.add(name)
                say(f"{name}: asked to stop")
                client.stop_job(name)
        for name in sorted(asked - set(left)):
            asked.discard(name)
            say(f"{name}: ended")
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(POLL_S)


def _unfinished(client: JobSubmissionClient) -> list[str]:
    """Ids of submitted jobs; drivers that joined the cluster by themselves have none and cannot be asked."""
    try:
        jobs = client.list_jobs()
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ConfigError(f"the job server does not answer: {' '.join(str(error).split())[:300]}") from error
    ended = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
    return sorted(job.submission_id for job in jobs if job.submission_id and job.status not in ended)
