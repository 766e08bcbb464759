"""Pool sizes, time and cost from measured seconds, with every figure worked out by hand."""

from types import SimpleNamespace

import pytest

from pipeline.config import LabelConfig
from pipeline.preflight.estimate import Interval, exact
from pipeline.preflight.propose import Node, cost_of, project, propose
from pipeline.preflight.rehearsal import Rehearsal

IMAGES = Interval(36_000.0, 30_000.0, 40_000.0)
LAPTOP = [Node(8.0)]


def config(**resources: object) -> LabelConfig:
    return LabelConfig.model_validate(
        {
            "source": {"format": "scenes"},
            "models": [{"name": "unet_small"}],
            "output": {"uri": "out"},
            "resources": resources,
        }
    )


def measured(*, model_s: float, pooled_s: float, wall_s: float) -> Rehearsal:
    """Of 100 images; seconds are of one image."""
    return Rehearsal(
        images=100, rows=100, failed=0, failures=(), wall_s=wall_s * 100,
        seconds={"read": 0.0, "decode": pooled_s * 60, "encode": pooled_s * 40, "predict": model_s * 100},
        row_bytes={"a": 1000.0, "b": 500.0}, peak_bytes=1, accelerator_bytes=None,
    )  # fmt: skip


def test_on_the_cpu_nodes_have_a_worker_each_and_what_was_measured_holds() -> None:
    done = measured(model_s=0.08, pooled_s=0.16, wall_s=0.125)
    nodes = [Node(8.0), Node(8.0), Node(4.0)]
    proposal, problems = propose(config(), nodes, done, 123_456)
    assert problems == []
    assert proposal.values == {"workers": 3, "layout": "fused", "batch_pixels": 123_456}
    assert list(proposal.reasons) == list(proposal.values)
    # The rehearsal on 8 cores came to 8 a second of the 10 that 0.08 + 0.16 / 8 allow; half the cores do half of it.
    found = project(proposal, nodes, done, IMAGES, 8)
    assert found.rate == pytest.approx(8 + 8 + 4)
    assert (found.workers, found.nodes, found.limit) == (3, 3, "model")
    assert found.hours.value == pytest.approx(36_000 / 20 / 3600)
    assert (found.hours.low, found.hours.high) == pytest.approx((30_000 / 72_000, 40_000 / 72_000))
    assert found.output_bytes.value == pytest.approx(36_000 * 1500)


def test_a_gpu_has_a_worker_with_threads_that_keep_up() -> None:
    done = measured(model_s=0.01, pooled_s=0.035, wall_s=0.01)
    nodes = [Node(32.0, 4.0)] * 2
    proposal, _ = propose(config(), nodes, done, None)
    assert proposal.values == {
        "workers": 8, "decode_threads": 5, "cpus_per_worker": 5.0, "gpus_per_worker": 1.0, "layout": "fused",
    }  # fmt: skip
    found = project(proposal, nodes, done, exact(8000.0), 8)
    assert (found.rate, found.limit) == (pytest.approx(800.0), "model")
    assert found.hours == exact(pytest.approx(10 / 3600))


def test_cores_that_cannot_keep_up_are_helped_by_other_nodes_or_are_the_limit() -> None:
    done = measured(model_s=0.01, pooled_s=0.16, wall_s=0.02)
    alone, _ = propose(config(), [Node(8.0, 1.0)], done, None)
    assert alone.values["layout"] == "fused"
    # Never all the cores: Ray's own tasks would wait for ever.
    assert alone.values["cpus_per_worker"] == 7.0
    found = project(alone, [Node(8.0, 1.0)], done, exact(500.0), 8)
    assert (found.rate, found.limit) == (pytest.approx(50.0), "cores")
    nodes = [Node(8.0, 1.0), Node(16.0), Node(16.0)]
    helped, _ = propose(config(), nodes, done, None)
    assert (helped.values["layout"], helped.values["readers"]) == ("split", 4)
    assert project(helped, nodes, done, exact(500.0), 8).rate == pytest.approx(100.0)


def test_what_the_config_fixes_stays() -> None:
    done = measured(model_s=0.01, pooled_s=0.02, wall_s=0.02)
    proposal, _ = propose(config(workers=2, gpus_per_worker=0.5), [Node(16.0, 2.0)] * 2, done, None)
    assert (proposal.values["workers"], proposal.values["gpus_per_worker"]) == (2, 0.5)


def test_a_node_without_what_a_worker_needs_is_a_problem() -> None:
    done = measured(model_s=0.01, pooled_s=0.02, wall_s=0.02)
    proposal, problems = propose(config(gpus_per_worker=2), [Node(8.0, 1.0)], done, None)
    assert (proposal.values, problems) == ({}, ["no node has 2 GPU for a worker"])


def test_every_proposal_is_a_valid_config() -> None:
    done = measured(model_s=0.01, pooled_s=0.16, wall_s=0.02)
    for nodes in (LAPTOP, [Node(1.0)], [Node(8.0, 1.0)], [Node(2.0, 2.0)], [Node(8.0, 1.0), Node(64.0)]):
        proposal, _ = propose(config(), nodes, done, 1)
        resources = config(**proposal.values).resources
        assert resources.cpus_per_worker <= max(1.0, nodes[0].cpus - 1)


def test_the_whole_cluster_costs_for_as_long_as_it_runs() -> None:
    done = measured(model_s=0.08, pooled_s=0.16, wall_s=0.125)
    nodes = [Node(8.0, 1.0), Node(4.0)]
    proposal, _ = propose(config(gpus_per_worker=0), nodes, done, None)
    found = project(proposal, nodes, done, IMAGES, 8)
    assert found.hours.value == pytest.approx(36_000 / 12 / 3600)
    prices = SimpleNamespace(currency="EUR", per_node_hour=1.0, per_gpu_hour=2.5, per_cpu_hour=0.125)
    cost = cost_of(SimpleNamespace(cost=prices), nodes, found)  # type: ignore[arg-type]
    assert cost is not None
    assert cost[1] == "EUR"
    assert cost[0].value == pytest.approx(found.hours.value * (2 + 2.5 + 1.5))
    assert cost_of(SimpleNamespace(), nodes, found) is None  # type: ignore[arg-type]
