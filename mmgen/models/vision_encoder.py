"""Vision transformer: the image tower of CLIP, SigLIP and EVA-CLIP.

One module serves two uses with one tree of parameters, so that a tower trained
by the one can be handed to the other:

  `encode`    one embedding an image, for contrastive models
  `__call__`  a table of patch features, for decoders and as a teacher: what
              LLaVA takes from CLIP is the output of the last block but one,
              without the class token and without the final norm (`tap` -2)

Sources: ViT, arXiv 2010.11929, section 3.1; CLIP, arXiv 2103.00020, section
2.4; SigLIP, arXiv 2303.15343; EVA-CLIP, arXiv 2303.15389 and 2402.04252;
LLaVA-1.5, arXiv 2310.03744, section 3.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmgen import fields
from mmgen import partition
from mmgen.data import layout
from mmgen.models import attention
from mmgen.models import transformer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionEncoderConfig:
  """A vision transformer; the defaults are OpenAI's CLIP.

  Attributes:
    image_size: pixels (Y, X). What is left of `patch` at the lower and right
      edge is cut off.
    patch: pixels along each edge of a patch.
    layers, width, heads, hidden: as in `transformer.StackConfig`.
    mlp: 'quick_gelu' (OpenAI), 'gelu' (OpenCLIP, EVA), 'gelu_tanh' (SigLIP),
      'swiglu' (EVA-02).
    norm, norm_eps: of every norm; as in `transformer.StackConfig`, as are
    placement, qkv_bias, inner_attention_norm, inner_mlp_norm, layer_scale,
    init: 'eva' starts the embeddings at 0.02, too.
    stem_bias: bias of the patch embedding.
    class_token: a learned token before the patches.
    rope_grid: rotary positions by row and column beside the learned ones,
      counted on a grid of this size, that of pretraining, over which `grid` is
      stretched; the class token is not turned. None for none.
    patch_dropout: share of the patches that training leaves out of each image;
      see `draw_patches`.
    drop_path: as in `transformer.StackConfig`; 0.4 in the released config of
      the first EVA01-CLIP-g/14, 0 in those of all others.
    pre_norm: a norm between the embeddings and the first block.
    pooling: a name in `POOLINGS`, for `encode`.
    tap: which hidden state makes the table, as an index into (input, block 1,
      ... block L): -1 is the last block's, -2 the one before. None: the last
      one after the final norm.
    final_norm: a norm after the last block; without it there is no tap None.
    class_entry: the table begins with the class token.
    pool: patches along each edge of a cell of the table, which is their mean.
    mean, std: of the pixels in 0..1, by channel.
    remat, unroll, backend, dtype: as in `transformer.StackConfig`.
  """
  image_size: tuple[int, int] = dataclasses.field(
      metadata=dict(least=1, most=4096))
  patch: int = dataclasses.field(metadata=dict(least=1, most=256))
  layers: int
  width: int
  heads: int
  hidden: int
  mlp: str = 'quick_gelu'
  norm: str = 'layer'
  norm_eps: float = dataclasses.field(
      default=1e-5, metadata=dict(above=0, below=1))
  placement: str = 'pre'
  qkv_bias: bool | str = True
  inner_attention_norm: bool = False
  inner_mlp_norm: bool = False
  layer_scale: float | None = None
  init: str = 'clip'
  stem_bias: bool = False
  class_token: bool = True
  rope_grid: tuple[int, int] | None = None
  patch_dropout: float = 0.0
  drop_path: float = 0.0
  pre_norm: bool = True
  pooling: str = 'cls'
  tap: int | None = -2
  final_norm: bool = True
  class_entry: bool = False
  pool: int = dataclasses.field(default=1, metadata=dict(least=1, most=64))
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD
  remat: bool = False
  unroll: bool = False
  backend: str = 'plain'
  dtype: str = 'float32'

  def __post_init__(self):
    if self.pooling not in POOLINGS:
      raise ValueError(f'vision.pooling is {self.pooling!r}; allowed: '
                       f'{", ".join(POOLINGS)}.')
    if self.pooling == 'cls' and not self.class_token:
      raise ValueError("vision.pooling is 'cls', but vision.class_token is "
                       'False; pool by another way or add the token.')
    if min(self.image_size) < self.patch:
      raise ValueError(f'vision.image_size is {self.image_size}, smaller than '
                       f'vision.patch, {self.patch}.')
    if self.tap is not None and not -self.layers - 1 <= self.tap < 0:
      raise ValueError(f'vision.tap is {self.tap}; allowed: None, or '
                       f'{-self.layers - 1} (the input) to -1 (last block).')
    if self.tap is None and not self.final_norm:
      raise ValueError('vision.tap is None, which is after the final norm, but '
                       'vision.final_norm is False; -1 is the last block.')
    if self.class_entry and not self.class_token:
      raise ValueError('vision.class_entry is True, but vision.class_token is '
                       'False; there is none to enter.')
    if self.pool < 1 or any(side % self.pool for side in self.grid):
      raise ValueError(f'vision.pool is {self.pool}; allowed: divisors of the '
                       f'rows and columns of patches, {self.grid}.')
    if not 0 <= self.patch_dropout < 1:
      raise ValueError(f'vision.patch_dropout is {self.patch_dropout}; '
                       'allowed: from 0 (keep all) to below 1.')

  @property
  def grid(self):
    """Rows and columns of patches."""
    return tuple(size // self.patch for size in self.image_size)

  @property
  def tokens(self):
    """Length of the sequence, with the class token."""
    rows, cols = self.grid
    return rows * cols + self.class_token

  @property
  def kept(self):
    """Patches of an image that training keeps."""
    rows, cols = self.grid
    return max(1, int(rows * cols * (1 - self.patch_dropout)))

  @property
  def stack(self):
    return transformer.StackConfig(
        layers=self.layers, width=self.width, heads=self.heads,
        hidden=self.hidden, norm=self.norm, norm_eps=self.norm_eps,
        mlp=self.mlp, placement=self.placement, qkv_bias=self.qkv_bias,
        out_bias=True, mlp_bias=True,
        inner_attention_norm=self.inner_attention_norm,
        inner_mlp_norm=self.inner_mlp_norm, layer_scale=self.layer_scale,
        drop_path=self.drop_path,
        rope='grid', rope_theta=1e4 if self.rope_grid else None,
        final_norm=self.final_norm,
        init=self.init, remat=self.remat, unroll=self.unroll,
        backend=self.backend, dtype=self.dtype)

  @property
  def places(self):
    """Rotary positions (row, column) of all tokens, [T, 2] float."""
    scale = np.asarray(self.rope_grid) / np.asarray(self.grid)
    places = np.indices(self.grid).reshape(2, -1).T * scale
    return np.pad(places, ((int(self.class_token), 0), (0, 0)))

  def image_layout(self, image_size):
    """The slots of the table that `VisionEncoder.__call__` returns."""
    self.check(image_size)
    return layout.ImageLayout(*(side // self.pool for side in self.grid),
                              class_slot=self.class_entry)

  def check(self, image_size):
    """Raises ValueError unless images have the size of the position table."""
    if tuple(image_size) != tuple(self.image_size):
      raise ValueError(
          f'images have {tuple(image_size)} pixels (rows, columns), but '
          f'vision.image_size, to which the positions belong, is '
          f'{tuple(self.image_size)}; make the two equal.')


def standardise(images_BYXC, mean, std):
  """uint8 pixels to float32: (x / 255 - mean) / std, by channel.

  In float32, since 1/255 is not exact in bfloat16.
  """
  mean = jnp.asarray(mean, jnp.float32)[None, None, None]
  std = jnp.asarray(std, jnp.float32)[None, None, None]
  return (images_BYXC.astype(jnp.float32) / 255 - mean) / std


def patchify(images_BYXC, patch):
  """Cuts images into patches, row by row: [B, P, patch * patch * C].

  Inside a patch the order is rows, columns, channels. What does not fill a
  patch at the lower and right edge is cut off, as an unpadded convolution
  does.
  """
  B, Y, X, C = images_BYXC.shape
  rows, cols = Y // patch, X // patch
  x = images_BYXC[:, :rows * patch, :cols * patch]
  x = x.reshape(B, rows, patch, cols, patch, C).swapaxes(2, 3)
  return x.reshape(B, rows * cols, patch * patch * C)


class MapPooling(nn.Module):
  """Multi-head attention pooling (SigLIP; Lee et al., arXiv 1810.00825).

  A learned probe attends to all tokens; then x + mlp(norm(x)).
  """
  config: transformer.StackConfig

  @nn.compact
  def __call__(self, x_BPD):
    c = self.config
    probe_D = self.param(
        'probe', nn.initializers.normal(c.width ** -0.5), (c.width,))
    probe_B1D = jnp.broadcast_to(
        probe_D.astype(c.dtype), (x_BPD.shape[0], 1, c.width))
    project = lambda name, x: attention.heads(nn.Dense(
        c.heads * c.H, dtype=c.dtype, name=name)(x), c.H)
    x_B1NH = attention.attend(
        project('query', probe_B1D), project('key', x_BPD),
        project('value', x_BPD), attention.Mask(), backend=c.backend)
    x_B1D = nn.Dense(c.width, dtype=c.dtype, name='out')(
        x_B1NH.reshape(len(x_B1NH), 1, -1))
    norm = transformer.NORMS[c.norm](c.norm_eps, c.dtype, name='norm')
    x_B1D = x_B1D + transformer.Mlp(c, name='mlp')(norm(x_B1D))
    return x_B1D[:, 0]


class VisionEncoder(nn.Module):
  """Images to patch features (`__call__`) or to one embedding (`encode`)."""
  config: VisionEncoderConfig

  def __call__(self, images_BIYXC, image_box_BI4):
    """Makes the table from which a decoder takes its visual slots.

    Args:
      images_BIYXC: uint8 pixels.
      image_box_BI4: valid cells; not read, since this encoder sees padding as
        it sees picture and leaves it to the layout to skip it.

    Returns:
      (table_BIPD, out); P cells row by row, behind the class token if it
      enters. `out` has 'taps', of images [B * I].
    """
    del image_box_BI4
    B, I = images_BIYXC.shape[:2]
    c = self.config
    taps = () if c.tap is None else (c.layers + 1 + c.tap,)
    # Blocks above the tap have parameters, and are not run.
    x_BPD, out = self._tokens(
        images_BIYXC.reshape(B * I, *images_BIYXC.shape[2:]), taps,
        stop=taps[0] if taps else None)
    x_BPD = out['taps'][taps[0]] if taps else x_BPD
    cells_BPD = _pooled(x_BPD[:, int(c.class_token):], c)
    x_BPD = (jnp.concatenate([x_BPD[:, :1], cells_BPD], axis=1)
             if c.class_entry else cells_BPD)
    return x_BPD.reshape(B, I, *x_BPD.shape[1:]), out

  def encode(self, images_BYXC, taps=(), kept_BP=None, factors_BL2=None):
    """Embeds each image as one vector, without a projection.

    Args:
      images_BYXC: uint8 pixels.
      taps: blocks whose output is wanted in out['taps']; 0 is the input.
      kept_BP: patches to look at, as `draw_patches` gives them; default all.
      factors_BL2: of the branches of blocks, as `transformer.draw_branches`
        gives them; default 1.

    Returns:
      (pooled_BD, out); out['hidden'] are all tokens after the final norm.
    """
    return self._tokens(images_BYXC, taps, kept_BP, factors_BL2, pool=True)

  @nn.compact
  def _tokens(self, images_BYXC, taps, kept_BP=None, factors_BL2=None,
              pool=False, stop=None):
    c = self.config
    c.check(images_BYXC.shape[1:3])
    patches_BPC = patchify(standardise(images_BYXC, c.mean, c.std), c.patch)
    pick = lambda table_TD: table_TD[None]
    if kept_BP is not None:
      patches_BPC = jnp.take_along_axis(patches_BPC, kept_BP[..., None], axis=1)
      # In a table of all tokens the class token, if any, is entry 0.
      extra = int(c.class_token)
      index_BT = jnp.pad(kept_BP + extra, ((0, 0), (extra, 0)))
      pick = lambda table_TD: jnp.take(table_TD, index_BT, axis=0)
    x_BPD = nn.Dense(
        c.width, use_bias=c.stem_bias, dtype=c.dtype, name='patch_embedding'
    )(patches_BPC)
    init = nn.initializers.normal(
        0.02 if c.init == 'eva' else c.width ** -0.5)
    if c.class_token:
      class_D = self.param('class_embedding', init, (c.width,))
      class_B1D = jnp.broadcast_to(
          class_D.astype(c.dtype), (x_BPD.shape[0], 1, c.width))
      x_BPD = jnp.concatenate([class_B1D, x_BPD], axis=1)
    positions = self.param('position_embedding', init, (c.tokens, c.width))
    x_BPD += pick(positions).astype(c.dtype)
    if c.pre_norm:
      x_BPD = transformer.NORMS[c.norm](
          c.norm_eps, c.dtype, name='pre_norm')(x_BPD)
    x_BPD = partition.constrain(x_BPD, 'batch', 'patches', 'width')
    x_BPD, out = transformer.Stack(c.stack, name='stack')(
        x_BPD, attention.Mask(),
        pick(jnp.asarray(c.places, jnp.float32)) if c.rope_grid else None,
        taps=taps, factors_BL2=factors_BL2, stop=stop)
    if not pool:
      return x_BPD, out
    out['hidden'] = x_BPD
    if c.pooling == 'map':
      return MapPooling(c.stack, name='head')(x_BPD), out
    return POOLINGS[c.pooling](x_BPD), out


def _pooled(x_BPD, config):
  """Means over `pool` x `pool` patches, cells row by row."""
  if config.pool == 1:
    return x_BPD
  rows, cols = (side // config.pool for side in config.grid)
  x = x_BPD.reshape(len(x_BPD), rows, config.pool, cols, config.pool, -1)
  return jnp.mean(x, axis=(2, 4)).reshape(len(x_BPD), rows * cols, -1)


def draw_patches(config, keys_B):
  """Draws the patches that training keeps, for each image on its own.

  Always `config.kept` of them, so that shapes are static (FLIP, arXiv
  2212.00794, section 3).

  Args:
    config: a `VisionEncoderConfig`.
    keys_B: a random key for each image.

  Returns:
    int32 [B, kept], different patches, in no order; for `encode`.
  """
  rows, cols = config.grid
  draws_BP = jax.vmap(lambda key: jax.random.uniform(key, (rows * cols,)))(
      keys_B)
  return jax.lax.top_k(draws_BP, config.kept)[1]


def sized(size, **overrides):
  """Returns the config of a published size, fields overridden.

  Raises:
    ValueError: an unknown size or field.
  """
  if size not in SIZES:
    raise ValueError(f'vision.size: {size!r}; allowed: {", ".join(SIZES)}.')
  return fields.read(VisionEncoderConfig, 'vision',
                     {**vars(SIZES[size]), **overrides}, ValueError)


def flops(config, pooled=True, train=False):
  """Forward FLOPs of one image; 2 for each multiply-add.

  Args:
    config: a `VisionEncoderConfig`.
    pooled: for `encode`; else for the table, which needs no blocks above `tap`.
    train: of the patches that training keeps only.
  """
  c = config
  patches = c.kept if train else c.tokens - c.class_token
  tokens = patches + c.class_token
  blocks = c.layers
  if not pooled and c.tap is not None:
    blocks += 1 + c.tap
  total = 2 * patches * 3 * c.patch ** 2 * c.width
  total += blocks * tokens * transformer.block_flops(c.stack, tokens)
  if pooled and c.pooling == 'map':
    # Keys and values of all tokens, one query, its mixing, output and MLP.
    total += 4 * tokens * c.width ** 2 + 4 * c.width ** 2
    total += 4 * tokens * c.width + 4 * c.width * c.hidden
  return total


# 'map' has parameters: it is `MapPooling`.
POOLINGS = {
    'cls': lambda x_BPD: x_BPD[:, 0],
    'mean': lambda x_BPD: jnp.mean(x_BPD, axis=1),
    'map': MapPooling,
}


def _clip(size, patch, layers, width, heads):
  return VisionEncoderConfig(
      image_size=(size, size), patch=patch, layers=layers, width=width,
      heads=heads, hidden=4 * width)


def _siglip(size, patch, layers, width, heads, hidden):
  return VisionEncoderConfig(
      image_size=(size, size), patch=patch, layers=layers, width=width,
      heads=heads, hidden=hidden, mlp='gelu_tanh', norm_eps=1e-6,
      stem_bias=True, class_token=False, pre_norm=False, pooling='map',
      mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def _eva(size, patch, layers, width, heads, hidden, **fields):
  return VisionEncoderConfig(
      image_size=(size, size), patch=patch, layers=layers, width=width,
      heads=heads, hidden=hidden, norm_eps=1e-6, init='eva', stem_bias=True,
      pre_norm=False, **{'mlp': 'gelu', 'qkv_bias': 'qv', **fields})


_EVA02 = dict(mlp='swiglu', inner_attention_norm=True, inner_mlp_norm=True,
              rope_grid=(16, 16))
_EVA_RMS = dict(norm='rms', qkv_bias=False)
_EVA01_G = _eva(224, 14, 40, 1408, 16, 6144)
_EVA02_E = _eva(224, 14, 64, 1792, 16, 15360, placement='post')

# Those of arXiv 2103.00020, table 20; arXiv 2303.15343; the code released with
# arXiv 2303.11331 (ti and s), 2303.15389 and 2402.04252; and small ones for
# drawn scenes of 32 pixels.
SIZES = {
    'mini': VisionEncoderConfig(
        image_size=(32, 32), patch=8, layers=3, width=128, heads=2, hidden=512,
        mlp='gelu', unroll=True),
    'clip-b32': _clip(224, 32, 12, 768, 12),
    'clip-b16': _clip(224, 16, 12, 768, 12),
    'clip-l14': _clip(224, 14, 24, 1024, 16),
    'clip-l14-336': _clip(336, 14, 24, 1024, 16),
    'siglip-b16': _siglip(224, 16, 12, 768, 12, 3072),
    'siglip-l16-256': _siglip(256, 16, 24, 1024, 16, 4096),
    'siglip-so400m': _siglip(224, 14, 27, 1152, 16, 4304),
    'siglip-so400m-384': _siglip(384, 14, 27, 1152, 16, 4304),
    'eva01-g14': _EVA01_G,
    'eva01-g14-plus': _EVA01_G,
    'eva02-ti14': _eva(224, 14, 12, 192, 3, 512, mlp='swiglu',
                       rope_grid=(16, 16)),
    'eva02-s14': _eva(224, 14, 12, 384, 6, 1024, mlp='swiglu',
                      rope_grid=(16, 16)),
    'eva02-b16': _eva(224, 16, 12, 768, 12, 2048, **_EVA02),
    'eva02-l14': _eva(224, 14, 24, 1024, 16, 2730, **_EVA02),
    'eva02-l14-336': _eva(336, 14, 24, 1024, 16, 2730, **_EVA02),
    'eva02-e14': _EVA02_E,
    'eva02-e14-plus': _EVA02_E,
    'eva-8b': _eva(224, 14, 32, 4096, 32, 20480, **_EVA_RMS),
    'eva-8b-448': _eva(448, 14, 32, 4096, 32, 20480, **_EVA_RMS),
    'eva-18b': _eva(224, 14, 48, 5120, 40, 25600, placement='post', **_EVA_RMS),
}
