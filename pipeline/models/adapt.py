"""Published weights under a model's own names: of the classification network that its backbone is.

An adapter takes a checkpoint's tensors by name and the names that the module wants, and returns tensors by the module's
names as far as it knows them. What it does not know comes back as it is.
"""

from collections.abc import Callable, Mapping, Set

from torch import Tensor

__all__ = ["Adapt", "as_named", "backbone"]

Adapt = Callable[[Mapping[str, Tensor], Set[str]], dict[str, Tensor]]


def as_named(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """The checkpoint as it is: its names are the module's."""
    return dict(given)


def backbone(*prefixes: str) -> Adapt:
    """For a model whose backbone keeps the names of its library below one of `prefixes`, such as `backbone.`.

    A checkpoint of which the module has no tensor under such a prefix is taken for the backbone's own: each tensor goes
    where its name, or its name without `features.` (torchvision's MobileNets), stands below a prefix. What stands
    nowhere is left out: it is the classifier, whose names (`classifier.0.weight`) some heads have as well.
    """

    def adapt(given: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
        if any(name in wanted and name.startswith(prefixes) for name in given):
            return dict(given)
        placed = {}
        for name, tensor in given.items():
            places = (prefix + part for prefix in prefixes for part in (name, name.removeprefix("features.")))
            place = next((place for place in places if place in wanted), None)
            if place is not None:
                placed[place] = tensor
        return placed or dict(given)

    return adapt
