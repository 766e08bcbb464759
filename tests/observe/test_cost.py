"""Cost: exact sums of prices over time, whatever the cluster grows and shrinks to."""

import pytest

from pipeline.config import CostConfig
from pipeline.observe.cost import Bill, ClusterSize, CostMeter, money

NODES = CostConfig(per_node_hour=3.2)


class Cluster:
    def __init__(self, nodes: int = 1, gpus: float = 0, cpus: float = 0) -> None:
        self.size, self.looks = ClusterSize(nodes=nodes, gpus=gpus, cpus=cpus), 0

    def __call__(self) -> ClusterSize:
        self.looks += 1
        return self.size


@pytest.mark.parametrize(
    ("prices", "per_hour"),
    [
        ({"per_node_hour": 3.0}, 6.0),
        ({"per_gpu_hour": 2.5}, 20.0),
        ({"per_cpu_hour": 0.125}, 8.0),
        ({"per_node_hour": 3.0, "per_gpu_hour": 2.5, "per_cpu_hour": 0.125}, 34.0),
        ({}, 0.0),
    ],
)
def test_prices_are_added_up(prices: dict[str, float], per_hour: float) -> None:
    meter = CostMeter(CostConfig.model_validate(prices), Cluster(nodes=2, gpus=8, cpus=64))
    assert meter.so_far(500) == 0
    meter.sample(1000)
    assert meter.so_far(1000) == 0
    assert meter.so_far(1000 + 1800) == per_hour / 2
    assert meter.bill(2800, images=0, left=10, working_since_s=None).per_hour == per_hour


def test_a_cluster_that_changes() -> None:
    cluster = Cluster(nodes=1)
    meter = CostMeter(NODES, cluster)
    meter.sample(0)
    cluster.size = ClusterSize(nodes=3, gpus=0, cpus=0)
    meter.sample(5)
    assert cluster.looks == 1  # it was looked at a moment ago
    meter.sample(3600)
    meter.sample(5400)  # the same
    cluster.size = ClusterSize(nodes=0, gpus=0, cpus=0)
    meter.sample(7200)
    assert meter.so_far(3600) == pytest.approx(3.2)
    assert meter.so_far(5400) == pytest.approx(3.2 + 4.8)
    assert meter.so_far(7200) == pytest.approx(3.2 + 9.6)
    assert meter.so_far(99_999) == pytest.approx(3.2 + 9.6)
    assert meter.between(1800, 5400) == pytest.approx(1.6 + 4.8)
    assert meter.between(5400, 1800) == 0
    # Any cut of the time adds up to the whole.
    cuts = [0, 10, 3599, 3601, 5000, 7199, 8000]
    assert sum(map(meter.between, cuts, cuts[1:])) == pytest.approx(meter.so_far(8000))


def test_starting_up_is_paid_for_but_makes_the_rest_no_dearer() -> None:
    meter = CostMeter(CostConfig(currency="EUR", per_node_hour=36.0), Cluster())
    meter.sample(0)
    bill = meter.bill(300, images=500, left=1000, working_since_s=200)
    assert bill == Bill(currency="EUR", per_hour=36.0, so_far=3.0, per_1000_images=6.0, to_go=2.0)
    assert bill.short() == "3.00 EUR + 2.00 to go"
    assert bill.sentence() == "cost: 3.00 EUR so far, 6.00 per 1000 images, 2.00 to go"
    assert Bill(**bill.as_json()) == bill


def test_before_the_first_image_there_is_no_forecast() -> None:
    meter = CostMeter(NODES, Cluster())
    meter.sample(0)
    bill = meter.bill(450, images=0, left=1000, working_since_s=None)
    assert (bill.so_far, bill.per_1000_images, bill.to_go) == (pytest.approx(0.4), None, None)
    assert bill.short() == "0.400 USD"
    assert bill.sentence() == "cost: 0.400 USD so far"
    assert meter.bill(450, images=10, left=0, working_since_s=0).sentence() == (
        "cost: 0.400 USD so far, 40.00 per 1000 images"
    )


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0.00"), (1234.567, "1234.57"), (1, "1.00"), (0.5, "0.500"), (0.0123456, "0.0123"), (1.2e-5, "0.0000120")],
)
def test_money(amount: float, text: str) -> None:
    assert money(amount) == text


@pytest.mark.parametrize("wrong", [{"per_node_hour": -1}, {"per_hour": 3}, {"currency": ""}])
def test_wrong_prices_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CostConfig.model_validate(wrong)
