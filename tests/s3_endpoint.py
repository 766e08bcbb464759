"""An S3 server on this machine: what the `s3` fixture gives, and programs use."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

__all__ = ["S3", "serve"]


@dataclass(frozen=True)
class S3:
    """A moto server. options: as s3fs takes them. requests: what it has answered so far, one line each."""

    options: dict[str, Any]
    client: Any
    log: Path

    def requests(self) -> list[str]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        return [line for line in text.splitlines() if " HTTP/1." in line]

    def bucket(self, name: str) -> str:
        self.client.create_bucket(Bucket=name)
        return name


@contextlib.contextmanager
def serve(log: Path) -> Iterator[S3]:
    """A moto server while the context lasts. log: where its words go. Raises RuntimeError where it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
                raise RuntimeError(f"moto server ended: {log.read_text()[-2000:]}")
            try:
                client.list_buckets()
                break
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
        else:
            raise RuntimeError("moto server did not answer")
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
