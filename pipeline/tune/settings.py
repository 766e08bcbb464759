"""What may be changed to make a model faster, one axis at a time."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["AXES", "Context", "Proposed", "Setting", "proposals"]

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "int8_dynamic", "int8_weight_only")
# Of the config's own input size, in order: the smaller ones lose more.
SCALES = (0.75, 0.5)
# In the order in which they are tried: each begins with the best of those before it. What cannot change labels by more
# than rounding comes first, and compiling late, because every setting after it is compiled again.
AXES = ("threads", "channels_last", "batch", "precision", "compile", "resize")


@dataclass(frozen=True)
class Setting:
    """Changes to a model's options and to the run's resources, sorted by name: equal changes are equal settings."""

    options: tuple[tuple[str, Any], ...] = ()
    resources: tuple[tuple[str, Any], ...] = ()

    def with_options(self, **changes: Any) -> "Setting":
        return replace(self, options=tuple(sorted({**dict(self.options), **changes}.items())))

    def with_resources(self, **changes: Any) -> "Setting":
        return replace(self, resources=tuple(sorted({**dict(self.resources), **changes}.items())))

    @property
    def name(self) -> str:
        """For people: precision=bf16 torch_threads=4."""
        pairs = itertools.chain(self.options, self.resources)
        return " ".join(f"{key}={str(value).lower()}" for key, value in pairs) or "as it is"

    def overrides(self, model: int) -> list[str]:
        """The options as the arguments of a command line. model: which of the config's."""
        return [f"models.{model}.options.{key}={str(value).lower()}" for key, value in self.options]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What there is to choose from. size: of the model's most common input, (height, width) before padding.

    resize, max_size, channels_last: of the model as it is configured. precision: likewise, fp32 where nothing is said.
    """

    accelerator: bool
    cores: int
    threads: int
    size: tuple[int, int]
    resize: int | None
    max_size: int | None
    channels_last: bool
    precision: str
    compile: bool


@dataclass(frozen=True)
class Proposed:
    """A setting to try, or why it is not worth trying."""

    setting: Setting
    refusal: str = ""


def proposals(axis: str, best: Setting, context: Context, budget: int | None = None) -> Iterator[Proposed]:
    """What to try on one axis, from the best setting so far. budget: the batch budget that a trial with it proposes."""
    if axis == "threads" and not context.accelerator:
        counts = {1 << power for power in range(context.cores.bit_length())} | {context.cores}
        for threads in sorted(counts - {context.threads}):
            if threads <= context.cores:
                yield Proposed(best.with_resources(torch_threads=threads))
    elif axis == "channels_last":
        yield Proposed(best.with_options(channels_last=not context.channels_last))
    elif axis == "batch" and budget is not None:
        yield Proposed(best.with_resources(batch_pixels=budget))
    elif axis == "precision":
        for precision in PRECISIONS:
            setting = best.with_options(precision=precision)
            if precision == "tf32" and not context.accelerator:
                yield Proposed(setting, "tf32 is of NVIDIA's matrix units, this is a CPU")
            elif setting != best:
                yield Proposed(setting)
    elif axis == "compile":
        yield Proposed(best.with_options(compile=not context.compile))
    elif axis == "resize":
        yield from (Proposed(best.with_options(**change)) for change in _smaller(context))


def _smaller(context: Context) -> Iterator[Mapping[str, int]]:
    """Smaller inputs: of the short side where the model has such a rule, else by a bound on the long side."""
    for scale in SCALES:
        if context.resize is not None:
            yield {"resize": _rounded(context.resize * scale)}
        else:
            yield {"max_size": _rounded(max(context.size) * scale)}


def _rounded(pixels: float) -> int:
    """To what models pad to anyway."""
    return max(32, round(pixels / 32) * 32)
