"""What several tests need: the shared data, and an S3 endpoint on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from s3_endpoint import S3, serve

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
    with serve(tmp_path_factory.mktemp("s3") / "requests.log") as endpoint:
        yield endpoint
