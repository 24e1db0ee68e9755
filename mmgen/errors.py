"""Errors that a user can act on, and how commands report them."""

import difflib
import sys


class UserError(Exception):
  """A mistake in the input: its text is one line that says what to do."""


class Unsaid(UserError):
  """What has to be said, since nothing tells it; `fields` names it."""

  def __init__(self, text, fields):
    super().__init__(text)
    self.fields = fields


def nearest(word, words) -> str:
  """Returns ' Did you mean ...?' for the closest of `words`, or ''."""
  close = difflib.get_close_matches(str(word), [str(w) for w in words], 1, 0.5)
  return f' Did you mean {close[0]!r}?' if close else ''


def run(main):
  """Runs a command; a `UserError` becomes one line and exit code 2.

  Args:
    main: function without arguments that returns an exit code or None.
  """
  try:
    code = main()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    code = 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    code = 130
  sys.exit(code)
