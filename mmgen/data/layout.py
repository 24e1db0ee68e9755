"""From documents to arrays: how pictures and words become slots of a row.

This file alone knows how a picture becomes slots. The data pipeline, the
models (through `ImageLayout.table_size`), the evaluators and the sampler all
read it, so that training and generation cannot disagree. Only numpy is used.

A vision module returns for each picture a *table* of P embeddings: first a
class embedding, if it has one, then the cells of its grid row by row, each row
ending in a newline embedding, if the module makes one. A slot of the sequence
takes its embedding from the table (`visual` >= 0) or from the text embedding
of the token standing there (`visual` = -1). Three systems, for a picture of
2 x 3 cells followed by the text "fox":

  Fuyu (newline='token', P = 6): newline is an ordinary token
    token   <bos> <patch> <patch> <patch> <newline> <patch> ... <newline> fox
    table     -1     0       1       2       -1        3   4 5     -1     -1

  EVE (class_slot=True, newline='table', P = 9): newline is a table entry
    token   <bos> <class> <patch> <patch> <patch> <newline> ... <newline> fox
    table     -1     0       1       2       3        4     5 6 7   8     -1

  LLaVA (P = 6): nothing but cells
    token   <bos> <patch> <patch> <patch> <patch> <patch> <patch> fox <eos>
    table     -1     0       1       2       3       4       5     -1   -1

When only the upper left 2 x 2 cells hold real picture (a portrait padded to a
landscape canvas), the table keeps its size and its numbers; the slots of the
padding are left out: EVE's row reads 0, 1 2 4, 5 6 8.

Every document is `<bos> spans <eos>`; with bos='after_image', as in Fuyu-8B,
the pictures that it begins with come before <bos>. A slot's target is the token
at the next slot of the same document. It has weight only if that token is text
to be learnt, so a picture is never predicted, and its last slot predicts the
first word after it. With roles input for "what?" and target for "fox", LLaVA
style, 1 x 2 cells:

  t          0       1       2       3     4     5     6
  tokens   <bos>  <patch> <patch>  what    ?    fox  <eos>
  targets <patch> <patch>  what     ?     fox  <eos>   0
  weights    0       0       0      0      1     1     0
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
from typing import Any
from typing import Literal

import numpy as np

from mmgen import errors
from mmgen.data import document as document_lib
from mmgen.data import packing

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class ImageLayout:
  """How the pictures of one model become slots.

  Attributes:
    rows: Rows of the full grid of cells.
    cols: Columns of the full grid of cells.
    class_slot: A class embedding from the vision module stands first.
    newline: What ends a row of cells: nothing, the text embedding of
      <newline> (`token`, Fuyu) or an embedding of the vision module (`table`,
      the split token of EVE, arXiv 2406.11832, section 3.2).
    border: The tokens <image> and </image> stand around.
    bos: Whether <bos> stands `first` or `after_image`, behind all pictures that
      a document begins with (Fuyu-8B, released code).
    whole: Every cell has read the whole picture, as learned queries do, so that
      none is left out for being padding.
  """

  rows: int
  cols: int
  class_slot: bool = False
  newline: Literal['none', 'token', 'table'] = 'none'
  border: bool = False
  bos: Literal['first', 'after_image'] = 'first'
  whole: bool = False

  @property
  def grid(self) -> tuple[int, int] | None:
    """Rows and columns of places in a picture; None if cells are no places."""
    return None if self.whole else (self.rows, self.cols)

  @property
  def table_size(self) -> int:
    """P, the number of embeddings the vision module returns a picture."""
    return self.class_slot + self.rows * self.stride

  @property
  def stride(self) -> int:
    """Entries of the table a row of cells takes."""
    return self.cols + (self.newline == 'table')

  @property
  def box(self) -> Box:
    """The box of all cells."""
    return 0, 0, self.rows, self.cols

  def slots(
      self, box: Box | None = None
  ) -> tuple[tuple[str, ...], np.ndarray]:
    """The slots of one picture.

    Args:
      box: Valid cells (top, left, rows, cols); None for the full grid.

    Returns:
      For each slot the name of the reserved token standing there, and its
      index in the table of P embeddings or -1, int32.
    """
    return _slots(self, box or self.box)

  def cell(self, index: int) -> tuple[int, int]:
    """The (row, col) of the grid that a <patch> slot's table index names."""
    return divmod(index - self.class_slot, self.stride)

  def cells(self, span: document_lib.Span) -> Box:
    """The cells of an image span that hold any real picture."""
    if span.valid is None or self.whole:
      return self.box
    top, left, height, width = span.valid
    size_y, size_x = span.data.shape[:2]
    first_y, first_x = top * self.rows // size_y, left * self.cols // size_x
    # -(-a // b) rounds up: a cell that is partly real counts as real.
    last_y = -(-(top + height) * self.rows // size_y)
    last_x = -(-(left + width) * self.cols // size_x)
    return first_y, first_x, last_y - first_y, last_x - first_x


@functools.lru_cache(maxsize=1024)
def _slots(layout: ImageLayout, box: Box):
  top, left, rows, cols = box
  if not (0 <= top and 0 <= left and rows > 0 and cols > 0
          and top + rows <= layout.rows and left + cols <= layout.cols):
    raise ValueError(
        f'valid cells {box} (top, left, rows, cols) are not a part of the '
        f'grid of {layout.rows} x {layout.cols} cells')
  slots = []
  if layout.border:
    slots.append(('<image>', -1))
  if layout.class_slot:
    slots.append(('<class>', 0))
  for row in range(top, top + rows):
    first = layout.class_slot + row * layout.stride
    slots += [('<patch>', first + c) for c in range(left, left + cols)]
    if layout.newline == 'table':
      slots.append(('<newline>', first + layout.cols))
    elif layout.newline == 'token':
      slots.append(('<newline>', -1))
  if layout.border:
    slots.append(('</image>', -1))
  names, table = zip(*slots)
  table = np.asarray(table, np.int32)
  table.flags.writeable = False  # shared by all who ask
  return names, table


@dataclasses.dataclass(frozen=True, eq=False)
class _Laid:
  """One document as slots; all arrays have one entry a slot."""

  tokens: np.ndarray  # int32
  learn: np.ndarray  # float32, loss weight of predicting the token here
  table: np.ndarray  # int32, index in the table of its picture, or -1
  picture: np.ndarray  # int32, which picture of the document, or -1
  images: list[np.ndarray]  # uint8 [Y, X, 3] each
  boxes: list[Box]  # valid cells of each picture


def _lay_out(document, tokenizer, image_layout, end: bool = True) -> _Laid:
  """Lays out one document; `end=False` leaves <eos> away (prompts)."""
  parts = []  # of (tokens, learn, table, picture)
  images, boxes = [], []

  def add(ids, learn=0.0, table=-1, picture=-1):
    ids = np.asarray(ids, np.int32)
    parts.append((ids, np.full(ids.shape, learn, np.float32),
                  np.broadcast_to(np.int32(table), ids.shape),
                  np.full(ids.shape, picture, np.int32)))

  if not document.spans:
    add(())
    return _Laid(*parts[0], images, boxes)
  learn = 0.0
  for span in _with_bos(document, image_layout):
    if span.kind == 'text':
      learn = 0.0 if span.role == 'input' else span.weight
      if isinstance(span.data, str):
        add(tokenizer.encode(span.data), learn)
      else:
        add([tokenizer.id(name) for name in span.data], learn)
    elif span.kind == 'image':
      box = image_layout.cells(span)
      names, table = image_layout.slots(box)
      ids = {name: tokenizer.id(name) for name in set(names)}
      add([ids[name] for name in names], 0.0, table, len(images))
      images.append(span.data)
      boxes.append(box)
    else:
      raise ValueError(
          f'document {document.id!r} has a span of kind {span.kind!r}; the '
          "layout 'sequence' knows 'text' and 'image'")
  if end and document.end:
    # The end is learnt exactly if the last words are.
    add([tokenizer.id('<eos>')], learn)
  arrays = [np.concatenate(column) for column in zip(*parts)]
  return _Laid(*arrays, images, boxes)


def _with_bos(document, image_layout):
  spans, place = document.spans, 0
  if not document.begin:
    return spans
  if image_layout and image_layout.bos == 'after_image':
    place = next((i for i, span in enumerate(spans) if span.kind != 'image'),
                 len(spans))
  return *spans[:place], document_lib.marks('<bos>'), *spans[place:]


def sequence(
    documents: Sequence[document_lib.Document],
    tokenizer: Any,
    image_layout: ImageLayout | None,
    rows: int,
    length: int,
    images: int,
    image_size: tuple[int, int] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """Packs documents into rows for a decoder; what does not fit is dropped.

  Letters: R rows, T length, I pictures a row, P `image_layout.table_size`.

  Args:
    documents: One packing group. Empty documents are bad records.
    tokenizer: Has `encode(text)` and `id(reserved name)`.
    image_layout: How pictures become slots; None if there are none.
    rows: R.
    length: T.
    images: I; 0 for text alone, then the arrays of pictures are absent.
    image_size: Pixels (Y, X) of every picture. Without it, the size of the
      first one (a group of bad records alone has none, and is an error).

  Returns:
    arrays:
      tokens int32 [R, T]; slots of the table carry <patch>, <class> or
        <newline>.
      targets int32 [R, T], the token at t + 1 of the same document, else 0.
      weights float32 [R, T], loss weights of the targets.
      segments int32 [R, T], 1 2 ... for the documents of a row, 0 for padding.
      positions int32 [R, T], restart with each document.
      visual int32 [R, T], index in the row's flattened tables [I * P], -1 where
        the text embedding is used.
      image_index int32 [R, T], which picture of the row a slot (its borders
        and newlines included) belongs to, -1 for text.
      images uint8 [R, I, Y, X, 3] and image_box int32 [R, I, 4], valid cells
        (top, left, rows, cols), zeros for an empty slot.
    stats: fill (part of R * T used), documents and tokens that were packed,
      dropped_documents and dropped_tokens, bad (empty documents).
  """
  return packed(documents, tokenizer, image_layout, rows, length, images,
                image_size)[1:]


def packed(documents, tokenizer, image_layout, rows, length, images,
           image_size=None):
  """What `sequence` does, and the documents of each row in front of it.

  Returns:
    Per row the indices of its documents in packing order; arrays; stats.
  """
  laid = [_lay_out(d, tokenizer, image_layout) for d in documents]
  placed = packing.best_fit(
      [len(x.tokens) for x in laid], [len(x.images) for x in laid], rows,
      length, images)
  arrays = _fill(laid, placed, length, images, image_layout, image_size)
  kept = [i for row in placed for i in row]
  tokens = sum(len(laid[i].tokens) for i in kept)
  bad = sum(not d.spans for d in documents)
  stats = dict(
      fill=tokens / (rows * length),
      documents=len(kept),
      tokens=tokens,
      dropped_documents=len(documents) - bad - len(kept),
      dropped_tokens=sum(len(x.tokens) for x in laid) - tokens,
      bad=bad,
  )
  return placed, arrays, stats


def _fill(laid, placed, length, images, image_layout, image_size):
  """Writes placed documents into the arrays that `sequence` returns."""
  shape = len(placed), length
  out = {name: np.zeros(shape, np.int32)
         for name in ('tokens', 'targets', 'segments', 'positions')}
  out['weights'] = np.zeros(shape, np.float32)
  out['visual'] = np.full(shape, -1, np.int32)
  out['image_index'] = np.full(shape, -1, np.int32)
  if images:
    if image_size is None:
      sizes = [x.images[0].shape[:2] for x in laid if x.images]
      if not sizes:
        raise ValueError('no document has a picture: image_size is needed')
      image_size = sizes[0]
    out['images'] = np.zeros((len(placed), images, *image_size, 3), np.uint8)
    out['image_box'] = np.zeros((len(placed), images, 4), np.int32)
  table_size = image_layout.table_size if image_layout else 0
  for row, members in enumerate(placed):
    start, slot = 0, 0
    for number, i in enumerate(members, 1):
      x = laid[i]
      end = start + len(x.tokens)
      out['tokens'][row, start:end] = x.tokens
      out['targets'][row, start:end - 1] = x.tokens[1:]
      out['weights'][row, start:end - 1] = x.learn[1:]
      out['segments'][row, start:end] = number
      out['positions'][row, start:end] = np.arange(end - start)
      out['visual'][row, start:end] = np.where(
          x.table >= 0, (slot + x.picture) * table_size + x.table, -1)
      out['image_index'][row, start:end] = np.where(
          x.picture >= 0, slot + x.picture, -1)
      for pixels, box in zip(x.images, x.boxes):
        if pixels.shape[:2] != tuple(image_size):
          raise ValueError(
              f'a picture of {pixels.shape[0]} x {pixels.shape[1]} pixels '
              f'among pictures of {image_size[0]} x {image_size[1]}')
        out['images'][row, slot] = pixels
        out['image_box'][row, slot] = box
        slot += 1
      start = end
  return out


def unpacked(
    documents: Sequence[document_lib.Document],
    tokenizer: Any,
    image_layout: ImageLayout | None,
    length: int,
    images: int,
    image_size: tuple[int, int] | None = None,
    answer: bool = True,
) -> dict[str, np.ndarray]:
  """One document a row, right-padded: evaluation drops and packs nothing.

  Args:
    documents: One a row; an empty document gives a row of padding.
    tokenizer: As in `sequence`.
    image_layout: As in `sequence`.
    length: T.
    images: I.
    image_size: As in `sequence`.
    answer: Whether to keep the last text to be learnt and what follows it.

  Returns:
    The arrays of `sequence`.

  Raises:
    UserError: a document does not fit.
  """
  if not answer:
    documents = [_without_answer(d) for d in documents]
  laid = [_lay_out(d, tokenizer, image_layout, answer) for d in documents]
  for d, x in zip(documents, laid):
    if len(x.tokens) > length:
      raise errors.UserError(
          f'document {d.id!r} takes {len(x.tokens)} slots; a row of this run '
          f'has {length} (layout.length). Shorten its text.')
    if len(x.images) > images:
      raise errors.UserError(
          f'document {d.id!r} has {len(x.images)} pictures, a row has {images}'
          ': raise layout.images')
  placed = [[i] if len(x.tokens) else [] for i, x in enumerate(laid)]
  return _fill(laid, placed, length, images, image_layout, image_size)


def prompt(
    documents: Sequence[document_lib.Document],
    tokenizer: Any,
    image_layout: ImageLayout | None,
    length: int,
    images: int,
    image_size: tuple[int, int] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """One document a row without its answer, for generation.

  The answer is the last text to be learnt; earlier ones stay as context.

  Returns:
    The arrays of `sequence`, and the lengths of the prompts, int32 [B]. The
    slots behind a prompt are padding: the first answer goes to slot
    `lengths[b]`.

  Raises:
    UserError: a prompt does not fit.
  """
  arrays = unpacked(documents, tokenizer, image_layout, length, images,
                    image_size, answer=False)
  return arrays, (arrays['segments'] > 0).sum(1).astype(np.int32)


def _without_answer(document):
  answers = [i for i, span in enumerate(document.spans)
             if span.kind == 'text' and span.role != 'input']
  if not answers:
    return document
  spans = document.spans[:answers[-1]]
  # A document that is all answer is continued from <bos> alone, which an empty
  # text keeps apart from a bad record.
  return dataclasses.replace(
      document, spans=spans or (document_lib.text('', 'input'),))


def pair(
    documents: Sequence[document_lib.Document],
    tokenizer: Any,
    length: int,
    image_size: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
  """Pictures and captions side by side, for contrastive training.

  Args:
    documents: Each with one picture and one text, or empty (a bad record).
    tokenizer: As in `sequence`.
    length: T. Longer captions lose their end but keep <eos>, as in CLIP.
    image_size: As in `sequence`.

  Returns:
    images uint8 [B, Y, X, 3]; tokens int32 [B, T], `<bos> caption <eos>` and
    `<pad>` up to T, without <bos> if the tokenizer has none (SigLIP); valid
    bool [B, T], False for padding; labels int64 [B], equal exactly for equal
    captions (a hash); example_valid bool [B], False for bad records, whose rows
    are padding and whose other arrays are zero.
  """
  found = [_picture_and_text(d) for d in documents]
  if image_size is None:
    sizes = [pixels.shape[:2] for pixels, _ in filter(None, found)]
    if not sizes:
      raise ValueError('no document has a picture: image_size is needed')
    image_size = sizes[0]
  n = len(documents)
  begin, pad = _ends(tokenizer)
  out = dict(
      images=np.zeros((n, *image_size, 3), np.uint8),
      tokens=np.full((n, length), pad, np.int32),
      valid=np.zeros((n, length), bool),
      labels=np.zeros(n, np.int64),
      example_valid=np.zeros(n, bool),
  )
  for b, example in enumerate(found):
    if example is None:
      continue
    pixels, caption = example
    room = length - len(begin) - 1
    ids = [*begin, *tokenizer.encode(caption)[:room], tokenizer.id('<eos>')]
    out['images'][b] = pixels
    out['tokens'][b, :len(ids)] = ids
    out['valid'][b, :len(ids)] = True
    out['labels'][b] = int.from_bytes(
        hashlib.blake2b(caption.encode(), digest_size=8).digest(), 'little',
        signed=True)
    out['example_valid'][b] = True
  return out


def _ends(tokenizer):
  """The ids before a caption, and the one that fills up behind it."""
  if tokenizer is None:  # of empty documents alone, as a plan has them
    return [], 0
  begin = [tokenizer.id('<bos>')] if '<bos>' in tokenizer.reserved else []
  return begin, tokenizer.id('<pad>')


def _picture_and_text(document):
  if not document.spans:
    return None
  pictures = [s.data for s in document.spans if s.kind == 'image']
  texts = [s.data for s in document.spans if s.kind == 'text']
  if len(pictures) != 1 or len(texts) != 1:
    raise ValueError(
        f'document {document.id!r} has {len(pictures)} pictures and '
        f"{len(texts)} texts; the layout 'pair' takes one of each")
  return pictures[0], texts[0]


def pair_stats(
    documents: Sequence[document_lib.Document],
    tokenizer: Any,
    arrays: dict[str, np.ndarray],
) -> dict[str, float]:
  """The stats of `sequence` for arrays of `pair`; dropped is what was cut."""
  texts = [_picture_and_text(d) for d in documents if d.spans]
  marks = len(_ends(tokenizer)[0]) + 1
  wanted = [marks + len(tokenizer.encode(caption)) for _, caption in texts]
  kept = arrays['valid'].sum(1)[arrays['example_valid']]
  return dict(
      fill=float(arrays['valid'].mean()),
      documents=len(texts),
      tokens=int(kept.sum()),
      dropped_documents=0,
      dropped_tokens=sum(wanted) - int(kept.sum()),
      bad=len(documents) - len(texts),
  )
