"""Pictures of any size to the one static size of a source.

`square` stretches, `pad` keeps the shape of the picture as EVE does: the longer
side fills the canvas, the shorter one is rounded up to whole cells of the
grid, and the rest is padding in the mean colour of CLIP (arXiv 2406.11832,
section 3.1, and its released preprocessing). The padding starts and ends on a
cell border, so that a cell is either picture or padding. Resampling is
Pillow's, antialiased, in one step from the original picture.
"""

import dataclasses

import numpy as np
from PIL import Image

from mmgen import errors
from mmgen.data import document as document_lib

# int(255 * mean) of CLIP's training pictures, the colour that EVE and LLaVA
# pad with.
PADDING = (122, 116, 104)

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


def check(size, fit, kernel, grid):
  """Raises UserError unless `fit_pixels` can serve these settings.

  Args:
    size: `image.size`, pixels (Y, X).
    fit: `image.fit`.
    kernel: `image.kernel`.
    grid: Cells (rows, cols) of the model's image layout.
  """
  for field, value, allowed in (('fit', fit, FITS), ('kernel', kernel,
                                                     KERNELS)):
    if value not in allowed:
      raise errors.UserError(
          f'image.{field} is {value!r}; allowed: {", ".join(allowed)}')
  if size[0] % grid[0] or size[1] % grid[1]:
    raise errors.UserError(
        f'image.size {tuple(size)} does not divide into the {grid[0]} x '
        f'{grid[1]} cells of the model')


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
  return document_lib.Document(tuple(spans), document.id, document.meta)


FITS = {'square': square, 'pad': pad}
