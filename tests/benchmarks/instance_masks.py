"""Time and memory of turning a detector's masks into run lengths, over torchvision's pasting of all of them at once.

    python tests/benchmarks/instance_masks.py --masks 100 --size 1920x1080

Both get the same 28x28 probabilities in the same boxes, and give the same run lengths, which is checked. Ours pastes
one mask after the other into one canvas (pipeline/stages/encode.py); torchvision's `paste_masks_in_image` makes a float
map of the image's size for each. Each way runs in processes of its own, alternately. The peak is the growth of the
process's largest resident set beyond what it was before, which counts numpy's and torch's memory alike; tracemalloc's,
which sees numpy's and Python's alone, stands beside it, and is measured in a run of its own, since it slows both.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def instances(count: int, width: int, height: int) -> Any:
    """Smooth blobs, as a mask head gives them, in boxes of a tenth to a half of the image's sides."""
    import numpy as np
    import torch

    from pipeline.models.spec import Instances

    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((count, 1, 5, 5), np.float32))
    size_N2 = rng.uniform(0.1, 0.5, (count, 2)) * [width, height]
    corner_N2 = rng.random((count, 2)) * ([width, height] - size_N2)
    return Instances(
        boxes_N4=np.concatenate([corner_N2, corner_N2 + size_N2], axis=1).astype(np.float32),
        scores_N=np.linspace(1, 0.5, count, dtype=np.float32),
        category_ids_N=np.ones(count, np.int64),
        masks_NMM=torch.nn.functional.interpolate(coarse, (28, 28), mode="bilinear")[:, 0].numpy(),
    )


def ours(found: Any, width: int, height: int) -> list[str]:
    from pipeline.stages.encode import encode_instances

    return [segment["rle"] for segment in encode_instances(found, width=width, height=height)]


def torchvisions(found: Any, width: int, height: int) -> list[str]:
    import torch
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    from pipeline.masks import encode_rle

    masks_N1MM = torch.from_numpy(found.masks_NMM)[:, None]
    pasted_N1HW = paste_masks_in_image(masks_N1MM, torch.from_numpy(found.boxes_N4), (height, width))
    return [encode_rle((mask_1HW[0] > 0.5).numpy()) for mask_1HW in pasted_N1HW if bool((mask_1HW > 0.5).any())]


WAYS: dict[str, Callable[[Any, int, int], list[str]]] = {"ours": ours, "torchvision": torchvisions}


def resident_bytes() -> int:
    """The largest resident set so far; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, count: int, width: int, height: int, *, traced: bool) -> dict[str, Any]:
    """In this process: seconds, peaks in bytes, and the run lengths."""
    import torch

    torch.set_num_threads(1)
    found = instances(count, width, height)
    WAYS[way](instances(2, 64, 48), 64, 48)
    before = resident_bytes()
    if traced:
        tracemalloc.start()
    started = time.perf_counter()
    rles = WAYS[way](found, width, height)
    seconds = time.perf_counter() - started
    heap = tracemalloc.get_traced_memory()[1] if traced else 0
    return {"seconds": seconds, "resident": resident_bytes() - before, "traced": heap, "rles": rles}


def in_subprocess(way: str, arguments: argparse.Namespace, *, traced: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--masks", str(arguments.masks), "--size", arguments.size]
    done = subprocess.run(
        [*command, *(["--traced"] if traced else [])], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=100)
    parser.add_argument("--size", default="1920x1080", help="width and height of the image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process and print JSON")
    parser.add_argument("--traced", action="store_true")
    arguments = parser.parse_args(argv)
    width, height = (int(side) for side in arguments.size.split("x"))
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.masks, width, height, traced=arguments.traced)))
        return 0
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, results in runs.items():
            results.append(in_subprocess(way, arguments, traced=False))
    first, *others = [run["rles"] for results in runs.values() for run in results]
    if any(rles != first for rles in others):
        raise SystemExit("the two ways give different masks")
    print(f"{len(first)} masks of {arguments.size}, {arguments.rounds} rounds, medians")
    seconds = {way: statistics.median(run["seconds"] for run in results) for way, results in runs.items()}
    for way, results in runs.items():
        resident = statistics.median(run["resident"] for run in results)
        traced = in_subprocess(way, arguments, traced=True)["traced"]
        print(
            f"{way:12} {1000 * seconds[way]:8.1f} ms   peak {resident / 1e6:7.1f} MB resident beyond the start, "
            f"{traced / 1e6:6.1f} MB of it numpy's and Python's"
        )
    print(f"torchvision / ours: {seconds['torchvision'] / seconds['ours']:.1f} times the time")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    raise SystemExit(main())
