"""Stages of published models: fixed inputs, and what a model makes of them.

Inputs are pictures of odd sizes, several in a row, and token ids in rows of
unequal length. Stages are named arrays, in the order of the computation:

  vision/pixels                        after preprocessing
  vision/0, vision/1, ...              input of the first block, output of each
  vision/hidden                        after the last norm, of a tower alone
  vision/pooled, vision/embedding      before and after projection, if any
  connector                            what a decoder sees of pictures, by slot
  text/..., decoder/...                as vision/...
  decoder/hidden                       after the last norm
  logits
  regressed, predicted                 by a visual head; by EVA of patches

Stages of a decoder hold the slots in use, one row of the batch behind the
other, [slots, ...].
"""

import dataclasses
import zlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmgen import errors
from mmgen import weights
from mmgen.data import document as document_lib
from mmgen.data import image as image_lib
from mmgen.data import layout as layout_lib
from mmgen.models import clip
from mmgen.models import image_tower
from mmgen.models import multimodal
from mmgen.models import patch_embedding
from mmgen.models import vision_encoder
from mmgen.weights import files

NO_TOWER = ('Its image tower is a CLIP as it was published: give that with '
            '--attach=PATH.')


def load(path, said, attached=()):
  """A `weights.Loaded` that computes in float32, a block after the other.

  Weights of a file that all have 16 bits stay so, except outside of blocks.

  Args:
    path, said: as for `weights.load`.
    attached: (path, said) of what is to be attached.

  Raises:
    UserError: these are the weights of a part.
  """
  loaded, *others = (
      weights.load(path, said=said, dtype=dtype(
          tensor.dtype for tensor in files.open(path).values()))
      for path, said in ((path, said), *attached))
  loaded = weights.attach(loaded, *others) if others else loaded
  config = loaded.model.config
  if type(loaded.model) not in KINDS or (
      config.vision is not None and 'vision' not in loaded.params):
    raise errors.UserError(
        f'{path} has the layout {loaded.layout}, which is not a whole model.'
        + (f' {NO_TOWER}' if 'decoder' in loaded.params else ''))
  # Unrolled and not compiled, the model widens one block at a time.
  unrolled = {
      field.name: dataclasses.replace(part, unroll=True)
      for field in dataclasses.fields(config)
      if hasattr(part := getattr(config, field.name), 'unroll')}
  model, _ = weights.FAMILIES[loaded.layout].build(
      dataclasses.replace(config, **unrolled), 'float32')
  params = flax.traverse_util.path_aware_map(
      lambda path, x: x if 'blocks' in path else x.astype(jnp.float32),
      loaded.params)
  # EVEv2 makes pictures larger in evaluation only, to thousands of slots each.
  fit = {'area_up': 'area'}.get(loaded.image.get('fit'))
  return dataclasses.replace(loaded, model=model, params=params,
                             image=loaded.image | ({'fit': fit} if fit else {}))


def dtype(dtypes):
  """Name of that of weights: float32, or of 16 bits if all have the same."""
  names = {dtype.name for dtype in dtypes
           if jnp.issubdtype(dtype, jnp.floating)}
  return names.pop() if names in ({'bfloat16'}, {'float16'}) else 'float32'


# ---------------------------------------------------------------------------
# Inputs


def inputs(loaded):
  """Fixed inputs for a model.

  Args:
    loaded: a `weights.Loaded`.

  Returns:
    {name: array}: 'picture/0', ... uint8 [Y, X, 3] of any size; and the batch
    that the model takes: of a CLIP images, tokens and valid, of an image tower
    images, else what `layout.unpacked` returns.
  """
  config, shown = loaded.model.config, []
  if config.vision is not None:
    shown = _draw(loaded.image['size'], loaded.image['fit'])
  batch, _ = KINDS[type(loaded.model)]
  named = {f'picture/{i}': pixels for i, pixels in enumerate(shown)}
  return named | batch(loaded, shown)


def pictures(inputs):
  """The pictures among inputs, in their order."""
  return [x for name, x in inputs.items() if name.startswith('picture/')]


