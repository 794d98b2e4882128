"""Transformers imported with the names of its models read once."""

import subprocess
import sys

CODE = """
import sys
from emergency_kit.model.imports import import_transformers
{call}
from transformers.utils import import_utils
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Trainer, models
reads = import_utils.create_import_structure_from_path
print(getattr(reads, "__wrapped__", None) is None, len(dir(models)), sorted(dir(models)) == sorted(dir(sys.modules["transformers.models"])), hash(tuple(sorted(dir(models)))))
"""


def names(call: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE.format(call=call)], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "0"})
    return done.stdout.split()


def test_the_second_reading_finds_what_its_own_would() -> None:
    quick, plain = names("import_transformers()"), names("")
    assert quick[0] == "True" and plain[0] == "False", "transformers no longer reads its models by create_import_structure_from_path: see model/imports.py"
    assert quick[1:] == plain[1:] and int(quick[1]) > 100
