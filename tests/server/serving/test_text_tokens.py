"""A text's tokens have its characters and its bytes, whatever the tokenizer cuts, drops, adds or writes otherwise."""

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.fakes import build_tokenizer
from ultrafuser.server.serving.text_tokens import TextToken, tokens_of

TEXTS = ["ok 😀🦜 é漢", "  two spaces \n", "<|im_end|>", "e\u0301 a\u0308 ﬁ", "👩‍👩‍👧 日本語", "\ufffd\u2028\x00", "a"]
LETTERS = "abcdefghijklmnopqrstuvwxyz<>|_ \n"


def bytes_merged(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that adds a first token, normalises, and has these tokens of several bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", *letters, *(one + other for one, other in merges)]
    own = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(merges)))
    own.normalizer = normalizers.NFC()
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", clean_up_tokenization_spaces=False)


def words_and_bytes() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: spaces are letters, one is put before the text, unknown characters become bytes."""
    words = ["<unk>", "<s>", "▁", *LETTERS, "▁ok", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "o"), ("▁o", "k")]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*words, "▁o"]))}
    own = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", bos_token="<s>")


TOKENIZERS = {
    "bytes": build_tokenizer(320, 336, "code"),
    "several bytes": bytes_merged(("Ģ", "ð"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ġ", "ðŁĺ"), ("æ", "¼")),
    "words and bytes": words_and_bytes(),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def parts(tokens: Sequence[TextToken]) -> list[tuple[str, bytes]]:
    return [(token.text, token.own_bytes) for token in tokens]


@each_tokenizer
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_the_tokens_together_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str, adds: bool) -> None:
    tokens = tokens_of(tokenizer, text, add_special_tokens=adds)
    assert [token.token_id for token in tokens] == tokenizer.encode(text, add_special_tokens=adds)
    assert "".join(token.text for token in tokens) == text
    assert b"".join(token.own_bytes for token in tokens) == text.encode()


def test_a_character_is_the_text_of_the_token_that_completes_it() -> None:
    """Its parts were decoded one by one: to replacement characters."""
    alone = tokens_of(TOKENIZERS["bytes"], "é漢", add_special_tokens=False)
    assert parts(alone) == [("", b"\xc3"), ("é", b"\xa9"), ("", b"\xe6"), ("", b"\xbc"), ("漢", b"\xa2")]


def test_a_token_may_end_one_character_and_begin_the_next() -> None:
    begun = tokens_of(TOKENIZERS["several bytes"], "a 😀😀", add_special_tokens=True)
    emoji = "😀".encode()
    assert parts(begun) == [
        ("", b""),
        ("a", b"a"),
        (" ", b" " + emoji[:3]),
        ("😀", emoji[3:] + emoji[:1]),
        ("", emoji[1:2]),
        ("", emoji[2:3]),
        ("😀", emoji[3:]),
    ]


def test_bytes_among_words_are_bytes() -> None:
    tokens = tokens_of(TOKENIZERS["words and bytes"], "ok é", add_special_tokens=True)
    assert parts(tokens) == [("", b""), ("ok", b"ok"), (" ", b" "), ("", b"\xc3"), ("é", b"\xa9")]
