"""Corpora on disk: preparing them once, and reading them at random.

A corpus has an address such as `emoji/tiny` and is one folder of that name
below the data directory: a TFDS data set in array_record files,
`manifest.json` (what is in it and what is held out), `tokenizer.model`, trained
on its training texts, `ATTRIBUTION.txt`, and `checksums.json` of these files.
Array_record files of the same records differ from one writing to the next, so
checksums stay out of the manifest: equal manifests mean equal scenes.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import shutil

from etils import epath
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from mmgen import errors
from mmgen.data import scenes
from mmgen.data import text
from mmgen.data.corpora import drawn_scenes
from mmgen.data.corpora import emoji
from mmgen.data.corpora import shapes

# Bytes of disk a scene may take, by side of the picture; measured, rounded up.
_BYTES_PER_SCENE = {32: 3000, 64: 6000}


class BadRecord(Exception):
  """A record that cannot be decoded."""

  def __init__(self, record, why):
    super().__init__(f'record {record}: {why}')
    self.id, self.why = record, why


def addresses():
  """Addresses of all corpora that can be prepared."""
  return tuple(
      f'{name}/{size}' for name, module in CORPORA.items()
      for size in module.SIZES)


def folder(data_dir, corpus):
  """Folder of a corpus; checks that the address has a name and a size."""
  if corpus.startswith('web/'):
    raise errors.UserError(
        f'corpus {corpus}: web corpora are not built yet; what reads them is a '
        f'checked config and no more. There are: {", ".join(addresses())}')
  if not re.fullmatch(r'\w+/\w+', corpus):
    raise errors.UserError(
        f'corpus {corpus!r} is no address such as emoji/tiny; there are: '
        f'{", ".join(addresses())}')
  return epath.Path(data_dir) / corpus


def manifest(data_dir, corpus):
  """The manifest of a prepared corpus.

  Args:
    data_dir: folder of all corpora.
    corpus: address, such as `emoji/tiny`.

  Returns:
    dict, see `prepare`.

  Raises:
    UserError: if the corpus has not been prepared, or its manifest is broken.
  """
  path = folder(data_dir, corpus) / 'manifest.json'
  command = f'python -m mmgen.prepare --corpus={corpus} --data_dir={data_dir}'
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise errors.UserError(
        f'corpus {corpus} is not in {data_dir}; run: {command}') from error
  except ValueError as error:
    raise errors.UserError(
        f'{path} is broken ({error}); to repair it, run: {command}') from error


def check_language(where, data_dir, corpus, language):
  """Raises a UserError if a corpus has no names in a language.

  Args:
    where: the entry that asks for it, for the error.
    data_dir: folder of all corpora.
    corpus: address, such as `emoji/tiny`.
    language: a code such as 'fr'.
  """
  if language == 'en':
    return
  known = sorted(set.intersection(
      *map(set, manifest(data_dir, corpus)['names'].values())))
  if language not in known:
    raise errors.UserError(
        f'{where}.language is {language!r}; {corpus} has names in '
        f'{", ".join(known)}.')


def load_tokenizer(data_dir, corpus):
  """The `text.Tokenizer` that was trained when the corpus was prepared."""
  manifest(data_dir, corpus)
  path = folder(data_dir, corpus) / 'tokenizer.model'
  return text.Tokenizer.from_bytes(path.read_bytes())


class Split:
  """A split as a sequence of records; see `open_split`."""

  def __init__(self, source, name, names):
    self._source, self._name, self._names = source, name, names

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    index = range(len(self))[index]
    try:
      record = self._source[index]
    except Exception as error:  # whatever a damaged file makes a decoder raise
      raise BadRecord(f'{self._name}#{index}', repr(error)) from error
    return _normalise(record, self._names)


def _str(value):
  return value.decode() if isinstance(value, bytes) else str(value)


def _rows(columns):
  """TFDS gives a sequence of dicts as a dict of sequences: turns it back."""
  keys = sorted(columns)
  return [dict(zip(keys, row)) for row in zip(*(columns[k] for k in keys))]


def _pixels(png, channels):
  with Image.open(io.BytesIO(png)) as image:
    return np.array(image.convert('RGB' if channels == 3 else 'L'))


def _normalise(record, names):
  """A record with str for bytes, arrays for PNG, rows for columns.

  Args:
    record: example of the TFDS data source, pictures not decoded.
    names: {concept: {language: name}}.

  Returns:
    dict of id, image uint8 [Y, X, 3], mask uint8 [Y, X], ground, captions,
    objects, names, questions.

  Raises:
    BadRecord: with the record's id.
  """
  identity = _str(record['id'])
  try:
    objects = [
        {'concept': _str(o['concept']), 'style': _str(o['style']),
         'where': _str(o['where']), 'box': tuple(map(float, o['box']))}
        for o in _rows(record['objects'])]
    spoken = [names[o['concept']] for o in objects]
    return {
        'id': identity,
        'image': _pixels(record['image'], 3),
        'mask': _pixels(record['mask'], 1),
        'ground': _str(record['ground']),
        'captions': {k: _str(v) for k, v in record['captions'].items()},
        'objects': objects,
        'names': {k: [n[k] for n in spoken] for k in spoken[0]},
        'questions': [
            {k: _str(v) for k, v in q.items()}
            for q in _rows(record['questions'])]}
  except Exception as error:  # whatever a damaged picture makes Pillow raise
    raise BadRecord(identity, repr(error)) from error


def open_split(data_dir, corpus, split):
  """Opens a split for random access.

  Args:
    data_dir: folder of all corpora.
    corpus: address, such as `emoji/tiny`.
    split: `train`, `validation`, `compositions`, `styles`, `concepts`, or a
      slice of one such as `train[:50%]`.

  Returns:
    `Split`: `len(split)` records, `split[i]` a dict of id (str), image (uint8
    [Y, X, 3]), mask (uint8 [Y, X], 0 ground, k the k-th object), ground (str),
    captions ({'raw', 'synthetic', 'fused'}), objects (list of {concept, style,
    box: (top, left, bottom, right) in 0..1, where}), names ({language: [one an
    object]}) and questions (list of {question, answer, type}). Reading a record
    that does not decode raises `BadRecord`.

  Raises:
    UserError: if the corpus is not prepared or has no such split.
  """
  about = manifest(data_dir, corpus)
  splits = about['splits']
  if split.split('[')[0] not in splits:
    raise errors.UserError(
        f'corpus {corpus} has no split {split!r}; it has: {", ".join(splits)}, '
        "and slices such as 'train[:50%]'")
  builder = _builder(os.fspath(folder(data_dir, corpus)))
  try:
    source = builder.as_data_source(
        split=split, decoders={
            'image': tfds.decode.SkipDecoding(),
            'mask': tfds.decode.SkipDecoding()})
  except (ValueError, AssertionError) as error:
    raise errors.UserError(
        f'split {split!r} of {corpus} holds no record or is no slice such as '
        f"'train[:50%]': {' '.join(str(error).split())}") from error
  return Split(source, split, about['names'])


@functools.cache
def _builder(path):
  return tfds.builder_from_directory(path)


def verify(data_dir, corpus):
  """What is damaged in a prepared corpus, as a str; '' if nothing is."""
  home = folder(data_dir, corpus)
  try:
    files = json.loads((home / 'checksums.json').read_text())
  except (FileNotFoundError, ValueError):
    return 'checksums.json is missing or broken'
  for name, entry in files.items():
    path = home / name
    if not path.exists():
      return f'{name} is missing'
    if path.stat().length != entry['bytes']:
      return (f'{name} has {path.stat().length} bytes instead of '
              f'{entry["bytes"]}')
    with path.open('rb') as file:
      if hashlib.file_digest(file, 'sha256').hexdigest() != entry['sha256']:
        return f'{name} has other bytes than were written'
  return ''


def prepare(data_dir, corpus, *, train=None, evaluation=None, vocab=None,
            seed=0, progress=lambda split, done, total: None):
  """Draws a corpus, trains its tokenizer, writes its manifest. Idempotent.

  Everything is written into a hidden folder beside the corpus and renamed when
  it is complete: what is found under the corpus' own name is whole. A process
  that is killed leaves only the hidden folder, which the next one removes.

  Args:
    data_dir: folder of all corpora, on a local disk.
    corpus: address, such as `emoji/tiny`.
    train: number of training scenes; None for the corpus' own.
    evaluation: number of scenes of every other split; likewise.
    vocab: size of the tokenizer; likewise.
    seed: int, chooses the scenes; what is held out does not depend on it.
    progress: function (split, number done, number in all).

  Returns:
    (manifest, whether anything was prepared). The manifest is a dict of corpus,
    settings, picture_source, pixels, grounds, styles, splits ({name: scenes}),
    concepts ({trained name: class word}), held_out (concepts; grounds, places
    and styles by concept), names ({concept: {language: name}}) and sha256 (of
    the pixels and texts of every split, and of the tokenizer).

  Raises:
    UserError: for an unknown corpus, a missing picture package, a folder that
      cannot be written or is full, or a corpus prepared with other settings.
  """
  home = pathlib.Path(os.fspath(folder(data_dir, corpus)))
  if corpus not in addresses():
    raise errors.UserError(
        f'no corpus {corpus!r}; there are: {", ".join(addresses())}')
  name, size = corpus.split('/')
  entry = CORPORA[name].SIZES[size]
  settings = {
      'train': entry['train'] if train is None else train,
      'evaluation': entry['evaluation'] if evaluation is None else evaluation,
      'vocab': entry['vocab'] if vocab is None else vocab,
      'seed': seed, 'generator_version': scenes.VERSION}
  for key, low in (('train', 1), ('evaluation', 1), ('seed', 0),
                   ('vocab', text.MIN_VOCAB)):
    if settings[key] < low:
      raise errors.UserError(
          f'{key}={settings[key]} is too small, at least {low} is needed')
  try:
    home.parent.mkdir(parents=True, exist_ok=True)
    with open(home.parent / f'.{size}.lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # released whenever the process ends
      if _is_there(data_dir, corpus, settings):
        return manifest(data_dir, corpus), False
      partial = home.parent / f'.{size}.partial'
      shutil.rmtree(partial, ignore_errors=True)
      try:
        about = _write(corpus, entry, settings, partial, progress)
        shutil.rmtree(home, ignore_errors=True)
        os.rename(partial, home)
      finally:
        shutil.rmtree(partial, ignore_errors=True)
  except OSError as error:
    raise _disk_error(data_dir, error) from error
  except RuntimeError as error:  # how the writer of array_record says it
    if 'No space left' not in str(error):
      raise
    full = OSError(errno.ENOSPC, 'no space left')
    raise _disk_error(data_dir, full) from error
  _builder.cache_clear()
  return about, True


def _disk_error(data_dir, error):
  what = ('is full' if error.errno in (errno.ENOSPC, errno.EDQUOT)
          else 'cannot be written')
  return errors.UserError(
      f'--data_dir={data_dir} {what} ({error.strerror or error}); choose '
      'another with --data_dir=<folder>')


def _is_there(data_dir, corpus, settings):
  """Whether the corpus is there, whole, and made with the same settings."""
  home = folder(data_dir, corpus)
  try:
    found = json.loads((home / 'manifest.json').read_text())['settings']
  except (FileNotFoundError, ValueError, KeyError):  # none, or a damaged one
    return False
  if found != settings:
    differences = ', '.join(
        f'{k}={found.get(k)} (asked: {v})' for k, v in settings.items()
        if found.get(k) != v)
    raise errors.UserError(
        f'{home} was prepared with {differences}; remove that folder or choose '
        'another --data_dir')
  return not verify(data_dir, corpus)


def _write(corpus, entry, settings, partial, progress):
  """Writes a whole corpus into the folder `partial`; returns the manifest."""
  name, size = corpus.split('/')
  splits = {s: settings['train' if s == 'train' else 'evaluation']
            for s in scenes.SPLITS}
  need = sum(splits.values()) * _BYTES_PER_SCENE[entry['scenes'].pixels]
  partial.mkdir(parents=True)
  free = shutil.disk_usage(partial).free
  if free < need:
    raise OSError(
        errno.ENOSPC, f'{need >> 20} MB are needed, {free >> 20} MB are free')
  pictures = CORPORA[name].picture_set(size)
  plan = scenes.plan(pictures, entry['scenes'])
  texts, done = [], dict.fromkeys(splits, 0)
  digests = {split: hashlib.sha256() for split in splits}

  def seen(split, scene, image, mask):
    if split == 'train':
      texts.extend(scene_texts(scene))
    for part in (repr(scene).encode(), image.data, mask.data):
      digests[split].update(part)
    done[split] += 1
    progress(split, done[split], splits[split])

  tfds.disable_progress_bar()
  builder = drawn_scenes.DrawnScenes(
      pictures=pictures, plan=plan, seed=settings['seed'], sizes=splits,
      progress=seen, data_dir=partial)
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a greeting
    builder.download_and_prepare(file_format='array_record')
  written = pathlib.Path(os.fspath(builder.data_path))
  for path in written.iterdir():
    path.rename(partial / path.name)
  for name in (builder.name, 'downloads'):
    shutil.rmtree(partial / name)
  texts += [n for c in plan.seen for n in plan.concepts[c].names.values()]
  try:
    model = text.train(texts, settings['vocab'])
  except ValueError as error:
    raise errors.UserError(f'--vocab: {error}') from error
  (partial / 'tokenizer.model').write_bytes(model)
  (partial / 'ATTRIBUTION.txt').write_text(_attribution(pictures))
  about = _manifest(corpus, settings, splits, pictures, plan)
  about['sha256'] = {
      'tokenizer': hashlib.sha256(model).hexdigest(),
      **{split: digest.hexdigest() for split, digest in digests.items()}}
  _write_json(partial / 'manifest.json', about)
  _write_json(partial / 'checksums.json', _checksums(partial))
  return about


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + '\n')


def _checksums(written):
  files = {}
  for path in sorted(written.iterdir()):
    files[path.name] = {
        'bytes': path.stat().st_size,
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}
  return files


def scene_texts(scene):
  """All that is said about a scene, for training a tokenizer."""
  said = list(scene.captions.values())
  for question in scene.questions:
    said += [question['question'], question['answer']]
  return said


def _attribution(pictures):
  lines = [
      f'{part} ({source["package"]} {source["version"]}, {source["licence"]}): '
      f'{source["attribution"]}' for part, source in pictures.sources.items()]
  return '\n\n'.join(lines) + '\n'


def _manifest(corpus, settings, splits, pictures, plan):
  """What a reader may want to know about a corpus, as JSON."""
  return {
      'corpus': corpus,
      'settings': settings,
      'picture_source': pictures.sources,
      'pixels': plan.config.pixels,
      'grounds': list(plan.config.grounds),
      'styles': list(plan.styles),
      'splits': splits,
      'concepts': {n: plan.concepts[n].kind for n in plan.seen},
      'held_out': {
          'concepts': {n: plan.concepts[n].kind for n in plan.unseen},
          'grounds': plan.no_ground, 'places': plan.no_place,
          'styles': plan.no_style},
      'names': {n: c.names for n, c in plan.concepts.items()}}


CORPORA = {'emoji': emoji, 'shapes': shapes}
