from clients.text import WordWrap, printable


def wrapped(pieces: list[str], width: int) -> str:
    written: list[str] = []
    wrap = WordWrap(written.append, width)
    for piece in pieces:
        wrap.feed(piece)
    wrap.close()
    return "".join(written)


def test_control_sequences_do_not_get_through() -> None:
    assert printable("a\x1b[31mb\x07c\x9bd\u202ee\r\n\tf") == "a[31mbcde\n    f"


def test_lines_break_between_words_however_the_stream_was_cut() -> None:
    assert wrapped(["The ca", "t sat", " on the m", "at."], 10) == "The cat\nsat on the\nmat.\n"


def test_line_feeds_and_indents_stay() -> None:
    assert wrapped(["1. eggs\n\n  - two"], 20) == "1. eggs\n\n  - two\n"


def test_a_long_word_is_not_held_back_for_ever() -> None:
    written: list[str] = []
    WordWrap(written.append, 10).feed("x" * 12)
    assert "".join(written).replace("\n", "") == "x" * 10


def test_wide_characters_count_two_cells() -> None:
    assert wrapped(["日本 日本 日本"], 11) == "日本 日本\n日本\n"
