"""Learned positions of a picture's cells, for another number of cells.

Numpy only: positions are resized on the host, when weights are loaded.
"""

import numpy as np


def resize_positions(table_TD, old, new, method='plain'):
  """Resizes learned positions to another grid; on the host, bicubic mostly.

  Args:
    table_TD: one entry a cell, row by row; one more in front, of a class
      token, is kept as it is.
    old, new: rows and columns.
    method: 'plain', PyTorch's default (EVA's code, transformers); 'antialias'
      (open_clip, timm); 'linear', not bicubic but bilinear from corner to
      corner (big_vision).

  Returns:
    numpy [T', D] in the dtype of the table.

  Raises:
    ValueError: a table of another grid, or an unknown method.
  """
  table_TD = np.asarray(table_TD)
  rows, cols = old
  extra = len(table_TD) - rows * cols
  if extra not in (0, 1):
    raise ValueError(f'resize_positions: {len(table_TD)} positions are not a '
                     f'grid of {rows} x {cols}, with or without a class token.')
  grid_YXD = table_TD[extra:].reshape(rows, cols, -1).astype(np.float32)
  down, across = (_weights(*sizes, method) for sizes in zip(old, new))
  grid_YXD = np.einsum('Yy,yxD,Xx->YXD', down, grid_YXD, across, optimize=True)
  return np.concatenate([
      table_TD[:extra],
      grid_YXD.reshape(-1, table_TD.shape[1]).astype(table_TD.dtype)])


def _weights(old, new, method):
  """Weights [new, old] with which PyTorch or scipy interpolate one axis."""
  def cubic(x, a):
    x = np.abs(x)
    near = (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1
    far = a * (x ** 3 - 5 * x ** 2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))
  target = np.arange(new)[:, None]
  source = (target + 0.5) * old / new - 0.5
  if method == 'antialias':
    weights = cubic((source - np.arange(old)[None]) / max(old / new, 1), -0.5)
    return weights / weights.sum(1, keepdims=True)
  if method == 'linear':
    source = target * (old - 1) / max(new - 1, 1)
    return np.maximum(1 - np.abs(source - np.arange(old)[None]), 0)
  if method != 'plain':
    raise ValueError(f'resize_positions: method {method!r}; allowed: plain, '
                     'antialias, linear.')
  # The outermost entries go on beyond the border.
  weights = cubic(source - np.arange(-2, old + 2)[None], -0.75)
  return weights @ np.pad(np.eye(old), ((2, 2), (0, 0)), mode='edge')
