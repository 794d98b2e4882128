import pytest

from emergency_kit.export.gguf import export_gguf
from tests.one_thread import one_thread  # noqa: F401
from tests.tiny import WHOLE, resolve, save_tiny_model


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A tiny random model with the bundled tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), tokens=WHOLE)


@pytest.fixture(scope="package")
def gguf(folder, tmp_path_factory):
    """The same model as a float32 GGUF file, by the exporter."""
    out = tmp_path_factory.mktemp("gguf")
    export_gguf(resolve(folder, training__output_dir=out, export__quantizations='["f32"]', export__allow_out_of_bounds="true", export__certificate_strings=40,
                        export__certificate_answer_tokens=40, export__certificate_prompts=1, export__certificate_max_new_tokens=4), checkpoint=folder, out=out / "files")
    return next((out / "files").glob("*.gguf"))
