"""Tokenizers of published models, behind the interface of `text.Tokenizer`.

Two kinds of files are read, and neither can execute anything: sentencepiece's
`tokenizer.model` (LLaMA, Vicuna, SigLIP) and `tokenizer.json` (CLIP, Qwen2.5,
Fuyu, LLaMA "fast"). Ids are those of the reference, with one exception: what a
user types never becomes a special id. '</s>' or '<|im_end|>' within a text is
spelled with ordinary pieces, where the references would end the turn.

Texts are encoded one span at a time, where the references encode a whole turn.
The ids are the same if a span says what it follows (`AfterMark`, `AfterText`)
and, if that is a text, begins with a space: no piece goes on over the start of
a word. So `prompts.STYLES` are cut.
"""

from collections.abc import Callable
import dataclasses
import html
import json
import pathlib

import sentencepiece

from mmgen import errors

_HEADER = b'{"family": '  # how `Tokenizer.bytes` begins
_SPACE = '\u2581'  # what sentencepiece writes for a space

# What LLaMA's Python tokenizer puts behind a special id: a space (`legacy`),
# nothing (since transformers 4.34), or a space that is cut off the first piece
# again (4.31 to 4.33, which LLaVA-1.5 was made with).
JOINS = ('space', 'none', 'cut')

_NOT_SPECIAL = '<pad>', '<unk>'

# normalizer_spec { add_dummy_prefix: false }: what stands later in a protocol
# buffer wins, so that this behind a tokenizer.model changes its setting.
_NO_PREFIX = b'\x1a\x02\x18\x00'


class AfterMark(str):
  """A text right behind a special id; any other kind of str begins anew."""


class AfterText(str):
  """A text right behind another text; nothing is put before it."""


@dataclasses.dataclass(frozen=True)
class Family:
  """Tokenizers with the same special pieces.

  Attributes:
    reserved: {reserved name: special piece}.
    added: pieces that the reference's program adds to those of the file.
    clean: what is done to a text first.
  """

  reserved: dict[str, str]
  added: tuple[str, ...] = ()
  clean: Callable[[str], str] = str


class Tokenizer:
  """A published tokenizer; `encode` never yields a special id.

  Attributes:
    family: a name of `FAMILIES`.
    reserved: the names that `id` takes.
    vocab_size: one more than the largest id; its model may have more rows.
    bytes: what `from_bytes` takes, to be stored with a model.
  """

  def __init__(self, file, family=None, join='space'):
    """Builds a tokenizer.

    Args:
      file: bytes of a tokenizer.model or a tokenizer.json.
      family: a name of `FAMILIES`; by default the first all of whose special
        pieces the file has.
      join: of `JOINS`; for a tokenizer.model, the other kind says it itself.

    Raises:
      ValueError: the file cannot be read or is not of that family.
    """
    if join not in JOINS:
      raise ValueError(f'join is {join!r}; allowed: {", ".join(JOINS)}')
    read = _Json if file.lstrip()[:1] == b'{' else _Sentencepiece
    self._file = read(file, join)
    self.family = _family(self._file.pieces, family)
    spec = FAMILIES[self.family]
    self._clean = spec.clean
    known = set(self._file.pieces)
    self._pieces = self._file.pieces + [
        piece for piece in spec.added if piece not in known]
    self._ids = {piece: i for i, piece in enumerate(self._pieces)}
    self._reserved = {
        name: self._ids[piece] for name, piece in spec.reserved.items()}
    self.reserved = tuple(self._reserved)
    # Padding may be a letter, and what is unknown is part of a text.
    self._special = self._file.control.union(
        i for name, i in self._reserved.items() if name not in _NOT_SPECIAL)
    self.vocab_size = len(self._pieces)
    options = dict(family=self.family, join=join)
    self.bytes = json.dumps(options).encode() + b'\n' + file

  @classmethod
  def from_bytes(cls, stored):
    """A tokenizer from the `bytes` of another."""
    options, _, file = stored.partition(b'\n')
    return cls(file, **json.loads(options))

  def __reduce__(self):
    return Tokenizer.from_bytes, (self.bytes,)

  def id(self, name):
    """The id that stands for a reserved symbol, such as `<eos>`.

    Raises:
      UserError: that family has none, and the prompts of others ask for it.
    """
    if name not in self._reserved:
      raise errors.UserError(
          f'{name!r} has no id in a published tokenizer of the family '
          f'{self.family!r}; these have: {", ".join(self._reserved)}. Another '
          'style of prompts may need none.')
    return self._reserved[name]

  @property
  def files(self):
    """{name: bytes} of the files that `load` makes the same of."""
    options, _, file = self.bytes.partition(b'\n')
    if file.lstrip()[:1] == b'{':
      return {'tokenizer.json': file}
    said = {'legacy': json.loads(options)['join'] == 'space'}
    return {'tokenizer.model': file,
            'tokenizer_config.json': json.dumps(said).encode()}

  def has(self, name):
    """Whether a reserved symbol has an id."""
    return name in self._reserved

  def encode(self, text):
    """Text to a list of ids, none of them special."""
    if not text:
      return []
    ids = self._file.encode(self._clean(text), type(text))
    if self._special.isdisjoint(ids):
      return ids
    return [j for i in ids
            for j in (self._spelled(i) if i in self._special else [i])]

  def _spelled(self, special):
    """The letters of a special piece that stands in a text."""
    ids = []
    for letter in self._pieces[special]:
      spelling = [letter] if letter in self._ids else [
          f'<0x{byte:02X}>' for byte in letter.encode()]
      ids += [self._ids[part] for part in spelling]
    return ids

  def decode(self, ids):
    """Ids to text; special ones are skipped, broken bytes become U+FFFD.

    A row of answers is filled up with 0, which may be a letter: zeros behind
    <eos> are skipped too.
    """
    ids = [int(i) for i in ids]
    end = max((n for n, i in enumerate(ids, 1) if i), default=0)
    if end and ids[end - 1] == self._reserved['<eos>']:
      ids = ids[:end]
    return self._file.decode([
        i for i in ids
        if i not in self._special and i < len(self._file.pieces)])

  def pieces(self, ids):
    """One readable string an id, for pages that show tokens."""
    return [self._file.readable(i) if i < len(self._file.pieces)
            else self._pieces[i] for i in map(int, ids)]


