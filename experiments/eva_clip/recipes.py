"""EVA-CLIP's released recipes (arXiv:2303.15389 and 2402.04252).

  python -m mmgen.table --experiment=eva_clip/recipes
  python -m mmgen.plan --config=eva_clip/recipes:18b --scale=paper

One row a model. LAMB, rates that fall from layer to layer downwards and from
the image tower to the text tower, half of the patches dropped where the
release drops them, softmax over the global batch; from 8B on without weight
decay and at a constant temperature of 0.01. The settings are those of the
released command lines (1B to 5B) and of tables 12 and 13 of the second paper.

Towers start from published weights below `weights/`: the image tower from an
EVA that was pretrained to predict hidden patches, the text tower from another
CLIP; projections and temperature start afresh. `l14_336` and `8b_448` start
from the whole model of 224 pixels.

Deviations: the corpora (Merged-2B and its like) were not released. The trust
ratio of LAMB is of whole tensors; under DeepSpeed's partitioning it was of
flattened shards. Pictures are resized and not cropped at random (0.9 to 1.0 of
the area). The command line of `e14_plus` starts its image tower from its own
result; here that is the pretrained one, as the authors' table of models says.

At mini scale each row is the same towers with 3 and 2 layers of 128, on drawn
scenes: a check that every recipe learns, and no comparison of sizes.
"""

from experiments import warm_starts

LAMB = dict(name='lamb', schedule='cosine', warmup_from='one', min_ratio=0.0,
            no_decay='position_embedding', accumulate=1)
# Of the released command lines, and of DeepSpeed's kernel, which they used.
SMALL = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, clip=5.0,
             bias_correction='rate', trust_clip=(0.01, 10.0),
             always_adapt=False)
LARGE = SMALL | dict(b2=0.95, eps=1e-6, weight_decay=0.0, always_adapt=True)
TEMPERATURE = dict(temperature=dict(pattern='^logit_scale$', freeze=True))
FUSED = 'query|key|value'

# 64 chips; the authors had 64 to 384 A100 of 40 or 80 GB.
MESH = dict(data=1, fsdp=64, tensor=1, sequence=1, slice='v5p:4x4x4')

MINI_VISION = dict(image_size=(32, 32), patch=8, layers=3, width=128, heads=2,
                   hidden=256, unroll=True)
MINI_TEXT = dict(length=16, layers=2, width=128, heads=2, hidden=512,
                 unroll=True)


def base(scale):
  """Returns the config of a recipe without its model."""
  c = warm_starts.base('mini')
  c.mix = dict(pairs=warm_starts.source('pair'))
  c.objective = dict(name='contrastive', loss='softmax')
  c.optimizer = LAMB | SMALL | dict(peak_lr=1e-2, warmup=20, groups={})
  c.evaluators = dict(zero_shot=dict(
      name='zero_shot', corpus=warm_starts.CORPUS, split='validation',
      templates=('a {}', 'a {} on a ground', 'one {}'), examples=2048))
  c.layout = dict(name='pair', length=16, rows=1, documents=128, images=1)
  if scale == 'paper':
    c.dtype = 'bfloat16'
    c.log_every = 10
    c.checkpoint_every = 1000
    c.optimizer.peak_lr = 5e-4  # of the temperature; towers have shares of it
    c.optimizer.warmup = 2000
    c.mix = dict(pairs=dict(warm_starts.source('pair'), corpus='web/merged-2b',
                            split='train', column='raw'))
    c.layout = dict(name='pair', length=77, rows=1, documents=1024, images=1)
    c.evaluators = {}
  return c


def _row(size, pixels, batch, samples, rates, decays, *, vision_fused,
         parts=1, optimizer=None, dropped=0.0, fixed=False):
  """The fields of one recipe.

  Args:
    size: of the model.
    pixels: of a picture's edges.
    batch: pairs a step, a multiple of 1,024 near the published number.
    samples: that were seen.
    rates: peak rates (image, text), in units of the temperature's.
    decays: layer-wise decays (image, text).
    vision_fused: what the release keeps in one tensor of the image tower.
    parts: in which a batch goes through the towers.
    optimizer: fields that differ from `SMALL`.
    dropped: share of the patches that training leaves out.
    fixed: whether the temperature stays as it is.
  """
  (image, text), (image_decay, text_decay) = rates, decays
  groups = dict(
      vision=dict(pattern='^vision', lr_scale=image, layer_decay=image_decay,
                  **({'fused': vision_fused} if vision_fused else {})),
      text=dict(pattern='^text', lr_scale=text, layer_decay=text_decay,
                fused=FUSED))
  groups |= TEMPERATURE if fixed else {}
  model = dict(name='clip', size=size)
  vision = dict(remat=True, patch_dropout=dropped)
  return {
      'optimizer.groups': groups,
      **{f'optimizer.{k}': v for k, v in (optimizer or {}).items()},
      'mini': {'model': dict(model, embed=128, text=MINI_TEXT,
                             vision=MINI_VISION | {'patch_dropout': dropped})},
      'paper': {
          'steps': samples // batch, 'mix.pairs.quota': batch // 1024,
          'image.size': (pixels, pixels), 'mesh': MESH,
          'optimizer.accumulate': parts,
          'model': dict(model, vision=vision, text=dict(remat=True))}}


