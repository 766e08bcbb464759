"""Models that go wrong while they are trained, as a user's own would."""

import os
import signal

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.spec import ModelSpec, Preprocess


class Raises(nn.Conv2d):
    """A bug."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        raise KeyError("neck")


class Dies(nn.Conv2d):
    """What the kernel does to a process that takes too much memory."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return image_BCHW


class EndsAlone(nn.Conv2d):
    """One worker stops for good, the other waits for its gradients."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise ConfigError("expected another world, got this one")
        return super().forward(image_BCHW)


def _spec(kind: type[nn.Conv2d]) -> ModelSpec:
    return ModelSpec(
        name=kind.__name__.lower(),
        task="semantic",
        build=lambda num_classes: kind(3, num_classes, 1),
        preprocess=Preprocess(),
        taxonomy="scenes",
        license="Apache-2.0",
    )


RAISES, DIES, ENDS_ALONE = map(_spec, (Raises, Dies, EndsAlone))
