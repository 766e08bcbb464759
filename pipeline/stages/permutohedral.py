"""Gaussian filtering of many points in a space of a few dimensions: the permutohedral lattice, in torch.

Adams, Baek & Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice". The lattice of a set of
points is found by sorting; filtering then gathers alone, so that it gives the same on every run, on any device.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Lattice"]

LARGEST_CODE = 2**62


class Lattice:
    """The lattice vertices around points, ready to filter values that the points have."""

    def __init__(self, feature_ND: Tensor, *, normalised: bool = True) -> None:
        """feature_ND: float32; the Gaussian has unit deviation in its space.

        normalised: filter with D^-1/2 K D^-1/2, D the row sums of the kernel K, as the dense CRF does; else with a
        multiple of K.
        """
        points, dimensions = feature_ND.shape
        code_VN, weight_VN, step_V = _enclosing_vertices(feature_ND)
        order_E = torch.argsort(code_VN.flatten(), stable=True)
        sorted_E = code_VN.flatten()[order_E]
        first_E = torch.ones_like(sorted_E, dtype=torch.bool)
        first_E[1:] = sorted_E[1:] != sorted_E[:-1]
        code_M = sorted_E[first_E]
        vertex_E = torch.empty_like(order_E)
        vertex_E[order_E] = first_E.cumsum(0) - 1

        self._vertices = len(code_M)
        self._offset_M = torch.cat([first_E.nonzero()[:, 0], first_E.new_full((1,), len(order_E), dtype=torch.int64)])
        self._point_E = order_E % points
        self._splat_E = weight_VN.flatten()[order_E]
        self._vertex_NV = vertex_E.view(dimensions + 1, points).T.contiguous()
        self._slice_NV = weight_VN.T.contiguous()
        self._neighbour_VM3 = [_neighbours(code_M, step) for step in step_V]
        self._blur_M3 = feature_ND.new_tensor([1.0, 0.5, 0.5]).expand(self._vertices + 1, 3).contiguous()
        if normalised:
            norm_N = self.filter(feature_ND.new_ones(points, 1))[:, 0].add(1e-20).rsqrt()
            self._splat_E = self._splat_E * norm_N[self._point_E]
            self._slice_NV = self._slice_NV * norm_N[:, None]

    def filter(self, value_NK: Tensor) -> Tensor:
        """float32 values of the points -> the same shape: each a Gaussian-weighted sum of all."""
        splat_MK = functional.embedding_bag(
            self._point_E,
            value_NK,
            self._offset_M,
            per_sample_weights=self._splat_E,
            mode="sum",
            include_last_offset=True,
        )
        vertex_MK = torch.cat([splat_MK, splat_MK.new_zeros(1, splat_MK.shape[1])])
        for neighbour_M3 in self._neighbour_VM3:
            vertex_MK = functional.embedding_bag(neighbour_M3, vertex_MK, per_sample_weights=self._blur_M3, mode="sum")
        return functional.embedding_bag(self._vertex_NV, vertex_MK, per_sample_weights=self._slice_NV, mode="sum")


def _enclosing_vertices(feature_ND: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The d+1 lattice vertices around each point as codes (V, N; int64), the point's barycentric weights among them
    (V, N), and what has to be added to a code for the next vertex along each of the d+1 axes.

    Equal distances are resolved as in the dense CRF's C++ (Krähenbühl 2013), so that both have the same vertices.
    """
    points, dimensions = feature_ND.shape
    axes = dimensions + 1
    deviation = math.sqrt(2 / 3) * axes
    elevated_VN = feature_ND.new_empty(axes, points)
    total_N = feature_ND.new_zeros(points)
    for axis in range(dimensions, 0, -1):
        scaled_N = feature_ND[:, axis - 1] * (deviation / math.sqrt(axis * (axis + 1)))
        elevated_VN[axis] = total_N - axis * scaled_N
        total_N = total_N + scaled_N
    elevated_VN[0] = total_N

    nearest_VN = torch.round(elevated_VN * (1 / axes))
    origin_VN = nearest_VN * axes
    residual_VN = elevated_VN - origin_VN
    rank_VN = nearest_VN.sum(0).expand(axes, points).clone()
    for axis in range(dimensions):
        below_VN = residual_VN[axis] < residual_VN[axis + 1 :]
        rank_VN[axis] += below_VN.sum(0)
        rank_VN[axis + 1 :] += ~below_VN
    shift_VN = ((rank_VN < 0).float() - (rank_VN >= axes).float()) * axes
    rank_VN, origin_VN = (rank_VN + shift_VN).long(), origin_VN + shift_VN

    ordered_VN = torch.empty_like(elevated_VN)
    ordered_VN.scatter_(0, dimensions - rank_VN, (elevated_VN - origin_VN) * (1 / axes))
    weight_VN = torch.cat([ordered_VN[:1] + (1 - ordered_VN[-1:]), ordered_VN[1:] - ordered_VN[:-1]])

    origin_DN = origin_VN[:dimensions].long()
    strides = _strides(origin_DN, margin=2 * axes)
    base_N = sum(
        (origin_N * stride for origin_N, stride in zip(origin_DN, strides, strict=True)), torch.zeros_like(rank_VN[0])
    )
    code_VN = torch.empty_like(rank_VN)
    for vertex in range(axes):
        code_N = base_N + _wrapped(vertex * sum(strides))
        for rank_N, stride in zip(rank_VN[:dimensions], strides, strict=True):
            code_N -= (rank_N > dimensions - vertex) * _wrapped(axes * stride)
        code_VN[vertex] = code_N
    steps = [_wrapped(axes * stride - sum(strides)) for stride in strides]
    return code_VN, weight_VN, [*steps, _wrapped(-sum(strides))]


def _strides(origin_DN: Tensor, margin: int) -> list[int]:
    """Factors that make one number of a vertex's coordinates, linear in them, so that neighbours are a sum away."""
    low_D, high_D = origin_DN.amin(1).tolist(), origin_DN.amax(1).tolist()
    extents = [high - low + 2 * margin + 1 for low, high in zip(low_D, high_D, strict=True)]
    if math.prod(extents) <= LARGEST_CODE:
        return [math.prod(extents[:axis]) for axis in range(len(extents))]
    # Too fine a lattice for 63 bits: odd factors of the golden ratio's bits, modulo 2^64. Among ten million vertices
    # two share a code in less than one of a hundred thousand images.
    return [_wrapped(pow(0x9E3779B97F4A7C15, axis + 1, 2**64) | 1) for axis in range(len(extents))]


def _wrapped(number: int) -> int:
    """As a signed number of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _neighbours(code_M: Tensor, step: int) -> Tensor:
    """(M + 1, 3) places of each vertex and its two neighbours on one axis; M, which stays 0, for one that is not."""
    count = len(code_M)
    wanted_M = code_M + step
    place_M = torch.searchsorted(code_M, wanted_M).clamp_(max=count - 1)
    found_M = code_M[place_M] == wanted_M
    neighbour_M3 = torch.full((count + 1, 3), count, dtype=torch.int64, device=code_M.device)
    own_M = torch.arange(count, device=code_M.device)
    neighbour_M3[:count, 0] = own_M
    neighbour_M3[:count, 1] = torch.where(found_M, place_M, count)
    neighbour_M3[place_M[found_M], 2] = own_M[found_M]
    return neighbour_M3