def owns(stored):
  """Whether bytes are those of a published tokenizer."""
  return stored.startswith(_HEADER)


def load(path, family=None, join=None):
  """A tokenizer from a file.

  Args:
    path: of a tokenizer.model or a tokenizer.json.
    family: as for `Tokenizer`.
    join: of `JOINS`; by default 'none' if the tokenizer_config.json beside it
      says `"legacy": false`, else 'space'.
  """
  path = pathlib.Path(path)
  beside = path.with_name('tokenizer_config.json')
  if join is None:
    said = json.loads(beside.read_text()) if beside.exists() else {}
    join = 'none' if said.get('legacy') is False else 'space'
  return Tokenizer(path.read_bytes(), family, join)


def _family(pieces, name):
  """The family of a file with these pieces, asked for or recognised."""
  if name is not None and name not in FAMILIES:
    raise ValueError(f'no family of published tokenizers is named {name!r}; '
                     f'there are: {", ".join(FAMILIES)}')
  missing = {}
  for family in [name] if name else FAMILIES:
    spec = FAMILIES[family]
    missing[family] = {*spec.reserved.values()}.difference(
        pieces, spec.added if name else ())
    if not missing[family]:
      return family
  raise ValueError('a tokenizer of no known family: ' + '; '.join(
      f'{family} needs {" ".join(sorted(lack))}'
      for family, lack in missing.items()))


class _Sentencepiece:
  """What `Tokenizer` needs of a tokenizer.model."""

  def __init__(self, file, join):
    self._join, self._model = join, _model(file)
    self._bare = _model(file + _NO_PREFIX)
    ids = range(self._model.GetPieceSize())
    self.pieces = [self._model.IdToPiece(i) for i in ids]
    self.control = {i for i in ids if self._model.IsControl(i)}

  def encode(self, text, kind):
    if kind is AfterText or kind is AfterMark and self._join == 'none':
      return self._bare.EncodeAsIds(text)
    ids = self._model.EncodeAsIds(text)
    if kind is AfterMark and self._join == 'cut' and not text.startswith(' '):
      rest = self.pieces[ids[0]].removeprefix(_SPACE)
      ids[:1] = [self._model.PieceToId(rest)] if rest else []
    return ids

  def decode(self, ids):
    return self._model.DecodeIds(ids)

  def readable(self, i):
    return self.pieces[i].replace(_SPACE, ' ')


def _model(file):
  model = sentencepiece.SentencePieceProcessor()
  try:
    model.LoadFromSerializedProto(file)
  except RuntimeError as error:
    raise ValueError(f'not a sentencepiece model: {error}') from error
  return model


