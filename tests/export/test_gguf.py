"""export_gguf: files that real llama.cpp loads, splits text with, and answers from like PyTorch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from emergency_kit.artifacts import load_manifest, save_manifest, verify_folder
from emergency_kit.errors import ExportError, ModelError
from emergency_kit.export import architecture, certificate, parity
from emergency_kit.export.gguf import build_examiner, export_gguf, open_source, pick_source
from emergency_kit.export.gguf_file import build_plan, write_gguf
from emergency_kit.export.quantize import QUANTIZATIONS
from emergency_kit.export.vocabulary import PRE_TOKENIZERS, build_vocabulary
from emergency_kit.export.weights import load_weights
from tests.export import tiny

TEXTS = ["112", "1-800-222-1222", "10 cm", "call 911 now!!", "🔥🚑 ok", "a\n\nb\n \n  c\t\td  ", "“don’t” — it’s", "37.5°C, ½ cup, 3/4", "é ñ 水 ١٢٣",
         "  lead", "x" * 40, "<|im_start|>user\nhi<|im_end|>\n"]


def ask(path: Path, **request: object) -> dict:
    return parity.ask_llama({"model": str(path), **request}, path.stat().st_size)


def read_field(path: Path, key: str) -> object:
    return GGUFReader(path).fields[key].contents()


@pytest.fixture(scope="module")
def exported(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapter exported in three types, by the function that the command calls."""
    resolved = tiny.resolve(base, tmp_path_factory.mktemp("outputs"), "export.quantizations=[f16, q8_0, q4_k_m]")
    paths = export_gguf(resolved, checkpoint=adapter)
    return dict(zip(("f16", "q8_0", "q4_k_m"), paths))


def test_files_and_manifest(exported: dict[str, Path], adapter: Path) -> None:
    folder = exported["f16"].parent
    stems = ["final-f16", "final-q4_k_m", "final-q8_0"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{stem}{end}" for stem in stems for end in (".certificate.json", ".certificate.md", ".gguf")]
                                                                    + ["manifest.json"])
    assert verify_folder(folder) == []
    manifest = load_manifest(folder)
    assert manifest["stage"] == "export" and manifest["parents"][0]["path"] == str(adapter)
    entry = manifest["export"]["files"]["final-f16.gguf"]
    assert entry["bytes"] == exported["f16"].stat().st_size and entry["quantization"] == "f16" and entry["sha256"] == manifest["files"]["final-f16.gguf"]
    assert entry["verdict"]["verdict"] == "none" and entry["write_peak_added_bytes"] < 200_000_000


def test_certificate_holds_what_was_compared(exported: dict[str, Path]) -> None:
    proof = json.loads(exported["f16"].with_suffix(".certificate.json").read_text())
    assert proof["tokenizer"] == {"strings": 120, "equal": 120, "first_difference": None, "composed_before": 0}
    assert proof["template"] == {"chats": 7, "equal": 7}
    numbers = proof["distributions"]
    assert numbers["answer_tokens"] >= 60 and numbers["mean_kl"] < 1e-4 and numbers["top1_percent"] > 90
    assert abs(numbers["perplexity"] / numbers["reference_perplexity"] - 1) < 0.01
    assert proof["greedy"]["prompts"] == len(proof["greedy"]["answers"]) == proof["safety"]["file"]["answers"] == 2
    assert proof["safety"]["file"]["actions"] > 5 and proof["outside"] == [] and proof["merge_max_abs_logit_difference"] < 1e-3
    page = exported["f16"].with_suffix(".certificate.md").read_text()
    assert "within its bounds" in page and proof["sha256"] in page
    worse = json.loads(exported["q4_k_m"].with_suffix(".certificate.json").read_text())["distributions"]
    better = json.loads(exported["q8_0"].with_suffix(".certificate.json").read_text())["distributions"]
    assert numbers["mean_kl"] < better["mean_kl"] < worse["mean_kl"]


