"""Every mask of an image: our generator's images per second against transformers' pipeline("mask-generation").

    python tests/benchmarks/mask_generator.py [--images 4] [--points 32] [--threads 1]

A shrunken SAM with random weights on scenes of 640x480, on the CPU. Of random weights no threshold is right, so both
are set where they let through about as many as a trained SAM's: a third of the masks by predicted IoU, half of those
that are not empty by stability. Both sides alternate, the medians are compared, and their masks are held against
each other.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image
from transformers import SamImageProcessor
from transformers.pipelines import MaskGenerationPipeline

from pipeline.masks import decode_rle
from pipeline.models.spec import Preprocess
from pipeline.models.zoo.mask_generator import GridOptions, generate
from pipeline.models.zoo.sam import Sam, build_sam
from pipeline.sources.scenes import render_scene
from pipeline.stages.prepare import prepare

SIDE, WIDTH, HEIGHT = 512, 640, 480
PREPROCESS = Preprocess(resize=SIDE, max_size=SIDE, pad_multiple=SIDE)


def random_sam(seed: int) -> Sam:
    """ViT-B's shape at a quarter of its width and a third of its depth, with weights that tell points apart."""
    torch.manual_seed(seed)
    sam = build_sam(
        1, hidden_size=192, layers=4, heads=3, global_layers=[1, 3], image_size=SIDE, prompt_size=64, decoder_mlp=512
    )
    for parameter in sam.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    # The authors' deviation of the points' encoding; transformers' makes neighbours have nothing in common.
    for name, parameter in sam.named_parameters():
        if name.endswith("positional_embedding"):
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(seed))
    # Random upscaling makes a checkerboard in every mask, of many more runs than real masks have.
    with torch.no_grad():
        for layer in (sam.model.mask_decoder.upscale_conv1, sam.model.mask_decoder.upscale_conv2):
            layer.weight.copy_(2 * layer.weight.mean((2, 3), keepdim=True).expand_as(layer.weight))
    return sam.eval()


def batch_of(images: list[np.ndarray[Any, Any]]) -> tuple[torch.Tensor, list[Any]]:
    prepared = [prepare(image_HWC, PREPROCESS) for image_HWC in images]
    batch_BCHW = torch.zeros(len(images), 3, SIDE, SIDE)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (PREPROCESS.mean, PREPROCESS.std))
    for target_CHW, item in zip(batch_BCHW, prepared, strict=True):
        part_CHW = (item.image_CHW.float() - mean) / std
        target_CHW[:, : part_CHW.shape[1], : part_CHW.shape[2]] = part_CHW
    return batch_BCHW, [item.frame for item in prepared]


