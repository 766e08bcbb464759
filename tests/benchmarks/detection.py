"""AP over coco_ap repeated 50 times: our seconds against COCOeval's and faster-coco-eval's, in one run.

    python tests/benchmarks/detection.py [repetitions]

Each is given the parsed JSON. `whole` is everything from there to the 12 figures; `evaluate` leaves out what COCO and
loadRes do (ours has no such step). faster-coco-eval is measured where it is installed; it is no dependency.
"""

import contextlib
import copy
import importlib
import io
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "metrics")]

from detection_oracle import our_states  # noqa: E402

from pipeline.metrics.detection import Detection  # noqa: E402

Json = dict[str, Any]
OTHERS = (
    # Name, module and class of the annotations, module and class of the evaluation, runs of which the best counts.
    ("pycocotools", "pycocotools.coco", "COCO", "pycocotools.cocoeval", "COCOeval", 1),
    ("faster-coco-eval", "faster_coco_eval", "COCO", "faster_coco_eval", "COCOeval_faster", 3),
)


def repeat(targets: Json, results: list[Json], times: int) -> tuple[Json, list[Json]]:
    """The same images under other ids, in the order of the ids."""
    step = 10 ** len(str(max(image["id"] for image in targets["images"])))
    images, annotations, more = [], [], []
    for number in range(times):
        shift = number * step
        images += [{**image, "id": image["id"] + shift} for image in targets["images"]]
        first = len(annotations) + 1
        annotations += [
            {**item, "image_id": item["image_id"] + shift, "id": first + place}
            for place, item in enumerate(targets["annotations"])
        ]
        more += [{**item, "image_id": item["image_id"] + shift} for item in results]
    return {**targets, "images": images, "annotations": annotations}, more


def time_official(dataset: Any, evaluator: Any, targets: Json, results: list[Json], kind: str) -> tuple[Any, ...]:
    targets, results = copy.deepcopy(targets), copy.deepcopy(results)
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        coco = dataset()
        coco.dataset = targets
        coco.createIndex()
        evaluation = evaluator(coco, coco.loadRes(results), kind)
        loaded = time.perf_counter()
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        end = time.perf_counter()
    return end - start, end - loaded, np.asarray(evaluation.stats)[:12]


def time_ours(targets: Json, results: list[Json], kind: str) -> tuple[Any, ...]:
    start = time.perf_counter()
    states = our_states(targets, results, kind)  # type: ignore[arg-type]
    matched = time.perf_counter()
    figures = Detection.empty().merge(*states).compute().figures()
    end = time.perf_counter()
    print(f"  ours: match {matched - start:.3f} s, merge and accumulate {end - matched:.3f} s")
    return end - start, end - start, np.array([*figures.values()])


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    root = Path(os.environ.get("MASKMILL_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    folder = next(path for path in (root / "data" / "coco_ap", root / "coco_ap") if path.is_dir())
    targets = json.loads((folder / "instances_val2014_100.json").read_text())
    print(
        f"{datetime.now(UTC):%Y-%m-%d} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    for kind in ("bbox", "segm"):
        results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
        case = repeat(targets, results, times)
        print(f"{kind}: {len(case[0]['images'])} images, {len(case[1])} predictions")
        ours = min((time_ours(*case, kind) for _ in range(3)), key=lambda run: run[0])
        for name, data_module, data_class, module, evaluation, rounds in OTHERS:
            with contextlib.suppress(ImportError):
                dataset = getattr(importlib.import_module(data_module), data_class)
                evaluator = getattr(importlib.import_module(module), evaluation)
                runs = [time_official(dataset, evaluator, *case, kind) for _ in range(rounds)]
                whole, evaluate, stats = min(runs, key=lambda run: run[1])
                print(
                    f"  {name}: whole {whole:.3f} s, evaluate {evaluate:.3f} s; ours {ours[0]:.3f} s: "
                    f"{whole / ours[0]:.2f} and {evaluate / ours[0]:.2f} times as long; "
                    f"largest difference {np.abs(stats - ours[2]).max():.1e}"
                )


if __name__ == "__main__":
    main()
