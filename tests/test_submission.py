"""What `maskmill submit` sends, and what it refuses before anything is sent. The cluster's side: tests/ray."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from jobs.submit import main
from pipeline.config import LabelConfig
from pipeline.configfile import load_config
from pipeline.dataflow import submission
from pipeline.dataflow.submission import Submission, travelling
from pipeline.errors import ConfigError

SCENES = ("source.format=scenes", "models.0.name=unet_small", "output.uri=s3://bucket/labels")
# Nobody listens there: what is wrong has to be said before.
NOWHERE = ("--address", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("label", *SCENES, "output.uri=out/labels"), "output.uri must be a URI or an absolute path"),
        (("label", *SCENES, "models.0.nmae=unet_small"), "did you mean name"),
        (("label", "missing.yaml"), "missing.yaml does not exist"),
        (("labels",), "expected one of the jobs label, train"),
        (("label", *SCENES, "--extra", "h"), "maskmill has no extra 'h'; it has"),
        (("label", *SCENES, "--env", "NAME"), "--env: expected NAME=VALUE"),
        (("label", *SCENES, "--status", "x"), "expected a job to submit or one to look at"),
        (("label", *SCENES, "--working-dir", "/nowhere"), "expected a folder to send along"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *NOWHERE]) in (2, 4)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_without_an_address_or_a_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert main(["label", *SCENES]) == 2
    assert "--address must be" in capsys.readouterr().err
    assert main(["label", *SCENES, "--address", "http://user:PASSWORD@127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "no Ray job server at http://user:***@127.0.0.1:9" in error
    assert "PASSWORD" not in error


class Client:
    """Keeps what a job server would be given. members: of the package that Ray would upload."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.members: dict[str, bytes] = {}

    def submit_job(self, **given: Any) -> str:
        self.given = given
        folder = Path(given["runtime_env"]["working_dir"])
        package = folder.with_suffix(".zip")
        create_package(str(folder), package, include_gitignore=False)
        with zipfile.ZipFile(package) as archive:
            self.members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
        package.unlink()
        return "id"


def test_the_config_travels_resolved_and_the_metadata_hold_no_credential(tmp_path: Path) -> None:
    """The credentials of a config are in its file, which the job needs, and nowhere else."""
    config = load_config(LabelConfig, None, [*SCENES, "output.storage={key: KEYKEYKEY, secret: SECRETSECRET}"])
    client = Client()
    assert submission.send(client, Submission(job="label", config=config, environment={"A": "b c"})) == "id"  # type: ignore[arg-type]
    assert client.given["entrypoint"] == "python -m jobs.label maskmill_job.yaml"
    assert client.given["runtime_env"]["env_vars"] == {"A": "b c"}
    shown = json.dumps(client.given, default=str)
    assert "SECRETSECRET" not in shown
    assert LabelConfig.model_validate(yaml.safe_load(client.members["maskmill_job.yaml"])) == config
    names = {Path(place).name for place in client.given["runtime_env"]["py_modules"]}
    assert names == {"pipeline", "jobs"}


@pytest.mark.parametrize(
    "given",
    [
        {"arguments": ("s3://b/x", "storage.secret=abc")},
        {"arguments": ("s3://b/x", "source.storage.client_kwargs.aws_session_token=abc")},
        {"arguments": ("https://user:PASSWORD@host/x",)},
        {"environment": {"AWS_SECRET_ACCESS_KEY": "abc"}},
        {"environment": {"PROXY": "http://user:PASSWORD@host:8080"}},
        {"requirements": ("--extra-index-url=https://user:PASSWORD@host/simple",)},
    ],
)
def test_credentials_are_kept_out_of_the_metadata(given: dict[str, Any]) -> None:
    client = Client()
    with pytest.raises(ConfigError, match="holds a credential") as caught:
        submission.send(client, Submission(job="status", **given))  # type: ignore[arg-type]
    assert client.given == {}
    assert "PASSWORD" not in str(caught.value)


def test_a_working_directory_leaves_hidden_files_and_keys_at_home(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    for name in ("my.py", "sub/models.py", "sub/deep/space.yaml", ".env", "sub/.aws/credentials", "sub/id_rsa", "a.PEM",
                 "__pycache__/x.pyc", ".git/config"):  # fmt: skip
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(name)
    (folder / "again.py").symlink_to(folder / "my.py")
    (folder / "loop").symlink_to(folder)
    sent, kept = travelling(folder)
    assert sorted(map(str, sent)) == ["again.py", "my.py", "sub/deep/space.yaml", "sub/models.py"]
    assert sorted(map(str, kept)) == [".env", ".git", "a.PEM", "loop", "sub/.aws", "sub/id_rsa"]
    client = Client()
    submission.send(client, Submission(job="models", working_dir=folder))  # type: ignore[arg-type]
    assert client.members == {
        "again.py": b"my.py", "my.py": b"my.py", "sub/deep/space.yaml": b"sub/deep/space.yaml",
        "sub/models.py": b"sub/models.py",
    }  # fmt: skip


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "data").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="is a link out of the folder"):
        travelling(folder)


def test_a_file_of_the_configs_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "maskmill_job.yaml").write_text("x")
    config = load_config(LabelConfig, None, SCENES)
    with pytest.raises(ConfigError, match="is maskmill's own"):
        submission.send(Client(), Submission(job="label", config=config, working_dir=tmp_path))  # type: ignore[arg-type]
