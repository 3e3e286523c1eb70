"""Text as it is generated: at every prefix what an incremental decoder gives, and no byte waits without need."""

import codecs
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polymamba.bytes.stream import as_text, write_stream

HARD = {
    "ascii": b"plain",
    "two bytes": "é".encode(),
    "CJK": "日本語".encode(),
    "combining": "e\u0301 n\u0303".encode(),
    "first of four bytes": "\U00010000".encode(),  # F0 90
    "emoji": "😀".encode(),  # F0 9F
    "four bytes, F1": "\U00050000".encode(),
    "four bytes, F3": "\U000d0000".encode(),
    "last of four bytes": "\U0010ffff".encode(),  # F4 8F
    "family": "👩\u200d👩\u200d👧".encode(),
    "truncated": b"a\xf0\x9f\x98",
    "truncated in the middle": b"\xe6\x97a\xf0\x9f\x98b",
    "overlong": b"\xc0\xaf\xe0\x80\xaf\xf0\x80\x80\xaf",
    "surrogates": b"\xed\xa0\x80\xed\xb0\x80",
    "beyond the last": b"\xf4\x90\x80\x80\xf8\x88\x80\x80\x80",
    "lone continuations": b"\x80\xbf\x80",
    "binary": bytes(range(256)),
}
UTF8_OR_NOT = st.lists(st.one_of(st.binary(max_size=5), st.characters(codec="utf-8").map(str.encode)))
UTF8_OR_NOT = UTF8_OR_NOT.map(b"".join)


def well_formed_length(data: bytes) -> int:
    """Bytes of the character that data begins with, by table 3-7 of the Unicode standard; 0 if it begins with none.

    -n if n bytes, and the data's end, are a beginning of one.
    """
    first = data[0]
    if first < 0x80:
        return 1
    second = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(first, (0x80, 0xBF))
    length = 2 if 0xC2 <= first <= 0xDF else 3 if 0xE0 <= first <= 0xEF else 4 if 0xF0 <= first <= 0xF4 else 0
    ranges = [second, (0x80, 0xBF), (0x80, 0xBF)][: max(0, length - 1)]
    for i, (low, high) in enumerate(ranges, start=1):
        if i == len(data):
            return -i
        if not low <= data[i] <= high:
            return 0
    return length


def n_waiting(data: bytes) -> int:
    """Bytes at the end of data that may still become a character."""
    at = 0
    while at < len(data):
        length = well_formed_length(data[at:])
        if length < 0:
            return -length
        at += max(length, 1)  # what begins no character is none
    return 0


@pytest.mark.parametrize("data", HARD.values(), ids=HARD)
def test_every_prefix(data):
    check_every_prefix(data)


@given(UTF8_OR_NOT)
@example(b"\xed\xa0")
def test_every_prefix_of_anything(data):
    check_every_prefix(data)


def check_every_prefix(data: bytes) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    expected = [decoder.decode(bytes([byte])) for byte in data]
    end = decoder.decode(b"", final=True)
    released = list(as_text(bytes([byte]) for byte in data))
    assert released == [text for text in [*expected, end] if text]
    assert "".join(released) == data.decode("utf-8", "replace")
    for n in range(len(data) + 1):
        shown = "".join(expected[:n])
        waiting = n_waiting(data[:n])
        whole = data[:n].decode("utf-8", "replace")
        if n < 2 or data[n - 2] != 0xED or not 0xA0 <= data[n - 1] <= 0xBF:  # Python waits there for a third byte
            assert shown == data[: n - waiting].decode("utf-8", "replace"), (n, waiting)
        assert whole.startswith(shown)


@given(UTF8_OR_NOT, st.lists(st.integers(0, 7)))
def test_pieces_may_be_cut_anywhere(data, sizes):
    pieces, rest = [], data
    for size in sizes:
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    pieces.append(rest)
    text, exact = io.BytesIO(), io.BytesIO()
    write_stream(pieces, text, lossless=False)
    write_stream(pieces, exact, lossless=True)
    assert text.getvalue() == data.decode("utf-8", "replace").encode()
    assert exact.getvalue() == data


def test_a_character_appears_with_its_last_byte():
    """Piece by piece, while the bytes are still coming."""
    given: list[int] = []

    def come():
        for byte in "a😀e\u0301".encode():
            given.append(byte)
            yield bytes([byte])

    seen = [(text, len(given)) for text in as_text(come())]
    assert seen == [("a", 1), ("😀", 5), ("e", 6), ("\u0301", 8)]
