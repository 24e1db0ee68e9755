"""Shows the packed rows of a step as a model would see them.

  python -m mmgen.look --config=quickstart:patches --step=3 --out=look.html

Writes one HTML page that needs nothing else: pictures cut into the patches of
their slots in slot order, tokens coloured by whether they are learnt, documents
apart, positions, the target of every slot (hover), the attention mask of each
row, and what was packed, dropped or bad. Everything is read from the arrays of
the batch, not from the documents behind them, so that a fault on the way shows.
"""

import argparse
import base64
import collections
import html
import io

from etils import epath
import numpy as np
from PIL import Image

from mmgen import config as config_lib
from mmgen import errors
from mmgen.data import pipeline as pipeline_lib
from mmgen.data import text

# Okabe and Ito's colours, told apart with any kind of colour vision.
LEARNT, READ, PICTURE = (0, 158, 115), (86, 130, 180), (230, 159, 0)
FUTURE, OUTSIDE = (238, 241, 245), (255, 255, 255)

STYLE = '''
:root { --ink:#1d2433; --soft:#667085; --line:#e4e7ec; --paper:#fff;
  --back:#f7f8fa; --accent:#0072b2; --learnt:0,158,115; --picture:#e69f00 }
* { box-sizing:border-box }
body { margin:0; background:var(--back); color:var(--ink);
  font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:1280px; margin:0 auto; padding:36px 24px 80px }
h1 { font-size:26px; line-height:1.25; margin:0 0 4px; letter-spacing:-.01em }
h2 { font-size:18px; margin:36px 0 4px }
.soft { color:var(--soft); font-size:12.5px }
.card { background:var(--paper); border:1px solid var(--line);
  border-radius:12px; padding:16px 18px; margin:12px 0;
  box-shadow:0 1px 2px rgba(16,24,40,.04); overflow-x:auto }
table { border-collapse:collapse; width:100%;
  font-variant-numeric:tabular-nums }
th { font-weight:600; font-size:12px; color:var(--soft); text-align:right;
  padding:4px 12px; border-bottom:1px solid var(--line); white-space:nowrap }
td { text-align:right; padding:8px 12px; border-bottom:1px solid #f0f2f5;
  white-space:nowrap }
td .soft { display:block }
tr:last-child td { border-bottom:0 }
th:first-child, td:first-child { text-align:left; padding-left:0 }
.meter { display:inline-block; width:90px; height:7px; border-radius:4px;
  background:#eceff3; overflow:hidden; margin-right:8px }
.meter b { display:block; height:100%; background:var(--accent) }
.legend { display:flex; flex-wrap:wrap; gap:6px 22px; align-items:center }
.key { display:inline-block; width:12px; height:12px; border-radius:3px;
  margin-right:6px; vertical-align:-1px }
.note { border-left:3px solid #fdb022; background:#fffaeb; padding:8px 12px;
  margin:8px 0; border-radius:0 8px 8px 0; font-size:13px }
.row { display:grid; grid-template-columns:1fr 196px; gap:10px 24px }
.row > header { grid-column:1/3; display:flex; gap:16px; align-items:baseline }
.row > header b { font-size:15px }
.strip { grid-column:1/3; width:100%; height:12px; border-radius:4px;
  image-rendering:pixelated; border:1px solid var(--line) }
.mask { width:196px; height:196px; image-rendering:pixelated;
  border:1px solid var(--line); border-radius:6px; display:block }
.docs { display:grid; gap:10px; align-content:start;
  grid-template-columns:repeat(auto-fill,minmax(410px,1fr)) }
.doc { border:1px solid var(--line); border-left:4px solid var(--accent);
  border-radius:8px; padding:8px 12px 10px; background:#fcfcfd }
.doc:nth-child(even) { border-left-color:#cc79a7 }
.slots { display:flex; flex-wrap:wrap; align-items:center; gap:4px 3px;
  margin-top:6px }
.tok { font:12.5px/1.3 ui-monospace,SFMono-Regular,Menlo,monospace;
  border-radius:4px; padding:2px 4px 1px; background:#eef1f5; white-space:pre;
  border-bottom:2px solid transparent; text-align:center; color:#344054 }
.tok small { display:block; font-size:8.5px; line-height:1.1;
  color:rgba(29,36,51,.5); font-weight:400 }
.tok.id { color:#6941c6; font-weight:600 }
.on { border-bottom-color:#d55e00 !important }
.pic { display:inline-flex; flex-direction:column; gap:2px; padding:4px;
  border-radius:6px; background:#fff6e0; margin:0 4px }
.line { display:flex; gap:2px; align-items:center }
.line > small { width:22px; font-size:8.5px; color:#98a2b3; text-align:right;
  margin-right:2px; font-variant-numeric:tabular-nums }
.cell { display:block; image-rendering:pixelated; border-radius:2px;
  border-bottom:2px solid transparent; background-clip:padding-box }
.pic .tok { padding:1px 3px; font-size:10px; background:#fdeac0 }
.pic .tok small { display:none }
.cell:hover, .tok:hover { outline:2px solid var(--accent) }
.pair { display:flex; gap:12px; align-items:center }
.pairs { display:grid; gap:12px;
  grid-template-columns:repeat(auto-fill,minmax(330px,1fr)) }
.pairs .card { margin:0 }
.void { align-self:center; color:var(--soft); font-size:12px; padding:6px 14px;
  border-radius:8px; border:1px dashed #cfd4dc; justify-self:start }
@media (max-width:860px) { .row { display:block } }
'''


