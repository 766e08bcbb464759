"""What the licence of a model and of its weights allows."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from pipeline.models.hub import HF, TIMM, timm_weights
from pipeline.models.spec import ModelSpec

__all__ = ["licence", "licence_warning"]

# Published weights under another licence than their registry entry's, by repository.
NON_COMMERCIAL = {
    "depth-anything/Depth-Anything-V2-*Base*": "CC-BY-NC-4.0",
    "depth-anything/Depth-Anything-V2-*Large*": "CC-BY-NC-4.0",
    "apple/DepthPro*": "Apple's licence for research",
    "nvidia/segformer-*": "NVIDIA Source Code License (non-commercial)",
    "nvidia/mit-*": "NVIDIA Source Code License (non-commercial)",
    "smp-hub/mit_*": "NVIDIA Source Code License (non-commercial)",
    "smp-hub/segformer-*": "NVIDIA Source Code License (non-commercial)",
}
# Among timm's names of licences.
TIMM_NON_COMMERCIAL = ("-nc-", "noncommercial", "apple-amlr", "seer-license")


def licence(spec: ModelSpec, weights: str, checkpoint: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, bool]:
    """The licence of a model with its weights, as far as it is known, and whether it leaves commercial use open.

    Beside the spec's own: what timm says of its weights, the repositories of NON_COMMERCIAL, and the spec.json of a
    checkpoint, which has the licence of the weights that its training began with. Raises CheckpointError
    for weights that timm does not have, ConfigError without its extra.
    """
    own = ""
    if checkpoint.get("commercial") is False:
        return str(checkpoint.get("license", "unknown"))[:200], False
    if weights.startswith(TIMM):
        own = str(timm_weights(weights.partition("#")[0]).license or "unknown")
        open_ = not any(part in own for part in TIMM_NON_COMMERCIAL)
    else:
        repo = weights.removeprefix(HF).partition("#")[0].partition(":")[0].partition("@")[0]
        if weights.startswith(HF):
            own = next((name for pattern, name in NON_COMMERCIAL.items() if fnmatchcase(repo, pattern)), "")
        open_ = not own
    text = f"{spec.license}, weights {own}" if own and own.lower() != spec.license.lower() else spec.license
    return text, spec.commercial and open_


def licence_warning(label: str, text: str) -> str:
    """What a job says of a model whose licence forbids commercial use."""
    return f"warning: the licence of {label} ({text}) forbids commercial use"
