"""What contents of files do not tell: a user is asked, and says it."""

from mmgen import errors


def take(said, sayable, what):
  """Checks what a user says; returns it, lists as tuples.

  Args:
    said: {'decoder.heads': value, ...}.
    sayable: {field: what it is}.
    what: the model, in an error.

  Raises:
    UserError: it cannot be said.
  """
  for field in said:
    if field not in sayable:
      raise errors.UserError(f'{field} cannot be said of {what}; what can: '
                             f'{", ".join(sayable)}.')
  return {field: tuple(value) if isinstance(value, list) else value
          for field, value in said.items()}


def ask(fields, sayable):
  """Raises `errors.Unsaid` if there are fields that nothing tells."""
  asked = sorted(set(fields))
  if asked:
    raise errors.Unsaid(
        'neither the tensors nor a JSON file beside them tell '
        + ' and '.join(f'{field} ({sayable[field]})' for field in asked)
        + f'. Say so: --say={asked[0]}=..., or said={{{asked[0]!r}: ...}}.',
        asked)
