"""What a second set of weights is worth (arXiv:2502.06788, Figure 5).

  python -m mmgen.table --experiment=eve_v2/second_set

  per_modality  of the norms, the attention and the MLP of each block (EVEv2.0)
  mlp           of the MLP alone (EVEv1.5)
  norms         of the norms alone
  shared        none (EVEv1.0): the second stage trains the patch layer alone

Three stages: the patch layer alone on 10M captioned pictures; with the second
set on 8M; everything on LLaVA's 665K. Pictures are at most 800 x 800 pixels.
The paper draws most of its results; of `shared` and `mlp` there are figures
for a smaller decoder, Qwen2.5-1.5B after 4M pictures.

Deviations: those of eve_v2/recipes, whose batches and rates are taken, as the
paper names none of the ablation. Its EVEv1.0 has a block of attention before
the decoder, `shared` the same patch layer as the other rows.

Cost at mini scale, an estimate: 5 minutes for each run of a row on two cores,
30 of them.
"""

from experiments.eve import base as eve
from experiments.eve_v2 import recipes

base = recipes.base
STAGES = recipes.STAGES

_PAPER = {
    'perceive': recipes.epoch(
        'web/eve-recap-29m', 'caption', 8 * 10**6, 1024, 1e-4, 2),
    'sft': recipes.epoch(
        'web/llava-mix-665k', 'conversation', 665298, 512, 1e-5, 2)}


def _row(*parts):
  """The fields of a row whose blocks have a second set of these parts."""
  return {'stages': ('prealign', *_PAPER)} | {
      stage: {recipes.SECOND: parts, 'paper': fields}
      for stage, fields in _PAPER.items()}


ROWS = {
    'per_modality': _row(*recipes.PARTS),
    'mlp': _row('mlp'),
    'norms': _row('norms'),
    'shared': _row(),
    'shuffled': eve.merged(_row(*recipes.PARTS), eve.SHUFFLED),
}


def _ahead(b, text, published):
  return dict(
      kind='greater', a='per_modality', b=b, metric='name in caption', d=0.03,
      expected=True, published=dict(zip('ab', published)), text=text)


TABLE = dict(
    title='A second set of weights for pictures',
    source='arXiv:2502.06788, text on Figure 5 (mean of GQA, SEED, TextVQA; '
    '8M) and on Qwen2.5-1.5B (mean of six benchmarks; 4M)',
    metrics=eve.METRICS,
    claims=dict(
        ahead_of_shared=_ahead(
            'shared', 'Two sets of weights beat one (Qwen2.5-1.5B).',
            (38.5, 35.1)),
        ahead_of_mlp=_ahead(
            'mlp', 'They beat two sets of the MLP alone (Qwen2.5-1.5B).',
            (38.5, 37.3)),
        ahead_of_norms=_ahead(
            'norms', 'They beat two sets of the norms alone.', (51.6, 48.8))),
    controls=dict(
        aa=dict(kind='aa', row='per_modality'),
        shuffled=dict(kind='worse', row='shuffled', than='per_modality')),
    seeds=tuple(range(5)),
    account='samples',
    **eve.TUNING,
    budget='120 + 200 + 240 steps, one shared learning rate, not tuned')
