"""A tokenizer gives text back byte for byte, is the same wherever it is trained, and knows how a document ends."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from colrow.data.corpus import FileCorpus, open_corpus
from colrow.data.prepare import prepare
from colrow.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer
from colrow.errors import DataError

HARD = [
    "",
    "plain",
    "  indented\n\tand tabbed \r\n",
    "naïve café 漢字 🙂\u200d",
    "\x00\x7f",
    f"say {END_OF_TEXT} twice",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, text_of):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(text_of(i, 250), encoding="utf-8")
    return FileCorpus("made up", sorted(folder.iterdir()), "text")


@pytest.fixture(scope="module")
def trained(corpus) -> Tokenizer:
    return train_tokenizer(corpus, 400)


def test_every_text_comes_back_byte_for_byte(trained):
    for text, ids in zip(HARD, trained.encode_batch(HARD), strict=True):
        assert ids[-1] == trained.eos_id
        assert ids.count(trained.eos_id) == 1  # also where the text spells the token
        assert max(ids) < trained.vocab_size
        assert trained.decode(ids[:-1]) == text
        assert trained.decode(ids, skip_special_tokens=False) == text + END_OF_TEXT
        assert trained.encode(text) == ids[:-1]


def test_training_again_gives_the_same_tokenizer(trained, corpus):
    again = train_tokenizer(corpus, 400)
    assert again.backend.to_str() == trained.backend.to_str()
    assert again.digest == trained.digest
    assert train_tokenizer(corpus, 300).digest != trained.digest
    assert (trained.vocab_size, trained.eos_id) == (400, 0)


def test_a_small_corpus_gives_a_small_vocabulary(tmp_path, section):
    (tmp_path / "a.txt").write_text("aa bb")
    assert train_tokenizer(open_corpus(section(f"{tmp_path}/a.txt")), 4096).vocab_size == 257


def test_what_is_wrong_with_the_corpus_is_reported_while_training(tmp_path, section):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnot JSON')
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is not JSON"):
        train_tokenizer(open_corpus(section(f"{tmp_path}/a.jsonl")), 300)


def test_too_small_a_vocabulary_is_refused(corpus):
    with pytest.raises(DataError, match=r"vocab_size=256 is too small: a byte-level BPE needs 257"):
        train_tokenizer(corpus, 256)


def test_a_saved_tokenizer_loads_as_it_was(trained, tmp_path):
    trained.save(tmp_path / "tok.json")
    trained.save(tmp_path)
    for path in (tmp_path / "tok.json", tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = load_tokenizer(path)
        assert (loaded.digest, loaded.eos_id) == (trained.digest, trained.eos_id)
        assert loaded.encode_batch(HARD) == trained.encode_batch(HARD)


def test_transformers_loads_a_saved_folder(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == END_OF_TEXT
    text = "def ka(lomi):\n    return lomi"
    assert theirs(text)["input_ids"] == trained.encode(text)


def test_settings_of_a_folder_are_kept(trained, tmp_path):
    trained.save(tmp_path)
    settings = {"eos_token": {"content": END_OF_TEXT}, "chat_template": "{{ x }}", "tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "out").mkdir()
    load_tokenizer(tmp_path).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings


def write_words(folder, *special: str, **files: dict) -> None:
    """A tokenizer.json of whole words with `special` tokens (ids from 3), and JSON `files` beside it."""
    backend = tokenizers.Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    if special and special[0] == "<s>":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
        )
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(folder / "tokenizer.json"))
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("files", "eos_id"),
    [
        ({"tokenizer_config": {"eos_token": "<b>"}, "config": {"eos_token_id": 3}}, 4),
        ({"tokenizer_config": {"eos_token": {"content": "<b>"}}}, 4),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 3}}, 3),
        ({"generation_config": {"eos_token_id": [4, 3]}, "config": {"eos_token_id": 3}}, 4),
        ({"config": {"eos_token_id": 3}}, 3),
        ({}, 5),
    ],
)
def test_the_end_of_a_document_is_what_the_folder_says(tmp_path, files, eos_id):
    write_words(tmp_path, "<a>", "<b>", "</s>", **files)
    assert load_tokenizer(tmp_path).eos_id == eos_id


def test_documents_begin_as_the_tokenizer_begins_them_and_are_never_cut(tmp_path):
    write_words(tmp_path, "<s>", "</s>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix == [3]
    assert tokenizer.encode_batch(["one two one two one two", "one"]) == [[3, 0, 1, 0, 1, 0, 1, 4], [3, 0, 4]]
    assert tokenizer.encode("two") == [3, 1]


@pytest.mark.parametrize(
    ("special", "files", "reported"),
    [
        ([], {}, r"does not tell which token ends a text \(its special tokens: none\): write .*eos_token"),
        (["<a>"], {"tokenizer_config": {"eos_token": "<z>"}}, r"no token '<z>', which tokenizer_config\.json"),
        (["<a>"], {"tokenizer_config": {"eos_token": "\ud800"}}, r"no token '\\ud800', which tokenizer_config\.json"),
        (["<a>"], {"config": {"eos_token_id": 9}}, r"has no token 9, which config\.json"),
        (["<a>"], {"config": {"eos_token_id": -1}}, r"has no token -1, which config\.json"),
        (["<a>"], {"config": {"eos_token_id": 2**70}}, r"has no token \d+, which config\.json"),
    ],
)
def test_a_tokenizer_without_an_end_is_refused(tmp_path, special, files, reported):
    write_words(tmp_path, *special, **files)
    with pytest.raises(DataError, match=reported):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reported"),
    [
        ("none", None, r"there is no tokenizer .*none .*or leave it out to train one"),
        ("tokenizer.model", "", r"holds tokenizer\.model, but no tokenizer\.json: put the model's config\.json beside"),
        ("o200k.tiktoken", "IQ== 0", r"holds o200k\.tiktoken, but no tokenizer\.json: put the model's"),
        ("readme.md", "", r"holds no tokenizer\.json: give another folder"),
        ("tokenizer.json", "{", r"tokenizer\.json is not a tokenizer\.json"),
    ],
)
def test_a_missing_or_damaged_tokenizer_is_named(tmp_path, name, content, reported):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reported):
        load_tokenizer(tmp_path / name if content is None else tmp_path)


def test_a_file_of_another_format_says_how_to_write_one(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "config.json").write_text("{}")
    advice = rf": write one with transformers, .*, and give {tmp_path} in data\.tokenizer\.path$"
    with pytest.raises(DataError, match=rf"is not a tokenizer\.json: .*{advice}"):
        load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("model", "raises"),
    [
        (models.WordLevel({"<eos>": 0, "one": 1}), True),
        (models.Unigram([("<eos>", 0.0), ("one", -1.0)]), True),
        (models.BPE({"<eos>": 0, "o": 1, "n": 2, "e": 3}, []), False),
    ],
)
def test_characters_without_an_id_are_named(tmp_path, section, texts, capsys, model, raises):
    """By an error where the library raises one; by a line where it leaves them out."""
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<eos>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = section(f"{texts}/*.txt", seq_len=4, tokenizer={"path": tmp_path / "tokenizer.json"})
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    if raises:
        with pytest.raises(DataError, match=r"the tokenizer has no ids for a text .*: give one with an unknown token"):
            prepare(config, 6, progress=True)
    else:
        prepare(config, 6, progress=True)
        assert "the tokenizer drops the characters that it does not know" in " ".join(capsys.readouterr().err.split())


CHAT = "<s> one <sep> two </s>"


def test_special_tokens_that_a_text_spells(tmp_path):
    write_words(tmp_path, "<s>", "</s>", "<sep>", tokenizer_config={"eos_token": "</s>"})
    as_text, as_tokens = load_tokenizer(tmp_path), load_tokenizer(tmp_path, special=True)
    (plain,), (special,) = (tokenizer.encode_batch([CHAT]) for tokenizer in (as_text, as_tokens))
    assert special == [3, 0, 5, 1, 4]  # begun and ended once, by its own tokens
    assert plain[:1] + plain[-1:] == [3, 4]
    assert 5 not in plain
    assert as_tokens.encode("one <sep>") == [3, 0, 5]
    assert as_tokens.encode_batch(["one"]) == as_text.encode_batch(["one"]) == [[3, 0, 4]]
    assert [as_text.spells_special(text) for text in (CHAT, "one", "<se", "")] == [True, False, False, False]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_option_decides_and_a_line_says_what_was_done(tmp_path, section, capsys, workers):
    write_words(tmp_path, "<s>", "</s>", "<sep>", tokenizer_config={"eos_token": "</s>"})
    rows = [{"text": f"one two {'one ' * i}" + ("<sep> two" if i % 4 == 0 else "")} for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = {}
    for option in ("text", "encode"):
        config = section(
            f"{tmp_path}/chats.jsonl",
            seq_len=4,
            tokenizer={"path": tmp_path / "tokenizer.json"},
            special_tokens=option,
            validation_fraction=0.4,
            workers=workers,
        )
        for _ in range(2):  # made, and found
            data = prepare(config, 6, progress=True)
            line = capsys.readouterr().err.replace("\n", " ")
            done = "became these tokens" if option == "encode" else "were encoded as plain text"
            assert f"5 documents spell special tokens, which {done} (data.special_tokens: {option}" in line
        ids = np.concatenate([data.train.ids, data.validation.ids])
        counts[option] = (int((ids == 5).sum()), len(ids))
    assert counts["encode"][0] == 5
    assert counts["text"][0] == 0
    assert counts["encode"][1] < counts["text"][1]


def test_a_corpus_without_special_tokens_says_nothing(corpus, section, texts, capsys):
    prepare(section(f"{texts}/*.txt"), 300, progress=True)
    assert "special tokens" not in capsys.readouterr().err


def test_a_device_is_not_read(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"tokenizer\.json is a device: give a file"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_an_error_of_the_tokenizer(tmp_path):
    """It is no Exception: a template that names a token which is not there, when the first text is encoded."""
    write_words(tmp_path, "<s>", "</s>", tokenizer_config={"eos_token": "</s>"})
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "nowhere", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tree["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="the tokenizer has no ids for a text"):
        load_tokenizer(tmp_path).encode("one")
