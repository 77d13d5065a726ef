"""Shards and what they were made from."""

from mixture_of_depths.text.shards import changed_file


def test_the_file_that_has_changed_is_named_though_others_were_added() -> None:
    before = [{"path": "a", "size": 1}, {"path": "c", "size": 1}]
    assert changed_file(before, before[::-1]) is None
    assert changed_file(before, [*before, {"path": "b", "size": 1}]) == "b"
    assert changed_file(before, [{"path": "b", "size": 1}, before[0], {"path": "c", "size": 2}]) == "c"
    assert changed_file(before, before[:1]) == "c"