def _png(pixels_YXC) -> str:
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(pixels_YXC, np.uint8)).save(buffer, 'png')
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'data:image/png;base64,{data}'


def mask(segments_T: np.ndarray) -> np.ndarray:
  """Who sees whom, bool [T, T]: earlier slots of the same document."""
  same = segments_T[:, None] == segments_T[None, :]
  return np.tril(same) & (segments_T > 0)[:, None]


def mask_picture(row: dict[str, np.ndarray]) -> np.ndarray:
  """The mask of a row as pixels [T, T, 3], a query a line, a key a column."""
  segments, visual = row['segments'], row['image_index'] >= 0
  same = (segments[:, None] == segments[None, :]) & (segments > 0)[:, None]
  pixels = np.full((*same.shape, 3), OUTSIDE, np.uint8)
  pixels[same] = FUTURE
  seen = mask(segments)
  pixels[seen & visual[None, :]] = PICTURE
  pixels[seen & ~visual[None, :]] = READ
  return pixels


def learnt(row: dict[str, np.ndarray]) -> np.ndarray:
  """With what weight the token at each slot is learnt, float [T].

  A slot's weight is that of the token after it, so this is the weight one slot
  earlier; the first slot of a row is never learnt.
  """
  return np.concatenate([[0.0], row['weights'][:-1]])


def _strip(row):
  """One line of pixels [1, T, 3]: what fills the row."""
  pixels = np.full((len(row['tokens']), 3), FUTURE, np.float32)
  pixels[row['segments'] > 0] = READ
  pixels[learnt(row) > 0] = LEARNT
  pixels[row['image_index'] >= 0] = PICTURE
  # Neighbouring documents differ in shade.
  even = (row['segments'] > 0) & (row['segments'] % 2 == 0)
  pixels[even] = 255 - (255 - pixels[even]) * 0.6
  return pixels[None]


def _css(*names, **flags) -> str:
  """Names of CSS classes: the given ones and the flags that are set."""
  return ' '.join([*names, *(name for name, on in flags.items() if on)])


