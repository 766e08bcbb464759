"""A model that takes its time, as one that is too large for its accelerator does."""

import time

from torch import Tensor

from pipeline.models.spec import ModelSpec, Preprocess
from pipeline.models.zoo.null import Null


class Slow(Null):
    """0.4 s a batch."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        time.sleep(0.4)
        return super().forward(image_BCHW)


SLOW = ModelSpec(
    name="slow", task="semantic", build=Slow, preprocess=Preprocess(pad_multiple=4), taxonomy="scenes", license="none"
)
