"""How the shards of a step are grouped into tasks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flows.crew import MAX_TASKS, TASKS_PER_WORKER, group_name, groups


@given(st.integers(0, 20_000), st.integers(1, 300))
def test_every_shard_is_in_one_task_in_order_and_tasks_are_few_and_even(num_shards: int, num_workers: int) -> None:
    names = [f"rows-{number:05}" for number in range(num_shards)]
    made = groups(names, num_workers)
    assert [name for group in made for name in group] == names
    assert len(made) <= min(MAX_TASKS, TASKS_PER_WORKER * num_workers)
    sizes = {len(group) for group in made}
    assert not sizes or (min(sizes) >= 1 and max(sizes) - min(sizes) <= 1)


def test_a_task_is_named_by_its_first_and_its_last_shard() -> None:
    assert group_name(["a-0"]) == "a-0"
    assert group_name(["a-0", "a-1", "b-0"]) == "a-0 to b-0"
