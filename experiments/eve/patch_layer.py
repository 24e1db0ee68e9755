"""Parts of EVE's patch layer (arXiv:2406.11832, Table 4, 0.5M samples).

  python -m mmgen.table --experiment=eve/patch_layer

  full        the patch embedding layer, aligned to the teacher
  no_ca1      a cell is the plain average of its raw patches
  no_ca2      the class embedding is a learned vector that reads nothing
  next_patch  what is predicted at a cell is compared with the teacher's
              feature of the next cell ('MSE_NP')
  patches     linear patches in place of the layer, aligned too: not in the
              paper's table, and so apart from its claims

The published table takes each part out alone and finds differences of tenths
of a point of VQAv2: it says that the attentions are minor, not that the layer
beats linear patches.

What the paper leaves open, and how it is read here: without CA1 the average
pooling stays; without CA2 the class embedding keeps its slot; the next cell is
the next valid one row by row, over the ends of rows, and the last cell of a
picture has no target. Next-patch targets take the place of those of the same
cell. All else, alignment included, is that of `full`.

Cost at mini scale, an estimate: 3 to 4 minutes for each run of a row on two
cores, 84 of them; `full` and `shuffled` are runs of eve/alignment.
"""

from experiments.eve import base as eve

base = eve.base
STAGES = eve.HALF_MILLION

ROWS = {
    'full': eve.aligned(),
    'no_ca1': eve.aligned() | {'model.vision.local_attention': False},
    'no_ca2': eve.aligned() | {'model.vision.global_attention': False},
    'next_patch': eve.aligned(shift=1),
    'patches': eve.merged(eve.aligned(), eve.PATCHES),
    'shuffled': eve.merged(eve.aligned(), eve.SHUFFLED),
}


def _minor(row, text, published):
  return dict(
      kind='equal', a='full', b=row, metric='name in caption', d=0.02,
      expected=True, text=text, published=dict(a=58.5, b=published))


TABLE = dict(
    title="Parts of EVE's patch layer",
    source='arXiv:2406.11832v2, Table 4 (VQAv2, 0.5M samples)',
    metrics=eve.METRICS,
    claims=dict(
        local_attention_is_minor=_minor(
            'no_ca1', 'Attention of a cell to its raw patches (CA1) is worth '
            'less than 2 points.', 58.2),
        global_attention_is_minor=_minor(
            'no_ca2', 'Attention of the class embedding to all cells (CA2) is '
            'worth less than 2 points.', 58.4),
        next_patch_is_equal=_minor(
            'next_patch', 'Alignment to the next patch and to the same one '
            'are worth the same within 2 points.', 58.0),
        layer_ahead_of_linear=dict(
            kind='greater', a='full', b='patches', metric='name in caption',
            d=0.03, expected=None, published=None,
            text='The full layer beats linear patches (not published).')),
    controls=dict(
        aa=dict(kind='aa', row='full'),
        shuffled=dict(kind='worse', row='shuffled', than='full')),
    seeds=tuple(range(12)),
    account='samples',
    **eve.TUNING,
    budget='120 + 320 + 240 steps, one shared learning rate, not tuned')
