"""OverFeat: a classifier and a box regressor as convolutions, over the whole image at several scales, and the greedy
merging of what they say.

Axes: B batch, C channels, H rows, W columns, N views (places where the network looks), K classes.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_iou

from pipeline.models.spec import Frame
from pipeline.models.zoo.region_heads import maps, vgg16
from pipeline.models.zoo.vgg import he_init

__all__ = ["OverFeat", "merge_boxes"]

STRIDE = 16
POSITIVE, NEGATIVE = 0.5, 0.3
# Background views that are learned from, in units of those with an object, and at least.
HARD_NEGATIVES, FEWEST_NEGATIVES = 3, 8


class OverFeat(nn.Module):
    """OverFeat (Sermanet et al. 2014, https://arxiv.org/abs/1312.6229), on VGG16's convolutions.

    The classifier's layers are convolutions, so that one pass looks through a window at every 16th pixel; the last
    pooling is done at all of its offsets (section 3.3), which is a pooling of stride 1 before a convolution dilated by
    2. The image is seen at several scales. Each view has softmax scores of the K classes and the background, and for
    each class a box (section 4: the regressor has layers of its own on the shared features) as edges relative to the
    view, which is where they begin. Boxes of all views and scales are merged, not suppressed.

    scales: of the prepared image. view: cells of the pooled maps in a view, 7 of 32 pixels by default, so 224 pixels.
    box_score_thresh: probability of a view that is asked for a box. candidates: of a class of an image, the likeliest
    ones, that are merged, which takes the square of their number. merge_threshold: see `merge_boxes`.
    """

    def __init__(
        self,
        num_classes: int,
        scales: Sequence[float] = (0.75, 1.0, 1.4, 2.0),
        view: int = 7,
        candidates: int = 100,
        merge_threshold: float = 0.8,
        box_score_thresh: float = 0.3,
        box_detections_per_img: int = 100,
        width: int = 64,
        hidden: int = 4096,
        regressor_hidden: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0 or view < 1 or candidates < 1:
            raise ValueError(
                f"scales must be some above 0, view and candidates 1 or more, got {scales}, {view}, {candidates}"
            )
        self.classes, self.scales, self.view = num_classes, tuple(scales), view
        self.candidates, self.merge_threshold = candidates, merge_threshold
        self.score_thresh, self.detections = box_score_thresh, box_detections_per_img
        self.encoder = vgg16(num_classes, width, hidden, fully=False)
        self.encoder["fc6"] = nn.Conv2d(8 * width, hidden, view, dilation=2)
        self.encoder["fc7"] = nn.Conv2d(hidden, hidden, 1)
        self.score = nn.Conv2d(hidden, num_classes + 1, 1)
        self.box = nn.Sequential(
            nn.Conv2d(8 * width, regressor_hidden, view, dilation=2),
            nn.ReLU(),
            nn.Conv2d(regressor_hidden, 4 * num_classes, 1),
        )
        he_init(self)
        for layer, std in ((self.score, 0.01), (self.box[2], 0.001)):
            nn.init.normal_(layer.get_parameter("weight"), std=std)
        self.dropout = nn.Dropout(dropout)

    def views(self, image_1CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What one image says at one scale: class scores (N, K + 1), edges relative to the views (N, K, 4), and the
        views (N, 4) in its pixels. An image smaller than a view is padded with zeros."""
        side = 32 * self.view
        rows, columns = image_1CHW.shape[2:]
        # Whole cells of conv5, of which a view is 2 view, and the pooling takes one more.
        padded = [max(math.ceil(size / STRIDE) * STRIDE, side) for size in (rows, columns)]
        image_1CHW = functional.pad(image_1CHW, (0, padded[1] - columns, 0, padded[0] - rows))
        pooled = functional.max_pool2d(maps(self.encoder, image_1CHW)[-1], 2, stride=1)
        features = pooled
        for name in ("fc6", "fc7"):
            features = self.dropout(functional.relu(self.encoder[name](features)))
        scores_KHW, edges_KHW = self.score(features)[0], self.box(pooled)[0]
        top, left = (torch.arange(size, device=image_1CHW.device) * STRIDE for size in scores_KHW.shape[1:])
        corner_N2 = torch.stack(torch.meshgrid(left, top, indexing="xy"), 2).flatten(0, 1).float()
        views_N4 = torch.cat([corner_N2, corner_N2 + side], 1)
        edges_NK4 = edges_KHW.flatten(1).T.unflatten(1, (self.classes, 4))
        return scores_KHW.flatten(1).T.float(), edges_NK4.float(), views_N4

    def at_scales(self, image_1CHW: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """`views` of all scales, the views in prepared pixels."""
        inside = image_1CHW[:, :, : frame.prepared_height, : frame.prepared_width]
        parts = []
        for scale in self.scales:
            size = [max(1, round(side * scale)) for side in inside.shape[2:]]
            resized = functional.interpolate(inside, size=size, mode="bilinear", antialias=True)
            scores, edges, views_N4 = self.views(resized)
            back = views_N4.new_tensor([inside.shape[3] / size[1], inside.shape[2] / size[0]] * 2)
            parts.append((scores, edges, views_N4 * back))
        scores, edges, views_N4 = (torch.cat(values) for values in zip(*parts, strict=True))
        return scores, edges, views_N4

    def forward(self, image_BCHW: Tensor, frames: Sequence[Frame]) -> list[dict[str, Tensor]]:
        """Per image boxes (N, 4) in prepared pixels, scores and labels (N; places), best first.

        A box's score adds up the probabilities p of the views that it was merged from, as the paper does, and is
        1 - exp(-sum), which keeps their order and stays below 1.
        """
        found = []
        for at, frame in enumerate(frames):
            scores, edges_NK4, views_N4 = self.at_scales(image_BCHW[at : at + 1], frame)
            probability_NK = scores.softmax(1)[:, : self.classes]
            boxes_NK4 = _placed(views_N4, edges_NK4)
            limit = views_N4.new_tensor([frame.prepared_width, frame.prepared_height] * 2)
            boxes, sums, labels = [], [], []
            for label in torch.nonzero((probability_NK >= self.score_thresh).any(0))[:, 0].tolist():
                probability_N = probability_NK[:, label]
                order = probability_N.argsort(descending=True, stable=True)[: self.candidates]
                order = order[probability_N[order] >= self.score_thresh]
                inside_N4 = torch.minimum(boxes_NK4[order, label].clamp(min=0), limit)
                whole_N = (inside_N4[:, 2:] > inside_N4[:, :2]).all(1)
                merged, sum_N = merge_boxes(
                    inside_N4[whole_N], probability_N[order][whole_N], threshold=self.merge_threshold
                )
                boxes.append(merged)
                sums.append(sum_N)
                labels.append(torch.full_like(sum_N, label, dtype=torch.int64))
            none = (views_N4.new_zeros(0, 4), views_N4.new_zeros(0), torch.zeros_like(views_N4[:0, 0]).long())
            sum_N, boxes_N4 = torch.cat([none[1], *sums]), torch.cat([none[0], *boxes])
            best = sum_N.argsort(descending=True, stable=True)[: self.detections]
            labels_N = torch.cat([none[2], *labels])[best]
            found.append({"boxes": boxes_N4[best], "scores": -torch.expm1(-sum_N[best]), "labels": labels_N})
        return found

    def losses(
        self, image_BCHW: Tensor, frames: Sequence[Frame], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`loss_classifier`: softmax cross-entropy of views; `loss_box`: squared error of the edges of those with an
        object, in its class. Both are means over an image's views that are learned from, then over the images.

        A view has the object that it overlaps by 0.5 (intersection over union) or more, and every object the view that
        overlaps it most. Of those below 0.3 the hardest are learned from, three for each view with an object (the
        paper's negatives on the fly, section 5).
        """
        classes, boxes = image_BCHW.new_zeros(()), image_BCHW.new_zeros(())
        for at, (frame, target) in enumerate(zip(frames, targets, strict=True)):
            scores, edges_NK4, views_N4 = self.at_scales(image_BCHW[at : at + 1], frame)
            objects_M4 = target["boxes"].to(views_N4)
            object_N, background_N = _assigned(views_N4, objects_M4)
            positive = torch.nonzero(object_N >= 0)[:, 0]
            labels = target["labels"].to(object_N)[object_N[positive]]
            easy_N = functional.log_softmax(scores.detach(), 1)[:, self.classes]
            count = max(FEWEST_NEGATIVES, HARD_NEGATIVES * len(positive))
            candidates = torch.nonzero(background_N)[:, 0]
            negative = candidates[easy_N[candidates].argsort(stable=True)[:count]]
            chosen = torch.cat([positive, negative])
            wanted = torch.cat([labels, torch.full_like(negative, self.classes)])
            error = functional.cross_entropy(scores[chosen], wanted, reduction="sum")
            classes = classes + error / max(len(chosen), 1) / len(targets)
            edges = (objects_M4[object_N[positive]] - views_N4[positive]) / _sides(views_N4[positive])
            squares = (edges_NK4[positive, labels] - edges).square().sum()
            boxes = boxes + squares / max(len(positive), 1) / len(targets)
        return {"loss_classifier": classes, "loss_box": boxes}


def _sides(boxes_N4: Tensor) -> Tensor:
    return (boxes_N4[:, 2:] - boxes_N4[:, :2]).repeat(1, 2)


def _placed(views_N4: Tensor, edges_NK4: Tensor) -> Tensor:
    return views_N4[:, None] + edges_NK4 * _sides(views_N4)[:, None]


def _assigned(views_N4: Tensor, objects_M4: Tensor) -> tuple[Tensor, Tensor]:
    """Which object a view has, -1 for none; and whether it is background."""
    if not len(objects_M4):
        return torch.full_like(views_N4[:, 0], -1).long(), torch.ones_like(views_N4[:, 0], dtype=torch.bool)
    overlap_NM = box_iou(views_N4, objects_M4)
    overlap_N, nearest_N = overlap_NM.max(1)
    object_N = torch.where(overlap_N >= POSITIVE, nearest_N, -1)
    object_N[overlap_NM.argmax(0)] = torch.arange(len(objects_M4), device=object_N.device)
    return object_N, (overlap_N < NEGATIVE) & (object_N < 0)


def merge_boxes(boxes_N4: Tensor, scores_N: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """The two boxes that match best become their mean, and their scores' sum, until no two match (section 4.3).

    The paper's match score is the distance of the centres and the intersection of the boxes; here the distance over the
    mean of their diagonals, plus what they lack of an intersection over union of 1, so that it does not depend on the
    image's size; 0 is the same box, and `threshold` the largest at which two are merged. Of equal matches the first.
    """
    boxes_N4, scores_N = boxes_N4.clone(), scores_N.clone()
    if not len(boxes_N4):
        return boxes_N4, scores_N
    match_NN = _match(boxes_N4, boxes_N4).fill_diagonal_(math.inf)
    alive_N = torch.ones(len(boxes_N4), dtype=torch.bool, device=boxes_N4.device)
    while len(boxes_N4) > 1:
        best = int(match_NN.argmin())
        one, other = divmod(best, len(boxes_N4))
        if not float(match_NN[one, other]) <= threshold:
            break
        boxes_N4[one] = (boxes_N4[one] + boxes_N4[other]) / 2
        scores_N[one] += scores_N[other]
        alive_N[other] = False
        match_NN[other] = match_NN[:, other] = math.inf
        anew_N = _match(boxes_N4[one : one + 1], boxes_N4)[0].masked_fill(~alive_N, math.inf)
        anew_N[one] = math.inf
        match_NN[one] = match_NN[:, one] = anew_N
    return boxes_N4[alive_N], scores_N[alive_N]


def _match(one_N4: Tensor, other_M4: Tensor) -> Tensor:
    one_N, other_M = ((boxes[:, 2:] - boxes[:, :2]).norm(dim=1) for boxes in (one_N4, other_M4))
    middle_N2, middle_M2 = ((boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (one_N4, other_M4))
    distance_NM = (middle_N2[:, None] - middle_M2).norm(dim=2)
    overlap_NM: Tensor = box_iou(one_N4, other_M4)
    match_NM: Tensor = distance_NM / ((one_N[:, None] + other_M) / 2) + 1 - overlap_NM
    return match_NM
