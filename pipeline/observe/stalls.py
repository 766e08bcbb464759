"""Stall attribution: which share of the accelerators' time went where, and what more of would make the run faster.

The rule is described in docs/observability.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ADVICE", "BUSY_SHARE", "METRIC_STAGES", "Stalls", "attribute", "metric_seconds"]

# From this share on nothing but the accelerator itself is worth changing.
BUSY_SHARE = 0.8
# What a cause of waits.CAUSES is called once it limits a run.
BOUNDS = {
    "read": "reader",
    "decode": "decoder",
    "encode": "encoder",
    "write": "writer",
    "dispatch": "dispatch",
    "other": "host",
}
WAITED_FOR = {
    "reader": "bytes from the source",
    "decoder": "images to be decoded and prepared",
    "encoder": "labels to be encoded and scored",
    "writer": "files to be written",
    "dispatch": "units to be handed out",
    "host": "the worker's own Python",
}
ADVICE = {
    "accelerator": "more or faster accelerators, lower precision or a smaller model",
    "reader": "more units at once (resources.calls_per_worker), or workers nearer to the source",
    "decoder": "more resources.decode_threads, or CPUs of other nodes (resources.layout=split)",
    "encoder": "more resources.decode_threads, or output.format=zstd",
    "writer": "an output that is nearer, more units at once (resources.calls_per_worker), or larger files "
    "(output.rows_per_file)",
    "dispatch": "larger units of the source (fewer to hand out)",
    "host": "larger batches (resources.batch_pixels)",
}
SPLIT_ADVICE = {
    "reader": "more readers (resources.readers)",
    "decoder": "more readers (resources.readers), on more CPUs",
}
# Thread seconds of stages.work.STAGES as the metric shows them; `wait` is the accelerators'.
METRIC_STAGES = {
    "read": ("read",),
    "decode": ("decode", "prepare"),
    "predict": ("predict",),
    "encode": ("encode", "score"),
    "write": ("write",),
}


@dataclass(frozen=True, kw_only=True)
class Stalls:
    """Where the accelerators' time went.

    bound: accelerator, a value of BOUNDS, or `start-up` where they have not had anything to do. busy_share, waits:
    shares of the time from a worker's first unit to its last batch, by what it waited for; together 1.
    """

    bound: str
    busy_share: float
    waits: Mapping[str, float]
    sentence: str

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "bound": self.bound,
            "busy_share": round(self.busy_share, 4),
            "waits": {name: round(share, 4) for name, share in self.waits.items()},
            "sentence": self.sentence,
        }


def attribute(
    seconds: Mapping[str, float], waits: Mapping[str, float], *, layout: Literal["fused", "split"] = "fused"
) -> Stalls:
    """seconds: of threads, by stage (stages.work.STAGES). waits: of accelerators, by cause (stages.waits.CAUSES)."""
    busy = seconds.get("predict", 0.0)
    total = busy + sum(waits.values())
    if total <= 0:
        return Stalls(bound="start-up", busy_share=0.0, waits={}, sentence="the accelerator has had nothing to do yet")
    shares = {BOUNDS[cause]: value / total for cause, value in waits.items() if value > 0}
    if layout == "split":
        shares = _handed_on(shares, seconds)
    busy_share = busy / total
    largest = max(shares, key=lambda name: shares[name], default="accelerator")
    bound = "accelerator" if busy_share >= BUSY_SHARE else largest
    if bound == "accelerator":
        says = f"accelerator-bound: it was busy {busy_share:.0%} of the time: {ADVICE[bound]} would help"
    else:
        advice = SPLIT_ADVICE.get(bound, ADVICE[bound]) if layout == "split" else ADVICE[bound]
        says = (
            f"{bound}-bound: the accelerator was busy {busy_share:.0%} of the time and waited {shares[bound]:.0%} for "
            f"{WAITED_FOR[bound]}: {advice} would help"
        )
    return Stalls(bound=bound, busy_share=busy_share, waits=shares, sentence=says)


def _handed_on(shares: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """In the split layout what is handed out is prepared windows, so that a wait for them is one for those who read and
    decode: divided as their own time is."""
    reading = seconds.get("read", 0.0)
    decoding = seconds.get("decode", 0.0) + seconds.get("prepare", 0.0)
    waited = shares.get("dispatch", 0.0)
    if not waited or reading + decoding <= 0:
        return dict(shares)
    result = {name: share for name, share in shares.items() if name != "dispatch"}
    for name, part in (("reader", reading), ("decoder", decoding)):
        if part > 0:
            result[name] = result.get(name, 0.0) + waited * part / (reading + decoding)
    return result


def metric_seconds(seconds: Mapping[str, float], waits: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage as maskmill_stage_seconds_total has them."""
    folded = {name: sum(seconds.get(stage, 0.0) for stage in stages) for name, stages in METRIC_STAGES.items()}
    return {**folded, "wait": sum(waits.values())}
