"""Draining a cluster: each job is asked once, waited for, and named where it does not end."""

from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from jobs import drain as job
from pipeline.dataflow import drain as module
from pipeline.dataflow import submission
from pipeline.errors import EXIT_CONFIG, EXIT_UNEXPECTED, ConfigError


class FakeServer:
    """Jobs that end some polls after they are asked to; those of none never do."""

    def __init__(self, **polls: int | None) -> None:
        self.left = dict(polls)
        self.asked: list[str] = []
        self.late: dict[str, int] = {}
        self.polls = 0

    def list_jobs(self) -> list[SimpleNamespace]:
        self.polls += 1
        self.left.update({name: 1 for name, poll in self.late.items() if poll == self.polls})
        rows = [SimpleNamespace(submission_id=None, status=JobStatus.RUNNING)]  # a driver of its own
        for name, polls in self.left.items():
            ended = polls is not None and polls <= 0
            rows.append(SimpleNamespace(submission_id=name, status=JobStatus.STOPPED if ended else JobStatus.RUNNING))
            if polls is not None and name in self.asked:
                self.left[name] = polls - 1
        return rows

    def stop_job(self, name: str) -> bool:
        self.asked.append(name)
        return True


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.001)


def test_each_job_is_asked_once_and_waited_for() -> None:
    server, said = FakeServer(a=3, b=1, over=0), []
    assert module.drain(server, 30, said.append) == []  # type: ignore[arg-type]
    assert server.asked == ["a", "b"]
    assert said == ["a: asked to stop", "b: asked to stop", "b: ended", "a: ended"]


def test_a_job_that_begins_meanwhile_is_asked_too() -> None:
    server = FakeServer(a=5)
    server.late = {"b": 3}
    assert module.drain(server, 30, lambda _: None) == []  # type: ignore[arg-type]
    assert server.asked == ["a", "b"]


def test_what_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeServer(stuck=None, fine=1)
    monkeypatch.setattr(submission, "connect", lambda _: server)
    assert job.main(["--address", "http://head:8265", "--timeout-s", "0.2"]) == EXIT_UNEXPECTED
    assert "still running after 0.2 s: stuck" in capsys.readouterr().err


def test_a_cluster_without_jobs_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "connect", lambda _: FakeServer())
    assert job.main(["--address", "http://head:8265"]) == 0


def test_a_server_that_is_gone_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()

    def gone() -> list[SimpleNamespace]:
        raise ConnectionError("refused")

    monkeypatch.setattr(server, "list_jobs", gone)
    with pytest.raises(ConfigError, match="the job server does not answer: refused"):
        module.drain(server, 1, lambda _: None)  # type: ignore[arg-type]


def test_without_an_address_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert job.main([]) == EXIT_CONFIG
    assert "--address must be" in capsys.readouterr().err
