"""Plans derived from the measured speed. Literal times are for two cores with AVX2 (0.8 s per answer)."""

from clients.demo.plan import Pace, Plan, Work, work_for

AVX2 = Pace(0.8)


def test_the_gate_is_no_part_of_what_a_machine_is_asked_for() -> None:
    assert [work_for(seconds) for seconds in (0.01, 0.049)] == [Work(64, None)] * 2
    assert [work_for(seconds) for seconds in (0.051, 0.8, 10.0)] == [Work(48, 8)] * 3


def test_the_whole_in_answers() -> None:
    # Before and after, two answers per vote, a round and a swap.
    assert Plan("short", 150, 64, 0, None).answers == 128 + 300 + 1300 + 20


def test_limits_follow_from_the_pace() -> None:
    # A minute plus five times the expected time.
    assert AVX2.longest(48) == 60 + 5 * 48 * 0.8
    assert AVX2.longest(300) == 60 + 5 * 300 * 0.8
    assert Pace(8.0).longest(300) == 60 + 5 * 300 * 8.0


def test_a_good_round_on_avx2_is_far_from_its_limit() -> None:
    limit = AVX2.round_limit()
    # Measured: 436 to 610 s in total and at most 100 s per step; 1,087 s in the first release.
    assert (limit.silent, limit.total) == (300 + 60 + 400, 300 + 60 + 400 + 60 + 5200)
