from types import SimpleNamespace
from typing import Any

from server.engine.vllm_stream import Labels, VllmAnswerStream, to_spans
from server.store.chats.records import Generation, Span


def test_tokens_are_labelled_with_the_version_loaded_on_arrival() -> None:
    changes = [(0, "v0000"), (2, "v0001"), (4, "v0000")]
    assert to_spans(changes, 5) == [Span(0, 2, "v0000"), Span(2, 4, "v0001"), Span(4, 5, "v0000")]


def test_a_version_without_tokens_has_no_span() -> None:
    assert to_spans([], 0) == []
    assert to_spans([(0, "v0000")], 0) == []
    assert to_spans([(0, "v0000"), (3, "v0001"), (3, "v0002")], 4) == [Span(0, 3, "v0000"), Span(3, 4, "v0002")]


class Engine:
    """vLLM's queue and its abort: after an abort, the engine reports what it had sampled until it heard of it."""

    def __init__(self, outputs: list[Any], after_abort: list[Any]) -> None:
        self.outputs, self.after_abort, self.aborted = outputs, after_abort, list[str]()

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.outputs = self.after_abort

    def get_nowait(self) -> Any:
        return self.outputs.pop(0)

    def close(self) -> None: ...


class Letters:
    def text(self, token_ids: list[int]) -> str:
        return "".join(chr(ord("a") + number) for number in token_ids)


def output(token_ids: list[int], finish_reason: str | None = None, spans: list[Any] | None = None) -> Any:
    logprobs = SimpleNamespace(logprobs=[-0.25] * len(token_ids))
    return SimpleNamespace(
        outputs=[
            SimpleNamespace(
                token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason, weight_versions=spans or []
            )
        ]
    )


async def test_an_answer_ends_at_a_stop_sequence_wherever_the_engine_is() -> None:
    spans = [SimpleNamespace(start=0, end=2, version="v0001"), SimpleNamespace(start=2, end=9, version="v0002")]
    end = output([7, 8], "abort", spans)
    engine = Engine([output([0, 1]), output([2]), output([3, 4, 5]), output([6])], [output([6]), end])
    text: Any = Letters()
    stream = VllmAnswerStream(engine, "req", engine, text, Labels(lambda: "v0001", lambda found: found), ("de",))
    assert [part async for part in stream] == ["ab", "c"]
    assert engine.aborted == ["req"]
    assert await stream.finish() == Generation(
        [0, 1, 2], [-0.25] * 3, "abc", "stop_sequence", [Span(0, 2, "v0001"), Span(2, 3, "v0002")]
    )


async def test_an_answer_that_ends_before_a_stop_sequence_is_whole_keeps_its_text() -> None:
    engine = Engine([output([0, 1, 3]), output([], "stop", [SimpleNamespace(start=0, end=3, version="v0001")])], [])
    text: Any = Letters()
    stream = VllmAnswerStream(engine, "req", engine, text, Labels(lambda: "v0001", lambda found: found), ("de",))
    assert [part async for part in stream] == ["ab", "d"]
    assert await stream.finish() == Generation([0, 1, 3], [-0.25] * 3, "abd", "stop", [Span(0, 3, "v0001")])
    assert engine.aborted == []


async def test_what_an_answer_says_so_far_does_not_change_with_it() -> None:
    whole = [SimpleNamespace(start=0, end=4, version="v0001")]
    engine = Engine([output([0, 1]), output([2]), output([3], "stop", whole)], [])
    text: Any = Letters()
    stream = VllmAnswerStream(engine, "req", engine, text, Labels(lambda: "v0001", lambda found: found))
    reader = aiter(stream)
    assert [await anext(reader), await anext(reader)] == ["ab", "c"]
    so_far = stream.so_far()
    assert [piece async for piece in reader] == ["d"]
    assert so_far == Generation([0, 1, 2], [-0.25] * 3, "abc", "error", [Span(0, 3, "v0001")])
    assert (await stream.finish()).token_ids == [0, 1, 2, 3]
