"""Operators of ML Programs on images: upsampling, resizing, cropping, sampling, suppression of boxes.

Written from Apple's description of MIL (coremltools' operator reference), in torch; parameters carry MIL's names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgekd.errors import DataError, ExportError

from ._mil_registry import Ints, operator


def _linear(x: Tensor, axis: int, points: Tensor) -> Tensor:
    """Linear interpolation along an axis, at places that are clamped to it."""
    last = x.shape[axis] - 1
    points = points.clamp(0, last)
    low = points.floor().to(torch.int64)
    shape = [1] * x.ndim
    shape[axis] = -1
    share = (points - low).to(x.dtype).reshape(shape)
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=last)), share)


def _grid(mode: str, start: float, end: float, count: int) -> Tensor:
    """Where ``count`` points lie on the pixels from ``start`` to ``end``, by MIL's sampling modes, not yet clamped."""
    size, i = end - start + 1, torch.arange(count, dtype=torch.float64)
    if mode == "STRICT_ALIGN_CORNERS" or (mode == "ALIGN_CORNERS" and count > 1):
        return start + i * ((end - start) / max(count - 1, 1))
    if mode == "ALIGN_CORNERS":
        return torch.tensor([(start + end) / 2], dtype=torch.float64)
    if mode == "DEFAULT":
        return start + i * (size / count)
    if mode == "OFFSET_CORNERS":
        return start + (i + 0.5) * (max(1.0, end - start) / count)
    if mode == "UNALIGN_CORNERS":
        return start + (i + 0.5) * (size / count) - 0.5
    raise ExportError(f"has the unknown sampling_mode {mode!r}")


@operator(moves=True)
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        size, last = math.floor(x.shape[axis] * factor), x.shape[axis] - 1
        x = x.index_select(axis, (torch.arange(size) / factor).floor().clamp(max=last).to(torch.int64))
    return x


@operator(later={"half_pixel_centers": "CoreML6"})
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The scale is recomputed from the sizes; half-pixel centers unless the corners are aligned."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        before = x.shape[axis]
        after = math.floor(before * factor)
        step = (before - 1) / max(after - 1, 1) if align_corners else before / after
        points = torch.arange(after, dtype=torch.float64) * step + (0.5 * step - 0.5 if half else 0.0)
        x = _linear(x, axis, points)
    return x


