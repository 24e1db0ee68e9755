"""Entries of a config as dataclasses: types and bounds."""

import dataclasses

import pytest

from mmgen import errors
from mmgen import fields


@dataclasses.dataclass(frozen=True)
class Entry:
  count: int
  size: tuple[int, int] = (8, 8)
  words: tuple[str, ...] = ()
  place: int | None = -2  # counted from the end: its class knows what it may be
  rate: float = dataclasses.field(
      default=0.5, metadata=dict(above=0, most=1))
  rest: object = None


def test_an_entry_becomes_its_dataclass():
  assert fields.read(Entry, 'x', dict(count=1, rate=1)) == Entry(1, rate=1)
  assert fields.read(Entry, 'x', dict(
      count=3, place=-9, size=[2, 3], words=['a', 'b', 'c'], rest=True)) == (
          Entry(3, [2, 3], ['a', 'b', 'c'], -9, 0.5, True))
  assert fields.read(Entry, 'x', dict(count=1, place=None)).place is None


@pytest.mark.parametrize('entry, message', [
    ('many', "x is 'many', a value; it has the fields count, size"),
    ({}, 'x.count is missing.'),
    (dict(cuont=1), "x has no field 'cuont'. Did you mean 'count'? It has"),
    (dict(count=0), 'x.count is 0; allowed: 1 or more.'),
    (dict(count=1.5), 'x.count is 1.5; expected int.'),
    (dict(count=True), 'x.count is True; expected int.'),
    (dict(count=None), 'x.count is None; expected int.'),
    (dict(count=1, size=(8,)), 'x.size is (8,); expected tuple[int, int].'),
    (dict(count=1, size=(8, 8.5)), 'expected tuple[int, int].'),
    (dict(count=1, size=(8, 0)), 'x.size is (8, 0); allowed: 1 or more.'),
    (dict(count=1, words=('a', 3)), 'expected tuple[str, ...].'),
    (dict(count=1, words='abc'), 'expected tuple[str, ...].'),
    (dict(count=1, place='end'), 'expected int | None.'),
    (dict(count=1, rate=0), 'x.rate is 0; allowed: above 0 and at most 1.'),
    (dict(count=1, rate=1.5), 'allowed: above 0 and at most 1.'),
    (dict(count=1, rate=float('nan')), 'x.rate is nan; expected float.'),
    (dict(count=1, rate='half'), "x.rate is 'half'; expected float."),
])
def test_a_mistake_is_named(entry, message):
  with pytest.raises(errors.UserError) as caught:
    fields.read(Entry, 'x', entry)
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_a_model_that_no_command_builds_raises_what_it_is_asked_to():
  with pytest.raises(ValueError, match='x.count is 0'):
    fields.read(Entry, 'x', dict(count=0), ValueError)
