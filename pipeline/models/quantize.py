"""Weights in 8 bits, by torchao: of linear layers, which are all that it quantizes. An extra: int8."""

import logging

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.extras import import_extra

__all__ = ["QUANTIZED", "quantize"]

# Precisions of a model's options by torchao's configuration. dynamic: activations are rounded too, each at run time.
QUANTIZED = {
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
    "int8_weight_only": "Int8WeightOnlyConfig",
}


def quantize(module: nn.Module, precision: str, where: str) -> None:
    """Change a module's linear layers in place. Raises ConfigError without the extra, for a module that has none, and
    where torchao cannot."""
    linear = sum(isinstance(layer, nn.Linear) for layer in module.modules())
    if not linear:
        raise ConfigError(f"precision {precision} works on linear layers, the model has none ({where})")
    library = import_extra("torchao.quantization", "int8")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            library.quantize_(module, getattr(library, QUANTIZED[precision])())
    except Exception as error:  # torchao's own, of many kinds
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"precision {precision}: {type(error).__name__}: {text} ({where})") from error
