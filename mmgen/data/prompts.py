"""Views: from one record of a corpus to one document.

A template says where pictures, words and reserved ids stand. Words fill whole
spans of their own, so that nothing a user types becomes a reserved id. Captions
and answers are learnt, and so is the <eos> between turns; the rest is read.

  caption        image, caption                         (EVE's "plain" prompt)
  question       image, <user> ... <assistant><answer> ...
  conversation   the same, all questions of the picture one after another,
                 each answer closed by <eos>            (LLaVA-1.5)
  text, text_conversation   the same words without their picture

<answer> says that a word or a short phrase follows: LLaVA-1.5 says it in words
(arXiv 2310.03744, section 3.2), Fuyu with one id as here.

A view draws what it must choose from a generator that the caller keys by
(seed, epoch, record), so that it is the same wherever the record is read.
"""

import re

from mmgen import errors
from mmgen.data import document as document_lib

TEMPLATES = {
    'caption_before': '{image}{caption}',
    'caption_after': '{caption}{image}',
    'text': '{caption}',
    'turn': '<user>{question}<assistant><answer>{answer}',
    'between_turns': '<eos>',
}
# What is learnt of a template.
TARGETS = ('{caption}', '{answer}', '<eos>')

COLUMNS = ('raw', 'synthetic', 'fused', 'names')
PLACES = ('before', 'after', 'random')


def render(template, **fields):
  """The spans of a template.

  Args:
    template: A name of `TEMPLATES`.
    **fields: Pixels uint8 [Y, X, 3] for `image`, else a str.
  """
  spans = []
  for part in re.findall(r'\{\w+\}|<\w+>', TEMPLATES[template]):
    role = 'target' if part in TARGETS else 'input'
    if part == '{image}':
      spans.append(document_lib.image(fields['image']))
    elif part.startswith('{'):
      spans.append(document_lib.text(fields[part[1:-1]], role))
    else:
      spans.append(document_lib.marks(part, role=role))
  return tuple(spans)


def caption_document(pixels, caption, place='before', record_id=''):
  """A picture and its caption.

  Args:
    pixels: uint8 [Y, X, 3].
    caption: The text; any text will do for a prompt, which leaves it out.
    place: Where the picture stands, `before` or `after` the caption.
    record_id: Name of the record.
  """
  return document_lib.Document(
      render(f'caption_{place}', image=pixels, caption=caption), record_id)


def question_document(pixels, turns, record_id=''):
  """A picture and questions about it.

  Args:
    pixels: uint8 [Y, X, 3]; None for questions alone.
    turns: Pairs (question, answer); the last answer may be anything for a
      prompt, which leaves it out.
    record_id: Name of the record.
  """
  spans = [] if pixels is None else [document_lib.image(pixels)]
  for i, (question, answer) in enumerate(turns):
    if i:
      spans += render('between_turns')
    spans += render('turn', question=question, answer=answer)
  return document_lib.Document(tuple(spans), record_id)


def caption_text(record, column, language, generator):
  """The caption of a record.

  Args:
    record: A record of a corpus.
    column: A name of `COLUMNS`, or several joined by +, of which one is drawn;
      a name given twice is drawn twice as often. `names` are the names of the
      objects in `language`.
    language: Language of `names`.
    generator: np.random.Generator.
  """
  columns = column.split('+')
  chosen = columns[generator.integers(len(columns))]
  if chosen == 'names':
    return ', '.join(record['names'][language])
  return record['captions'][chosen]


def caption(record, source, generator):
  """A picture and one of its captions, in either order."""
  text = caption_text(record, source.column, source.language, generator)
  place = source.image_place
  if place == 'random':
    place = PLACES[generator.integers(2)]
  return caption_document(record['image'], text, place, record['id'])


def question(record, source, generator):
  """A picture and one of its questions."""
  del source
  asked = _questions(record)
  one = asked[generator.integers(len(asked))]
  return question_document(record['image'], [(one['question'], one['answer'])],
                           record['id'])


def conversation(record, source, generator):
  """A picture and all of its questions, in random order."""
  asked = _questions(record)
  turns = [(asked[i]['question'], asked[i]['answer'])
           for i in generator.permutation(len(asked))]
  pixels = None if source.view in WITHOUT_PICTURES else record['image']
  return question_document(pixels, turns, record['id'])


def _questions(record):
  if not record['questions']:
    raise errors.UserError(
        f"record {record['id']!r} has no questions: the views 'vqa' and "
        "'conversation' need a corpus that asks some")
  return record['questions']


def text(record, source, generator):
  """A caption without its picture."""
  words = caption_text(record, source.column, source.language, generator)
  return document_lib.Document(render('text', caption=words), record['id'])


def pair(record, source, generator):
  """A picture and a caption for the layout `pair`."""
  words = caption_text(record, source.column, source.language, generator)
  return caption_document(record['image'], words, record_id=record['id'])


def check(where, source):
  """Raises UserError if a source names a choice that does not exist.

  Args:
    where: Its field in the config, such as `mix.captions`.
    source: A `mixture.Source`.
  """
  columns = source.column.split('+')
  for field, values, allowed in (
      ('view', [source.view], VIEWS),
      ('column', columns, COLUMNS),
      ('image_place', [source.image_place], PLACES)):
    for value in values:
      if value not in allowed:
        raise errors.UserError(
            f'{where}.{field} is {value!r}; allowed: {", ".join(allowed)}')
  if source.image_place != 'before' and source.view != 'caption':
    raise errors.UserError(
        f'{where}.image_place is {source.image_place!r}; the view '
        f"{source.view!r} only knows 'before'")
  if source.language != 'en' and 'names' not in columns:
    raise errors.UserError(
        f'{where}.language is {source.language!r}; only '
        f"{where}.column 'names' is known in other languages than 'en'")
  if source.shuffle_pairs and source.view in WITHOUT_PICTURES:
    raise errors.UserError(
        f"{where}.shuffle_pairs is set; the view {source.view!r} has no "
        'pictures')


VIEWS = {
    'caption': caption,
    'vqa': question,
    'conversation': conversation,
    'text': text,
    'text_conversation': conversation,
    'pair': pair,
}
WITHOUT_PICTURES = ('text', 'text_conversation')
