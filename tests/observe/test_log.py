"""The structured log: one JSON object a line, no credential in it, and a log that fails is no reason to stop."""

import io
import json
import logging
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.observe.log import EventLog, open_log
from pipeline.redaction import remember


def test_lines(tmp_path: Path) -> None:
    log = open_log(str(tmp_path / "run.jsonl"))
    assert log
    log.run_id = "r1"
    log.write("failed_row", "error", shard_id="a.tar", image_id="a.tar/ü\n\u2028", stage=None, attempts=2)
    log.write("commit", rows=3, level="a field of that name")
    open_log(str(tmp_path / "run.jsonl")).write("run_running")  # appends
    lines = (tmp_path / "run.jsonl").read_text("utf-8").split("\n")
    assert lines.pop() == ""
    first, second, third = map(json.loads, lines)
    assert list(first)[:4] == ["time", "level", "event", "run_id"]
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "error", "event": "failed_row", "run_id": "r1", "shard_id": "a.tar", "image_id": "a.tar/ü\n\u2028",
        "attempts": 2,
    }  # fmt: skip
    assert (second["event"], second["rows"]) == ("commit", 3)
    assert third["event"] == "run_running"


def test_no_credential_gets_in() -> None:
    remember({"secret": "wJalrXUtnFEMI-K7MDENG"})
    file = io.StringIO()
    log = EventLog(file, run_id="r")
    log.write("retry", message="GET https://u:pass@h/x?X-Amz-Signature=abcdef01 said wJalrXUtnFEMI-K7MDENG")
    log.write("retry", nested={"list": ["s3://k:wJalrXUtnFEMI-K7MDENG@b"]}, image_id="wJalrXUtnFEMI-K7MDENG")
    for secret in ("wJalr", "abcdef01", ":pass@"):
        assert secret not in file.getvalue()
    assert all(json.loads(line) for line in file.getvalue().splitlines())


def test_without_a_path_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(None)
    assert not log
    log.write("commit")
    open_log("-").write("commit")
    assert json.loads(capsys.readouterr().out)["event"] == "commit"


def test_a_path_that_cannot_be_written_is_a_wrong_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.path .*nowhere"):
        open_log(str(tmp_path / "nowhere" / "run.jsonl"))


def test_a_full_disk_ends_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    log = EventLog(Full(), run_id="r")
    with caplog.at_level(logging.WARNING):
        log.write("commit")
        log.write("commit")
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert not log
