"""What tests of observers share: metrics in memory, and a clock that is set."""

from collections import defaultdict

from pipeline.observe.metrics import METRICS


class Recorded:
    """Metrics in memory; each must be one of METRICS, with exactly its tags."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = defaultdict(float)

    def add(self, name: str, value: float, **tags: str) -> None:
        assert METRICS[name].kind == "counter"
        assert value >= 0
        assert tuple(tags) == METRICS[name].tags
        self.values[name, *tags.values()] += value

    def set(self, name: str, value: float, **tags: str) -> None:
        assert METRICS[name].kind == "gauge"
        assert tuple(tags) == METRICS[name].tags
        self.values[name, *tags.values()] = value


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now
