"""Entries of a config as dataclasses: their mistakes, named in one line each.

A field says in its metadata which numbers it allows, by names of `BOUNDS`, as
in `dataclasses.field(metadata=dict(least=0, below=1))`. A whole number that
says nothing is at least 1; if its default is less, its class knows better.
"""

import dataclasses
import math
import operator
import types
import typing

from mmgen import errors

# What a bound asks of a number, and how an error says it.
BOUNDS = {
    'least': (operator.ge, '{} or more'),
    'above': (operator.gt, 'above {}'),
    'most': (operator.le, 'at most {}'),
    'below': (operator.lt, 'below {}'),
}


def read(kind, where: str, entry, error=errors.UserError):
  """Makes the dataclass `kind` of an entry of a config.

  Args:
    kind: the dataclass.
    where: name of the entry, for errors.
    entry: {field: value}; the type of a value may be any that the field's
      annotation allows, a list may stand for a tuple and 1 for 1.0.
    error: the exception to raise.

  Raises:
    error: an unknown field, one that is missing, or a value of another type
      or out of bounds.
  """
  fields = {field.name: field for field in dataclasses.fields(kind)}
  if not hasattr(entry, 'items'):
    raise error(f'{where} is {entry!r}, a value; it has the fields '
                f'{", ".join(fields)}.')
  entry = dict(entry.items())
  for name in entry:
    if name not in fields:
      raise error(f'{where} has no field {name!r}.'
                  f'{errors.nearest(name, fields)} It has: '
                  f'{", ".join(fields)}.')
  for name, field in fields.items():
    if name not in entry and field.default is dataclasses.MISSING and (
        field.default_factory is dataclasses.MISSING):
      raise error(f'{where}.{name} is missing.')
  for name, value in entry.items():
    field = fields[name]
    if not _is_of(value, field.type):
      raise error(f'{where}.{name} is {value!r}; expected '
                  f'{_type_name(field.type)}.')
    bounds = [(*BOUNDS[key], bound) for key, bound in _bounds(field).items()]
    if not all(holds(number, bound) for number in _numbers(value)
               for holds, _, bound in bounds):
      allowed = ' and '.join(text.format(bound) for _, text, bound in bounds)
      raise error(f'{where}.{name} is {value!r}; allowed: {allowed}.')
  return kind(**entry)


def _bounds(field):
  """Returns {name in `BOUNDS`: number} of a dataclass field."""
  parts = (field.type, *typing.get_args(field.type))
  known = isinstance(field.default, int) and field.default < 1
  if field.metadata or int not in parts or known:
    return field.metadata
  return {'least': 1}


def _numbers(value):
  """Returns the numbers of a value, which may be a list of them."""
  values = value if isinstance(value, (tuple, list)) else (value,)
  return [v for v in values if isinstance(v, (int, float))
          and not isinstance(v, bool)]


def _is_of(value, kind) -> bool:
  """Says whether a value of a config is of an annotated type."""
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if isinstance(kind, types.UnionType) or origin is typing.Union:
    return any(_is_of(value, part) for part in parts)
  if origin is tuple:
    if parts[-1] is Ellipsis:
      parts = parts[:1] * len(value) if isinstance(value, (tuple, list)) else ()
    return isinstance(value, (tuple, list)) and len(value) == len(parts) and (
        all(_is_of(v, part) for v, part in zip(value, parts)))
  if kind is typing.Any:
    return True
  if kind is tuple:
    return isinstance(value, (tuple, list))
  if kind is float:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and (
        math.isfinite(value))
  whole = kind is int and isinstance(value, bool)
  return isinstance(value, origin or kind) and not whole


def _type_name(kind) -> str:
  """Returns a type as it is written in a dataclass, such as 'int | None'."""
  return kind.__name__ if type(kind) is type else str(kind)
