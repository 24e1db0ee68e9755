"""Next-token prediction while hidden states are aligned to a teacher.

EVE (arXiv 2406.11832, section 3.3): at every cell of a picture a patch
aligning layer predicts, from the decoder's hidden states there, what a frozen
vision encoder sees at that cell. Aligner and teacher exist in training only.

The paper writes a mean squared error of normalised features, the released code
1 - cosine: half of it, summed over the width. Averaged over the width instead
it would be smaller by a factor of half the width, and hardly supervise.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgen import fields
from mmgen.models import alignment as aligner_lib
from mmgen.models import clip
from mmgen.models import vision_encoder
from mmgen.objectives import common
from mmgen.objectives import next_token


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
  """Cross-entropy of text, and one minus the cosine to a teacher's features.

  The alignment loss of a picture is the mean over its valid cells, that of a
  batch the mean over pictures, whatever their sizes (released code).

  Attributes:
    model: a `models.multimodal.MultimodalDecoder`.
    aligner: a `models.alignment.PatchAligner`; its parameters are
      `params['aligner']`.
    teacher: a `models.vision_encoder.VisionEncoder`; its parameters are
      'teacher', which a config freezes. Its grid has as many cells as the
      model's, or a whole fraction of them along each edge.
    coefficients: {name: factor of the loss}.
    shift: what is predicted at a cell is compared with what the teacher sees
      so many valid cells later, row by row; 1 is the next patch (table 4,
      'MSE_NP').
  """
  model: Any
  aligner: Any
  teacher: Any
  coefficients: dict[str, float] = dataclasses.field(
      default_factory=lambda: {'next_token': 1.0, 'alignment': 1.0})
  shift: int = 0

  names = ('next_token', 'alignment')
  coupled = False

  def __post_init__(self):
    if self.shift < 0:
      raise ValueError(f'shift is {self.shift}; allowed: 0 (the same cell), 1 '
                       '(the next), ...')

  def init(self, rng):
    """Returns the parameters that the model itself does not have.

    The teacher's are those of an untrained one: a config freezes them
    (`optimizer.groups`) and takes a trained one's by `init.teacher`.
    """
    c = self.aligner.config
    hidden = {l: jnp.zeros((1, c.decoder_width)) for l in c.taps}
    image = jnp.zeros((1, *self.teacher.config.image_size, 3), jnp.uint8)
    keys = jax.random.split(rng)
    return {'aligner': self.aligner.init(keys[0], hidden)['params'],
            'teacher': self.teacher.init(
                keys[1], image, method='encode')['params']}

  def weights(self, batch):
    """Returns the weights of all targets and the number of pictures."""
    pictures = sum(
        (jnp.sum(jnp.sum(self._slots(arrays)[1], axis=-1) > self.shift,
                 dtype=jnp.float32)
         for arrays in batch.values() if 'images' in arrays), jnp.float32(0))
    tokens = sum(jnp.sum(arrays['weights']) for arrays in batch.values())
    return {'next_token': tokens, 'alignment': pictures}

  def __call__(self, params, frozen, state, batch, rng, step):
    """See the step contract."""
    del step  # `rng` is of this step
    variables = {'params': common.merge(params, frozen)}
    c = self.aligner.config
    totals = dict.fromkeys(self.names, jnp.float32(0))
    for source, arrays in batch.items():
      seen = 'images' in arrays
      logits_BTV, out = self.model.apply(
          variables, arrays, train=True, taps=c.taps[1:] if seen else (),
          rngs=common.rngs(rng, source))
      totals['next_token'] += jnp.sum(arrays['weights'] * (
          next_token.cross_entropy(logits_BTV, arrays['targets'])))
      if seen:
        hidden = {**out['taps'], c.layers: out['hidden']}
        totals['alignment'] += self._align(variables, arrays, hidden)
    weights = self.weights(batch)
    return ({name: (totals[name], weights[name]) for name in self.names},
            (state, {}))

  def _align(self, variables, arrays, hidden):
    """Sum over pictures of 1 - mean cosine."""
    slots_BIRQ, valid_BIP = self._slots(arrays)
    hidden = {l: _gather(h_BTD, slots_BIRQ).reshape(
        *valid_BIP.shape, h_BTD.shape[-1]) for l, h_BTD in hidden.items()}
    found_BIPD, _ = self.aligner.apply(
        {'params': variables['params']['aligner']}, hidden)
    wanted_BIPD, _ = self.teacher.apply(
        {'params': variables['params']['teacher']},
        shrink(arrays['images'], self.teacher.config.image_size),
        arrays['image_box'])
    return jnp.sum(distance(*shifted(
        found_BIPD, jax.lax.stop_gradient(wanted_BIPD), valid_BIP,
        self.shift)))

  def _slots(self, arrays):
    """Where the cells of the teacher's grid lie in the model's rows.

    Returns:
      slots_BIRQ: for each of the teacher's R cells the slots of the Q cells of
        the model that cover it, -1 where a cell has no slot.
      valid_BIR: whether all of them have.
    """
    images = arrays['images'].shape[1]
    image_layout = self.model.config.image_layout(arrays['images'].shape[2:4])
    slots_BIP = cell_slots(arrays['visual'], images, image_layout)
    rows, cols = self.teacher.config.grid
    grid = (image_layout.rows, image_layout.cols)
    if grid[0] % rows or grid[1] % cols:
      raise ValueError(
          f'the teacher sees {rows} x {cols} cells, the model {grid[0]} x '
          f'{grid[1]}; the model must have a whole multiple along each edge: '
          "change the teacher's image_size or patch.")
    over = (grid[0] // rows, grid[1] // cols)
    slots = slots_BIP.reshape(
        *slots_BIP.shape[:2], rows, over[0], cols, over[1]).swapaxes(3, 4)
    slots_BIRQ = slots.reshape(*slots_BIP.shape[:2], rows * cols, -1)
    return slots_BIRQ, jnp.all(slots_BIRQ >= 0, axis=-1)


def build(model, teacher, aligner=None, coefficients=None,
          shift=0) -> Alignment:
  """Makes the objective from a config's fields.

  Args:
    model: a `models.multimodal.MultimodalDecoder`.
    teacher: {'size': a published size, and fields that override it}.
    aligner: {'interval', 'heads'} of the aligning layer, if not EVE's.
    coefficients: as in `Alignment`.
    shift: likewise.

  Raises:
    ValueError: an unknown size or field, or values that do not fit.
  """
  text = model.config.decoder
  teacher = vision_encoder.sized(**dict(teacher.items()), dtype=text.dtype)
  layer = fields.read(
      aligner_lib.PatchAlignerConfig, 'aligner',
      dict(layers=text.layers, decoder_width=text.width, width=teacher.width,
           dtype=text.dtype, **dict((aligner or {}).items())), ValueError)
  options = {} if coefficients is None else dict(coefficients=coefficients)
  return Alignment(model, aligner_lib.PatchAligner(layer),
                   vision_encoder.VisionEncoder(teacher), shift=shift,
                   **options)


def flops(objective):
  """Forward FLOPs that alignment adds for one picture slot, in use or not.

  Matrix products only, without the resize of the teacher's picture.

  Args:
    objective: an `Alignment`.

  Returns:
    (teacher, aligner), 2 for each multiply-add. Training takes the teacher's
    once, as no gradient enters it, and three times the aligner's.
  """
  rows, cols = objective.teacher.config.grid
  return (vision_encoder.flops(objective.teacher.config, pooled=False),
          rows * cols * aligner_lib.flops(objective.aligner.config))


def cell_slots(visual_BT, images, image_layout):
  """Inverts `visual`: at which slot of its row each cell of a picture stands.

  Args:
    visual_BT: index in the row's flattened tables, or -1.
    images: I, tables in a row.
    image_layout: of the tables.

  Returns:
    int32 [B, I, rows * cols], cells row by row; -1 for cells without a slot.
  """
  size = image_layout.table_size
  def invert(visual_T):
    # Slots of text all write to one entry behind the tables.
    entries = jnp.where(visual_T >= 0, visual_T, images * size)
    slots = jnp.arange(visual_T.size, dtype=jnp.int32)
    return jnp.full(images * size + 1, -1, jnp.int32).at[entries].set(slots)
  table = jax.vmap(invert)(visual_BT)[:, :-1].reshape(-1, images, size)
  names, entries = image_layout.slots()
  return table[:, :, entries[np.asarray(names) == '<patch>']]


def distance(found_BIPD, wanted_BIPD, valid_BIP):
  """1 - mean cosine over the valid cells of each picture, float32 [B, I].

  Zero for pictures without a valid cell.
  """
  cosine_BIP = jnp.sum(
      clip.normalise(found_BIPD) * clip.normalise(wanted_BIPD), axis=-1)
  count_BI = jnp.sum(valid_BIP, axis=-1)
  mean_BI = jnp.sum(cosine_BIP * valid_BIP, axis=-1) / jnp.maximum(count_BI, 1)
  return jnp.where(count_BI > 0, 1 - mean_BI, 0.0)


def shifted(found_BIPD, wanted_BIPD, valid_BIP, shift):
  """Pairs each valid cell with the valid cell `shift` places behind it.

  Returns:
    The arguments of `distance`, with P - shift cells: found, the wanted of a
    later cell, and whether both are valid.
  """
  if not shift:
    return found_BIPD, wanted_BIPD, valid_BIP
  # Valid cells to the front, in their order: padding lies between the rows.
  order_BIP = jnp.argsort(~valid_BIP, axis=-1, stable=True)
  take = lambda x: jnp.take_along_axis(x, order_BIP[..., None], axis=2)
  later_BIP = jnp.take_along_axis(valid_BIP, order_BIP, axis=2)[..., shift:]
  return (take(found_BIPD)[:, :, :-shift], take(wanted_BIPD)[:, :, shift:],
          later_BIP)


def shrink(images_BIYXC, size):
  """Bicubic, as pictures are prepared, to the teacher's pixels; uint8.

  The reference resizes the original twice; here the teacher's picture is made
  from the model's, which is the larger one.
  """
  if images_BIYXC.shape[2:4] == tuple(size):
    return images_BIYXC
  if any(ours % theirs for ours, theirs in zip(images_BIYXC.shape[2:4], size)):
    raise ValueError(
        f"the model's images have {images_BIYXC.shape[2:4]} pixels, the "
        f"teacher's {tuple(size)}; the first must be whole multiples.")
  shape = (*images_BIYXC.shape[:2], *size, images_BIYXC.shape[4])
  pixels = jax.image.resize(
      images_BIYXC.astype(jnp.float32), shape, 'cubic', antialias=True)
  return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def _gather(h_BTD, slots_BIRQ):
  """Mean hidden state over the Q slots of each cell, [B, I * R, D]."""
  B, I, R, Q = slots_BIRQ.shape
  flat_BS1 = jnp.maximum(slots_BIRQ, 0).reshape(B, I * R * Q, 1)
  h_BSD = jnp.take_along_axis(h_BTD, flat_BS1, axis=1)
  return jnp.mean(h_BSD.reshape(B, I * R, Q, -1), axis=2)
