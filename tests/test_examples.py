import pytest
from examples import MINUTES, clock, counted
from hypothesis import assume, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("fails", [False, True])
def test_time_ends_examples_but_not_shrinking(fails, monkeypatch):
    @settings(max_examples=3000, database=None, derandomize=True)
    @given(st.data())
    @counted
    def holds(data):
        number = data.draw(st.integers())
        assume(number % 2)
        if clock.examples >= 20:
            clock.end = 0
        assert not (fails and number > 1000)

    monkeypatch.setenv(MINUTES, "1000")
    clock.start(1)
    with pytest.raises(AssertionError if fails else pytest.skip.Exception):
        holds()
    assert clock.examples >= 20
