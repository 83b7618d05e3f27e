"""Stop strings and incremental decoding, whatever the borders of tokens."""

import pathlib

import numpy as np
import pytest

from dsv3_jax import config as c
from dsv3_jax.data import gguf_tokenizer
from dsv3_jax.data.gguf_file import GgufFile
from dsv3_jax.data.tokenizers import StreamDecoder, Tokenizer, make_tokenizer
from dsv3_jax.inference.text import StopStrings, TextStream

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(c.BpeTokenizer(300), {"a": ["the cat sat on the mat " * 20]})


def cut(text: str, stops: list[str], piece: int) -> tuple[str, bool]:
    """Text through `StopStrings`, `piece` characters at a time."""
    stopper, shown = StopStrings(stops), ""
    for at in range(0, len(text), piece):
        shown += stopper.push(text[at : at + piece])
        assert not any(stop in shown for stop in stops if stop)
    return shown + stopper.flush(), stopper.found


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected", "found"),
    [
        ("one\n\ntwo", ["\n\n"], "one", True),
        ("one\ntwo\n", ["\n\n"], "one\ntwo\n", False),
        ("aaab", ["aab"], "a", True),
        ("ababac", ["abac"], "ab", True),
        ("stop", ["stop"], "", True),
        ("nothing here", ["xyz", ""], "nothing here", False),
        ("abcX", ["abcX", "c"], "ab", True),
        ("end with a begin", ["begins"], "end with a begin", False),
        ("first or second", ["second", "or"], "first ", True),
    ],
)
def test_text_ends_before_the_stop_string(piece, text, stops, expected, found):
    assert cut(text, stops, piece) == (expected, found)


def test_text_that_cannot_be_a_stop_string_is_shown_at_once():
    stopper = StopStrings(["END"])
    assert [stopper.push(x) for x in ("a", "bE", "N", "x", "END!", "more")] == ["a", "b", "", "ENx", "", ""]


@pytest.mark.parametrize("text", ["naïve 漢字 🙂🏽 ok", "", "the cat sat", "🙂" * 9])
def test_pieces_add_up_and_hold_no_half_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    decoder = StreamDecoder(tokenizer, tokenizer.encode("before 🙂"))
    pieces = [decoder.push([i]) for i in ids] + [decoder.flush()]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_unfinished_character_comes_with_flush(tokenizer):
    ids = tokenizer.encode("ok 漢")
    decoder = StreamDecoder(tokenizer)
    shown = "".join(decoder.push([i]) for i in ids[:-1])
    assert shown == "ok " and decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.push(ids[-1:]) == "漢"


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer as SentencePiece's, which knows a few letters and writes the rest as bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "好"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 5
    names = {"tokens": tokens, "scores": [0.0] * len(tokens), "token_type": kinds, "model": "llama"}
    names |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    file = GgufFile(pathlib.Path("a.gguf"), {f"{gguf_tokenizer.KEY}{k}": v for k, v in names.items()}, {}, {}, {})
    return Tokenizer(gguf_tokenizer._inner(file, tokens), "<s>", "</s>")


