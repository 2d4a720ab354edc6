"""Experts' schedules, by the kernels that make them on the device."""

import pytest

pytest.importorskip("triton")

from . import interpreting


def test_schedules_in_the_interpreter():
    interpreting.run("interpreted_schedule")
