"""Plots of a table as <img> elements that need no other file."""

import base64
import io
import math

import matplotlib
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from mmgen.tables import claims
from mmgen.training import metrics

CURVE_POINTS = 300
# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9',
           '#000000', '#999933')


def _axes(x: str, y: str):
  axes = mpl_figure.Figure(figsize=(10.4, 3.6)).subplots()
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(alpha=0.25)
  return axes


def _style(i: int) -> dict:
  """Returns the colour and the kind of line of the i-th row."""
  return dict(color=COLOURS[i % len(COLOURS)],
              linestyle=('-', '--', ':')[i // len(COLOURS) % 3])


def _svg(axes) -> str:
  """A figure as an <img>: inside a data URI its ids cannot collide."""
  axes.legend(frameon=False)
  stream = io.BytesIO()
  with matplotlib.rc_context({'svg.hashsalt': 'mmgen'}):
    axes.figure.savefig(stream, format='svg', bbox_inches='tight',
                        metadata={'Date': None})
  data = base64.b64encode(stream.getvalue()).decode()
  return f'<img alt="" src="data:image/svg+xml;base64,{data}">'


def _thin(steps, values):
  """Averages a curve over equal bins, so that rows can be told apart."""
  size = math.ceil(len(values) / CURVE_POINTS)
  bins = range(0, len(values), size)
  return ([steps[min(i + size, len(steps)) - 1] for i in bins],
          [sum(values[i:i + size]) / len(values[i:i + size]) for i in bins])


def curves(runs) -> str:
  """Draws the training loss of every row over its steps.

  Args:
    runs: {row: folder}.

  Returns:
    HTML; '' if no row has a curve.
  """
  axes = _axes('step', 'training loss')
  for i, (row, folder) in enumerate(runs.items()):
    rows = [r for r in metrics.read_rows(folder) if 'loss' in r]
    if rows:
      steps, loss = _thin([r['step'] for r in rows], [r['loss'] for r in rows])
      axes.plot(steps, loss, label=row, linewidth=1.6, **_style(i))
  return _svg(axes) if axes.lines else ''


def rates(tuned: dict) -> str:
  """Draws the score of every row over its learning rate.

  A line joins the means over the tuning seeds, small dots are single seeds
  and a star marks the rate that is chosen.

  Args:
    tuned: of `tuning.summarise`.

  Returns:
    HTML.
  """
  unit = claims.UNITS[tuned['column']['unit']]
  axes = _axes('peak learning rate',
               f'{tuned["metric"]} ({tuned["split"]} split)')
  axes.set_xscale('log', base=2)
  for i, (row, about) in enumerate(tuned['rows'].items()):
    style = _style(i)
    means = {t['rate']: t['mean'] / unit for t in about['trials']
             if t['mean'] is not None}
    axes.plot(list(means), list(means.values()), label=row, linewidth=1.6,
              **style)
    for trial in about['trials']:
      seeds = [s / unit for s in trial['scores'].values() if s is not None]
      axes.plot([trial['rate']] * len(seeds), seeds, '.', markersize=4,
                alpha=0.5, color=style['color'])
    if about['chosen'] is not None:
      axes.plot(about['chosen'], means[about['chosen']], '*', markersize=14,
                color=style['color'], markeredgecolor='white')
  axes.set_xticks(tuned['grid'])
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:g}'))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  return _svg(axes)
