"""Documents: what every corpus is turned into before anything else.

A document is a tuple of spans in reading order. It says *what* an example
contains and which parts a model is to learn, never *how* that becomes slots
of a sequence: `mmgen/data/layout.py` decides the latter.

    Document((
        image(pixels),
        text('what is this?', role='input'),
        marks('<answer>', role='input'),
        text('a red fox'),
    ), id='scene-17')

Only numpy is imported here.
"""

import dataclasses
from typing import Any
from typing import Literal

import numpy as np

Kind = Literal['text', 'image', 'codes', 'points', 'box', 'mask']
Role = Literal['input', 'target', 'both']


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
  """One part of a document.

  Attributes:
    kind: What `data` is.
    data: For `text` a `str`, which can never become a reserved id, or a tuple
      of names of reserved ids such as `('<user>',)`, which is the only way to
      put one into a text. For `image` uint8 pixels [Y, X, 3].
    role: `input` is read but not learnt (loss weight 0), `target` is learnt,
      `both` is learnt and also given as input to another part.
    weight: Loss weight of each token of a target.
    time: Seconds from the start, for an image that is a video frame.
    ref: Index of the span in the same document this one speaks of (the image
      a box lies in).
    valid: For images, the rectangle of real picture (top, left, height, width)
      in pixels when the rest is padding. None: all of it.
  """

  kind: Kind
  data: Any
  role: Role = 'both'
  weight: float = 1.0
  time: float | None = None
  ref: int | None = None
  valid: tuple[int, int, int, int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
  """Spans in reading order; no spans at all stands for a bad record.

  Attributes:
    spans: The parts.
    id: Name of the record it was made from, for error messages.
    meta: Anything a reader may want to know; layouts never look at it.
    begin: Whether a layout puts <bos> before it.
    end: Whether a layout puts <eos> behind it.
  """

  spans: tuple[Span, ...]
  id: str = ''
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)
  begin: bool = True
  end: bool = True


def text(data: str, role: Role = 'target', weight: float = 1.0) -> Span:
  """A span of text."""
  return Span('text', data, role, weight)


def marks(*names: str, role: Role = 'input', weight: float = 1.0) -> Span:
  """A span of reserved ids, given by name."""
  return Span('text', names, role, weight)


def image(
    pixels_YXC: np.ndarray,
    valid: tuple[int, int, int, int] | None = None,
) -> Span:
  """A span of one picture, uint8 [Y, X, 3]."""
  return Span('image', pixels_YXC, 'input', valid=valid)


def bad(record_id: str, why: str) -> Document:
  """The empty document that keeps the place of a record that cannot be used."""
  return Document((), record_id, {'bad': why})
