"""What was declared before the first results of a table, and what changed.

A predicate that is written, bent or dropped with results in sight proves
nothing. So `table.frozen.json` is written once, before a table first trains
anything, and every later table is held against it. It holds

  claims    {claim: hash of all that decides its verdict}
  controls  {control: hash of all that decides its outcome}
  seen      [row, seed] of the results that were there already

A file of an older table is {claim: hash} alone: its controls were not hashed,
and what had been seen was not noted.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json

from mmgen import errors
from mmgen.tables import claims


@dataclasses.dataclass(frozen=True)
class Frozen:
  """See the module; `controls` is None in an older file."""
  claims: Mapping[str, str]
  controls: Mapping[str, str] | None = None
  seen: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Departures:
  """What is to be said where a table departs from what was frozen.

  Attributes:
    claims: {claim: notes}; such a claim is exploratory.
    controls: {control: notes}.
    warnings: of the table itself.
  """
  claims: Mapping[str, tuple[str, ...]] = dataclasses.field(
      default_factory=dict)
  controls: Mapping[str, tuple[str, ...]] = dataclasses.field(
      default_factory=dict)
  warnings: tuple[str, ...] = ()


def declaration(table: claims.Table, runs: Mapping[str, str],
                seen=()) -> Frozen:
  """Hashes the claims and controls of a table.

  Of a claim these are the predicate with d, its rows, its column, the seeds,
  the budget, the matched account and the exclusions; of a control likewise. A
  tuning counts through the rates of the rows: how these were found decides
  nothing.

  Args:
    table: the declared table.
    runs: {row: key of what it trains and how it is scored}, without the rows
      that are not run.
    seen: (row, seed) of results that are there.
  """
  # Two empty places: hashes of older tables had the tuning there.
  shared = (table.seeds, (), None, table.budget, table.account,
            table.exclusions)
  columns = {name: dataclasses.astuple(c) for name, c in table.metrics.items()}

  def digest(what, metric, rows):
    return hashlib.sha256(json.dumps(
        [dataclasses.astuple(what), columns[metric], shared,
         [runs.get(row) for row in rows]], default=str).encode()).hexdigest()

  first = next(iter(table.metrics))
  return Frozen(
      {name: digest(claim, claim.metric, claim.all_rows)
       for name, claim in table.claims.items()},
      {name: digest(control, control.metric or first,
                    (control.row, control.than))
       for name, control in table.controls.items()},
      tuple(seen))


def read(path) -> Frozen | None:
  """Returns what was frozen, of this or an older form; None if nothing was."""
  if not path.exists():
    return None
  stored = json.loads(path.read_text())
  if not isinstance(stored.get('claims'), dict):
    return Frozen(stored)
  return Frozen(stored['claims'], stored['controls'],
                tuple((row, seed) for row, seed in stored['seen']))


def write(path, frozen: Frozen):
  """Stores what is declared now.

  Raises:
    UserError: the folder cannot be written.
  """
  with errors.writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(frozen), indent=1) + '\n')


def departures(table: claims.Table, frozen: Frozen, now: Frozen) -> Departures:
  """Says where a table departs from what was frozen.

  Args:
    table: as it is declared now.
    frozen: what was declared, and seen, before the first run.
    now: of `declaration`.
  """
  changed = {name: _change(name, frozen.claims, now.claims)
             for name in now.claims}
  for name, claim in table.claims.items():
    seen = [f'{row} seed {seed}' for row, seed in frozen.seen
            if row in claim.all_rows and seed in table.seeds]
    if seen:
      changed[name] += ('results that it rests on were there before it was '
                        f'declared: {", ".join(seen)}',)
  before = now.controls if frozen.controls is None else frozen.controls
  gone = [f'{kind} {name!r}, declared before the first run, is gone'
          for kind, old, new in (('claim', frozen.claims, now.claims),
                                 ('control', before, now.controls))
          for name in old if name not in new]
  return Departures(
      {name: tuple(f'exploratory: {note}' for note in notes)
       for name, notes in changed.items()},
      {name: _change(name, before, now.controls) for name in now.controls},
      tuple(gone))


def _change(name: str, old: Mapping[str, str],
            new: Mapping[str, str]) -> tuple[str, ...]:
  if name not in old:
    return ('it was declared after the first run',)
  return ('it or its rows changed after the first run',) * (
      old[name] != new[name])
