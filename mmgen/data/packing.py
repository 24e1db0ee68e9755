"""Which document goes into which row: longest first, best fit.

The best-fit-decreasing heuristic of bin packing, with two limits a row: its
length in tokens and its number of picture slots. The number of rows is fixed,
so that what does not fit is left out and the caller counts it.
"""

from collections.abc import Sequence


def best_fit(
    lengths: Sequence[int],
    images: Sequence[int],
    rows: int,
    length: int,
    slots: int,
) -> list[list[int]]:
  """Places documents in rows, the longest first, each in its tightest row.

  Equal lengths keep their order and equal gaps go to the first row, so that
  the result depends on the arguments alone.

  Args:
    lengths: Tokens of each document; 0 stands for a bad record and takes no
      place.
    images: Pictures of each document.
    rows: Number of rows.
    length: Tokens a row can hold.
    slots: Pictures a row can hold.

  Returns:
    For each row the indices of its documents in the order they were placed.
    Documents found in no row did not fit.
  """
  gaps = [length] * rows
  free = [slots] * rows
  placed = [[] for _ in range(rows)]
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    if not lengths[i]:
      break
    open_rows = [r for r in range(rows)
                 if gaps[r] >= lengths[i] and free[r] >= images[i]]
    if open_rows:
      row = min(open_rows, key=lambda r: gaps[r])
      gaps[row] -= lengths[i]
      free[row] -= images[i]
      placed[row].append(i)
  return placed
