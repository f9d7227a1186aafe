"""Text → token ids: against the tokenizer itself, and the refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from building import FIXTURES
from transformers import AutoTokenizer

from corda_convert.corpus import CorpusOptions, presets, read_corpus, read_documents, read_samples, read_stream
from corda_convert.corpus.options import limited_seq_len
from corda_convert.errors import CordaConvertError, InputNotFound, MalformedFile, PlanRefused, UnsupportedInput

KNOWLEDGE = FIXTURES / "data" / "knowledge.jsonl"
TEMPLATE = "Question: {question} Answer: {answer}"
CONVERSATION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FIXTURES / "model")


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of text: bytes, text, or a line of JSON for each record."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")
        return path

    return write


def refused(options: CorpusOptions, tokenizer: Any) -> str:
    with pytest.raises(CordaConvertError) as refusal:
        read_corpus(options, tokenizer)
    return str(refusal.value)


def test_records_unpacked_are_what_the_tokenizer_makes_of_them(tokenizer: Any) -> None:
    samples = read_samples(CorpusOptions((KNOWLEDGE,), (TEMPLATE,), pack=False), tokenizer)
    lines = (FIXTURES / "data" / "knowledge.txt").read_text(encoding="utf-8").splitlines()
    assert samples == tokenizer(lines)["input_ids"]


def test_the_lines_of_a_text_file_are_its_records_unless_packed(tokenizer: Any) -> None:
    text = FIXTURES / "data" / "knowledge.txt"
    assert read_samples(CorpusOptions((text,), pack=False), tokenizer) == read_samples(
        CorpusOptions((KNOWLEDGE,), (TEMPLATE,), pack=False), tokenizer
    )


def test_packed_samples_are_the_tokens_of_the_text_in_windows_that_begin_as_texts_do(tokenizer: Any) -> None:
    text = FIXTURES / "data" / "english.eval.txt"
    corpus = read_corpus(CorpusOptions((text,), seq_len=100, samples=1000), tokenizer)
    begin, *ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    assert [token for sample in corpus.samples for token in sample[1:]] == ids
    assert {sample[0] for sample in corpus.samples} == {begin}
    assert {len(sample) for sample in corpus.samples[:-1]} == {100}
    (warning,) = corpus.warnings
    assert f"{len(corpus.samples)} samples of 100 tokens, {corpus.tokens:,} tokens" in warning
    assert "1,000 were asked for" in warning


def test_a_long_text_is_taken_in_pieces_whose_order_the_seed_decides(
    tokenizer: Any, written: Callable[..., Path]
) -> None:
    lines = [f"Line {number} of a long text, which says nothing else.\n" for number in range(9000)]
    path = written("long.txt", "".join(lines))
    options = CorpusOptions((path,), seq_len=50, samples=4)
    first, again, other = (read_samples(replace(options, seed=seed), tokenizer) for seed in (1, 1, 2))
    assert first == again != other
    assert all(len(sample) == 50 for sample in first)
    everything = read_samples(replace(options, samples=10**6), tokenizer)
    text = tokenizer.decode([token for sample in everything for token in sample], skip_special_tokens=True)
    assert sorted(line for line in text.splitlines() if line) == sorted(line.rstrip("\n") for line in lines)


def test_the_stream_of_records_is_their_text_joined_by_blank_lines(tokenizer: Any) -> None:
    records = [json.loads(line) for line in KNOWLEDGE.read_text(encoding="utf-8").splitlines()]
    text = "\n\n".join(record["question"] + "\n" + record["answer"] for record in records)
    expected = tokenizer(text, verbose=False)["input_ids"]
    assert read_stream(CorpusOptions((KNOWLEDGE,), ("question", "answer")), tokenizer) == expected


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CONVERSATION},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, CONVERSATION[1]]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"conversation": [{"human": "Why?", "assistant": "Because."}]},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"instruction": "Why?", "response": "Because."},
        {"query": "Why?", "response": "Because."},
        {"question": "Why?", "answer": "Because."},
    ],
    ids=lambda record: "-".join(record),
)
def test_conversations_in_every_common_form_go_through_the_chat_template(
    record: dict[str, Any], tokenizer: Any, written: Callable[..., Path]
) -> None:
    options = CorpusOptions((written("chat.jsonl", [record]),), chat=True, pack=False)
    expected = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)["input_ids"]
    assert read_samples(options, tokenizer) == [expected]


def test_an_input_goes_below_its_instruction_and_a_system_message_above(
    tokenizer: Any, written: Callable[..., Path]
) -> None:
    record = {"system": "Be kind.", "instruction": "Add.", "input": "1 and 2", "output": "3"}
    (document,) = read_documents(CorpusOptions((written("chat.jsonl", [record]),), chat=True), tokenizer)
    assert tokenizer.decode(document.token_ids) == "Be kind.\n<s>Question: Add.\n\n1 and 2 Answer: 3</s>"


def test_two_fields_name_the_turns_of_a_conversation(tokenizer: Any, written: Callable[..., Path]) -> None:
    path = written("chat.jsonl", [{"Q": "Why?", "A": "Because.", "messages": []}])
    (document,) = read_documents(CorpusOptions((path,), ("Q", "A"), chat=True), tokenizer)
    assert tokenizer.decode(document.token_ids) == "<s>Question: Why? Answer: Because.</s>"


def test_packed_conversations_stand_end_to_end_with_the_special_tokens_of_the_template(
    tokenizer: Any, written: Callable[..., Path]
) -> None:
    path = written("chat.jsonl", [{"messages": CONVERSATION}] * 3)
    samples = read_samples(CorpusOptions((path,), chat=True, seq_len=7, samples=99), tokenizer)
    once = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)["input_ids"]
    assert [token for sample in samples for token in sample] == once * 3


def test_templates_reach_into_records(tokenizer: Any, written: Callable[..., Path]) -> None:
    record = {"answers": [{"text": "Oslo"}], "n": 3, "a.b": "dotted"}
    path = written("nested.jsonl", [record])
    options = CorpusOptions((path,), (r"{{{answers.0.text}}}\n{n} {a.b}",), pack=False)
    (sample,) = read_samples(options, tokenizer)
    assert sample == tokenizer("{Oslo}\n3 dotted")["input_ids"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", '[{"text": "one two"}, {"text": "three"}]'),
        ("wrapped.json", '{"version": 2, "rows": [{"text": "one two"}, {"text": "three"}]}'),
        ("strings.json", '["one two", "three"]'),
        ("lines.json", '{"text": "one two"}\n{"text": "three"}\n'),
        ("marked.jsonl", b'\xef\xbb\xbf{"text": "one two"}\r\n\r\n{"text": "three"}'),
        ("strings.jsonl", '"one two"\n"three"'),
    ],
)
def test_json_comes_in_several_forms(name: str, content: Any, tokenizer: Any, written: Callable[..., Path]) -> None:
    samples = read_samples(CorpusOptions((written(name, content),), pack=False), tokenizer)
    assert samples == tokenizer(["one two", "three"])["input_ids"]


def test_parquet_gives_what_the_same_rows_of_json_give(tokenizer: Any, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [json.loads(line) for line in KNOWLEDGE.read_text(encoding="utf-8").splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "knowledge.parquet")
    options = CorpusOptions((tmp_path / "knowledge.parquet",), (TEMPLATE,), pack=False, samples=50)
    assert read_samples(options, tokenizer) == read_samples(replace(options, files=(KNOWLEDGE,)), tokenizer)


def test_special_tokens_of_both_sides_stay_around_each_window(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    bounded = AutoTokenizer.from_pretrained(FIXTURES / "model")
    bounded._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    text = FIXTURES / "data" / "english.eval.txt"
    samples = read_samples(CorpusOptions((text,), seq_len=64, samples=3), bounded)
    assert [(sample[0], sample[-1], len(sample)) for sample in samples] == [(1, 2, 64)] * 3


def test_what_is_wrong_with_the_options_is_said_all_at_once(tokenizer: Any, tmp_path: Path) -> None:
    options = CorpusOptions((tmp_path / "none.txt", tmp_path), seq_len=1, samples=0, preset="wiki", field=("text",))
    with pytest.raises(PlanRefused) as refusal:
        read_corpus(options, tokenizer)
    text = str(refusal.value)
    for part in (
        "Both files and a preset",
        "--seq-len is 1; it is 2 at least",
        "--samples is 0",
        "There is no preset wiki",
        f"There is no file of text {tmp_path / 'none.txt'}",
        f"{tmp_path} is a folder",
        "--field is for files",
    ):
        assert part in text
    assert "Neither a file nor a preset" in refused(CorpusOptions(), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "There is no text in empty.txt: no records"),
        ("blank.jsonl", '{"text": " "}\n{"text": ""}', "There is no text in blank.jsonl: 2 records, all of them blank"),
        ("latin.txt", "eins\nzwei\nfünf".encode("latin-1"), "latin.txt, line 3: byte 0xfc (at 11) is not UTF-8"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xfc"}', "latin.jsonl, line 2: byte 0xfc"),
        ("cut.jsonl", '{"text": "a"}\n{"text": ', "cut.jsonl, line 2 is no JSON"),
        ("number.jsonl", "7", "line 1 is a number; a record is"),
        ("other.jsonl", '{"title": "a", "body": "b"}', "has no field text. It has: title, body"),
        ("none.jsonl", "{}", "has no field text. It has none."),
        ("list.jsonl", '{"text": ["a"]}', "text is no text, but a list.\nDots lead into it: --field text.0"),
        ("utf16.txt", "hello".encode("utf-16"), "is not UTF-8.\nConvert the file first, as with: iconv -f utf-16"),
        ("null.jsonl", '{"text": null}', "text is no text, but null"),
        ("cut.json", '[{"text": "a"}', "cut.json is no JSON"),
        ("notes.md", "text", "is no file of text that is known by its ending"),
        ("fake.parquet", b"PAR1 no", "is no parquet file"),
        ("deep.json", "[" * 100_000, "deep.json is no JSON: maximum recursion depth"),
        ("deep.jsonl", "[" * 100_000, "deep.jsonl, line 1 is no JSON: maximum recursion depth"),
        ("half.jsonl", '{"text": "a \\ud83d b"}', "half.jsonl, line 1: \\ud83d is half of a character"),
    ],
)
def test_what_cannot_be_read_is_refused_by_file_and_line(
    name: str, content: Any, message: str, tokenizer: Any, written: Callable[..., Path]
) -> None:
    assert message in refused(CorpusOptions((written(name, content),)), tokenizer)


def test_conversations_that_are_none_are_refused(tokenizer: Any, written: Callable[..., Path]) -> None:
    def said(record: Any, using: Any = tokenizer) -> str:
        return refused(CorpusOptions((written("chat.jsonl", [record]),), chat=True), using)

    assert "line 1 has no turns of a conversation. Its fields: title, body" in said({"title": "a", "body": "b"})
    assert "messages are a list, not an object" in said({"prompt": {}, "completion": "a"})
    assert "has no message" in said({"messages": []})
    assert "neither `role` and `content`" in said({"messages": [{"text": "a"}]})
    assert "a message's content is no text, but null" in said({"messages": [{"role": "user", "content": None}]})
    plain = AutoTokenizer.from_pretrained(FIXTURES / "model")
    plain.chat_template = None
    assert "has no chat template" in said({"messages": CONVERSATION}, plain)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "the chat template refuses these messages: roles must alternate" in said({"messages": CONVERSATION}, plain)


@pytest.fixture
def local_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a folder in the place of a preset's repository, with one file of records for each part."""

    def place(name: str, parts: dict[str, list[dict[str, Any]]]) -> None:
        for file, records in parts.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        preset = replace(presets.PRESETS[name], repository=str(tmp_path / name), configuration=None, revision=None)
        monkeypatch.setattr(presets, "PRESETS", {**presets.PRESETS, name: preset})

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return place