TEXTS = ["你好世界abc", "abc 你们 c", "🙂🙂🙂🙂 世界世界世界世界世界a", "ñ\n\na"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_text_in_bytes_streams_as_it_decodes(byte_fallback, text, step):
    ids = byte_fallback.encode(text)
    assert byte_fallback.decode(ids) == text
    decoder = StreamDecoder(byte_fallback)
    assert "".join(decoder.push(ids[at : at + step]) for at in range(0, len(ids), step)) == text
    assert decoder.flush() == ""


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_may_end_inside_a_character(tokenizer, byte_fallback, text):
    for each in (tokenizer, byte_fallback):
        ids = each.encode(text)
        for cut in range(len(ids)):
            decoder = StreamDecoder(each, ids[:cut])
            shown = "".join(decoder.push([i]) for i in ids[cut:]) + decoder.flush()
            prompts = [each.decode(ids[:n]) for n in range(cut, -1, -1)]
            whole = next(prompt for prompt in prompts if not prompt.endswith("\N{REPLACEMENT CHARACTER}"))
            assert whole + shown == text, cut


@pytest.mark.parametrize("count", [1, 4, 200])
def test_bytes_that_are_no_text_are_given_up(byte_fallback, count):
    broken = byte_fallback._inner.token_to_id("<0xFF>")
    ids = [*byte_fallback.encode("世"), *[broken] * count, *byte_fallback.encode("世a")]
    decoder, pieces, longest = StreamDecoder(byte_fallback), [], 0
    for i in ids:
        pieces.append(decoder.push([i]))
        longest = max(longest, len(decoder._ids))
    text = "".join(pieces) + decoder.flush()
    assert text.startswith("世" + "\N{REPLACEMENT CHARACTER}" * count) and text.endswith("a")
    assert longest < 20  # the work for an id does not grow
    assert count < 4 or "\N{REPLACEMENT CHARACTER}" in "".join(pieces[:9])  # and it is shown as it comes


class Script:
    """Stands for a generator: gives out the tokens of given texts, some at a time."""

    def __init__(self, rows, steps: int):
        self.rows, self.steps = rows, steps

    def room(self, prompts, max_new_tokens):
        return [max_new_tokens for _ in prompts]

    def stream(self, prompts, **options):
        self.options, self.calls = options, 0
        length = max(map(len, self.rows))
        tokens = np.full((len(self.rows), length), -1, np.int32)
        for row, ids in zip(tokens, self.rows, strict=True):
            row[: len(ids)] = ids
        for at in range(0, length, self.steps):
            self.calls += 1
            yield tokens[:, at : at + self.steps]


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_rows_stop_by_themselves(tokenizer, steps):
    texts = ["the cat\nUser: sat", "on the mat 漢", "the mat\nUse the cat"]
    rows = [tokenizer.encode(text) for text in texts]
    room = len(rows[2])
    rows[1] = rows[1][:-1]
    stream = TextStream(Script(rows, steps), tokenizer, [[5]] * 3, max_new_tokens=room, stop=["\nUser:"])
    pieces = list(stream)
    done = stream.completions
    assert [completion.text for completion in done] == ["the cat", "on the mat \N{REPLACEMENT CHARACTER}", texts[2]]
    assert [completion.text for completion in done] == ["".join(row) for row in zip(*pieces, strict=True)]
    assert [completion.stopped for completion in done] == [True, len(rows[1]) < room, False]
    assert done[0].num_tokens == len(tokenizer.encode("the cat\nUser:"))
    assert [done[1].num_tokens, done[2].num_tokens] == [len(rows[1]), len(rows[2])]


def test_nothing_is_made_after_every_row_has_ended(tokenizer):
    """One row by a stop id, with half a character, one by a stop string, one for want of room."""
    rows = [tokenizer.encode("on 漢")[:-1], tokenizer.encode("the cat\nUser: sat" + " on the mat" * 30)]
    rows.append(tokenizer.encode("a cat sat on the mat"))
    generator = Script(rows, 1)
    generator.room = lambda prompts, max_new_tokens: [500, 500, len(rows[2])]
    stream = TextStream(generator, tokenizer, [[5]] * 3, max_new_tokens=500, stop=["\nUser:"])
    pieces = list(stream)
    texts = ["on \N{REPLACEMENT CHARACTER}", "the cat", "a cat sat on the mat"]
    assert [completion.text for completion in stream.completions] == texts
    assert ["".join(row) for row in zip(*pieces, strict=True)] == texts
    assert [completion.stopped for completion in stream.completions] == [True, True, False]
    needed = max(len(rows[0]) + 1, len(tokenizer.encode("the cat\nUser:")), len(rows[2]))
    assert generator.calls == needed < len(rows[1])


def test_a_stop_string_that_spells_a_special_token_is_a_stop_id(tokenizer):
    generator = Script([[5]], 1)
    list(TextStream(generator, tokenizer, [[5]], max_new_tokens=1, stop=["<|pad|>", "the"]))
    assert generator.options["stop_ids"] == {0, tokenizer.eos_id}
