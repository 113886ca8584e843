"""The faults that `mutations.py` plants still have a place in the code, and a test."""

from planted import lost


def test_every_fault_can_be_planted() -> None:
    assert lost() == []
