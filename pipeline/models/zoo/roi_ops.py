"""Features of regions, cut to one size: RoIAlign and RoIPool (torchvision's) and RoIWarp (ours), from one map or from
the levels of a pyramid.

Axes: B images, N regions, C channels, H rows, W columns, P rows and columns of a region's features.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align, roi_pool

__all__ = ["ROI_KINDS", "RoIFeatures", "RoIKind", "roi_warp"]

RoIKind = Literal["align", "pool", "warp"]
ROI_KINDS: tuple[str, ...] = get_args(RoIKind)
# Lin et al. 2017, arXiv:1612.03144, equation 1: a region of 224 x 224 pixels belongs to the level of stride 16.
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4
# What keeps a side of exactly 224 on its level in float32, as in torchvision.
LEVEL_EPSILON = 1e-6


def roi_warp(
    features_BCHW: Tensor, rois_N5: Tensor, output_size: int, spatial_scale: float, samples: int = 2
) -> Tensor:
    """RoIWarp (Dai, He, Sun 2016, arXiv:1512.04412, section 3.2): values_NCPP, with gradients to features and boxes.

    A region is sampled bilinearly (zeros outside of the map) at `samples * output_size` rows and columns, the first at
    its upper left corner, then max-pooled to output_size. As in the paper's equation 5, neither the box is rounded nor
    are half pixels accounted for: sample u of S lies at x + u / S * width, and a map's values at whole coordinates.

    rois_N5: the image's index in the batch, then x1, y1, x2, y2 in pixels of the image. spatial_scale: features per
    pixel.
    """
    side = samples * output_size
    height, width = features_BCHW.shape[-2:]
    dtype = torch.promote_types(features_BCHW.dtype, rois_N5.dtype)
    fractions_S = torch.arange(side, device=rois_N5.device, dtype=dtype) / side
    x1_N, y1_N, x2_N, y2_N = (rois_N5[:, 1:].to(dtype) * spatial_scale).unbind(1)
    x_NS = x1_N[:, None] + fractions_S * (x2_N - x1_N)[:, None]
    y_NS = y1_N[:, None] + fractions_S * (y2_N - y1_N)[:, None]
    # grid_sample's -1 and 1 are the outer edges of the first and the last value.
    x_NS, y_NS = (2 * x_NS + 1) / width - 1, (2 * y_NS + 1) / height - 1
    grid_NSS2 = torch.stack([x_NS[:, None, :].expand(-1, side, -1), y_NS[:, :, None].expand(-1, -1, side)], dim=-1)
    owner_N = rois_N5[:, 0].long()
    order_N = torch.argsort(owner_N, stable=True)
    parts = []
    for at, features_CHW in enumerate(features_BCHW):
        own_n = order_N[owner_N[order_N] == at]
        grid_1SS2 = grid_NSS2[own_n].reshape(1, len(own_n) * side, side, 2)
        sampled_1CSS = functional.grid_sample(
            features_CHW[None].to(dtype), grid_1SS2, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        parts.append(sampled_1CSS.reshape(len(features_CHW), len(own_n), side, side).transpose(0, 1))
    sampled_NCSS = torch.cat(parts)[torch.argsort(order_N)]
    return functional.max_pool2d(sampled_NCSS, samples).to(features_BCHW.dtype)


class RoIFeatures(nn.Module):
    """Features of boxes, from the level that fits a box's size; to be put where torchvision has MultiScaleRoIAlign.

    kind: `align` (He et al. 2017, arXiv:1703.06870, section 3; torchvision's, without its half-pixel shift, as
    torchvision's detectors have it), `pool` (Girshick 2015, arXiv:1504.08083, section 2.1) or `warp` (`roi_warp`).
    strides: pixels per feature of each map, ascending powers of 2; maps behind them (a pyramid's coarsest, which is for
    proposals alone) are not used. output_size: P. sampling_ratio: samples per bin and direction of `align` and `warp`.
    Raises ValueError for another kind and for strides that are no ascending powers of 2.
    """

    def __init__(self, kind: str, strides: Sequence[int], output_size: int, sampling_ratio: int = 2) -> None:
        super().__init__()
        if kind not in ROI_KINDS:
            raise ValueError(f"roi must be one of {', '.join(ROI_KINDS)}, got {kind!r}")
        finest = strides[0].bit_length() - 1 if strides else 0
        if not strides or list(strides) != [1 << (finest + level) for level in range(len(strides))]:
            raise ValueError(f"strides must be ascending powers of 2, got {list(strides)}")
        self.kind = kind
        self.strides = tuple(strides)
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """values_NCPP of all images' boxes, in their order.

        features: maps from the finest on, features_BCHW. boxes: of each image (n, 4), x1, y1, x2, y2 in pixels.
        image_sizes: not needed, since the strides are known; torchvision gives them.
        """
        maps = [*features.values()][: len(self.strides)]
        owners = [torch.full_like(item[:, :1], at) for at, item in enumerate(boxes)]
        rois_N5 = torch.cat([torch.cat(owners), torch.cat([*boxes])], dim=1)
        if len(maps) == 1:
            return self._cut(maps[0], rois_N5, self.strides[0])
        level_N = self._levels(rois_N5[:, 1:])
        size = (len(rois_N5), maps[0].shape[1], self.output_size, self.output_size)
        values_NCPP = maps[0].new_zeros(size)
        for level, (features_BCHW, stride) in enumerate(zip(maps, self.strides, strict=True)):
            (own_n,) = torch.where(level_N == level)
            # Every level, even without a box: DistributedDataParallel waits for its gradients.
            values_NCPP[own_n] = self._cut(features_BCHW, rois_N5[own_n], stride).to(values_NCPP.dtype)
        return values_NCPP

    def _cut(self, features_BCHW: Tensor, rois_N5: Tensor, stride: int) -> Tensor:
        # Half precision is too coarse for pixels, and torchvision's operations want one type.
        values_BCHW, scale = features_BCHW.to(rois_N5.dtype), 1 / stride
        if self.kind == "warp":
            values_NCPP = roi_warp(values_BCHW, rois_N5, self.output_size, scale, self.sampling_ratio)
        elif self.kind == "pool":
            values_NCPP = roi_pool(values_BCHW, rois_N5, self.output_size, scale)
        else:
            values_NCPP = roi_align(values_BCHW, rois_N5, self.output_size, scale, self.sampling_ratio)
        return values_NCPP.to(features_BCHW.dtype)

    def _levels(self, boxes_N4: Tensor) -> Tensor:
        """Places in `strides`."""
        boxes_N4 = boxes_N4.detach()
        sides_N = ((boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])).sqrt()
        level_N = torch.floor(CANONICAL_LEVEL + torch.log2(sides_N / CANONICAL_SIDE) + LEVEL_EPSILON)
        finest = self.strides[0].bit_length() - 1
        return level_N.clamp(finest, finest + len(self.strides) - 1).long() - finest
