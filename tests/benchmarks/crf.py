"""How fast the dense CRF is, against the authors' C++ (extra crf) in the same run, on one core.

    python tests/benchmarks/crf.py [--size 512] [--classes 21] [--iterations 5] [--repeats 3] [--threads 1]

The image is a generated scene, the logits are smooth noise. Prints the median time of both, their ratio, and how far
the results are apart. `lattice`: the part that finds the lattice, which does not depend on classes and iterations.
"""

import argparse
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pipeline.config import CrfStage, ScenesSource
from pipeline.sources.base import Sample
from pipeline.sources.registry import open_source
from pipeline.stages.crf import bilateral_features, crf, gaussian_features
from pipeline.stages.permutohedral import Lattice


def scene(size: int) -> Tensor:
    source = open_source(ScenesSource(format="scenes", count=1, width=size, height=size, targets=()))
    (unit,) = source.plan()
    (sample,) = (item for item in source.read(unit, ()) if isinstance(item, Sample))
    image_HWC = np.array(Image.open(io.BytesIO(sample.image)).convert("RGB"))
    return torch.from_numpy(image_HWC).permute(2, 0, 1).contiguous()


def median_s(work: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 512), ("classes", 21), ("iterations", 5), ("repeats", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    image = scene(given.size)
    coarse = torch.randn(1, given.classes, given.size // 8, given.size // 8, generator=torch.Generator().manual_seed(0))
    logits = 3 * functional.interpolate(coarse, size=image.shape[1:], mode="bilinear")[0]
    stages = {name: CrfStage(kind="crf", iterations=given.iterations, backend=name) for name in ("torch", "pydensecrf")}

    def lattices() -> None:
        Lattice(gaussian_features(given.size, given.size, stages["torch"].gaussian_sdims, image.device))
        Lattice(bilateral_features(image, stages["torch"].bilateral_sdims, stages["torch"].bilateral_schan))

    print(f"{given.size}x{given.size}, {given.classes} classes, {given.iterations} iterations, {given.threads} threads")
    ours = crf(logits, image, stages["torch"])
    ours_s = median_s(lambda: crf(logits, image, stages["torch"]), given.repeats)
    print(f"torch       {ours_s:6.2f} s, of which lattice {median_s(lattices, given.repeats):.2f} s")
    if importlib.util.find_spec("pydensecrf") is None:
        print("pydensecrf2 is not installed (extra crf): nothing to compare with")
        return
    theirs = crf(logits, image, stages["pydensecrf"])
    theirs_s = median_s(lambda: crf(logits, image, stages["pydensecrf"]), given.repeats)
    same = (ours.argmax(0) == theirs.argmax(0)).float().mean().item()
    apart = (ours.exp() - theirs.exp()).abs()
    print(f"pydensecrf  {theirs_s:6.2f} s on one core; torch / pydensecrf = {ours_s / theirs_s:.2f}")
    print(f"same label at {same:.6f} of the pixels; probabilities {apart.mean():.1e} apart, at most {apart.max():.1e}")


if __name__ == "__main__":
    main()
