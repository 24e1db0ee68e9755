"""What a run reports: files, progress line, stability, FLOPs.

`metrics.jsonl` has one row per step, whose floats read back exactly. The step
of a row is the number of updates behind it.
"""

import json
import logging
import math
import sys
import time

from etils import epath
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import tensorboardX

_log = logging.getLogger(__name__)

# A loss or gradient norm is a spike if it lies this many standard deviations
# above the mean of the values before it. OLMo 2 (arXiv:2501.00656, section 3)
# counts values 7 deviations away from a rolling mean of 1,000; the window here
# is shorter because short runs still descend within 1,000 steps, and falls
# are no spikes.
SPIKE_DEVIATIONS = 7.0
SPIKE_WINDOW = 100
SPIKE_LEAST = 20  # values needed before any is judged

# A run has collapsed if its held-out loss ends this far above its lowest. The
# factor is this project's: EVE's figure 5 (arXiv:2406.11832) shows collapses
# of far more and gives no rule.
COLLAPSE_RATIO = 1.2

# What `count_batch` counts; sums over a run are its accounts.
COUNTS = ('samples', 'images', 'text_tokens', 'visual_tokens')

# Dense bf16 peak of one jax device, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    'TPU v2': 22.5e12,  # a device is one of the chip's two cores
    'TPU v3': 61.5e12,  # likewise
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
}


# ---------------------------------------------------------------------------
# Accounts


def count_batch(batch):
  """Counts what a global batch holds.

  Args:
    batch: {source: arrays} of the layouts `sequence` or `pair`.

  Returns:
    i32 scalars: 'samples' (documents with a place in it), 'images', and the
    positions in use, 'text_tokens' and 'visual_tokens'. The layout `pair` has
    no positions of pictures.
  """
  total = dict.fromkeys(COUNTS, jnp.zeros((), jnp.int32))
  for arrays in batch.values():
    if 'segments' in arrays:
      used, visual = arrays['segments'] > 0, arrays['image_index'] >= 0
      found = dict(samples=jnp.max(arrays['segments'], axis=-1),
                   text_tokens=used & ~visual, visual_tokens=used & visual)
      if 'image_box' in arrays:
        found['images'] = arrays['image_box'][..., 2] > 0
    else:
      used = arrays['example_valid']
      found = dict(samples=used, images=used, text_tokens=arrays['valid'])
    for name, x in found.items():
      total[name] += jnp.sum(x, dtype=jnp.int32)
  return total


def count_flops(jaxpr) -> int:
  """Counts the FLOPs of all matrix products and convolutions of a program.

  A multiply-add is 2. Scans count as often as they run, a conditional as its
  dearest branch; masked and padded positions count, and so does what is
  computed anew in the backward pass.

  Args:
    jaxpr: such as `jitted.trace(*args).jaxpr`.

  Raises:
    ValueError: a matrix product inside a loop of unknown length.
  """
  total = 0
  for eqn in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == 'dot_general':
      (contract, _), _ = params['dimension_numbers']
      depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
      if contract:  # else it is a product element by element, and no sum
        total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    elif name == 'conv_general_dilated':
      kernel = eqn.invars[1].aval.shape
      outputs = kernel[params['dimension_numbers'].rhs_spec[0]]
      depth = math.prod(kernel) // outputs
      total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
    elif name == 'cond':
      total += max(count_flops(branch) for branch in params['branches'])
    else:
      inside = sum(count_flops(x) for x in _jaxprs(params))
      if inside and name == 'while':
        raise ValueError('a matrix product in a loop of unknown length.')
      total += inside * (params['length'] if name == 'scan' else 1)
  return total


def live(closed):
  """Returns a traced program without what no result needs.

  A compiler drops it too: a teacher's blocks above the layer that is read, the
  gradient of pixels.
  """
  jaxpr = closed.jaxpr
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _jaxprs(params):
  values = [x for value in params.values()
            for x in (value if isinstance(value, (tuple, list)) else [value])]
  return [x for x in values
          if hasattr(x, 'eqns') or hasattr(getattr(x, 'jaxpr', None), 'eqns')]


