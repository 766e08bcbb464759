"""Trims CRDs to schemas that a test reads fast: `python trim.py CRD.yaml ... > custom_resources.json`.

Descriptions go, defaults too, and what stands there several times (pod templates do, four times) is written once.
Unknown fields are refused wherever the CRD names any, as the API server's strict validation does.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

LEAST = 160  # characters of what is worth a definition of its own
DROPPED = {"description", "default", "title", "example"}


def trimmed(schema: Any, names: bool = False) -> Any:
    """Without prose. names: the keys of this mapping are names of fields, not words of the schema."""
    if isinstance(schema, list):
        return [trimmed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if names:
        return {key: trimmed(value) for key, value in schema.items()}
    kept = {key: value for key, value in schema.items() if key not in DROPPED and not key.startswith("x-kubernetes")}
    result = {key: trimmed(value, key == "properties") for key, value in kept.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **{key: result[key] for key in ("pattern",) if key in result}}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in result
    if "properties" in result and not open_ended:
        result["additionalProperties"] = False
    return result


def shared(roots: dict[str, Any]) -> dict[str, Any]:
    """The same schemas, with what repeats in `$defs`."""
    counts: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            counts[json.dumps(node, sort_keys=True)] += 1
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            count(child)

    definitions: dict[str, Any] = {}

    def replaced(node: Any, names: bool = False) -> Any:
        if isinstance(node, list):
            return [replaced(item) for item in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if not names and counts[text] > 1 and len(text) >= LEAST:
            name = hashlib.sha256(text.encode()).hexdigest()[:8]
            if name not in definitions:
                definitions[name] = None
                definitions[name] = {key: replaced(value, key == "properties") for key, value in node.items()}
            return {"$ref": f"#/$defs/{name}"}
        return {key: replaced(value, key == "properties" and not names) for key, value in node.items()}

    for root in roots.values():
        count(root)
    return {"kinds": {kind: replaced(root) for kind, root in roots.items()}, "$defs": definitions}


def main(paths: list[str]) -> None:
    roots = {}
    for path in paths:
        crd = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        for version in crd["spec"]["versions"]:
            if version["served"] and version["storage"]:
                kind = f"{crd['spec']['group']}/{version['name']} {crd['spec']['names']['kind']}"
                root = trimmed(version["schema"]["openAPIV3Schema"])
                root["properties"]["metadata"] = {"type": "object"}
                roots[kind] = root
    json.dump(shared(roots), sys.stdout, sort_keys=True, separators=(",", ":"))
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1:])
