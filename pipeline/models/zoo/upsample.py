"""How decoders enlarge feature maps: the family of ways that papers choose from.

- nearest: each value becomes a square of copies.
- bilinear: half-pixel centres, edges held.
- bed_of_nails: each value at the top left of its square, zeros elsewhere.
- max_unpool: each value where the encoder's pooling took its maximum from, zeros elsewhere (needs its indices).
- transposed: a transposed convolution that begins as bilinear interpolation and learns.

The two that leave zeros are for decoders that convolve what they get; a map of scores needs one of the others.

Axes: B batch, C channels, H rows, W columns.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Enlarge", "Upsample", "Upsampling", "bilinear_kernel", "check_upsample", "from_grid"]

Upsampling = Literal["nearest", "bilinear", "bed_of_nails", "max_unpool", "transposed"]


def check_upsample(kind: str, known: tuple[str, ...] = get_args(Upsampling)) -> None:
    """Raise ValueError for a kind that is not among `known`."""
    if kind not in known:
        raise ValueError(f"upsample must be one of {', '.join(known)}, got {kind!r}")


def bilinear_kernel(factor: int) -> Tensor:
    """The (2 factor, 2 factor) float32 kernel with which a transposed convolution of stride `factor` interpolates
    bilinearly; factor is even (Long et al. 2015, section 3.3)."""
    ramp = 1 - (torch.arange(2 * factor, device="cpu") + 0.5 - factor).abs() / factor
    return torch.outer(ramp, ramp)


class Upsample(nn.Module):
    """Twice the height and width.

    channels: C. kind: of the family. Raises ValueError for an unknown kind.
    """

    def __init__(self, channels: int, kind: Upsampling) -> None:
        super().__init__()
        check_upsample(kind)
        self.kind = kind
        if kind == "transposed":
            self.weight = nn.Parameter(torch.empty(channels, channels, 4, 4))
            _interpolating(self.weight, 2)

    def forward(self, values_BCHW: Tensor, indices_BCHW: Tensor | None = None) -> Tensor:
        """(B, C, 2 H, 2 W). indices_BCHW: of the encoder's 2x2 pooling, needed by max_unpool alone."""
        if self.kind == "transposed":
            return functional.conv_transpose2d(values_BCHW, self.weight, stride=2, padding=1)
        if self.kind == "max_unpool":
            if indices_BCHW is None:
                raise ValueError("max_unpool needs the indices of the encoder's pooling, got none")
            return functional.max_unpool2d(values_BCHW, indices_BCHW, (2, 2))
        if self.kind == "bed_of_nails":
            rows = torch.stack([values_BCHW, torch.zeros_like(values_BCHW)], dim=-1).flatten(-2)
            return torch.stack([rows, torch.zeros_like(rows)], dim=-2).flatten(-3, -2)
        return functional.interpolate(values_BCHW, scale_factor=2.0, mode=self.kind)


class Enlarge(nn.Module):
    """`factor` times as large, with a margin: FCN's transposed convolutions of kernel 2 factor and no padding.

    The output has factor * (n + 1) pixels for n, and value j is centred at factor * j + factor - 0.5.

    channels: C. factor: even. kind: `transposed`, `bilinear` or `nearest`; the others hold the edge values where a
    transposed convolution fades out. learned: of `transposed`, whether it learns, from channel to channel as well.
    """

    def __init__(self, channels: int, factor: int, kind: Upsampling = "transposed", *, learned: bool = False) -> None:
        super().__init__()
        check_upsample(kind, ("transposed", "bilinear", "nearest"))
        self.channels, self.factor, self.kind, self.learned = channels, factor, kind, learned
        if kind == "transposed" and learned:
            self.weight = nn.Parameter(torch.empty(channels, channels, 2 * factor, 2 * factor))
            _interpolating(self.weight, factor)
        elif kind == "transposed":
            self.register_buffer("kernel", bilinear_kernel(factor).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, values_BCHW: Tensor) -> Tensor:
        """(B, C, factor * (H + 1), factor * (W + 1))."""
        if self.kind == "transposed":
            if self.learned:
                return functional.conv_transpose2d(values_BCHW, self.weight, stride=self.factor)
            kernel = self.get_buffer("kernel").to(values_BCHW.dtype)
            return functional.conv_transpose2d(values_BCHW, kernel, stride=self.factor, groups=self.channels)
        framed = functional.pad(values_BCHW, (1, 1, 1, 1), mode="replicate")
        enlarged = functional.interpolate(framed, scale_factor=float(self.factor), mode=self.kind)
        half = self.factor // 2
        return enlarged[..., half:-half, half:-half]


def from_grid(values_BCHW: Tensor, stride: int, height: int, width: int) -> Tensor:
    """(B, C, height, width) of values that stand at pixels 0, stride, 2 stride, ...: bilinear between them, the last
    one held beyond them. So stand the units of networks whose strided layers are 3x3 with a padding of 1."""
    rows, columns = (stride * (size - 1) + 1 for size in values_BCHW.shape[-2:])
    between = functional.interpolate(values_BCHW, size=(rows, columns), mode="bilinear", align_corners=True)
    below, right = max(0, height - rows), max(0, width - columns)
    if below or right:
        between = functional.pad(between, (0, right, 0, below), mode="replicate")
    return between[..., :height, :width]


@torch.no_grad()
def _interpolating(weight: Tensor, factor: int) -> None:
    """Fill (C, C, 2 factor, 2 factor) so that each channel is interpolated by itself."""
    eye = torch.eye(weight.shape[0], device="cpu")
    weight.copy_(eye[:, :, None, None] * bilinear_kernel(factor))
