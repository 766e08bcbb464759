"""What stands at one place of an epoch: an example to learn from, or why there is none."""

from dataclasses import dataclass

from pipeline.errors import RowError
from pipeline.images import decode_image
from pipeline.sources.base import Sample
from pipeline.training.augment import AugmentOptions, Example, augment
from pipeline.training.border import BorderWeights
from pipeline.training.task_targets import TaskTargets

__all__ = ["Failure", "Item", "Preparation", "StepItems"]

MESSAGE_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that is not learned from (or not scored), and why."""

    image_id: str
    error_type: str
    message: str

    @classmethod
    def of(cls, image_id: str, error: Exception) -> "Failure":
        return cls(image_id, type(error).__name__, str(error)[:MESSAGE_CHARACTERS])


@dataclass(frozen=True, slots=True)
class Item:
    """What stands at one place of the epoch: an example, or why there is none."""

    image_id: str
    example: Example | None = None
    failure: Failure | None = None

    @property
    def size_bytes(self) -> int:
        return sum(values.nbytes for values in self.example.values()) if self.example else 0


@dataclass(frozen=True, slots=True)
class StepItems:
    """One worker's share of one batch. step: counted from the epoch's first."""

    step: int
    items: tuple[Item, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Preparation:
    """From an encoded sample to an example: decoded, in the model's label space, augmented.

    seed: of the augmentation. max_pixels: larger images fail. border: adds `pixel_weight` to what is augmented.
    """

    targets: TaskTargets
    options: AugmentOptions
    seed: int
    max_pixels: int
    border: BorderWeights | None = None

    def item(self, sample: Sample, epoch: int) -> Item:
        """The same item for the same arguments, wherever it is made."""
        try:
            if sample.error is not None:
                raise sample.error
            image_HWC = decode_image(sample.image, max_pixels=self.max_pixels)
            cells_of = self.border.classes if self.border else ()
            example = self.targets.example(image_HWC, sample.targets, cells_of=cells_of)
        except RowError as error:
            return Item(sample.image_id, failure=Failure.of(sample.image_id, error))
        changed = augment(example, self.options, seed=self.seed, epoch=epoch, image_id=sample.image_id)
        return Item(sample.image_id, example=self.border.weighted(changed) if self.border else changed)
