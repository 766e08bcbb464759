"""A taxonomy's names as the vocabulary of a model that reads: what a sample's text picks out of it, and the lists of
word pieces that text models come with."""

from collections.abc import Mapping

from pipeline.errors import CheckpointError, ConfigError, PredictError, StorageError
from pipeline.models.fetch import local_file
from pipeline.taxonomy import Taxonomy

__all__ = ["asked", "category_names", "read_text"]

MAX_TEXT_BYTES = 10_000_000


def category_names(taxonomy: Taxonomy) -> dict[str, int]:
    """Ids of the categories by their names, in lower case."""
    return {category.name.lower(): category.id for category in taxonomy.categories}


def asked(text: str, names: Mapping[str, int]) -> set[int] | None:
    """Categories that a sample's text ("car. person") names, None where it says nothing. Raises PredictError."""
    phrases = [" ".join(part.split()).lower() for part in text.split(".")]
    unknown = [phrase for phrase in phrases if phrase and phrase not in names]
    if unknown:
        shown = ", ".join([*names][:10])
        raise PredictError(f"prompts.text: {unknown[0]!r:.80} is no category of the model; it has {shown}")
    return {names[phrase] for phrase in phrases if phrase} or None


def read_text(uri: str) -> str:
    """The content of the UTF-8 file that the option `vocab` names, a path or an address that fsspec knows. Raises
    ConfigError where it cannot be read or is longer than MAX_TEXT_BYTES."""
    try:
        with local_file(uri, {}, max_bytes=MAX_TEXT_BYTES) as path, open(path, encoding="utf-8") as file:
            return file.read()
    except (CheckpointError, StorageError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"vocab {uri!r} cannot be read: {' '.join(str(error).split())[:300]}") from error
