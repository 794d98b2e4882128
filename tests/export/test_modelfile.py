"""Modelfile: the prompts of training through Ollama's grammar and Go's templates, for each kind of chat template."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from emergency_kit.artifacts import verify_folder
from emergency_kit.data.format import SYSTEM_PROMPT, build_messages
from emergency_kit.data.template import render_prompt
from emergency_kit.errors import ExportError
from emergency_kit.export import modelfile
from emergency_kit.export.gguf import export_gguf
from emergency_kit.export.layouts import Layouts, write_layouts
from emergency_kit.export.modelfile import build_modelfile, build_template, fill_template, parse_modelfile, prove_modelfile
from tests.data.families import build_tokenizer
from tests.export import tiny

LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def tokenizer_of(kind: str):
    if kind == "mistral":
        return tiny.build_sentencepiece_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(tiny.BUNDLED)
    if kind == "llama3":
        tokenizer.chat_template = LLAMA3
    return tokenizer


@pytest.mark.parametrize("kind", ["chatml", "mistral", "llama3"])
def test_prompts_are_those_of_training(kind: str, tmp_path: Path) -> None:
    tokenizer, resolved = tokenizer_of(kind), tiny.resolve(tmp_path, tmp_path)
    text = build_modelfile("final-q4_k_m.gguf", tokenizer, "apache-2.0", resolved)
    prove_modelfile(text, tokenizer, resolved)
    parsed = parse_modelfile(text)
    assert parsed.source == "./final-q4_k_m.gguf" and parsed.system == SYSTEM_PROMPT and parsed.licenses == ["apache-2.0"]
    assert parsed.parameters == [("stop", tokenizer.eos_token), ("num_ctx", 1280), ("num_predict", resolved.config.inference.max_new_tokens), ("temperature", 0.0), ("repeat_penalty", 1.0)]


@pytest.mark.parametrize("kind", ["chatml", "mistral", "llama3"])
def test_two_turns_are_the_chat_templates(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    template = build_template(tokenizer)
    user, answer, more = "CARD: x\n\nSITUATION: fire", "FACTS\n• a", "and now?"
    found = fill_template(template, SYSTEM_PROMPT, user, answer) + fill_template(template, "", more, "")
    system, content = {"role": "system", "content": SYSTEM_PROMPT}, user
    first = [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{content}"}] if kind == "mistral" else [system, {"role": "user", "content": content}]
    turns = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": more}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) in (found, (tokenizer.bos_token or "") + found)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters='"\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'), min_size=1))
def test_any_text_survives_the_grammar(text: str) -> None:
    if not text.strip():
        return
    parsed = parse_modelfile(f"FROM ./a.gguf\nSYSTEM {modelfile._quote(text)}\nPARAMETER stop {modelfile._quote(text)}\n")
    assert parsed.system == text and parsed.stops == [text]


@settings(max_examples=60, deadline=None)
@given(system=st.text(), user=st.text(), literal=st.text())
@example(system="", user="", literal="{")
@example(system="a", user="b", literal="{{{")
def test_templates_fill_as_written(system: str, user: str, literal: str) -> None:
    escaped = modelfile._escape(literal.replace("}}", ""))
    expected = literal.replace("}}", "")
    template = "{{ if .System }}" + escaped + "{{ .System }}{{ else }}none{{ end }}{{ .Prompt }}"
    assert fill_template(template, system, user, "") == ((expected + system) if system else "none") + user


def test_comments_case_and_blocks() -> None:
    parsed = parse_modelfile('# a comment\nfrom ./m.gguf\n\nparameter stop "<|im_end|>"\nSYSTEM """two\nlines"""\nMESSAGE user hello there\nADAPTER ./a.gguf\n')
    assert (parsed.source, parsed.stops, parsed.system, parsed.messages, parsed.adapters) == (
        "./m.gguf", ["<|im_end|>"], "two\nlines", [("user", "hello there")], ["./a.gguf"])


@pytest.mark.parametrize(("text", "message"), [
    ("FROM ./a\nTEMPLTE x\n", "line 2: instruction 'TEMPLTE' is unknown"), ("FROM ./a\nPARAMETER temprature 1\n", "line 2: parameter 'temprature' is unknown"),
    ("FROM ./a\nPARAMETER num_ctx many\n", "num_ctx is 'many'; expected int"), ('FROM ./a\nSYSTEM """open\n', 'opens with """ and nothing closes it'),
    ("SYSTEM x\n", "no FROM line"), ("FROM\n", "FROM has no value"), ("FROM a\nMESSAGE doctor hi\n", "role 'doctor'"), ('FROM a\nSYSTEM "a" b\n', "stands behind")])
def test_a_wrong_modelfile_is_refused(text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message.replace('"', '"')):
        parse_modelfile(text)


def test_a_wrong_template_is_found(tmp_path: Path) -> None:
    tokenizer, resolved = tokenizer_of("chatml"), tiny.resolve(tmp_path, tmp_path)
    text = build_modelfile("m.gguf", tokenizer, None, resolved)
    with pytest.raises(ExportError, match="its template renders"):
        prove_modelfile(text.replace("<|im_start|>assistant", "### Response:"), tokenizer, resolved)
    with pytest.raises(ExportError, match="does not hold the system prompt and the stop token"):
        prove_modelfile(text.replace("<|im_end|>\"", "</s>\""), tokenizer, resolved)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}"
    with pytest.raises(ExportError, match="more than wrap"):
        build_template(tokenizer)


def write_ollama(folder: Path, create: str, show: str) -> None:
    """A program of Ollama's name that says what Ollama would."""
    program = folder / "ollama"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\ncase $1 in create) {create};; show) {show};; esac\n')
    program.chmod(0o755)


