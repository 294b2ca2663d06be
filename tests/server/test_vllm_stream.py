"""Labels of an answer whose engine died: by what was loaded when its tokens came."""

from server.records import Span
from server.vllm_stream import extended


def test_tokens_are_of_the_version_that_was_loaded_when_they_came() -> None:
    spans: list[Span] = []
    for end, version in ((2, "v0001"), (5, "v0001"), (6, "v0002"), (9, "v0002"), (10, "v0001")):
        spans = extended(spans, end, version)
    assert spans == [Span(0, 5, "v0001"), Span(5, 9, "v0002"), Span(9, 10, "v0001")]