def _draw(size, fit):
  """A wide, a high and a nearly square picture: waves and noise."""
  draw = np.random.default_rng(0)
  # Some put pictures as they are on a canvas: a full one takes 2340 slots of
  # Fuyu's, and of EVEv2's even more.
  scale = {'fuyu': 0.2, 'area': 0.07}.get(fit, 1)
  shares = scale * np.array([(0.83, 1.71), (2.3, 0.9), (1.3, 1.4)])
  drawn = []
  for share in shares:
    y, x = (max(int(part * side), 1) for part, side in zip(share, size))
    places = np.indices((y, x))[..., None]
    waves = np.sin((places / draw.uniform(1, 9, (2, 1, 1, 3))).sum(0))
    noise = draw.uniform(-40, 40, (y, x, 3))
    drawn.append((127.5 + 80 * waves + noise).clip(0, 255).astype(np.uint8))
  return drawn


def _pairs(loaded, shown):
  """The batch of a CLIP; texts of unequal length, padded with 0."""
  config = loaded.model.config
  T, vocab = config.text.length, config.text.vocab
  own = loaded.beside.get('config.json', {}).get('text_config') or {}
  end = own.get('eos_token_id', 2)
  # 2 is what old files of transformers have, which then takes the largest.
  end = end if 2 < end < vocab else vocab - 1
  words = np.setdiff1d(np.arange(3, vocab), end)
  lengths, draw = [T, max(T // 2, 2), 2], np.random.default_rng(1)
  tokens = np.zeros((len(lengths), T), np.int32)
  for row, length in zip(tokens, lengths):
    row[:length] = *draw.choice(words, length - 1), end
  return _images(loaded, shown) | dict(
      tokens=tokens, valid=np.arange(T)[None] < np.asarray(lengths)[:, None])


def _images(loaded, shown):
  """The batch of an image tower."""
  image, grid = loaded.image, loaded.model.config.vision.grid
  return dict(images=np.stack([
      image_lib.fit_pixels(pixels, image['size'], image['fit'],
                           image['kernel'], grid)[0] for pixels in shown]))


def _rows(loaded, shown):
  """The batch of a decoder: one picture, two between words, none."""
  config, grid, size = loaded.model.config, None, None
  words = [document_lib.text(words, 'input') for words in (
      'a fox, and', 'what does it say to the other one?', 'nothing')]
  rows = [words[:2], words[1:], words[2:]]
  if shown:
    image = loaded.image
    size = image['size']
    grid = config.image_layout(size)
    spans = image_lib.fit_document(
        document_lib.Document(tuple(map(document_lib.image, shown))), size,
        image['fit'], image['kernel'], (grid.rows, grid.cols)).spans
    rows[:2] = [[spans[0], words[0]], [words[0], spans[1], words[1], spans[2],
                                       words[2]]]
  room = 100 + (2 * len(grid.slots()[0]) if grid else 0)
  batch = layout_lib.unpacked(
      [document_lib.Document(tuple(row), str(i)) for i, row in enumerate(rows)],
      _Ids(config.decoder.vocab, picture_id(loaded)), grid, room,
      2 if shown else 0, size)
  used = int((batch['segments'] > 0).sum(1).max())
  return {name: x[:, :used] if x.shape[1] == room else x
          for name, x in batch.items()}


def picture_id(loaded):
  """The id that the reference has at the slots of pictures.

  If a config names none it is within the vocabulary: that of LLaVA's authors
  and of EVE has none for them.
  """
  own = loaded.beside.get('config.json', {})
  usual = min(71011 if 'fuyu' in loaded.layout else 32000,
              loaded.model.config.decoder.vocab - 1)
  return own.get('image_token_id', own.get('image_token_index', usual))


class _Ids:
  """A tokenizer that gives each letter an id; none is that of pictures."""

  def __init__(self, vocab, picture):
    self._vocab, self._picture = vocab, picture

  def id(self, name):
    return self._picture if name == '<patch>' else self._other(
        zlib.crc32(name.encode()))

  def encode(self, text):
    return [self._other(7919 * ord(letter) + i)
            for i, letter in enumerate(text)]

  def _other(self, number):
    i = number % (self._vocab - 1)
    return i + (i >= self._picture)


# ---------------------------------------------------------------------------
# Stages


def compute(loaded, inputs):
  """What a model makes of its inputs: {name of a stage: float32 array}."""
  _, run = KINDS[type(loaded.model)]
  with jax.default_matmul_precision('highest'):
    found = run(loaded.model, {'params': loaded.params}, inputs)
  return {name: np.asarray(x, np.float32) for name, x in found.items()}


def _run_images(model, variables, inputs):
  """The stages of an image tower."""
  c, images = model.config, jnp.asarray(inputs['images'])
  embedding, out = model.apply(
      variables, images, tuple(range(c.vision.layers + 1)),
      method='encode_image')
  found = {'vision/pixels': vision_encoder.standardise(
      images, c.vision.mean, c.vision.std)}
  found |= {f'vision/{i}': x for i, x in out['taps'].items()}
  found |= {'vision/hidden': out['hidden'], 'vision/embedding': embedding}
  if c.predicted is not None:
    _, out = model.apply(variables, images)
    found['predicted'] = out['predicted']
  return found


def _run_pairs(model, variables, inputs):
  """The stages of a CLIP."""
  c, found = model.config, {}
  found['vision/pixels'] = vision_encoder.standardise(
      inputs['images'], c.vision.mean, c.vision.std)
  for tower, method, arguments in (
      ('vision', 'encode_image', ('images',)),
      ('text', 'encode_text', ('tokens', 'valid'))):
    embedding, out = model.apply(
        variables, *(jnp.asarray(inputs[name]) for name in arguments),
        taps=tuple(range(getattr(c, tower).layers + 1)), method=method)
    found |= {f'{tower}/{i}': x for i, x in out['taps'].items()}
    found |= {f'{tower}/pooled': out['pooled'],
              f'{tower}/embedding': embedding}
  scale, bias = model.apply(variables, method='temperature')
  found['logits'] = scale * found['vision/embedding'] @ (
      found['text/embedding'].T) + bias
  return found


def _run_rows(model, variables, inputs):
  """The stages of a decoder, and of what it sees with."""
  c, found = model.config, {}
  batch = {name: jnp.asarray(x) for name, x in inputs.items()
           if not name.startswith('picture/')}
  if c.vision is not None:
    used = inputs['image_box'].any(-1)  # [rows, pictures]
    found['vision/pixels'] = _pixels(c.vision, inputs, used)
    if isinstance(c.vision, vision_encoder.VisionEncoderConfig):
      _, out = model.apply(variables, method=lambda m: m.vision.encode(
          batch['images'][used], tuple(range(c.vision.layers + 1))))
      found |= {f'vision/{i}': x for i, x in out['taps'].items()}
    table, _ = model.apply(variables, method=lambda m: m.connector(
        m.vision(batch['images'], batch['image_box'])[0]))
    found['connector'] = _in_use(table, inputs['visual'])
  logits, out = model.apply(variables, batch,
                            taps=tuple(range(c.decoder.layers + 1)))
  slots = inputs['segments'] > 0
  found |= {f'decoder/{i}': x[slots] for i, x in out['taps'].items()}
  found |= {'decoder/hidden': out['hidden'][slots], 'logits': logits[slots]}
  if 'regressed' in out:
    found['regressed'] = out['regressed'][slots]
  return found


def _pixels(config, inputs, used):
  """Standardised pixels; of Fuyu those of the patches in use, one by one."""
  standardise = lambda images: vision_encoder.standardise(
      images, config.mean, config.std)
  if not isinstance(config, patch_embedding.LinearPatchesConfig):
    return standardise(inputs['images'][used])
  images = inputs['images']
  patches = vision_encoder.patchify(
      standardise(images.reshape(-1, *images.shape[2:])), config.patch)
  return _in_use(patches.reshape(*images.shape[:2], -1, patches.shape[-1]),
                 inputs['visual'])


def _in_use(table_BIPD, visual_BT):
  """The entries that slots take, one row behind the other: [slots, D]."""
  return jnp.concatenate([
      row.reshape(-1, row.shape[-1])[visual[visual >= 0]]
      for row, visual in zip(table_BIPD, visual_BT)])


# {kind of a model: (function that makes its batch, that runs it)}
KINDS = {
    clip.Clip: (_pairs, _run_pairs),
    image_tower.ImageTower: (_images, _run_images),
    multimodal.MultimodalDecoder: (_rows, _run_rows),
}
