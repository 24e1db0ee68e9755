"""Pictures to embeddings without an encoder: linear patches, EVE's layers.

All return for each picture a table of P embeddings, from which the layout
(`data/layout.py`) picks those that get a slot in the sequence:

  linear patches (Fuyu-8B)   the cells of the grid, row by row
  EVE's patch embedding      a class embedding; then for each row of the grid
  layer, EVEv2's             its cells and one split embedding

Tables always describe the full grid, padding included, so shapes are static;
`image_box` says which cells are picture. EVE's class embedding looks at those
alone, and every other entry depends on its own cell only, so that the slots in
use do not depend on the padding at all.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmgen import partition
from mmgen.data import layout
from mmgen.models import attention
from mmgen.models import transformer
from mmgen.models import vision_encoder


@dataclasses.dataclass(frozen=True)
class LinearPatchesConfig:
  """Fuyu-8B's way (model card; the published code is its specification).

  Attributes:
    width: width D of an embedding; the decoder's, as nothing follows.
    patch: pixels along each edge of a patch.
    newline: what ends a row of patches, as in `layout.ImageLayout`; Fuyu puts
      an ordinary token there.
    bos: where <bos> stands, as in `layout.ImageLayout`; Fuyu's weights want
      'after_image'.
    mean, std: of the pixels in 0..1, by channel.
    dtype: compute dtype.
  """
  width: int
  patch: int = dataclasses.field(default=30, metadata=dict(least=1, most=256))
  newline: str = 'token'
  bos: str = 'first'
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  dtype: str = 'float32'

  def __post_init__(self):
    for field, allowed in (('newline', ('none', 'token')),
                           ('bos', ('first', 'after_image'))):
      if getattr(self, field) not in allowed:
        raise ValueError(f'vision.{field} is {getattr(self, field)!r}; '
                         f'allowed: {", ".join(allowed)}.')

  def image_layout(self, image_size):
    """The slots of a picture of `image_size` (rows, columns) pixels."""
    rows, cols = _grid(image_size, self.patch, 'vision.patch')
    return layout.ImageLayout(rows, cols, newline=self.newline, bos=self.bos)


class LinearPatches(nn.Module):
  """One linear map from the pixels of a patch; no norm, no positions.

  Parameters {'projection': {'kernel': [patch * patch * C, D], 'bias'}}; pixels
  of a patch in the order row, column, channel. The kernel starts at
  N(0, 0.02^2), as the published configuration says.
  """
  config: LinearPatchesConfig

  @nn.compact
  def __call__(self, images_BIYXC, image_box_BI4):
    """Returns (table_BIPD, out) of uint8 pictures; see the head of the file."""
    del image_box_BI4  # cells do not see each other
    c = self.config
    patches = _patches(images_BIYXC, c)
    table_BIPD = nn.Dense(
        c.width, dtype=c.dtype, kernel_init=nn.initializers.normal(0.02),
        name='projection')(patches)
    return table_BIPD, {'patches': table_BIPD}


@dataclasses.dataclass(frozen=True)
class EveConfig:
  """EVE's patch embedding layer (arXiv 2406.11832, section 3.1).

  Attributes:
    width: width D of the layer; a connector maps it to the decoder's.
    heads: attention heads N of both cross-attentions.
    patch: pixels along each edge of a raw patch.
    pool: raw patches along each edge of a cell.
    local_attention: whether a cell reads its raw patches (CA1); without it a
      cell is their plain average.
    global_attention: whether the class embedding reads the cells (CA2);
      without it it is the learned vector alone.
    norm_eps: of the layer norms.
    mean, std: of the pixels in 0..1, by channel.
    dtype: compute dtype.
  """
  width: int = 1024
  heads: int = 8
  patch: int = dataclasses.field(default=14, metadata=dict(least=1, most=256))
  pool: int = dataclasses.field(default=2, metadata=dict(least=1, most=64))
  local_attention: bool = True
  global_attention: bool = True
  norm_eps: float = 1e-5
  mean: tuple[float, float, float] = vision_encoder.CLIP_MEAN
  std: tuple[float, float, float] = vision_encoder.CLIP_STD
  dtype: str = 'float32'

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(f'model.vision.heads is {self.heads}; allowed: divisors '
                       f'of model.vision.width, {self.width}.')

  def image_layout(self, image_size):
    """The slots of a picture of `image_size` (rows, columns) pixels."""
    rows, cols = _grid(image_size, self.patch * self.pool,
                       'vision.patch * vision.pool')
    return layout.ImageLayout(rows, cols, class_slot=True, newline='table')


class Eve(nn.Module):
  """EVE's patch embedding layer, without the two-layer MLP after it.

  That MLP is the connector 'mlp': class and split embeddings pass through it
  too. Matrices start as PyTorch's defaults (the reference builds this layer
  after the initialisation of its language model), class and split embeddings
  at N(0, 1). Before a decoder that is trained from scratch at a small width
  the connector scales all of them to about the size of what it gives for
  cells, which is larger than a text embedding of 0.02; pre-norm blocks take
  that well.
  """
  config: EveConfig

  @nn.compact
  def __call__(self, images_BIYXC, image_box_BI4):
    """Makes the table of each picture.

    Args:
      images_BIYXC: uint8 pixels.
      image_box_BI4: the cells (top, left, rows, cols) that are picture; all
        zeros for an empty slot, whose table nothing may read.

    Returns:
      (table_BIPD, out), P = 1 + rows * (cols + 1).
    """
    c = self.config
    grid = c.image_layout(images_BIYXC.shape[2:4])
    patches_BIPD = nn.Dense(
        c.width, use_bias=False, dtype=c.dtype, kernel_init=torch_kernel,
        name='patch_embedding')(_patches(images_BIYXC, c))
    # From here on the pictures of all rows stand side by side.
    cells = self._local(patches_BIPD.reshape(
        -1, grid.rows * c.pool, grid.cols * c.pool, c.width))
    valid = _inside(image_box_BI4.reshape(-1, 4), grid.rows, grid.cols)
    class_embedding = self._global(cells, valid)

    split = self.param('split_embedding', nn.initializers.normal(1), (c.width,))
    table = _table(class_embedding, cells, split.astype(c.dtype), grid)
    by_row = lambda x: x.reshape(*images_BIYXC.shape[:2], -1, c.width)
    return by_row(table), {'patches': patches_BIPD, 'cells': by_row(cells),
                           'class': by_row(class_embedding)}

  def _local(self, patches_BYXD):
    """CA1: the average of each cell reads the raw patches of that cell."""
    c = self.config
    B, Y, X, D = patches_BYXD.shape
    blocks = _blocks(patches_BYXD, c.pool).reshape(-1, c.pool * c.pool, D)
    cells = jnp.mean(blocks, axis=1, keepdims=True)
    if c.local_attention:
      cells = CrossAttention(c, name='local_attention')(
          cells, blocks, attention.Mask())
    return cells.reshape(B, -1, D)

  def _global(self, cells_BPD, valid_BP):
    """CA2: one learned vector reads all cells that are picture."""
    c = self.config
    query = self.param('class_embedding', nn.initializers.normal(1), (c.width,))
    query = jnp.broadcast_to(query.astype(c.dtype)[None, None],
                             (cells_BPD.shape[0], 1, c.width))
    if not c.global_attention:
      return query
    return CrossAttention(c, name='global_attention')(
        query, cells_BPD, attention.Mask(valid_BS=valid_BP))


@dataclasses.dataclass(frozen=True)
class ConvPatchesConfig:
  """EVEv2's patch embedding (arXiv 2502.06788, section 3; released code).

  Attributes:
    width: width D of an embedding; the decoder's, as nothing follows.
    hidden: channels between the two convolutions.
    patch: pixels along each edge of what the first one reads.
    pool: results along each edge of what the second one reads.
    mean, std: of the pixels in 0..1, by channel.
    dtype: compute dtype.
  """
  width: int
  hidden: int = 1024
  patch: int = dataclasses.field(default=16, metadata=dict(least=1, most=256))
  pool: int = dataclasses.field(default=2, metadata=dict(least=1, most=64))
  mean: tuple[float, float, float] = vision_encoder.CLIP_MEAN
  std: tuple[float, float, float] = vision_encoder.CLIP_STD
  dtype: str = 'float32'

  def image_layout(self, image_size):
    """The slots of a picture of `image_size` (rows, columns) pixels."""
    rows, cols = _grid(image_size, self.patch * self.pool,
                       'vision.patch * vision.pool')
    return layout.ImageLayout(rows, cols, class_slot=True, newline='table')


class ConvPatches(nn.Module):
  """Two convolutions that do not overlap, an exact GELU between them.

  Cells do not see each other; class and split embeddings are learned vectors
  and nothing else. All starts as in PyTorch, class and split at N(0, 1).
  """
  config: ConvPatchesConfig

  @nn.compact
  def __call__(self, images_BIYXC, image_box_BI4):
    """Returns (table_BIPD, out) of uint8 pictures; see the head of the file."""
    del image_box_BI4  # cells do not see each other
    c = self.config
    grid = c.image_layout(images_BIYXC.shape[2:4])
    def dense(name, width, x):
      return nn.Dense(width, dtype=c.dtype, kernel_init=torch_kernel,
                      bias_init=torch_bias(x.shape[-1]), name=name)(x)
    patches = jax.nn.gelu(dense('patch_embedding', c.hidden, _patches(
        images_BIYXC, c)), approximate=False)
    blocks = _blocks(patches.reshape(
        -1, grid.rows * c.pool, grid.cols * c.pool, c.hidden), c.pool)
    cells = dense('cell_embedding', c.width, blocks.reshape(
        len(blocks), grid.rows * grid.cols, -1))
    first, split = (
        self.param(name, nn.initializers.normal(1), (c.width,)).astype(c.dtype)
        for name in ('class_embedding', 'split_embedding'))
    first = jnp.broadcast_to(first[None, None], (len(cells), 1, c.width))
    by_row = lambda x: x.reshape(*images_BIYXC.shape[:2], -1, c.width)
    return by_row(_table(first, cells, split, grid)), {'cells': by_row(cells)}


class CrossAttention(nn.Module):
  """query + out(attention(norm(query), norm(keys))), scaled by 1/sqrt(width).

  The scale is that of the full width rather than of a head, and the residual
  adds the query before its norm; both as in the reference.
  """
  config: EveConfig

  @nn.compact
  def __call__(self, query_BTD, key_BSD, mask):
    c = self.config
    norm = lambda name: transformer.LayerNorm(c.norm_eps, c.dtype, name=name)
    project = lambda name, x: attention.heads(nn.Dense(
        c.width, use_bias=False, dtype=c.dtype, kernel_init=torch_kernel,
        name=name)(x), c.width // c.heads)
    key_BSD = norm('key_value_norm')(key_BSD)
    mixed = attention.attend(
        project('query', norm('query_norm')(query_BTD)),
        project('key', key_BSD), project('value', key_BSD), mask,
        scale=c.width ** -0.5)
    return query_BTD + nn.Dense(
        c.width, dtype=c.dtype, kernel_init=torch_kernel,
        bias_init=torch_bias(c.width), name='out')(
            mixed.reshape(query_BTD.shape))


# What PyTorch gives linear maps and convolutions: U(-a, a), a = 1/sqrt(inputs).
torch_kernel = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def torch_bias(inputs):
  """Returns the initialiser of a bias after `inputs` inputs, as PyTorch's."""
  bound = inputs ** -0.5
  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)
  return init