def test_metadata_describes_model_and_tokenizer(exported: dict[str, Path]) -> None:
    fields = {name: field.contents() for name, field in GGUFReader(exported["q4_k_m"]).fields.items() if not name.endswith(("tokens", "merges", "token_type"))}
    expected = {"general.architecture": "llama", "general.name": "final", "general.file_type": 15, "general.quantization_version": 2,
                "llama.block_count": 2, "llama.context_length": 4096, "llama.embedding_length": 256, "llama.attention.head_count": 8,
                "llama.attention.head_count_kv": 2, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False}
    assert {key: fields[key] for key in expected} == expected
    assert "<|im_start|>" in fields["tokenizer.chat_template"]


def test_tensors_are_complete_and_close_to_the_merged_model(exported: dict[str, Path], base: Path, adapter: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    state = model.state_dict()
    expected = {place.gguf: state[place.name] for place in architecture.list_tensors(model, "tiny")}
    family = architecture.FAMILIES["llama"]
    for name, limit in (("f16", 6e-4), ("q8_0", 5e-3), ("q4_k_m", 0.12)):
        tensors = {tensor.name: tensor for tensor in GGUFReader(exported[name]).tensors}
        assert set(tensors) == set(expected) and len(tensors) == 2 + 9 * 2
        for key, tensor in tensors.items():
            rows = architecture.reorder_rows(key, expected[key].detach().numpy(), model.config, family)[:512]  # the embedding has 49152
            found = dequantize(tensor.data[:512], tensor.tensor_type).reshape(rows.shape)
            assert numpy.abs(found - rows).max() <= limit * numpy.abs(rows).max(), key
    kinds = {key: tensor.tensor_type.name for key, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == "Q6_K" and kinds["blk.0.attn_q.weight"] == "Q4_K" and kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_k_m"])
def test_llama_cpp_loads_and_answers(name: str, exported: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.BUNDLED)
    reply = ask(exported[name], texts=TEXTS, prompts=[parity.tokenize(tokenizer, "Call 112")], new_tokens=8)
    assert reply["tokens"] == [parity.tokenize(tokenizer, text) for text in TEXTS]
    assert 1 <= len(reply["generated"][0]) <= 8


def test_default_source_is_the_merged_model_until_it_is_stale(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = tiny.resolve(base, tmp_path)
    with pytest.raises(ModelError, match="next: make train"):
        export_gguf(resolved)
    checkpoint = tiny.copy_folder(adapter, tmp_path / "checkpoints" / "final")
    save_manifest(checkpoint, "train", resolved)
    assert pick_source(resolved, None).folder == checkpoint
    merged = tiny.copy_folder(base, tmp_path / "merged" / "final")
    save_manifest(merged, "merge", resolved, parents=[checkpoint, base])
    assert pick_source(resolved, None).folder == merged
    (checkpoint / "training_state.json").write_text("{}")  # trained again
    save_manifest(checkpoint, "train", resolved)
    assert pick_source(resolved, None).folder == checkpoint
    assert "was made from an earlier adapter" in capsys.readouterr().out


def test_existing_file_is_kept_unless_overwritten(exported: dict[str, Path], base: Path, adapter: Path) -> None:
    before = exported["f16"].read_bytes()
    with pytest.raises(ExportError, match=r"final-f16.gguf: already there; replace with --overwrite"):
        export_gguf(tiny.resolve(base, exported["f16"].parent, "export.quantizations=[f16]"), checkpoint=adapter, out=exported["f16"].parent)
    assert exported["f16"].read_bytes() == before


def test_unknown_type_needs_no_checkpoint(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="did you mean 'q8_0'"):
        export_gguf(tiny.resolve(base, tmp_path, "export.quantizations=[f16, q8]"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "settings"), [
    ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    ("qwen2", {"vocab_size": 49280}),
    ("qwen3", {"head_dim": 64}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 64}, "attention_bias": True})])
def test_families_answer_like_pytorch(kind: str, settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_model(tmp_path / kind, kind, **settings)
    resolved = tiny.resolve(folder, tmp_path, "export.quantizations=[f32]")
    path = export_gguf(resolved, checkpoint=folder)[0]
    assert load_manifest(path.parent)["export"]["files"][path.name]["certificate"]["distributions"]["mean_kl"] < 1e-5
    loaded = AutoTokenizer.from_pretrained(folder)
    splitting = "qwen2" if kind == "qwen2" else "smollm"  # transformers splits so for Qwen2, whatever the file says
    assert f"gpt2 tokenizer ({splitting})" in capsys.readouterr().out
    assert ask(path, texts=TEXTS)["tokens"] == [parity.tokenize(loaded, text) for text in TEXTS]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_known_way_to_split_text_is_llama_cpps(name: str, tmp_path: Path) -> None:
    steps, ignore_merges = PRE_TOKENIZERS[name]
    built = {"Digits": lambda value: {"type": "Digits", "individual_digits": value},
             "Split": lambda value: {"type": "Split", "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False},
             "ByteLevel": lambda value: {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": value}}
    tokenizer = tiny.build_split_tokenizer({"type": "Sequence", "pretokenizers": [built[step](value) for step, value in steps]}, ignore_merges)
    folder = tiny.save_model(tmp_path / "m", tokenizer=tokenizer, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    vocabulary = build_vocabulary(tokenizer, 49152, "tiny")
    assert vocabulary.pre == name
    write_gguf(tmp_path / "m.gguf", build_plan(model, QUANTIZATIONS["f16"], "tiny"), model.config, load_weights(str(folder)), vocabulary,
               architecture.FAMILIES["llama"], "tiny")
    assert ask(tmp_path / "m.gguf", texts=TEXTS)["tokens"] == [parity.tokenize(tokenizer, text) for text in TEXTS]


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_sentencepiece_mistral(tokenizer_class: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "mistral", "mistral", tokenizer=tiny.build_sentencepiece_tokenizer(), tie_word_embeddings=False, vocab_size=2048)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": tokenizer_class, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = export_gguf(tiny.resolve(folder, tmp_path, "export.quantizations=[f16]"), checkpoint=folder)[0]
    assert read_field(path, "tokenizer.ggml.model") == "llama" and read_field(path, "tokenizer.ggml.add_space_prefix") is True
    texts = [f"<s>[INST] {text.strip()} [/INST]" for text in TEXTS]
    assert ask(path, texts=texts)["tokens"] == [parity.tokenize(tokenizer, text) for text in texts]


def test_certificate_finds_unpermuted_rows_lost_control_tokens_and_a_cut_file(base: Path, tmp_path: Path) -> None:
    resolved, quantization = tiny.resolve(base, tmp_path), QUANTIZATIONS["f16"]
    opened = open_source(resolved, pick_source(resolved, base))
    examiner, plan, llama = build_examiner(resolved, opened), build_plan(opened.skeleton, quantization, "tiny"), architecture.FAMILIES["llama"]

    def certify(name: str, vocabulary: object = opened.vocabulary, family: object = llama) -> dict:
        write_gguf(tmp_path / name, plan, opened.skeleton.config, opened.weights, vocabulary, family, "tiny")
        return certificate.certify(tmp_path / name, quantization, examiner)

    assert certify("right.gguf")["outside"] == []
    wrong = certify("rows.gguf", family=dataclasses.replace(llama, permuted=False))
    with pytest.raises(ExportError, match=r"mean KL divergence \S+ is over 0.001.*The file was not kept"):
        certificate.check(wrong, resolved.config.export)
    wrong = certify("no-control.gguf", vocabulary=dataclasses.replace(opened.vocabulary, kinds=[1] * 49152))
    assert wrong["tokenizer"]["equal"] < 120 and "strings into other tokens" in wrong["outside"][0]
    wrong = certify("other-splitting.gguf", vocabulary=dataclasses.replace(opened.vocabulary, pre="llama-bpe"))
    assert wrong["tokenizer"]["equal"] < 120 and wrong["outside"]
    wrong = certify("template.gguf", vocabulary=dataclasses.replace(opened.vocabulary, chat_template="{{ messages[0].content }}"))
    assert wrong["template"]["equal"] == 0 and "chats otherwise" in wrong["outside"][0]
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "rows.gguf").read_bytes()[:1_000_000])
    with pytest.raises(ExportError, match="llama.cpp cannot use the file"):
        certificate.certify(tmp_path / "cut.gguf", quantization, examiner)


def test_out_of_bounds_is_not_kept_unless_told(base: Path, tmp_path: Path) -> None:
    bounds = ["export.quantizations=[q2_k]", "export.max_mean_kl={q2_k: 1e-9}", "export.min_top1_percent={q2_k: 0}"]
    with pytest.raises(ExportError, match="mean KL divergence .* is over 1e-09.*--allow-out-of-bounds"):
        export_gguf(tiny.resolve(base, tmp_path, *bounds), checkpoint=base)
    assert not list((tmp_path / "gguf").glob("*"))
    path = export_gguf(tiny.resolve(base, tmp_path, *bounds, "export.allow_out_of_bounds=true"), checkpoint=base)[0]
    assert "is over 1e-09" in load_manifest(path.parent)["export"]["files"][path.name]["certificate"]["outside"][0]
    assert "OUT OF ITS BOUNDS" in path.with_suffix(".certificate.md").read_text()


def test_a_model_too_large_for_memory_is_compared_tensor_by_tensor(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emergency_kit.export.reference.free_memory", lambda: 1_000_000)
    path = export_gguf(tiny.resolve(base, tmp_path, "export.quantizations=[f16]"), checkpoint=base)[0]
    proof = load_manifest(path.parent)["export"]["files"][path.name]["certificate"]
    assert proof["distributions"]["mean_kl"] < 1e-4 and "one tensor at a time" in proof["reference"]
    assert proof["greedy"]["same"] is None and proof["safety"]["reference"] is None and proof["outside"] == []


def test_unknown_splitting_and_architecture_are_named(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny.build_split_tokenizer({"type": "Whitespace"})
    with pytest.raises(ExportError, match="neither byte-level BPE nor SentencePiece"):
        build_vocabulary(tokenizer, 49152, "tiny")
    tokenizer = tiny.build_split_tokenizer({"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Isolated"}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]})
    with pytest.raises(ExportError, match=r"Punctuation \+ ByteLevel; known: gpt-2, smollm"):
        build_vocabulary(tokenizer, 49152, "tiny")
    with pytest.raises(ExportError, match="has token 49151 .* but its embedding only 100 rows"):
        build_vocabulary(AutoTokenizer.from_pretrained(base), 100, "tiny")
    folder = tiny.copy_folder(base, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"architecture 'olmo' is not one that the GGUF exporter knows \(llama, mistral, qwen2, qwen3\)"):
        export_gguf(tiny.resolve(folder, tmp_path), checkpoint=folder)


def test_a_file_that_cannot_be_written_is_not_left(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    with pytest.raises(ExportError, match="blk.1.ffn_up.weight holds a weight of 1e\\+05, too large for f16"):
        export_gguf(tiny.resolve(folder, tmp_path / "outputs", "export.quantizations=[f16]"), checkpoint=folder)
    assert not any(path.is_file() for path in (tmp_path / "outputs").rglob("*"))


def test_bundled_model_answers_like_pytorch(tmp_path: Path) -> None:
    resolved = tiny.resolve("bundled", tmp_path, "export.quantizations=[f16]", "export.certificate_strings=500")
    path = export_gguf(resolved, checkpoint=tiny.BUNDLED)[0]
    proof = load_manifest(path.parent)["export"]["files"][path.name]["certificate"]
    assert proof["distributions"]["mean_kl"] < 1e-5 and proof["distributions"]["top1_percent"] > 99
    assert proof["template"] == {"chats": 7, "equal": 7} and proof["tokenizer"]["equal"] == 500
    assert len(GGUFReader(path).tensors) == 272
    assert read_field(path, "general.license") == "apache-2.0"