def test_a_preset_of_questions_is_packed_and_one_of_instructions_is_not(
    tokenizer: Any, local_preset: Callable[..., None]
) -> None:
    local_preset("nqopen", {"train.jsonl": [{"question": "who", "answer": ["a"]}, {"question": "when", "answer": []}]})
    (packed,) = read_samples(CorpusOptions(preset="NQopen"), tokenizer)
    assert tokenizer.decode(packed, skip_special_tokens=True) in ("who\n\nwhen", "when\n\nwho")
    records = [
        {"instruction": "Say one.", "input": "", "output": "One."},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    local_preset("alpaca", {"train.jsonl": records})
    corpus = read_corpus(CorpusOptions(preset="alpaca"), tokenizer)
    assert corpus.samples == [tokenizer("Say one.\n\nOne.")["input_ids"]]
    chat = read_samples(CorpusOptions(preset="alpaca", chat=True), tokenizer)
    assert tokenizer.decode(chat[0]) == "<s>Question: Say one. Answer: One.</s>"


def test_perplexity_reads_the_evaluation_part_of_a_preset_blank_lines_included(
    tokenizer: Any, local_preset: Callable[..., None]
) -> None:
    local_preset(
        "wikitext2", {"train.jsonl": [{"text": "no"}], "test.jsonl": [{"text": "a"}, {"text": ""}, {"text": "b"}]}
    )
    assert (
        read_stream(CorpusOptions(preset="wikitext2"), tokenizer, evaluation=True)
        == tokenizer("a\n\n\n\nb")["input_ids"]
    )
    with pytest.raises(UnsupportedInput, match="one of: wikitext2, c4, ptb"):
        read_stream(CorpusOptions(preset="nqopen"), tokenizer, evaluation=True)


@pytest.mark.parametrize("name", ["c4", "ptb"])
def test_presets_that_name_their_files_read_those_of_each_part(
    name: str, tokenizer: Any, tmp_path: Path, local_preset: Callable[..., None]
) -> None:
    import gzip

    import pyarrow
    from pyarrow import parquet

    local_preset(name, {})
    preset = presets.PRESETS[name]
    for part in (preset.calibration, preset.evaluation):
        assert part is not None and part.files is not None
        path = tmp_path / name / part.files.replace("*", "0000")
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {preset.fields[0]: f"the {part.split} part"}
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(json.dumps(record).encode()))
        else:
            parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    options = CorpusOptions(preset=name)
    assert read_samples(options, tokenizer) == tokenizer(["the train part"])["input_ids"]
    expected = tokenizer("the validation part")["input_ids"]
    assert read_stream(options, tokenizer, evaluation=True) == expected