def linear_flops(config, image_size):
  """Forward FLOPs of linear patches for one picture, 2 per multiply-add."""
  cells = config.image_layout(image_size).table_size
  return 2 * cells * 3 * config.patch ** 2 * config.width


def conv_flops(config, image_size):
  """Forward FLOPs of both convolutions for one picture, 2 per multiply-add."""
  c = config
  grid = c.image_layout(image_size)
  raw = c.pool ** 2 * c.hidden
  return 2 * grid.rows * grid.cols * raw * (3 * c.patch ** 2 + c.width)


def eve_flops(config, image_size):
  """Forward FLOPs of EVE's layer for one picture, 2 per multiply-add.

  Matrix products only. With the MLP after it EVE-7B's 672 pixels take 42 G
  (arXiv 2406.11832, table 6).
  """
  c = config
  grid = c.image_layout(image_size)
  cells, raw = grid.rows * grid.cols, grid.rows * grid.cols * c.pool ** 2
  square = c.width ** 2
  stem = raw * 3 * c.patch ** 2 * c.width
  # Queries and outputs by query; keys, values and their two mixings by key.
  local = 2 * cells * square + 2 * raw * (square + c.width)
  overall = 2 * square + 2 * cells * (square + c.width)
  return 2 * (stem + local * c.local_attention + overall * c.global_attention)