_QKV, _KERNELS = 'query|key|value', '(query|key|value)/kernel'
_B = 10**9
_LARGE = dict(vision_fused=_QKV, fixed=True, optimizer=LARGE)

ROWS = {
    'g14_plus': _row('eva01-g14-plus', 224, 114688, 4 * _B, (0.8, 0.08),
                     (0.85, 0.75), vision_fused=_KERNELS, dropped=0.5, parts=2),
    'b16': _row('eva02-b16', 224, 131072, 8 * _B, (0.4, 0.04), (0.75, 0.75),
                vision_fused=None),
    'l14': _row('eva02-l14', 224, 131072, 4 * _B, (0.8, 0.08), (0.85, 0.75),
                vision_fused=None, parts=2),
    'l14_336': _row('eva02-l14-336', 336, 61440, 2 * _B, (0.8, 0.08),
                    (0.75, 0.65), vision_fused=None, parts=2),
    'e14': _row('eva02-e14', 224, 114688, 4 * _B, (0.8, 0.08), (0.9, 0.75),
                vision_fused=_KERNELS, dropped=0.5, parts=4),
    'e14_plus': _row('eva02-e14-plus', 224, 143360, 9 * _B, (0.8, 0.08),
                     (0.9, 0.75), vision_fused=_KERNELS, dropped=0.5, parts=4),
    '8b': _row('eva-8b', 224, 178176, 9 * _B, (0.8, 0.08), (0.9, 0.75),
               dropped=0.5, parts=8, **_LARGE),
    '8b_448': _row('eva-8b-448', 448, 24576, 800 * 10**6, (0.4, 0.04),
                   (0.85, 0.75), parts=4, **_LARGE),
    '18b': _row('eva-18b', 224, 108544, 6 * _B, (0.8, 0.08), (0.9, 0.75),
                dropped=0.5, parts=8, **_LARGE),
}

# Weights of the image tower and of the text tower, or of all (released README
# files, "init. ckpt"; the positions in `224to336` are resized already).
STARTS = {
    'g14_plus': ('EVA01_g_psz14.pt', 'CLIP-ViT-H-14-laion2B-s32B-b79K'),
    'b16': ('EVA02_B_psz14to16.pt', 'clip-vit-base-patch16'),
    'l14': ('EVA02_L_psz14.pt', 'clip-vit-large-patch14'),
    'l14_336': ('EVA02_CLIP_L_psz14_224to336.pt',),
    'e14': ('EVA02_E_psz14.pt', 'CLIP-ViT-H-14-laion2B-s32B-b79K'),
    'e14_plus': ('EVA02_E_psz14.pt', 'CLIP-ViT-bigG-14-laion2B-39B-b160k'),
    '8b': ('EVA_8B_psz14.bin', 'EVA02_CLIP_E_psz14_plus_s9B.pt'),
    '8b_448': ('EVA_CLIP_8B_psz14_s9B.pt',),
    '18b': ('EVA_18B_psz14.fp16.bin', 'EVA02_CLIP_E_psz14_plus_s9B.pt'),
}
for _name, _files in STARTS.items():
  ROWS[_name]['paper']['init'] = {
      part: f'file:weights/{file}' for part, file in zip(
          ('vision', 'text') if len(_files) == 2 else ('all',), _files)}

TABLE = dict(
    title="EVA-CLIP's recipes",
    source='arXiv:2402.04252, Table 2 (zero-shot ImageNet-1K)',
    metrics={'zero-shot': 'zero_shot/accuracy'},
    published={row: {'zero-shot': figure} for row, figure in dict(
        g14_plus=79.3, e14_plus=82.1, **{'8b': 83.5, '18b': 83.8}).items()},
    seeds=(0,),
    account='samples',
    budget='400 steps of 128 pairs, rates not tuned')