def grid_answers(sam: Sam, images: list[np.ndarray[Any, Any]], points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits_NMM and scores_N of the first image, from its grid."""
    batch_BCHW, frames = batch_of(images[:1])
    with torch.inference_mode():
        (embedding,) = sam.embed(batch_BCHW)
        middles = (torch.arange(points) + 0.5) / points
        y, x = torch.meshgrid(middles * frames[0].prepared_height, middles * frames[0].prepared_width, indexing="ij")
        points_P12 = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)
        labels_P1 = torch.ones(len(points_P12), 1, dtype=torch.int64)
        logits, scores = sam.decode(embedding, points_PK2=points_P12, labels_PK=labels_P1, several=True)
    return logits.flatten(0, 1), scores.flatten()


def calibrate(sam: Sam, images: list[np.ndarray[Any, Any]], share: float) -> None:
    """Shift the logits so that `share` of the pixels are inside, by way of one channel of the upscaled embedding that
    becomes a constant. And raise the predicted IoU: the pipeline takes a threshold of 0 or less for none at all."""
    decoder = sam.model.mask_decoder
    with torch.no_grad():
        decoder.upscale_conv2.weight[:, 0] = 0
        decoder.upscale_conv2.bias[0] = 10  # where GELU is the identity
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight[0] = 0
            mlp.proj_out.bias[0] = 0
        logits = grid_answers(sam, images, 8)[0].unflatten(0, (-1, 3))
        for token, mlp in enumerate(decoder.output_hypernetworks_mlps[1:]):
            mlp.proj_out.bias[0] = -logits[:, token].flatten()[::37].quantile(1 - share) / 10
        decoder.iou_prediction_head.proj_out.bias += 100


def thresholds(sam: Sam, images: list[np.ndarray[Any, Any]], points: int) -> tuple[float, float, float]:
    """Predicted IoU that a third of the masks pass, stability that half of those do, and an offset for it."""
    logits_NMM, scores_N = grid_answers(sam, images, points)
    iou = float(scores_N.quantile(2 / 3))
    chosen_NMM = logits_NMM[scores_N > iou]
    offset = 0.1 * float(chosen_NMM.std())
    stability = (chosen_NMM > offset).sum((1, 2)) / (chosen_NMM > -offset).sum((1, 2)).clamp(min=1)
    return iou, float(stability[stability > 0].quantile(0.5)), offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--points", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nms", type=float, default=0.95, help="random masks are alike: 0.7 would leave one or two")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    sam = random_sam(options.seed)
    images = [render_scene(index, width=WIDTH, height=HEIGHT).image_HWC for index in range(options.images)]
    calibrate(sam, images, 0.25)
    iou, stability, offset = thresholds(sam, images, options.points)
    grid = GridOptions(
        points_per_side=options.points,
        pred_iou_thresh=iou,
        stability_score_thresh=stability,
        stability_score_offset=offset,
        box_nms_thresh=options.nms,
    )
    processor = SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    pipeline = MaskGenerationPipeline(model=sam.model, image_processor=processor, device="cpu")
    pictures = [Image.fromarray(image_HWC) for image_HWC in images]

    def ours() -> list[Any]:
        with torch.inference_mode():
            return generate(sam, *batch_of(images), grid)

    def theirs() -> list[Any]:
        found: list[Any] = pipeline(
            pictures,
            points_per_crop=options.points,
            points_per_batch=grid.points_per_batch,
            pred_iou_thresh=iou,
            stability_score_thresh=stability,
            stability_score_offset=offset,
            crops_nms_thresh=options.nms,
        )
        return found

    seconds: dict[str, list[float]] = {"ours": [], "pipeline": []}
    cpu_seconds: dict[str, list[float]] = {"ours": [], "pipeline": []}
    results: dict[str, list[Any]] = {}
    for _ in range(options.repeats):
        for name, call in (("ours", ours), ("pipeline", theirs)):
            started, busy = time.perf_counter(), time.process_time()
            results[name] = call()
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name].append(time.process_time() - busy)

    counts, runs, differing = [], [], 0
    for mine, other in zip(results["ours"], results["pipeline"], strict=True):
        text, ends = mine["runs"].numpy().tobytes().decode(), mine["lengths"].cumsum(0).tolist()
        rles = [text[end - length : end] for end, length in zip(ends, mine["lengths"].tolist(), strict=True)]
        counts.append((len(rles), len(other["masks"])))
        runs += [len(rle) / 1.5 for rle in rles]
        for rle, mask in zip(rles, other["masks"], strict=False):
            differing += int((decode_rle(rle, width=WIDTH, height=HEIGHT) != np.asarray(mask)).sum())
    rates = {name: options.images / statistics.median(values) for name, values in seconds.items()}
    parameters = sum(parameter.numel() for parameter in sam.parameters()) / 1e6
    print(f"{datetime.now(UTC):%Y-%m-%d} {platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s)")
    print(f"SAM of {parameters:.1f} M parameters at {SIDE}, {options.images} images of {WIDTH}x{HEIGHT}, ", end="")
    print(f"{options.points}x{options.points} points = {3 * options.points**2} masks each")
    print(
        f"masks kept (ours, pipeline): {counts}; pixels that differ: {differing}; about {np.mean(runs):.0f} runs each"
    )
    for name, rate in rates.items():
        walls = ", ".join(f"{value:.1f}" for value in seconds[name])
        print(f"{name:>8}: {rate:.4f} images/s ({walls} s; CPU {statistics.median(cpu_seconds[name]):.1f} s)")
    cpu_ratio = statistics.median(cpu_seconds["pipeline"]) / statistics.median(cpu_seconds["ours"])
    print(f"   ratio: {rates['ours'] / rates['pipeline']:.2f} of images/s, {cpu_ratio:.2f} of CPU seconds")


if __name__ == "__main__":
    main()
