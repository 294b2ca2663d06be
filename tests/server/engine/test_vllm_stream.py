from server.engine.vllm_stream import to_spans
from server.store.chats.records import Span


def test_tokens_are_labelled_with_the_version_loaded_on_arrival() -> None:
    changes = [(0, "v0000"), (2, "v0001"), (4, "v0000")]
    assert to_spans(changes, 5) == [Span(0, 2, "v0000"), Span(2, 4, "v0001"), Span(4, 5, "v0000")]


def test_a_version_without_tokens_has_no_span() -> None:
    assert to_spans([], 0) == []
    assert to_spans([(0, "v0000")], 0) == []
    assert to_spans([(0, "v0000"), (3, "v0001"), (3, "v0002")], 4) == [Span(0, 3, "v0000"), Span(3, 4, "v0002")]