def test_layouts_and_ollamas_own_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, resolved = tokenizer_of("chatml"), tiny.resolve(tmp_path, tmp_path)
    files = [tmp_path / "gguf" / f"final-{name}.gguf" for name in ("q8_0", "q4_k_m")]
    files[0].parent.mkdir()
    for path in files:
        path.write_bytes(path.name.encode())
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    write = lambda **more: write_layouts(Layouts(ollama=True, lmstudio=True, **more), files, "final", tokenizer, "apache-2.0", resolved, False)  # noqa: E731
    write()
    assert "not checked by Ollama, which is not installed here. Next, where it is: ollama create final:q8_0" in capsys.readouterr().out
    folder = tmp_path / "gguf"
    laid = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert laid == sorted(["final-q8_0.gguf", "final-q4_k_m.gguf", "lmstudio/ai-emergency-kit/final/final-q4_k_m.gguf", "lmstudio/ai-emergency-kit/final/final-q8_0.gguf",
                           "lmstudio/config-presets/final.preset.json", "ollama/final-q4_k_m/Modelfile", "ollama/final-q4_k_m/final-q4_k_m.gguf",
                           "ollama/final-q8_0/Modelfile", "ollama/final-q8_0/final-q8_0.gguf"])
    assert os.path.samefile(files[0], folder / "ollama/final-q8_0/final-q8_0.gguf")
    write_ollama(tmp_path, "exit 0", f"cat {folder}/ollama/final-q8_0/Modelfile")
    write(ollama_name="kit")
    assert (tmp_path / "calls").read_text().splitlines()[:2] == [f"create kit:q8_0 -f {folder}/ollama/final-q8_0/Modelfile", "show kit:q8_0 --modelfile"]
    write_ollama(tmp_path, "exit 0", "printf 'FROM x\\nTEMPLATE [INST]\\n'")
    with pytest.raises(ExportError, match="has another template, system, stop than"):
        write()
    write_ollama(tmp_path, "echo unknown parameter >&2; exit 1", "")
    with pytest.raises(ExportError, match="ollama create refused it .unknown parameter"):
        write()
    write_ollama(tmp_path, "echo 'Error: could not connect to a running Ollama instance' >&2; exit 1", "")
    write()
    assert "whose server does not run" in capsys.readouterr().out


def test_prompt_of_the_bundled_tokenizer_is_byte_for_byte() -> None:
    tokenizer = tokenizer_of("chatml")
    messages = build_messages("smoke under the door", None)
    assert fill_template(build_template(tokenizer), SYSTEM_PROMPT, messages[1]["content"], "") == render_prompt(tokenizer, messages)


def test_files_that_are_there_are_laid_out_as_they_are(outputs: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.copy_folder(outputs / "gguf", tmp_path / "gguf")
    resolved = tiny.resolve(base, outputs, "export.quantizations=[q8_0]")
    before = (folder / "final-q8_0.gguf").stat().st_mtime_ns
    export_gguf(resolved, out=folder, layouts=Layouts(ollama=True, lmstudio=True))
    assert "final-q8_0.gguf: already there, of the same model" in capsys.readouterr().out
    assert (folder / "final-q8_0.gguf").stat().st_mtime_ns == before and verify_folder(folder) == []
    assert (folder / "ollama/final-q8_0/Modelfile").is_file() and (folder / "lmstudio/ai-emergency-kit/final/final-q8_0.gguf").is_file()
    with pytest.raises(ExportError, match="already there; replace with --overwrite"):
        export_gguf(resolved, out=folder)


@pytest.mark.parametrize("family", ["mistral-v0.2", "mistral-v0.2-revised", "mistral-v0.3", "llama-3.2", "qwen-3", "gemma", "phi-3"])
def test_families_have_their_prompts_and_stop_at_the_end_of_a_turn(family: str, tmp_path: Path) -> None:
    tokenizer, resolved = build_tokenizer(family), tiny.resolve(tmp_path, tmp_path)
    text = build_modelfile("m.gguf", tokenizer, None, resolved)
    prove_modelfile(text, tokenizer, resolved)
    assert parse_modelfile(text).stops == {"gemma": ["<end_of_turn>", "<eos>"], "phi-3": ["<|end|>", "<|endoftext|>"]}.get(family, [tokenizer.eos_token])