def peak_flops() -> float | None:
  """Returns the peak FLOP/s of all devices, or None if it is not known."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return peak and peak * jax.device_count()


# ---------------------------------------------------------------------------
# Stability


def spikes(values) -> int:
  """Counts upward spikes in a series; see `SPIKE_DEVIATIONS`."""
  values = np.asarray(values, np.float64)
  count = 0
  for i in range(SPIKE_LEAST, len(values)):
    window = values[max(0, i - SPIKE_WINDOW):i]
    if values[i] > window.mean() + SPIKE_DEVIATIONS * window.std():
      count += 1
  return count


def collapsed(values) -> bool:
  """Whether a series of held-out losses ends far above its lowest value.

  See `COLLAPSE_RATIO`. A last value that is not finite is a collapse too; one
  before it is passed over.
  """
  finite = [value for value in values if math.isfinite(value)]
  return not math.isfinite(values[-1]) or (
      values[-1] > COLLAPSE_RATIO * min(finite))


def stability(rows) -> dict[str, float]:
  """Summarises how smoothly a run went.

  Args:
    rows: of `metrics.jsonl`.

  Returns:
    Spikes of loss and gradient norm per 1,000 steps, quantiles of the gradient
    norm before clipping, and, if a held-out loss was taken more than once
    (`eval_every`), 'collapsed': 1.0 if any such loss has, else 0.0.
  """
  held_out = {}  # by step: a run cut off after its last score repeats it
  for row in rows:
    for name, value in row.items():
      if name.startswith('scores/') and name.endswith('/loss'):
        held_out.setdefault(name, {})[row['step']] = value
  rows = [row for row in rows if 'loss' in row]
  loss = [row['loss'] for row in rows]
  norm = [row['grad_norm'] for row in rows]
  if not rows:
    return {}
  result = {
      'loss_spikes_per_1000': 1000 * spikes(loss) / len(rows),
      'grad_norm_spikes_per_1000': 1000 * spikes(norm) / len(rows)}
  for name, q in (('p50', 0.5), ('p90', 0.9), ('p99', 0.99), ('max', 1.0)):
    result[f'grad_norm_{name}'] = float(np.quantile(norm, q))
  followed = [list(found.values()) for found in held_out.values()
              if len(found) > 1]
  if followed:
    result['collapsed'] = float(any(map(collapsed, followed)))
  return result


# ---------------------------------------------------------------------------
# Files


def read_rows(folder) -> list[dict]:
  """Returns the rows of `metrics.jsonl`; a line cut off in writing ends it."""
  path = epath.Path(folder) / 'metrics.jsonl'
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


class MetricsWriter:
  """Writes `metrics.jsonl` and TensorBoard files of one run.

  On a restart the rows after the restored step are dropped: the steps to come
  write them again.
  """

  def __init__(self, folder, step: int):
    """Opens the files.

    Args:
      folder: of the run.
      step: the restored step, 0 for a fresh start.
    """
    self._path = epath.Path(folder) / 'metrics.jsonl'
    kept = [row for row in read_rows(folder) if row['step'] <= step]
    cut = self._path.with_suffix('.cut')
    cut.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    cut.replace(self._path)
    self._file = self._path.open('a')
    self._board = tensorboardX.SummaryWriter(
        str(epath.Path(folder) / 'tensorboard'), purge_step=step + 1)

  def write(self, step: int, values: dict):
    """Appends one row."""
    self._file.write(json.dumps({'step': step, **values}) + '\n')

  def plot(self, step: int, values: dict):
    """Adds scalars to TensorBoard."""
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def flush(self):
    """Makes all rows durable, as is due before a checkpoint."""
    self._file.flush()
    self._board.flush()

  def close(self):
    self._file.close()
    self._board.close()


# ---------------------------------------------------------------------------
# Progress


class Progress:
  """One line: step, loss, tokens/s, images/s, time left, utilisation.

  On a terminal the line is redrawn; elsewhere it is printed each time.
  """

  def __init__(self, steps: int, step: int, flops: int, title: str):
    """Starts the clock.

    Args:
      steps: of the whole run.
      step: already done.
      flops: of one step, on all devices.
      title: name of the run.
    """
    self._steps, self._step, self._flops = steps, step, flops
    self._title, self._time = title, time.perf_counter()
    self._peak = peak_flops()
    self._bar = None
    if rich.console.Console(file=sys.stderr).is_terminal:
      self._bar = rich.progress.Progress(
          rich.progress.TextColumn(title), rich.progress.BarColumn(),
          rich.progress.TextColumn('{task.description}'),
          console=rich.console.Console(file=sys.stderr), transient=False)
      self._task = self._bar.add_task('', total=steps, completed=step)
      self._bar.start()

  def update(self, step: int, loss: float, tokens: int, images: int) -> dict:
    """Shows and returns the rates since the last update.

    Args:
      step: steps done.
      loss: the last one.
      tokens: since the last update.
      images: since the last update.

    Returns:
      {'seconds_per_step', 'tokens_per_second', 'images_per_second', 'mfu' if
      the peak of the devices is known}.
    """
    now = time.perf_counter()
    seconds, done = now - self._time, step - self._step
    self._time, self._step = now, step
    rates = {'seconds_per_step': seconds / done,
             'tokens_per_second': tokens / seconds,
             'images_per_second': images / seconds}
    if self._peak:
      rates['mfu'] = self._flops * done / seconds / self._peak
    left = round((self._steps - step) * seconds / done)
    line = (f'step {step}/{self._steps}  loss {loss:.4f}  '
            f'{rates["tokens_per_second"]:,.0f} tokens/s  '
            f'{rates["images_per_second"]:,.0f} images/s  '
            f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left')
    if self._peak:
      line += f'  {rates["mfu"]:.1%} of peak'
    if self._bar:
      self._bar.update(self._task, completed=step, description=line)
    else:
      _log.info('%s  %s', self._title, line)
    return rates

  def close(self):
    if self._bar:
      self._bar.stop()