class _Page:
  """What the pieces of a page share: names of tokens, pictures shown once."""

  def __init__(self, tokenizer, image_layout):
    self.tokenizer = tokenizer
    self.image_layout = image_layout
    self.styles = []

  def piece(self, token) -> str:
    """A token as people can read it: spaces and line ends are shown."""
    if token == self.tokenizer.id('<newline>'):
      return '\u21b5'
    said = self.tokenizer.pieces([int(token)])[0]
    return html.escape(said.replace(' ', '\u00b7').replace('\n', '\\n'))

  def picture(self, pixels_YXC, cell_y, cell_x) -> str:
    """Adds a picture whose cells are cut out by CSS; returns its class."""
    name = f'p{len(self.styles)}'
    layout = self.image_layout
    self.styles.append(
        f'.{name} {{ background-image:url({_png(pixels_YXC)}); '
        f'background-size:{layout.cols * cell_x}px {layout.rows * cell_y}px; '
        f'width:{cell_x}px; height:{cell_y}px }}')
    return name

  def hover(self, row, t) -> str:
    """Everything the arrays say about one slot, as a title."""
    says = [f'slot {t}, position {row["positions"][t]}',
            f'token {row["tokens"][t]} {self.piece(row["tokens"][t])}']
    if row['visual'][t] >= 0:
      says.append(f'embedding {row["visual"][t]} of the row\u2019s tables')
    if row['image_index'][t] >= 0:
      says.append(f'picture {row["image_index"][t]}')
    if row['targets'][t]:
      says.append(f'target {row["targets"][t]} {self.piece(row["targets"][t])}'
                  f', weight {row["weights"][t]:g}')
    else:
      says.append('no target')
    return '&#10;'.join(says)

  def token(self, row, t) -> str:
    """One slot as a chip."""
    weight = learnt(row)[t]
    style = (f' style="background:rgba(var(--learnt),{.12 + .4 * weight:.2f})"'
             if weight else '')
    css = _css('tok', id=row['tokens'][t] < len(text.RESERVED),
               on=row['weights'][t] > 0)
    return (f'<span class="{css}"{style} title="{self.hover(row, t)}">'
            f'{self.piece(row["tokens"][t])}'
            f'<small>{row["positions"][t]}</small></span>')

  def picture_slots(self, row, slots) -> str:
    """The slots of one picture: its patches in their places, line by line."""
    layout = self.image_layout
    pixels = row['images'][row['image_index'][slots[0]]]
    cell_x = int(np.clip(260 / layout.cols, 6, 26))
    cell_y = max(6, round(cell_x * pixels.shape[0] * layout.cols
                          / (pixels.shape[1] * layout.rows)))
    name = self.picture(pixels, cell_y, cell_x)
    patch = self.tokenizer.id('<patch>')
    lines = collections.defaultdict(list)  # line of the grid -> slots
    line = -1
    for t in slots:
      if row['tokens'][t] == patch:
        line, col = layout.cell(row['visual'][t] % layout.table_size)
        css = _css('cell', name, on=row['weights'][t] > 0)
        shown = (f'<i class="{css}" title="{self.hover(row, t)}" style="'
                 f'background-position:-{col * cell_x}px -{line * cell_y}px">'
                 '</i>')
      else:
        shown = self.token(row, t)
      lines[line].append((t, shown))
    body = ''.join(
        f'<div class="line"><small>{row["positions"][line[0][0]]}</small>'
        f'{"".join(shown for _, shown in line)}</div>'
        for line in lines.values())
    return f'<div class="pic">{body}</div>'

  def document(self, row, segment, record) -> str:
    """One document of a row."""
    slots = np.flatnonzero(row['segments'] == segment)
    parts, done = [], -1
    for t in slots:
      image = row['image_index'][t]
      if t <= done:
        continue
      if image < 0:
        parts.append(self.token(row, t))
        continue
      own = [s for s in slots if row['image_index'][s] == image]
      parts.append(self.picture_slots(row, own))
      done = own[-1]
    return (f'<div class="doc"><span class="soft"><b>{html.escape(record)}</b>'
            f' &middot; {len(slots)} slots</span>'
            f'<div class="slots">{"".join(parts)}</div></div>')

  def row(self, number, row, records) -> str:
    """One packed row."""
    length = len(row['tokens'])
    used = int((row['segments'] > 0).sum())
    documents = ''.join(self.document(row, k, record)
                        for k, record in enumerate(records, 1))
    if used < length:
      documents += f'<div class="void">empty slots: {length - used}</div>'
    return (
        f'<section class="card row"><header><b>Row {number}</b>'
        f'<span class="soft">{used} of {length} slots, {len(records)} '
        f'documents, {int((row["weights"] > 0).sum())} learnt tokens</span>'
        f'</header><img class="strip" src="{_png(_strip(row))}" alt="fill">'
        f'<div class="docs">{documents}</div>'
        f'<div><img class="mask" src="{_png(mask_picture(row))}" '
        'alt="attention mask" title="query down, key across">'
        '<span class="soft">mask: query down, key across</span></div>'
        '</section>')

  def pair(self, arrays, b, record) -> str:
    """One example of the layout `pair`."""
    count = int(arrays['valid'][b].sum())
    chips = ''.join(f'<span class="tok">{self.piece(t)}</span>'
                    for t in arrays['tokens'][b, :count])
    return (
        '<div class="card pair"><img class="mask" style="width:88px;'
        f'height:88px" src="{_png(arrays["images"][b])}" alt="picture"><div>'
        f'<span class="soft"><b>{html.escape(record)}</b> &middot; label '
        f'{arrays["labels"][b] % 16**6:06x} &middot; {count} tokens</span>'
        f'<div class="slots">{chips}</div></div></div>')


def _summary(pipeline, stats, batch) -> str:
  """The table of sources."""
  head = ('source', 'fill', 'documents', 'tokens', 'learnt', 'pictures',
          'dropped documents', 'tokens', 'bad records')
  lines = [''.join(f'<th>{h}</th>' for h in head)]
  for name, found in stats.items():
    arrays, source = batch[name], pipeline.sources[name]
    if 'example_valid' in arrays:
      learnt_tokens, pictures = '', arrays['example_valid'].sum()
    else:
      learnt_tokens = (arrays['weights'] > 0).sum()
      boxes = arrays.get('image_box', np.zeros((0, 0, 4)))
      pictures = (boxes[..., 2] > 0).sum()
    meter = (f'<span class="meter"><b style="width:{100 * found["fill"]:.1f}%">'
             f'</b></span>{100 * found["fill"]:.1f} %')
    says = html.escape(
        f'{source.corpus} {source.split}, {source.view}, {source.column}; '
        f'groups a step: {source.quota}')
    cells = (f'<b>{html.escape(name)}</b> <span class="soft">{says}</span>',
             meter, found['documents'], found['tokens'], learnt_tokens,
             pictures, found['dropped_documents'], found['dropped_tokens'],
             found['bad'])
    lines.append(''.join(f'<td>{c}</td>' for c in cells))
  body = ''.join(f'<tr>{line}</tr>' for line in lines)
  return f'<section class="card"><table>{body}</table></section>'