def test_a_preset_that_cannot_be_had_says_so(tokenizer: Any, local_preset: Callable[..., None]) -> None:
    local_preset("nqopen", {})
    with pytest.raises(InputNotFound, match="data set of the preset nqopen, cannot be loaded"):
        read_corpus(CorpusOptions(preset="nqopen"), tokenizer)


def test_a_library_that_is_missing_is_named(tokenizer: Any, written: Callable[..., Path], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for options in (CorpusOptions((written("a.parquet", b""),)), CorpusOptions(preset="c4")):
        assert "pip install datasets" in refused(options, tokenizer)


def test_samples_are_no_longer_than_the_models_positions() -> None:
    from transformers import Gemma3Config, GPT2Config

    assert limited_seq_len(2048, GPT2Config(n_positions=1024))[0] == 1024
    assert limited_seq_len(512, GPT2Config(n_positions=1024)) == (512, None)
    config = Gemma3Config(text_config={"max_position_embeddings": 96})
    length, warning = limited_seq_len(2048, config)
    assert length == 96
    assert warning is not None
    assert "96 tokens long, not 2048" in warning


def test_a_file_that_is_a_folder_is_no_traceback(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputNotFound):
        read_corpus(CorpusOptions((tmp_path,)), tokenizer)
    with pytest.raises(MalformedFile):
        unreadable = tmp_path / "x.json"
        unreadable.write_text("3", encoding="utf-8")
        read_corpus(CorpusOptions((unreadable,)), tokenizer)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("{question", "a brace without its other half"),
        ("question}{answer}", "a brace without its other half"),
        ("Q: {}", "braces without a name"),
        (" ", "it is empty"),
    ],
)
def test_a_field_that_is_neither_a_name_nor_a_template_is_refused(field: str, message: str, tokenizer: Any) -> None:
    assert message in refused(CorpusOptions((KNOWLEDGE,), (field,)), tokenizer)


def test_braces_that_are_doubled_stand_for_themselves(tokenizer: Any, written: Callable[..., Path]) -> None:
    path = written("a.jsonl", [{"a": "x"}])
    (document,) = read_documents(CorpusOptions((path,), ('{{"a": {a}}}',), pack=False), tokenizer)
    assert document.token_ids == tokenizer('{"a": x}')["input_ids"]


def test_fields_of_text_without_fields_are_refused(tokenizer: Any) -> None:
    text = FIXTURES / "data" / "knowledge.txt"
    assert "a .txt file has no fields" in refused(CorpusOptions((text,), ("text",)), tokenizer)
    assert read_stream(CorpusOptions((text, KNOWLEDGE), ("question",)), tokenizer)
