"""A Chromium for the page's tests, and tables as the viewer meets them."""

from collections.abc import Iterator

import pytest
from browser import Browser, find_chromium, open_browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("there is no chromium on this machine")
    with open_browser(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened
