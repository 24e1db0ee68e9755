"""Text to ids and back: a small sentencepiece tokenizer with reserved ids.

The tokenizer is trained when a corpus is prepared, from that corpus' training
texts, and is stored with the data and with every checkpoint. Its reserved ids
are sentencepiece *control symbols*: they never come out of encoding, whatever
text a user types, and layouts put them in by name.
"""

import io
import pathlib
import re

import sentencepiece

from mmgen.data import published_text

# Ids 0, 1, 2 ... in this order, in every tokenizer. The spare ones are room for
# later systems, so that stored tokenizers and checkpoints stay valid.
RESERVED = (
    '<pad>', '<bos>', '<eos>', '<unk>', '<image>', '</image>', '<patch>',
    '<newline>', '<class>', '<user>', '<assistant>', '<answer>', '<chunk>',
    '<spare1>', '<spare2>', '<spare3>')

# Smallest vocabulary that can spell everything: reserved ids and 256 bytes.
MIN_VOCAB = len(RESERVED) + 256

# sentencepiece writes a space as this character; a real one needs care.
_SPACE = '\u2581'


class Tokenizer:
  """Encodes text without ever yielding a reserved id; exact round trip."""

  reserved = RESERVED  # what `id` takes; a published one has fewer

  def __init__(self, model):
    """Builds a tokenizer.

    Args:
      model: bytes of a sentencepiece model made by `train`.

    Raises:
      ValueError: if the bytes are no such model, or its reserved ids differ.
    """
    self.bytes = bytes(model)
    self._model = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(self.bytes)
    except RuntimeError as error:
      raise ValueError(f'not a sentencepiece model: {error}') from error
    found = tuple(
        self._model.IdToPiece(i)
        for i in range(min(len(RESERVED), self._model.GetPieceSize())))
    if found != RESERVED:
      raise ValueError(
          f'tokenizer begins with the pieces {found}, expected {RESERVED}')
    self.vocab_size = self._model.GetPieceSize()
    self._space = [
        self._model.PieceToId(f'<0x{b:02X}>') for b in _SPACE.encode()]

  @classmethod
  def from_bytes(cls, model):
    """A tokenizer from its stored `bytes`, this or a published one."""
    if published_text.owns(model):
      return published_text.Tokenizer.from_bytes(model)
    return cls(model)

  @classmethod
  def load(cls, path):
    """A tokenizer from a `tokenizer.model` file."""
    return cls(pathlib.Path(path).read_bytes())

  @property
  def files(self):
    """{name: bytes} of the files that `load` makes the same of."""
    return {'tokenizer.model': self.bytes}

  def has(self, name):
    """Whether there is such a reserved symbol."""
    return name in RESERVED

  def id(self, name):
    """The id of a reserved symbol, such as `<image>`."""
    if name not in RESERVED:
      raise ValueError(f'{name!r} is not reserved; these are: {RESERVED}')
    return RESERVED.index(name)

  def encode(self, text):
    """Text to a list of ids, none of them reserved.

    A space is put before it, as LLaMA's tokenizer does, so that a word is the
    same token where it begins a text (an answer) and within one (a caption).
    A text that follows another one is left as it is.
    """
    if not text:
      return []
    if not isinstance(text, published_text.AfterText):
      text = f' {text}'
    # sentencepiece cannot tell a typed U+2581 from a space: spell it as bytes.
    ids = []
    for i, part in enumerate(text.split(_SPACE)):
      ids += self._space if i else []
      ids += self._model.EncodeAsIds(part)
    return ids

  def decode(self, ids):
    """Ids to text; reserved ids are skipped, broken bytes become U+FFFD."""
    return self._model.DecodeIds(
        [int(i) for i in ids if i >= len(RESERVED)]).removeprefix(' ')

  def pieces(self, ids):
    """One readable string an id, for pages that show tokens."""
    return [
        self._model.IdToPiece(int(i)).replace(_SPACE, ' ') for i in ids]


def load(path, family=None):
  """A tokenizer from a file: one of ours, or a published one.

  Args:
    path: of a tokenizer.model or a tokenizer.json.
    family: of a published one, as for `published_text.Tokenizer`.

  Raises:
    ValueError: it is neither.
  """
  try:
    return Tokenizer.load(path)
  except ValueError:
    return published_text.load(path, family)


def train(texts, vocab_size):
  """Trains a byte-pair tokenizer with byte fallback, without normalisation.

  Args:
    texts: iterable of str.
    vocab_size: number of ids, reserved symbols and 256 bytes included.

  Returns:
    The serialised model, bytes.

  Raises:
    ValueError: if `vocab_size` is too small or larger than the texts allow.
  """
  if vocab_size < MIN_VOCAB:
    raise ValueError(
        f'vocab_size={vocab_size}: at least {MIN_VOCAB} ids are needed for '
        'reserved symbols and bytes')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=(f' {text}' for text in texts), model_writer=model,
        model_type='bpe', vocab_size=vocab_size,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece=RESERVED[0], bos_piece=RESERVED[1], eos_piece=RESERVED[2],
        unk_piece=RESERVED[3], control_symbols=list(RESERVED[4:]),
        byte_fallback=True, character_coverage=0.999, split_digits=True,
        normalization_rule_name='identity', add_dummy_prefix=False,
        remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
  except RuntimeError as error:
    message = str(error)
    least = re.search(r'smaller than required_chars. \d+ vs (\d+)', message)
    most = re.search(r'Please set it to a value <= (\d+)', message)
    if least:
      message = f'the letters of these texts need at least {least.group(1)}'
    elif most:
      message = f'these texts allow at most {most.group(1)}'
    raise ValueError(f'vocab_size={vocab_size}: {message}') from error
  return model.getvalue()
