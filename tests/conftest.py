"""What several tests need: the shared data, and an S3 endpoint on this machine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from hypothesis import settings
from s3_endpoint import S3

REPOSITORY = Path(__file__).resolve().parent.parent

# How long an example takes says more about the machine than about the code.
settings.register_profile("maskmill", deadline=None)
settings.load_profile("maskmill")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the evaluation data: `$MASKMILL_SHARED` or `$MASKMILL_SHARED/data`, else `../shared/data`."""
    given = os.environ.get("MASKMILL_SHARED")
    root = Path(given) if given else REPOSITORY.parent / "shared"
    for folder in (root / "data", root):
        if (folder / "coco128").is_dir():
            return folder
    pytest.skip(f"the evaluation data is not in {root} (set MASKMILL_SHARED)")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    pytest.importorskip("moto", reason="moto[server] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "requests.log"
    endpoint = f"http://127.0.0.1:{port}"
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
            config=Config(proxies={}, connect_timeout=2, retries={"max_attempts": 0}),
        )
        for _ in range(150):
            if server.poll() is not None:
                pytest.fail(f"moto server ended: {log.read_text()[-2000:]}")
            try:
                client.list_buckets()
                break
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
        else:
            pytest.fail("moto server did not answer")
        yield S3(
            options={
                "key": "test",
                "secret": "test",
                "endpoint_url": endpoint,
                "client_kwargs": {"region_name": "us-east-1"},
            },
            client=client,
            log=log,
        )
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
