"""Errors that a user can act on, and how commands report them."""

import contextlib
import difflib
import os
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


# What the array store quotes when the system refuses to write; it raises
# ValueErrors and RuntimeErrors. A device without memory says the same as a
# store without room, and more.
_REFUSALS = ('No space left', 'Permission denied', 'Read-only', 'too large',
             'Not a directory', 'Disk quota', 'RESOURCE_EXHAUSTED')
_NO_MEMORY = 'Out of memory'


@contextlib.contextmanager
def writing(folder):
  """Turns a failure to write below `folder` into a UserError of one line."""
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    text = getattr(error, 'strerror', None) or str(error).rpartition(': ')[2]
    if not isinstance(error, OSError) and (
        _NO_MEMORY in str(error)
        or not any(refusal in str(error) for refusal in _REFUSALS)):
      raise
    raise UserError(
        f'cannot write below {folder}: {text.splitlines()[0]}. Free some '
        'space or give another --workdir, and run the same command again: it '
        'continues from the last complete checkpoint.') from error


def run(main):
  """Runs a command; a `UserError` becomes one line and exit code 2.

  Args:
    main: function without arguments that returns an exit code or None.
  """
  try:
    code = main()
    sys.stdout.flush()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    code = 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    code = 130
  except BrokenPipeError:  # of a reader such as head, which has read enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = 141
  sys.exit(code)