LEGEND = '''<section class="card legend soft">
<span><i class="key" style="background:rgba(0,158,115,.52)"></i>learnt token
(stronger for more weight)</span>
<span><i class="key" style="background:#eef1f5"></i>token that is only
read</span>
<span><i class="key" style="background:#fff6e0"></i>picture, its slots in order;
the small number is the position of a line&rsquo;s first slot</span>
<span><i class="key" style="border-bottom:2px solid #d55e00;border-radius:0">
</i>slot whose prediction counts</span>
<span><i class="key" style="background:#5682b4"></i>mask: text seen</span>
<span><i class="key" style="background:#e69f00"></i>mask: picture seen</span>
<span><i class="key" style="background:#eef1f5"></i>mask: future, hidden</span>
<span>Hover any slot for its token, target, weight and place.</span>
</section>'''


def _left_out(groups) -> str:
  """The documents of a source that are in no row, and why."""
  notes = []
  for group in groups:
    placed = {i for row in group.rows for i in row}
    for i, d in enumerate(group.documents):
      if not d.spans:
        notes.append(f'<b>{html.escape(d.id)}</b> is bad: '
                     f'{html.escape(d.meta["bad"])}')
      elif i not in placed:
        notes.append(f'<b>{html.escape(d.id)}</b> did not fit')
  return ''.join(f'<div class="note">{n}</div>' for n in notes)


def page(config, pipeline, step: int, rows: int) -> str:
  """The page of one step.

  Args:
    config: Of the run, for the title.
    pipeline: A `pipeline.Pipeline`.
    step: Which batch to show.
    rows: How many rows of each source to show at most.
  """
  batch, groups = pipeline.batch(step), pipeline.groups(step)
  shared = _Page(pipeline.tokenizer, pipeline.image_layout)
  parts = []
  for source, arrays in batch.items():
    records = [[group.documents[i].id for i in row]
               for group in groups[source] for row in group.rows]
    shown = range(min(rows, len(records)))
    parts.append(f'<h2>{html.escape(source)}</h2><span class="soft">'
                 f'{len(shown)} of {len(records)} rows</span>')
    parts.append(_left_out(groups[source]))
    if 'example_valid' in arrays:
      pairs = ''.join(shared.pair(arrays, b, records[b][0])
                      for b in shown if arrays['example_valid'][b])
      parts.append(f'<div class="pairs">{pairs}</div>')
    else:
      parts += [
          shared.row(r, {k: v[r] for k, v in arrays.items()}, records[r])
          for r in shown]
  title = html.escape(f'{config.name}, step {step}')
  return (
      '<!doctype html><html lang="en"><meta charset="utf-8">'
      f'<title>{title}</title><style>{STYLE}{"".join(shared.styles)}</style>'
      f'<main><h1>{title}</h1><p class="soft">Seed {config.seed}, scale '
      f'{html.escape(config.scale)}. The batch as the model receives it.</p>'
      f'{_summary(pipeline, pipeline.stats(step), batch)}{LEGEND}'
      f'{"".join(parts)}</main></html>')


def main(argv=None):
  """Writes the page and prints its path."""
  parser = argparse.ArgumentParser(
      prog='python -m mmgen.look', description=__doc__.split('\n')[0])
  config_lib.add_arguments(parser)
  parser.add_argument('--step', type=int, default=0,
                      help='which batch to show (default: %(default)s)')
  parser.add_argument('--rows', type=int, default=8,
                      help='rows a source to show (default: %(default)s)')
  parser.add_argument('--out', default='look.html',
                      help='where to write (default: %(default)s)')
  args, unknown = parser.parse_known_args(argv)
  if args.step < 0 or args.rows < 1:
    raise errors.UserError(
        f'--step is {args.step} and --rows is {args.rows}; --step begins at 0, '
        '--rows at 1')
  config = config_lib.from_arguments(args, unknown)
  pipeline = pipeline_lib.open_pipeline(
      config, args.data_dir, config_lib.image_layout(config))
  out = epath.Path(args.out)
  written = page(config, pipeline, args.step, args.rows)
  try:
    out.write_text(written)
  except OSError as error:
    raise errors.UserError(
        f'--out={args.out} cannot be written: {error}') from error
  print(out)


if __name__ == '__main__':
  errors.run(main)
