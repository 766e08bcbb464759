"""Models of segmentation-models-pytorch (https://github.com/qubvel-org/segmentation_models.pytorch, MIT).

Any of its encoders goes with any of them, timm's too (`tu-NAME`). Weights are random; the library never loads any.
"""

import difflib
from typing import Any

from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.adapt import backbone
from pipeline.models.extras import import_extra

__all__ = ["EXTRA", "adapt_encoder", "build_pspnet", "builder"]

EXTRA = "smp"
LIBRARY = "segmentation_models_pytorch"
# The Mix Transformers' code and weights are NVIDIA's, for research and evaluation only.
MIX_TRANSFORMER = "mit_"

adapt_encoder = backbone("encoder.", "encoder.model.")


def builder(architecture: str, default_encoder: str) -> Any:
    """A `build` for the library's class `architecture`.

    An encoder under a licence that forbids commercial use can only be chosen where the default has it too, so that the
    spec's licence holds.
    """

    def build(num_classes: int, encoder: str = default_encoder) -> nn.Module:
        library = import_extra(LIBRARY, EXTRA)
        _check(library, encoder, default_encoder)
        module: nn.Module = getattr(library, architecture)(
            encoder_name=encoder, encoder_weights=None, classes=num_classes
        )
        if encoder.startswith(MIX_TRANSFORMER):
            # patch_embed1, block1, norm1, patch_embed2, ...: as they run, which is how backbone.py counts stages. The
            # library registers all patch_embeds first.
            parts: Any = module.get_submodule("encoder")._modules
            for name in sorted(parts, key=lambda name: str(name)[-1]):
                parts[name] = parts.pop(name)
        return module

    return build


def build_pspnet(num_classes: int, encoder: str = "resnet50") -> nn.Module:
    """PSPNet on all stages of its encoder at an eighth of the image's size, by dilation, as in Zhao et al. 2017
    (arXiv:1612.01105, section 3.2).

    The library's own default cuts the encoder off at an eighth, and keeps the stages behind it as weights that nothing
    uses. Raises ConfigError for encoders that cannot be dilated.
    """
    library = import_extra(LIBRARY, EXTRA)
    _check(library, encoder, "resnet50")
    try:
        dilated = library.encoders.get_encoder(encoder, weights=None, output_stride=8)
    except (ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"encoder {encoder!r} cannot be dilated, which pspnet needs: {text}") from error
    module: nn.Module = library.PSPNet(
        encoder_name=encoder, encoder_weights=None, encoder_depth=5, upsampling=8, classes=num_classes
    )
    module.encoder = dilated
    return module


def _check(library: Any, encoder: Any, default_encoder: str) -> None:
    """Raise ConfigError for an encoder that does not exist or has another licence."""
    if not isinstance(encoder, str):
        raise ConfigError(f"encoder must be a name, got {encoder!r}")
    if encoder.startswith("tu-"):
        known = import_extra("timm", EXTRA).list_models()
        name, label = encoder.removeprefix("tu-").partition(".")[0], "tu-"
    else:
        known, name, label = library.encoders.get_encoder_names(), encoder, ""
    if name not in known:
        close = [label + item for item in difflib.get_close_matches(name, known, n=3, cutoff=0.4)]
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known[:20])}, ..."
        raise ConfigError(f"unknown encoder {encoder!r}; {hint}")
    if encoder.startswith(MIX_TRANSFORMER) and not default_encoder.startswith(MIX_TRANSFORMER):
        raise ConfigError(
            f"encoder {encoder!r} is under NVIDIA's licence, which forbids commercial use and is not this model's; "
            "it goes with model segformer, or with a ModelSpec of your own"
        )
