"""Our Mask R-CNN path against torchvision's own forward pass."""

import numpy as np
import torch

from pipeline.config import ModelConfig
from pipeline.masks import decode_rle
from pipeline.models.load import load_model
from pipeline.sources.scenes import render_scene
from pipeline.stages.encode import encode_instances
from pipeline.stages.predict import Predict
from pipeline.stages.prepare import prepare


def test_the_rows_are_what_torchvision_says() -> None:
    options = {
        "resize": 64,
        "score_threshold": 0.0,
        "box_score_thresh": 0.0,
        "max_segments": 20,
        "channels_last": False,
    }
    model = load_model(ModelConfig(name="maskrcnn_resnet50_fpn_v2", options=options), seed=3, tile_pixels=1 << 22)
    # The short side is 64 already, so neither side resizes and the numbers can be equal.
    image_HWC = render_scene(5, width=96, height=64).image_HWC
    predict = Predict(model, device=torch.device("cpu"), batch_pixels=1 << 22, tile_pixels=1 << 22)
    (prediction,) = predict([prepare(image_HWC, model.preprocess)])
    segments = encode_instances(prediction.instances, width=96, height=64)

    official = model.module
    official.transform.min_size, official.transform.max_size = (64,), 1333
    with torch.inference_mode():
        (expected,) = official([torch.from_numpy(image_HWC.copy()).permute(2, 0, 1) / 255])
    order = torch.argsort(expected["scores"], descending=True, stable=True)[:20]
    assert len(order) == 20
    torch.testing.assert_close(
        torch.from_numpy(prediction.instances.boxes_N4), expected["boxes"][order], rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(
        torch.from_numpy(prediction.instances.scores_N), expected["scores"][order], rtol=1e-4, atol=1e-6
    )
    assert prediction.instances.category_ids_N.tolist() == expected["labels"][order].tolist()
    masks_NHW = (expected["masks"][order][:, 0] > 0.5).numpy()
    masks_NHW = masks_NHW[masks_NHW.any(axis=(1, 2))]
    assert len(segments) == len(masks_NHW)
    for segment, mask_HW in zip(segments, masks_NHW, strict=True):
        # Boxes differ in the last bit, which may move a pixel on the threshold.
        assert np.count_nonzero(decode_rle(segment["rle"], width=96, height=64) != mask_HW) <= 0.01 * mask_HW.size