class _Json:
  """What `Tokenizer` needs of a tokenizer.json."""

  def __init__(self, file, join):
    del join  # said by the file
    import tokenizers  # only these files need it

    def build(spec):
      model = tokenizers.Tokenizer.from_str(json.dumps(spec))
      model.encode_special_tokens = True  # as ordinary text
      model.no_truncation()
      model.no_padding()
      return model

    try:
      spec = json.loads(file)
      for added in spec['added_tokens']:
        added['special'] = True  # any other kind would be found in texts
      self._model, bare = build(spec), _without_space(spec)
      self._bare = self._model if bare == spec else build(bare)
      scheme = (spec['pre_tokenizer'] or {}).get('prepend_scheme')
      self._marked = self._bare if scheme == 'first' else self._model
      self._word_end = spec['model'].get('end_of_word_suffix')
      self._is_bytes = (spec['decoder'] or {}).get('type') == 'ByteLevel'
    except Exception as error:  # the library raises nothing more precise
      raise ValueError(f'not a tokenizer.json: {error!r}') from error
    self.control = {added['id'] for added in spec['added_tokens']}
    ids = self._model.get_vocab()
    self.pieces = [f'<nothing {i}>' for i in range(1 + max(ids.values()))]
    for piece, i in ids.items():
      self.pieces[i] = piece

  def encode(self, text, kind):
    model = {AfterText: self._bare, AfterMark: self._marked}.get(
        kind, self._model)
    return model.encode(text, add_special_tokens=False).ids

  def decode(self, ids):
    text = self._model.decode(ids)
    return text.replace(self._word_end, ' ').strip() if self._word_end else text

  def readable(self, i):
    if self._is_bytes and i not in self.control:
      return self._model.decode([i]).replace(self._word_end or _SPACE, ' ')
    return self.pieces[i].replace(_SPACE, ' ')


def _without_space(spec):
  """The same tokenizer, which puts no space before a text."""
  spec = json.loads(json.dumps(spec))
  normalizer = spec['normalizer'] or {}
  for step in normalizer.get('normalizers', [normalizer]):
    if step.get('type') == 'Prepend':
      step['prepend'] = ''
  if 'prepend_scheme' in (spec['pre_tokenizer'] or {}):
    spec['pre_tokenizer']['prepend_scheme'] = 'never'
  return spec


def _clean_clip(text):
  """As OpenAI's code; a tokenizer.json says only the end of it."""
  import ftfy  # only CLIP needs it

  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return ' '.join(text.split()).lower()


def _clean_siglip(text):
  """ASCII in lower case (big_vision, `tokenize(lower=True)`)."""
  return text.encode().lower().decode()


def _clean_fuyu(text):
  """Leaves no control character that begins an answer."""
  return text.replace('\x04', '\ufffd')


def _slots(piece):
  """Slots of a vision module, whose id is never looked up."""
  return dict.fromkeys(('<patch>', '<class>', '<newline>'), piece)


_EMU = ('[PAD]', '[IMG]', '[/IMG]', '<image>')
_EMU2 = _EMU + (
    '[gIMG]', '[/gIMG]', '[EOC]', '[VIDEO]', '<grounding>', '<phrase>',
    '</phrase>', '<object>', '</object>', '</delimiter_of_multi_objects/>',
    '<REC>', *(f'<patch_index_{i:04d}>' for i in range(257)))
_ROLES = ('[USER]', '[ASSISTANT]')
_LLAMA = {'<unk>': '<unk>', '<bos>': '<s>', '<eos>': '</s>'}
_EMU_RESERVED = {**_LLAMA, '<pad>': '[PAD]', '<image>': '[IMG]',
                 '</image>': '[/IMG]', '<patch>': '<image>'}
_EMU_CHAT = {**_EMU_RESERVED, '<user>': '[USER]', '<assistant>': '[ASSISTANT]'}

# The more a family asks for, the earlier it stands.
FAMILIES = {
    'emu2_chat': Family({**_EMU_CHAT, '<chunk>': '[EOC]'}, _EMU2 + _ROLES),
    'emu2': Family({**_EMU_RESERVED, '<chunk>': '[EOC]'}, _EMU2),
    'emu_instruct': Family(_EMU_CHAT, _EMU + _ROLES),
    'emu': Family(_EMU_RESERVED, _EMU),
    'fuyu': Family({
        '<pad>': '|ENDOFTEXT|', '<bos>': '<s>', '<eos>': '|ENDOFTEXT|',
        '<patch>': '|SPEAKER|', '<newline>': '|NEWLINE|',
        '<answer>': '<0x04>'}, clean=_clean_fuyu),
    # Hugging Face's files of LLaVA, not those of its authors.
    'llava_hf': Family({**_LLAMA, '<pad>': '<pad>', **_slots('<image>')}),
    'qwen2': Family({'<pad>': '<|endoftext|>', '<eos>': '<|im_end|>',
                     **_slots('<|endoftext|>')}),
    # OpenAI pads with 0, Hugging Face with the end; no embedding sees it.
    'clip': Family({'<pad>': '!', '<bos>': '<|startoftext|>',
                    '<eos>': '<|endoftext|>'}, clean=_clean_clip),
    'llama': Family({**_LLAMA, '<pad>': '<unk>', **_slots('<unk>')}),
    'siglip': Family({'<pad>': '</s>', '<eos>': '</s>', '<unk>': '<unk>'},
                     clean=_clean_siglip),
}
