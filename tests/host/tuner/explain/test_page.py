"""Whole pages of calls on GPUs that are not here, by formula."""

import pytest

from tests.support.covering import some
from tests.support.explained_calls import CALLS, asked_about
from tests.support.pages import page_faults
from tuner.explain.page import OF_CALL, OF_KERNEL, as_data, facts_of, page

MOST_BYTES = 400_000


@pytest.mark.parametrize("name", some(tuple(CALLS), "one query", "no keys"))
def test_page_is_whole_and_small(name):
    asked = asked_about(name)
    text, facts = page(asked), facts_of(asked)
    assert page_faults(text, MOST_BYTES) == []
    for section in (*OF_KERNEL, *OF_CALL):
        assert f'id="{section.name}"' in text
    for kernel in facts["call"].kernels:
        assert kernel.config in text
        if kernel.predicted is not None:
            assert str(kernel.predicted) in text


def test_facts_are_what_json_can_hold():
    data = as_data(asked_about("one query"))
    assert set(data) == {"call", "kernels", *(each.name for each in OF_CALL)}
    assert set(data["kernels"]["forward"]) == {each.name for each in OF_KERNEL}
