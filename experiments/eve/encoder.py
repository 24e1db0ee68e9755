"""An encoder against patches under one decoder (arXiv:2406.11832, Table 3).

  python -m mmgen.table --experiment=eve/encoder

  clip         CLIP tower (layer -2) and an MLP, as LLaVA-1.5; the tower is
               frozen throughout, so stage 1 trains the MLP alone
  patches      linear patches, as Fuyu-8B
  eve          EVE's patch embedding layer, without alignment
  eve_aligned  the same, aligned to the CLIP tower while training

All rows see the same documents in the same order in all three stages. The
account is samples of these stages; the pictures and FLOPs that the CLIP tower
itself took are charged and shown beside it.
"""

from experiments.eve import base as eve

base = eve.base
STAGES = eve.STAGES

_CLIP = {
    'model.vision': eve.VISION['mini']['clip'],
    'init.vision': 'run:warm_starts:clip',
    'paper': {'model.vision': eve.VISION['paper']['clip'],
              'init.vision': 'file:weights/clip-vit-large-patch14-336',
              'image.size': (336, 336)},
} | {stage: {'optimizer.groups.vision': eve.FREEZE_VISION}
     for stage in eve.STAGES}

ROWS = {
    'clip': _CLIP,
    'patches': eve.PATCHES,
    'eve': {},
    'eve_aligned': eve.aligned(),
    'eve_shuffled': eve.SHUFFLED,
}

TABLE = dict(
    title='An encoder against patches under one decoder',
    source='arXiv:2406.11832v2, Table 3 (VQAv2)',
    metrics=eve.METRICS,
    claims=dict(
        encoder_ahead=dict(
            kind='greater', a='clip', b='eve_aligned',
            metric='name in caption', d=0.03, expected=True,
            text='At equal samples of the three stages, a CLIP tower beats '
            'the aligned patch layer.',
            published=dict(a=78.5, b=75.4)),
        alignment_and_attention_ahead=dict(
            kind='greater', a='eve_aligned', b='patches',
            metric='name in caption', d=0.03, expected=True,
            text="EVE's aligned patch layer beats linear patches.",
            published=dict(a=75.4, b=74.2)),
        alignment_helps=dict(
            kind='greater', a='eve_aligned', b='eve',
            metric='name in caption', d=0.03, expected=True,
            text='Alignment to a teacher helps the patch layer '
            '(Table 4, 0.5M samples).',
            published=dict(a=58.5, b=55.6))),
    controls=dict(
        aa=dict(kind='aa', row='patches'),
        shuffled=dict(kind='worse', row='eve_shuffled', than='eve')),
    seeds=(0, 1, 2, 3, 4),
    account='samples',
    **eve.TUNING,
    budget='120 + 320 + 240 steps, one shared learning rate, not tuned')