@operator(moves=True)
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """As ``upsample_nearest_neighbor``: the pixel at or before i · (old size / new size)."""
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        x = x.index_select(axis, torch.arange(size) * x.shape[axis] // size)
    return x


@operator()
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    for axis, size in ((-2, target_size_height), (-1, target_size_width)):
        x = _linear(x, axis, _grid(sampling_mode, 0, x.shape[axis] - 1, size))
    return x


@operator(since="CoreML7")
def resize(
    x: Tensor, shape: Ints, resized_dims: int, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Tensor:
    """The last axes to the last sizes of ``shape``, where 0 keeps a size.

    The nearest pixel is the one that a grid point rounds to (Apple's own tests of coremltools show it); which one is
    meant half-way between two is not published, and refused.
    """
    for axis in range(-resized_dims, 0):
        before = x.shape[axis]
        size = shape[axis] or before
        if size == before:
            continue
        points = _grid(sampling_mode, 0, before - 1, size)
        if interpolation_mode == "LINEAR":
            x = _linear(x, axis, points)
            continue
        if interpolation_mode != "NEAREST_NEIGHBOR":
            raise ExportError(f"has the unknown interpolation_mode {interpolation_mode!r}")
        points = points.clamp(0, before - 1)
        if bool((points.frac() == 0.5).any()):
            raise ExportError(f"resizes {before} to {size}: points half-way between two pixels have no nearest one")
        x = x.index_select(axis, points.round().to(torch.int64))
    return x


@operator(later={"pad_value": "CoreML6", "boxes": "CoreML7", "box_indices": "CoreML7"})
def crop_resize(
    x: Tensor,
    roi: Tensor | None = None,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float | None = None,
    boxes: Tensor | None = None,
    box_indices: Tensor | None = None,
) -> Tensor:
    """Boxes of images, each resized to the target; a point outside of its image is ``pad_value``.

    Before iOS 17 ``roi`` is (N, 1, 4 or 5, 1, 1), with the image's number in front where there are five, and the result
    (N, images or 1, C, H, W); then ``boxes`` is (N, 4) and the result (N, C, H, W).
    """
    count = x.shape[0]
    if boxes is not None:
        owners = range(len(boxes)) if box_indices is None else box_indices.tolist()
        pairs = [(x[_image(owner, count)], box) for owner, box in zip(owners, boxes.double(), strict=True)]
    elif roi is not None and roi.shape[2] == 5:
        flat = roi.reshape(-1, 5).double()
        pairs = [(x[_image(int(row[0]), count)], row[1:]) for row in flat]
    elif roi is not None:
        pairs = [(x[image], box) for box in roi.reshape(-1, 4).double() for image in range(count)]
    else:
        raise ExportError("has neither roi nor boxes")
    crops = []
    for image, box in pairs:
        rows, columns = _box(box, box_coordinate_mode)
        height, width = image.shape[-2:]
        scales = (height - 1, width - 1) if normalized_coordinates else (1, 1)
        points = [
            _grid(sampling_mode, start * scale * spatial_scale, end * scale * spatial_scale, size)
            for (start, end), scale, size in zip((rows, columns), scales, (target_height, target_width), strict=True)
        ]
        outside = [(p < 0) | (p > size - 1) for p, size in zip(points, (height, width), strict=True)]
        crop = _linear(_linear(image, -2, points[0]), -1, points[1])
        beyond = outside[0].unsqueeze(1) | outside[1]
        if pad_value is None and bool(beyond.any()):
            raise DataError("has a box that leaves its image, which before iOS 16 is not defined")
        crops.append(torch.where(beyond, torch.tensor(pad_value or 0.0), crop))
    result = torch.stack(crops)
    return result if boxes is not None else result.unflatten(0, (roi.shape[0], -1))  # type: ignore[union-attr]


def _image(number: int, count: int) -> int:
    if not 0 <= number < count:
        raise DataError(f"crops image {number} of {count}")
    return number


def _box(box: Tensor, mode: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """First and last row, first and last column."""
    a, b, c, d = box.tolist()
    if mode not in (
        "CORNERS_HEIGHT_FIRST", "CORNERS_WIDTH_FIRST", "CENTER_SIZE_HEIGHT_FIRST", "CENTER_SIZE_WIDTH_FIRST",
    ):  # fmt: skip
        raise ExportError(f"has the unknown box_coordinate_mode {mode!r}")
    first, second = ((a, c), (b, d)) if mode.startswith("CORNERS") else (_around(a, c), _around(b, d))
    return (first, second) if mode.endswith("HEIGHT_FIRST") else (second, first)


def _around(center: float, size: float) -> tuple[float, float]:
    return center - size / 2, center + size / 2


@operator()
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Every pixel (x, y) of the result from (a0 x + a1 y + a2, b0 x + b1 y + b2), all in -1 to 1."""
    if coordinates_mode.lower() != "normalized_minus_one_to_one":
        raise ExportError(f"has the coordinates_mode {coordinates_mode!r}; MIL allows normalized_minus_one_to_one")
    across, down = (_normalized(size, align_corners) for size in (output_width, output_height))
    rows, columns = torch.meshgrid(down, across, indexing="ij")
    points = torch.stack([columns, rows, torch.ones_like(rows)], -1)  # (H, W, 3)
    matrices = transform_matrix.reshape(-1, 2, 3).expand(x.shape[0], -1, -1)
    coordinates = torch.einsum("hwk,bjk->bhwj", points, matrices)
    return resample(x, coordinates, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)


def _normalized(size: int, align_corners: bool) -> Tensor:
    """Where the pixels of an axis lie between -1 and 1."""
    places = torch.arange(size, dtype=torch.float32)
    return 2 * places / max(size - 1, 1) - 1 if align_corners else (2 * places + 1) / size - 1


@operator()
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """The image at (x, y) pairs, (B, H, W, 2); between pixels the nearest one or a mean of four."""
    sizes = (x.shape[-1], x.shape[-2])
    points = [
        _pixels(coordinates[..., i].to(torch.float32), size, coordinates_mode.lower(), align_corners)
        for i, size in enumerate(sizes)
    ]
    if sampling_mode.lower() == "nearest":
        return _at(x, points[0].round(), points[1].round(), padding_mode, padding_value)
    if sampling_mode.lower() != "bilinear":
        raise ExportError(f"has the unknown sampling_mode {sampling_mode!r}")
    (left, top), result = [p.floor() for p in points], torch.zeros(())
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        share = torch.ones(())
        for point, low, step in ((points[0], left, right), (points[1], top, below)):
            share = share * ((point - low) if step else (1 - (point - low)))
        result = result + share.unsqueeze(1) * _at(x, left + right, top + below, padding_mode, padding_value)
    return result


def _pixels(values: Tensor, size: int, mode: str, align_corners: bool) -> Tensor:
    """Coordinates in pixels of an axis."""
    if mode == "unnormalized":
        return values
    if mode not in ("normalized_minus_one_to_one", "normalized_zero_to_one"):
        raise ExportError(f"has the unknown coordinates_mode {mode!r}")
    share = (values + 1) / 2 if mode == "normalized_minus_one_to_one" else values
    return share * (size - 1) if align_corners else share * size - 0.5


def _at(x: Tensor, columns: Tensor, rows: Tensor, padding_mode: str, padding_value: float) -> Tensor:
    """Pixels of (B, C, H, W) at whole places, (B, H', W') each; beyond the edges by the padding mode."""
    places = []
    inside = torch.ones((), dtype=torch.bool)
    for place, size in ((rows, x.shape[-2]), (columns, x.shape[-1])):
        last = size - 1
        inside = inside & (place >= 0) & (place <= last)
        if padding_mode == "reflection":  # without the edge: 3 2 1 2 3
            place = last - (last - place.abs().remainder(max(2 * last, 1))).abs() if last else torch.zeros_like(place)
        elif padding_mode == "symmetric":  # with it: 2 1 1 2
            place = place.remainder(2 * size)
            place = torch.where(place > last, 2 * size - 1 - place, place)
        elif padding_mode not in ("constant", "border"):
            raise ExportError(f"has the unknown padding_mode {padding_mode!r}")
        places.append(place.clamp(0, last).to(torch.int64))
    batch = torch.arange(x.shape[0]).reshape(-1, 1, 1)
    values = x.permute(0, 2, 3, 1)[batch, places[0], places[1]].permute(0, 3, 1, 2)
    return torch.where(inside.unsqueeze(1), values, padding_value) if padding_mode == "constant" else values


@operator(moves=True)
def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    score_threshold: float | None = None,
    per_class_suppression: bool = False,
) -> tuple[Tensor, ...]:
    """The best boxes, without those that overlap a better one (of their own class) by more than the threshold.

    Boxes are (center x, center y, width, height); the score of a box is its best class's. Before iOS 17 (those have a
    ``score_threshold``, and count the boxes) the boxes are on axis 1, then on the last one. What is missing to
    ``max_boxes`` is zero, with the index -1.
    """
    old = score_threshold is not None
    if not old:
        boxes, scores = boxes.mT, scores.mT
    chosen = [_suppress(b, s, iou_threshold, max_boxes, score_threshold, per_class_suppression)
              for b, s in zip(boxes, scores, strict=True)]  # fmt: skip
    indices = torch.full((len(boxes), max_boxes), -1, dtype=torch.int32)
    found_boxes = torch.zeros((len(boxes), max_boxes, 4))
    found_scores = torch.zeros((len(boxes), max_boxes, scores.shape[-1]))
    for i, kept in enumerate(chosen):
        indices[i, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        found_boxes[i, : len(kept)] = boxes[i, kept]
        found_scores[i, : len(kept)] = scores[i, kept]
    if old:
        return found_boxes, found_scores, indices, torch.tensor([len(kept) for kept in chosen], dtype=torch.int32)
    return found_boxes.mT, found_scores.mT, indices


def _suppress(
    boxes: Tensor, scores: Tensor, iou_threshold: float, most: int, score_threshold: float | None, per_class: bool
) -> list[int]:
    """Indices of the boxes that stay, the best first."""
    best, classes = scores.max(-1)
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    areas = boxes[:, 2] * boxes[:, 3]
    kept: list[int] = []
    for i in torch.argsort(best, descending=True, stable=True).tolist():
        if len(kept) == most or (score_threshold is not None and float(best[i]) < score_threshold):
            break
        rivals = [j for j in kept if not per_class or classes[j] == classes[i]]
        shared = (torch.minimum(high[i], high[rivals]) - torch.maximum(low[i], low[rivals])).clamp(min=0).prod(-1)
        if not bool((shared > iou_threshold * (areas[i] + areas[rivals] - shared)).any()):
            kept.append(i)
    return kept
