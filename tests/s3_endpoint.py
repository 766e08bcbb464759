"""What the `s3` fixture gives."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
