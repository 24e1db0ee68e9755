"""Pictures of any size to the one static size of a source.

  square     stretches                                     (kernel: any)
  pad        EVE: the longer side fills the canvas, the    (bicubic)
             rest is padding, in whole cells
  pad_pairs  EVE-HD: the same, in pairs of cells            (bicubic)
  clip       the shorter side fills the canvas, what       (bicubic)
             sticks out is cut off on both sides
  open_clip  the same, cut half a pixel elsewhere          (bicubic)
  expand     LLaVA-1.5: padded to a square, then stretched (bicubic)
  fuyu       Fuyu-8B: shrunk only if too large, then put   (bilinear)
             into the upper left corner
  area       EVEv2, training: to the area of a quarter of   (bicubic)
             the canvas, if larger; in whole cells, in the
             upper left corner
  area_up    EVEv2, evaluation: the same, smaller ones too  (bicubic)

Each gives the pixels of its reference, bit by bit, with the kernel named here.
Resampling is Pillow's, antialiased, in one step.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from mmgen import errors

# int(255 * mean) of CLIP's training pictures, the colour that EVE and LLaVA
# pad with.
PADDING = (122, 116, 104)
# Fuyu's released code pads with 1.0 before it divides by 255: nearly black.
FUYU_PADDING = 1

KERNELS = {
    'nearest': Image.Resampling.NEAREST,
    'box': Image.Resampling.BOX,
    'bilinear': Image.Resampling.BILINEAR,
    'hamming': Image.Resampling.HAMMING,
    'bicubic': Image.Resampling.BICUBIC,
    'lanczos': Image.Resampling.LANCZOS,
}


def resize(pixels_YXC, size, kernel):
  """Stretches uint8 pixels [Y, X, 3] to `size` (Y, X)."""
  if pixels_YXC.shape[:2] == tuple(size):
    return pixels_YXC
  picture = Image.fromarray(pixels_YXC)
  return np.asarray(picture.resize((size[1], size[0]), KERNELS[kernel]))


def square(pixels_YXC, size, kernel, grid):
  """Stretches to the whole canvas; returns (pixels, None: all is picture)."""
  del grid
  return resize(pixels_YXC, size, kernel), None


def pad(pixels_YXC, size, kernel, grid):
  """Keeps the shape of the picture and pads evenly with whole cells.

  The shorter side is rounded up to whole cells, and padding starts and ends on
  a cell border, so that a cell is either picture or padding (EVE, arXiv
  2406.11832, section 3.1, and its released preprocessing).

  Args:
    pixels_YXC: uint8 [Y, X, 3].
    size: Pixels (Y, X) of the canvas, divisible by the grid.
    kernel: A name of `KERNELS`.
    grid: Cells (rows, cols) of the canvas.

  Returns:
    The canvas and the rectangle (top, left, height, width) of real picture.
  """
  (rows, cols), (size_y, size_x) = grid, size
  y, x = pixels_YXC.shape[:2]
  # Whole numbers only: the cells of the shorter side are the exact quotient,
  # rounded up.
  if y * size_x >= x * size_y:
    fit_rows, fit_cols = rows, -(-cols * x * size_y // (y * size_x))
  else:
    fit_rows, fit_cols = -(-rows * y * size_x // (x * size_y)), cols
  cell_y, cell_x = size_y // rows, size_x // cols
  top, left = (rows - fit_rows) // 2 * cell_y, (cols - fit_cols) // 2 * cell_x
  height, width = fit_rows * cell_y, fit_cols * cell_x
  canvas = np.empty((size_y, size_x, 3), np.uint8)
  canvas[:] = PADDING
  canvas[top:top + height, left:left + width] = resize(
      pixels_YXC, (height, width), kernel)
  return canvas, (top, left, height, width)


def pad_pairs(pixels_YXC, size, kernel, grid):
  """As `pad`, in blocks of 2 x 2 cells: one cell of EVE-7B-HD's teacher."""
  return pad(pixels_YXC, size, kernel, (grid[0] // 2, grid[1] // 2))


def clip(pixels_YXC, size, kernel, grid):
  """Crops to the centre as `transformers` does (CLIPImageProcessor).

  Of an odd number of pixels too many, the odd one is cut off at the end.
  """
  del grid
  return _crop(pixels_YXC, size, kernel, lambda extra: extra // 2), None


def open_clip(pixels_YXC, size, kernel, grid):
  """Crops to the centre as torchvision does: OpenAI's code, open_clip, EVA.

  Half a pixel is rounded to an even number of pixels cut off in front.
  """
  del grid
  return _crop(pixels_YXC, size, kernel, lambda extra: round(extra / 2)), None


def _crop(pixels_YXC, size, kernel, start):
  """The shorter side to `size`; `start`: pixels cut off in front of so many."""
  edge = size[0]
  y, x = pixels_YXC.shape[:2]
  height, width = (edge * side // min(y, x) for side in (y, x))
  top, left = start(height - edge), start(width - edge)
  return resize(pixels_YXC, (height, width), kernel)[
      top:top + edge, left:left + edge]


def expand(pixels_YXC, size, kernel, grid):
  """Pads to a square in the mean colour, then resizes (LLaVA-1.5).

  To the model the padding is picture (arXiv 2310.03744, released code).
  """
  del grid
  y, x = pixels_YXC.shape[:2]
  edge = max(y, x)
  top, left = (edge - y) // 2, (edge - x) // 2
  canvas = np.empty((edge, edge, 3), np.uint8)
  canvas[:] = PADDING
  canvas[top:top + y, left:left + x] = pixels_YXC
  return resize(canvas, size, kernel), None


def fuyu(pixels_YXC, size, kernel, grid):
  """Shrinks what is larger than the canvas; never enlarges (Fuyu-8B).

  Returns:
    The canvas and the rectangle of whole cells that hold any picture. Its last
    row and column of cells may hold padding, which the model sees.
  """
  y, x = pixels_YXC.shape[:2]
  if y > size[0] or x > size[1]:
    scale = min(size[0] / y, size[1] / x)
    # In floating point, as the reference, which fails where nothing is left.
    y, x = (max(1, int(side * scale)) for side in (y, x))
  canvas = np.full((*size, 3), FUYU_PADDING, np.uint8)
  canvas[:y, :x] = resize(pixels_YXC, (y, x), kernel)
  cell_y, cell_x = size[0] // grid[0], size[1] // grid[1]
  return canvas, (0, 0, -(-y // cell_y) * cell_y, -(-x // cell_x) * cell_x)


def area(pixels_YXC, size, kernel, grid):
  """Shrinks what has more pixels than a quarter of the canvas (EVEv2).

  Each side becomes the nearest number of whole cells (arXiv 2502.06788,
  released training code). What is more than four times as long as
  wide may not fit the canvas, and is shrunk further than there.

  Returns:
    The canvas and the rectangle of the picture, in its upper left corner.
  """
  y, x = pixels_YXC.shape[:2]
  scale = _area_scale(y, x, size)
  sides = (side / scale if scale > 1 else side for side in (y, x))
  return _corner(pixels_YXC, size, kernel, grid, sides, round)


def area_up(pixels_YXC, size, kernel, grid):
  """As `area`, but enlarges as well, and rounds up (EVEv2's evaluation)."""
  y, x = pixels_YXC.shape[:2]
  scale = _area_scale(y, x, size)
  return _corner(pixels_YXC, size, kernel, grid, (y / scale, x / scale),
                 math.ceil)


def _area_scale(y, x, size):
  # In floating point, as the reference.
  return math.sqrt(x * y) / (math.sqrt(size[0] * size[1]) / 2)


def _corner(pixels_YXC, size, kernel, grid, sides, whole):
  """Resizes to a whole number of cells and puts into the upper left corner."""
  cells = [side // count for side, count in zip(size, grid)]
  counts = [max(whole(side / cell), 1) for side, cell in zip(sides, cells)]
  over = max(count / most for count, most in zip(counts, grid))
  if over > 1:
    counts = [max(int(count / over), 1) for count in counts]
  y, x = (count * cell for count, cell in zip(counts, cells))
  canvas = np.empty((*size, 3), np.uint8)
  canvas[:] = PADDING
  canvas[:y, :x] = resize(pixels_YXC, (y, x), kernel)
  return canvas, (0, 0, y, x)


def check(size, fit, kernel, grid):
  """Raises UserError unless `fit_pixels` can serve these settings.

  Args:
    size: `image.size`, pixels (Y, X).
    fit: `image.fit`.
    kernel: `image.kernel`.
    grid: Cells (rows, cols) of the model's image layout; None if its slots are
      no cells of a picture.
  """
  for field, value, allowed in (('fit', fit, FITS), ('kernel', kernel,
                                                     KERNELS)):
    if value not in allowed:
      raise errors.UserError(
          f'image.{field} is {value!r}; allowed: {", ".join(allowed)}')
  if fit in SQUARES:
    # What fills no cell is cut off by the model; no padding has to fit cells.
    if size[0] != size[1]:
      raise errors.UserError(
          f'image.size is {tuple(size)}; with image.fit {fit!r} both sides '
          'must be equal')
  elif fit in CELLS and grid is None:
    raise errors.UserError(
        f'image.fit is {fit!r}, which leaves cells of padding out; the slots '
        'of this model are no cells. Allowed: '
        f'{", ".join(name for name in FITS if name not in CELLS)}')
  elif grid and (size[0] % grid[0] or size[1] % grid[1]):
    raise errors.UserError(
        f'image.size {tuple(size)} does not divide into the {grid[0]} x '
        f'{grid[1]} cells of the model')
  elif fit == 'pad_pairs' and (grid[0] % 2 or grid[1] % 2):
    raise errors.UserError(
        f"image.fit is 'pad_pairs', but the model has {grid[0]} x {grid[1]} "
        'cells; both must be even')


def fit_pixels(pixels_YXC, size, fit, kernel, grid):
  """Brings a picture to the static size.

  Args:
    pixels_YXC: uint8 [Y, X, 3] of any size.
    size: Pixels (Y, X).
    fit: A name of `FITS`.
    kernel: A name of `KERNELS`.
    grid: Cells (rows, cols).

  Returns:
    uint8 pixels of that size, and the rectangle (top, left, height, width) of
    real picture or None for all of it.
  """
  if (pixels_YXC.dtype != np.uint8 or pixels_YXC.ndim != 3
      or pixels_YXC.shape[2] != 3 or 0 in pixels_YXC.shape):
    raise ValueError(
        f'a picture is uint8 [Y, X, 3], found {pixels_YXC.dtype} '
        f'{list(pixels_YXC.shape)}')
  return FITS[fit](pixels_YXC, size, kernel, grid)


def fit_document(document, size, fit, kernel, grid):
  """Applies `fit_pixels` to every picture of a document."""
  spans = []
  for span in document.spans:
    if span.kind == 'image':
      pixels, valid = fit_pixels(span.data, size, fit, kernel, grid)
      span = dataclasses.replace(span, data=pixels, valid=valid)
    spans.append(span)
  return dataclasses.replace(document, spans=tuple(spans))


FITS = {'square': square, 'pad': pad, 'pad_pairs': pad_pairs, 'clip': clip,
        'open_clip': open_clip, 'expand': expand, 'fuyu': fuyu,
        'area': area, 'area_up': area_up}
# Those that make a square only.
SQUARES = ('clip', 'open_clip', 'expand')
# Those that tell cells of picture from cells of padding.
CELLS = ('pad', 'pad_pairs', 'fuyu', 'area', 'area_up')