def _patches(images_BIYXC, config):
  """Normalises and cuts: [B, I, P, patch * patch * C]."""
  _grid(images_BIYXC.shape[2:4], config.patch, 'vision.patch')
  pixels = vision_encoder.standardise(
      images_BIYXC.reshape(-1, *images_BIYXC.shape[2:]), config.mean,
      config.std)
  patches = vision_encoder.patchify(pixels, config.patch)
  patches = patches.reshape(*images_BIYXC.shape[:2], *patches.shape[1:])
  return partition.constrain(patches, 'batch', None, 'patches', None)


def _blocks(x_BYXD, pool):
  """Side by side what a cell covers: [B, Y / pool, X / pool, pool, pool, D]."""
  B, Y, X, D = x_BYXD.shape
  return x_BYXD.reshape(
      B, Y // pool, pool, X // pool, pool, D).swapaxes(2, 3)


def _table(class_B1D, cells_BPD, split_D, grid):
  """The class embedding, then each row of cells and a split embedding."""
  B, _, D = cells_BPD.shape
  split = jnp.broadcast_to(split_D[None, None, None], (B, grid.rows, 1, D))
  rows = jnp.concatenate(
      [cells_BPD.reshape(B, grid.rows, grid.cols, D), split], axis=2)
  return jnp.concatenate([class_B1D, rows.reshape(B, -1, D)], axis=1)


def _grid(image_size, cell, name):
  rows, cols = (size // cell for size in image_size)
  if (rows * cell, cols * cell) != tuple(image_size) or not rows * cols:
    raise ValueError(f'image.size is {tuple(image_size)} pixels (rows, '
                     f'columns); allowed: multiples of {name}, {cell}.')
  return rows, cols


def _inside(box_B4, rows, cols):
  """bool [B, rows * cols]: the cells of each box."""
  top, left, height, width = (box_B4[:, i, None] for i in range(4))
  row, col = jnp.arange(rows)[None], jnp.arange(cols)[None]
  in_row = (row >= top) & (row < top + height)
  in_col = (col >= left) & (col < left + width)
  return (in_row[:, :, None] & in_col[:, None, :]).reshape(-1, rows * cols)
