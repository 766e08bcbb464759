"""The copy of a config: what is proposed stands in it, all else as it was, and credentials of a command line do not."""

import stat
from pathlib import Path

import pytest
import yaml

from pipeline.config import LabelConfig
from pipeline.configfile import load_config
from pipeline.errors import ConfigError
from pipeline.preflight.apply import applied, default_path, write_copy

TEXT = """\
# Night run.
source:
  format: scenes   # generated
  count: 7
resources:
  torch_threads: 2  # shared machine
  workers: auto

# Two of them.
models:
  - name: unet_small
output: {uri: out}
"""
VALUES = {"workers": 3, "cpus_per_worker": 2.0, "layout": "fused", "batch_pixels": 123456}


def load(text: str, tmp_path: Path) -> LabelConfig:
    path = tmp_path / "copy.yaml"
    path.write_text(text)
    return load_config(LabelConfig, str(path))


def test_the_copy_is_the_config_with_the_proposal_and_its_comments(tmp_path: Path) -> None:
    copy, left_out = applied(TEXT, [], VALUES)
    assert left_out == []
    config = load(copy, tmp_path)
    assert config.resources.model_dump(include=set(VALUES)) == VALUES
    assert config.resources.torch_threads == 2
    assert config.model_copy(update={"resources": None}) == load(TEXT, tmp_path).model_copy(update={"resources": None})
    for comment in ("# Night run.", "# generated", "# Two of them."):
        assert comment in copy
    assert copy.index("# Two of them.") < copy.index("models:")
    assert copy.index("resources:") < copy.index("models:")


def test_overrides_are_in_the_copy_but_for_storage_options_and_credentials(tmp_path: Path) -> None:
    overrides = [
        "source.count=9",
        "seed=4",
        "output.storage.secret=hush-hush-hush",
        "models.0.storage.key=hidden-key",
        "models.0.options.hf_token=hidden-token",
    ]
    copy, left_out = applied(TEXT, overrides, VALUES)
    config = load(copy, tmp_path)
    assert (config.source.count, config.seed) == (9, 4)  # type: ignore[union-attr]
    assert left_out == ["output.storage.secret", "models.0.storage.key", "models.0.options.hf_token"]
    assert "hush" not in copy
    assert "hidden" not in copy


@pytest.mark.parametrize(
    "text",
    [
        "{source: {format: scenes}, models: [{name: unet_small}], output: {uri: out}}\n",
        "---\nsource:\n  format: scenes\n'models':\n  - name: unet_small\n'resources':\n  workers: 1\n"
        "output:\n  uri: out\n...\n",
        "output:\n  uri: |-\n    out\n\nsource: {format: scenes}\nmodels:\n- name: unet_small\nresources: # none\n",
        "",
    ],
)
def test_whatever_the_style_of_the_config_the_copy_reads_as_it_should(text: str, tmp_path: Path) -> None:
    overrides = ["source.format=scenes", "models.0.name=unet_small", "output.uri=out"]
    copy, _ = applied(text, overrides, VALUES)
    config = load(copy, tmp_path)
    assert config.resources.model_dump(include=set(VALUES)) == VALUES
    assert (config.source.format, config.models[0].name, config.output.uri) == ("scenes", "unet_small", "out")
    assert "&" not in copy
    assert yaml.safe_load(copy)["resources"] == VALUES


def test_a_copy_of_the_copy_is_the_copy() -> None:
    once, _ = applied(TEXT, [], VALUES)
    assert yaml.safe_load(applied(once, [], VALUES)[0]) == yaml.safe_load(once)
    assert applied(once, [], VALUES)[0].count("proposed by maskmill") == 1


def test_the_copy_is_named_after_the_config_and_has_its_rights(tmp_path: Path) -> None:
    config = tmp_path / "label.yaml"
    config.write_text(TEXT)
    config.chmod(0o640)
    path = default_path(str(config))
    assert path == tmp_path / "label.preflight.yaml"
    write_copy(str(config), path, "seed: 1\n")
    write_copy(str(config), path, "seed: 2\n")
    assert path.read_text() == "seed: 2\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(item.name for item in tmp_path.iterdir()) == ["label.preflight.yaml", "label.yaml"]
    write_copy(None, tmp_path / "new.yaml", "seed: 3\n")
    assert stat.S_IMODE((tmp_path / "new.yaml").stat().st_mode) == 0o600


def test_the_config_itself_is_never_replaced(tmp_path: Path) -> None:
    config = tmp_path / "label.yaml"
    config.write_text(TEXT)
    with pytest.raises(ConfigError, match="another PATH than the config itself"):
        write_copy(str(config), tmp_path / "." / "label.yaml", "")
    assert config.read_text() == TEXT
    with pytest.raises(ConfigError, match="--apply needs a PATH"):
        default_path("s3://bucket/label.yaml")
