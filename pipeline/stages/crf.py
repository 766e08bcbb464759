"""The fully connected CRF: labels that agree with the image's edges, by mean field (Krähenbühl & Koltun 2011).

arXiv:1210.5644. A pixel's label is drawn towards that of pixels nearby, and of pixels nearby with a similar colour, by
two Gaussian kernels and Potts compatibility. Kernels are normalised symmetrically and count a pixel itself, as in the
authors' C++ (`pydensecrf`).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config import CrfStage
from pipeline.models.extras import import_extra
from pipeline.stages.permutohedral import Lattice

__all__ = ["bilateral_features", "crf", "gaussian_features", "mean_field"]

Filter = Callable[[Tensor], Tensor]


def crf(logits_KHW: Tensor, image_CHW: Tensor, stage: CrfStage) -> Tensor:
    """Class logits (float32) and their image (3 channels, uint8) -> log-probabilities_KHW after the CRF.

    Raises ConfigError where `backend: pydensecrf` is not installed.
    """
    log_KHW = torch.log_softmax(logits_KHW, 0)
    if stage.backend == "pydensecrf":
        return _pydensecrf(log_KHW, image_CHW, stage)
    height, width = log_KHW.shape[1:]
    device = log_KHW.device
    kernels: list[tuple[float, Filter]] = []
    if stage.gaussian_compat:
        lattice = Lattice(gaussian_features(height, width, stage.gaussian_sdims, device))
        kernels.append((stage.gaussian_compat, lattice.filter))
    if stage.bilateral_compat:
        features_N5 = bilateral_features(image_CHW.to(device), stage.bilateral_sdims, stage.bilateral_schan)
        kernels.append((stage.bilateral_compat, Lattice(features_N5).filter))
    log_NK = log_KHW.flatten(1).T.contiguous()
    return mean_field(log_NK, kernels, stage.iterations).T.reshape(log_KHW.shape)


def mean_field(log_NK: Tensor, kernels: Sequence[tuple[float, Filter]], iterations: int) -> Tensor:
    """Log-probabilities of each pixel alone -> those after `iterations` of mean field under Potts compatibility.

    kernels: (weight, filter): what sums probabilities_NK over all pixels by the kernel. (Algorithm 1 of the paper.)
    """
    refined_NK = log_NK
    for _ in range(iterations):
        probability_NK = refined_NK.exp()
        # Potts charges for every other label, which is, up to a constant, a reward for the same.
        message_NK = log_NK.clone()
        for weight, filtered in kernels:
            message_NK.add_(filtered(probability_NK), alpha=weight)
        refined_NK = torch.log_softmax(message_NK, 1)
    return refined_NK


def gaussian_features(height: int, width: int, sdims: float, device: torch.device) -> Tensor:
    """(N, 2): x and y of every pixel, row by row, in deviations of `sdims` pixels."""
    y_H, x_W = (torch.arange(side, dtype=torch.float32, device=device) / sdims for side in (height, width))
    return torch.stack([x_W.expand(height, width), y_H[:, None].expand(height, width)], -1).view(-1, 2)


def bilateral_features(image_CHW: Tensor, sdims: float, schan: float) -> Tensor:
    """(N, 5): place in deviations of `sdims` pixels, and colour in deviations of `schan` of 256 levels."""
    height, width = image_CHW.shape[1:]
    colour_N3 = image_CHW.flatten(1).T.float() / schan
    return torch.cat([gaussian_features(height, width, sdims, image_CHW.device), colour_N3], 1)


def _pydensecrf(log_KHW: Tensor, image_CHW: Tensor, stage: CrfStage) -> Tensor:
    densecrf = import_extra("pydensecrf.densecrf", "crf")
    classes, height, width = log_KHW.shape
    model = densecrf.DenseCRF2D(width, height, classes)
    model.setUnaryEnergy(np.ascontiguousarray(-log_KHW.flatten(1).cpu().numpy()))
    if stage.gaussian_compat:
        model.addPairwiseGaussian(sxy=stage.gaussian_sdims, compat=stage.gaussian_compat)
    if stage.bilateral_compat:
        image_HWC = np.ascontiguousarray(image_CHW.permute(1, 2, 0).cpu().numpy())
        model.addPairwiseBilateral(
            sxy=stage.bilateral_sdims, srgb=stage.bilateral_schan, rgbim=image_HWC, compat=stage.bilateral_compat
        )
    probability_KN = torch.from_numpy(np.array(model.inference(stage.iterations), np.float32))
    return probability_KN.clamp_(min=torch.finfo(torch.float32).tiny).log_().view(log_KHW.shape).to(log_KHW.device)
