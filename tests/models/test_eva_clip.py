"""EVA-CLIP against its reference, published sizes, patch dropout, drop path.

The arrays in tests/golden/eva_*.npz hold random weights, inputs and what every
stage of tiny models of each style made of them. All but eva_oblong are of the
code released with arXiv 2402.04252 (baaivision/EVA, EVA-CLIP-18B), under its
own names; eva_oblong, whose pictures are not square, is of timm 1.0.31, under
the names of open_clip's files (torch 2.13.0, fp32, CPU).
"""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mmgen.models import clip
from mmgen.models import text_encoder
from mmgen.models import transformer
from mmgen.models import vision_encoder
from mmgen.objectives import contrastive

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
close = reference.close
EVA02 = dict(mlp='swiglu', inner_attention_norm=True, inner_mlp_norm=True,
             rope_grid=(16, 16))
RMS = dict(norm='rms', qkv_bias=False)


def vision(size, patch, layers, width, heads, hidden, **fields):
  return vision_encoder.VisionEncoderConfig(
      image_size=size, patch=patch, layers=layers, width=width, heads=heads,
      hidden=hidden, norm_eps=1e-6, stem_bias=True, pre_norm=False,
      **{'mlp': 'gelu', 'qkv_bias': 'qv', **fields})


def pair(vision, length, layers, width, heads, embed):
  text = text_encoder.TextEncoderConfig(
      vocab=37, length=length, layers=layers, width=width, heads=heads,
      hidden=4 * width, mlp='gelu')
  return clip.ClipConfig(vision, text, embed,
                         vision_projection_bias=vision.qkv_bias == 'qv')


CASES = {
    # B/16, L/14: 5 x 5 cells, stretched over the 16 x 16 of pretraining.
    'eva_rope': pair(vision((26, 26), 5, 2, 24, 3, 45, **EVA02),
                     6, 2, 12, 3, 7),
    # g/14: hidden is 21 * 4.3637.
    'eva_gelu': pair(vision((20, 20), 6, 3, 21, 3, 91), 7, 2, 10, 5, 9),
    # E/14
    'eva_post': pair(vision((15, 15), 3, 3, 20, 5, 52, placement='post'),
                     5, 3, 12, 1, 8),
    # 8B
    'eva_rms': pair(vision((16, 16), 4, 3, 18, 3, 90, **RMS), 6, 2, 12, 2, 11),
    # 18B
    'eva_rms_post': pair(
        vision((17, 17), 5, 4, 15, 3, 75, placement='post', **RMS),
        8, 2, 8, 2, 6),
    # EVA-01 B/16, of which no weights were released.
    'eva_layer_scale': pair(
        vision((12, 12), 4, 2, 18, 3, 72, layer_scale=0.1), 5, 1, 8, 2, 6),
}


def linear(get, name, weight='weight', bias='bias'):
  tree = {'kernel': get(f'{name}.{weight}').T}
  bias = get(f'{name}.{bias}', optional=True)
  return tree if bias is None else tree | {'bias': bias}


def norm(get, name):
  tree = {'scale': get(f'{name}.weight')}
  bias = get(f'{name}.bias', optional=True)
  return tree if bias is None else tree | {'bias': bias}


def vision_block(get, c, name):
  attention = {}
  parts = ('query', 'key', 'value')
  fused = get(f'{name}.attn.qkv.weight', optional=True)
  for i, (part, letter) in enumerate(zip(parts, 'qkv')):
    tree = ({'kernel': np.split(fused, 3)[i].T} if fused is not None
            else linear(get, f'{name}.attn.{letter}_proj'))
    bias = get(f'{name}.attn.{letter}_bias', optional=True)
    if bias is not None:
      tree['bias'] = bias
    attention[part] = tree
  attention['out'] = linear(get, f'{name}.attn.proj')
  if c.mlp == 'swiglu':
    names = dict(gate='w1', up='w2', down='w3')
  else:
    names = dict(up='fc1', down='fc2')
  mlp = {k: linear(get, f'{name}.mlp.{v}') for k, v in names.items()}
  if c.inner_attention_norm:
    attention['norm'] = norm(get, f'{name}.attn.inner_attn_ln')
    mlp['norm'] = norm(get, f'{name}.mlp.ffn_ln')
  block = {'attention_norm': norm(get, f'{name}.norm1'), 'attention': attention,
           'mlp_norm': norm(get, f'{name}.norm2'), 'mlp': mlp}
  if c.layer_scale is not None:
    block |= {'attention_scale': get(f'{name}.gamma_1'),
              'mlp_scale': get(f'{name}.gamma_2')}
  return block


def text_block(get, name):
  weight = np.split(get(f'{name}.attn.in_proj_weight'), 3)
  bias = np.split(get(f'{name}.attn.in_proj_bias'), 3)
  attention = {
      part: {'kernel': weight[i].T, 'bias': bias[i]}
      for i, part in enumerate(('query', 'key', 'value'))}
  attention['out'] = linear(get, f'{name}.attn.out_proj')
  return {'attention_norm': norm(get, f'{name}.ln_1'), 'attention': attention,
          'mlp_norm': norm(get, f'{name}.ln_2'),
          'mlp': {'up': linear(get, f'{name}.mlp.c_fc'),
                  'down': linear(get, f'{name}.mlp.c_proj')}}


def stacked(blocks, final_norm):
  return {'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks),
          'final_norm': final_norm}


def vision_from_reference(get, c):
  conv = get('visual.patch_embed.proj.weight')
  return {
      'patch_embedding': {
          'kernel': conv.transpose(2, 3, 1, 0).reshape(-1, c.width),
          'bias': get('visual.patch_embed.proj.bias')},
      'class_embedding': get('visual.cls_token')[0, 0],
      'position_embedding': get('visual.pos_embed')[0],
      'stack': stacked([vision_block(get, c, f'visual.blocks.{i}')
                        for i in range(c.layers)], norm(get, 'visual.norm'))}


def from_reference(arrays, config, prefix=''):
  """Our tree from arrays named as in the reference's state dict."""
  def get(name, optional=False):
    found = arrays.get(prefix + name)
    assert optional or found is not None, name
    return found
  t = config.text
  text = {
      'token_embedding': {'embedding': get('text.token_embedding.weight')},
      'position_embedding': get('text.positional_embedding'),
      'stack': stacked([text_block(get, f'text.transformer.resblocks.{i}')
                        for i in range(t.layers)], norm(get, 'text.ln_final'))}
  return {'vision': vision_from_reference(get, config.vision), 'text': text,
          'vision_projection': linear(get, 'visual.head'),
          'text_projection': {'kernel': get('text.text_projection')},
          'logit_scale': get('logit_scale')}


def close_gradient(path, ours, theirs):
  if jax.tree_util.keystr(path).endswith("['key']['bias']"):  # of the text
    # A constant on all keys does not change a softmax: truly zero.
    assert np.abs(ours).max() < 1e-6 and np.abs(theirs).max() < 1e-6
  else:
    close(ours, theirs, 2e-5)


@functools.cache
def load(name):
  with np.load(GOLDEN / f'{name}.npz') as file:
    return dict(file)


def projected(params, pooled):
  tree = params['vision_projection']
  return pooled @ tree['kernel'] + tree.get('bias', np.zeros(1))[None]


@pytest.mark.parametrize('name', CASES)
def test_every_stage_equals_the_reference(name):
  config, golden = CASES[name], load(name)
  model = clip.Clip(config)
  params = from_reference(golden, config, 'param/')
  tokens = golden['tokens']
  # Reference: the highest id ends a text, and what follows is padding.
  valid = np.arange(tokens.shape[1])[None] <= tokens.argmax(1)[:, None]
  batch = dict(images=golden['images'], tokens=tokens, valid=valid,
               example_valid=np.ones(len(tokens), bool))
  expected = jax.eval_shape(
      lambda: model.init(jax.random.key(0), batch))['params']
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)

  def run(params):
    taps = lambda tower: tuple(range(tower.layers + 1))
    apply = lambda method, *x: model.apply({'params': params}, *x,
                                           method=method)
    image = apply('encode_image', batch['images'], taps(config.vision))
    text = apply('encode_text', tokens, valid, taps(config.text))
    sums, _ = contrastive.Contrastive(model).couple(
        params, {}, {'s': (image[0], text[0])}, {'s': batch})
    total, weight = sums['contrastive']
    return total / weight, (image, text, apply('temperature')[0])

  if name == 'eva_rope':
    (value, found), gradient = jax.jit(
        jax.value_and_grad(run, has_aux=True))(params)
    theirs = from_reference(load(f'{name}_gradients'), config)
    jax.tree_util.tree_map_with_path(close_gradient, gradient, theirs)
  else:
    value, found = jax.jit(run)(params)
  image, text, scale = jax.tree.map(np.asarray, found)
  tree = params['vision']
  pixels = vision_encoder.standardise(
      batch['images'], config.vision.mean, config.vision.std)
  patches = vision_encoder.patchify(pixels, config.vision.patch)
  close(patches @ tree['patch_embedding']['kernel']
        + tree['patch_embedding']['bias'][None, None], golden['vision/patches'])
  for side, (embedding, out) in (('vision', image), ('text', text)):
    for i, state in out['taps'].items():
      close(state, golden[f'{side}/{i}'])
    close(out['hidden'], golden[f'{side}/hidden'])
    close(out['pooled'], golden[f'{side}/pooled'])
    close(embedding, golden[
        'image_embeds' if side == 'vision' else 'text_embeds'])
  close(projected(params, image[1]['pooled']), golden['vision/head'])
  close(text[1]['pooled'] @ params['text_projection']['kernel'],
        golden['text/head'])
  close(scale * image[0] @ text[0].T, golden['logits'])
  close(value, golden['loss'])


def test_pictures_that_are_not_square():
  """Rows and columns are stretched each by their own factor; names of timm."""
  c = vision((17, 30), 4, 2, 16, 2, 30, **EVA02)
  golden = load('eva_oblong')
  renamed = {}
  for name, array in golden.items():
    for theirs, ours in (
        (r'param/visual\.trunk\.', 'visual.'),
        ('attn.norm', 'attn.inner_attn_ln'), ('mlp.norm', 'mlp.ffn_ln'),
        ('fc1_g', 'w1'), ('fc1_x', 'w2'), ('fc2', 'w3'),
        (r'([qv])_proj\.bias', r'\1_bias')):
      name = re.sub(theirs, ours, name)
    renamed[name] = array
  get = lambda name, optional=False: renamed.get(name)
  params = {'vision': vision_from_reference(get, c),
            'vision_projection': linear(get, 'visual.head')}
  pooled, out = jax.jit(lambda params: vision_encoder.VisionEncoder(c).apply(
      {'params': params}, golden['images'], (0, 1, 2), method='encode'))(
          params['vision'])
  for i, state in out['taps'].items():
    close(state, golden[f'vision/{i}'])
  close(out['hidden'], golden['vision/hidden'])
  close(projected(params, pooled), golden['vision/head'])


@pytest.mark.parametrize('name, change', [
    ('eva_rope', dict()), ('eva_rope', dict(unroll=True)),
    ('eva_rope', dict(remat=True)), ('eva_post', dict())], ids=str)
def test_kept_patches_as_in_the_reference(name, change):
  """The same patches kept: values, and gradients of what was gathered."""
  golden, dropped = load(name), load(f'{name}_dropout')
  config = CASES[name]
  tower = dataclasses.replace(config.vision, patch_dropout=0.5, **change)
  params = from_reference(golden, config, 'param/')
  assert dropped['kept'].shape[1] == tower.kept == 12

  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    pooled, out = vision_encoder.VisionEncoder(tower).apply(
        {'params': params['vision']}, golden['images'],
        tuple(range(tower.layers + 1)), dropped['kept'], method='encode')
    head = projected(params, pooled)
    factors = jnp.linspace(-1, 1, head.size).reshape(head.shape)
    return jnp.sum(head * factors), (head, out['taps'])

  (_, (head, taps)), gradient = jax.jit(run)(params)
  for i, state in taps.items():
    close(state, dropped[f'vision/{i}'])
  close(head, dropped['head'])
  gradient = gradient['vision']
  close(gradient['position_embedding'], dropped['grad/visual.pos_embed'][0])
  conv = dropped['grad/visual.patch_embed.proj.weight']
  close(gradient['patch_embedding']['kernel'],
        conv.transpose(2, 3, 1, 0).reshape(-1, tower.width))
  attention = 'grad/visual.blocks.0.attn.'
  query = (dropped[attention + 'q_proj.weight'] if name == 'eva_rope'
           else np.split(dropped[attention + 'qkv.weight'], 3)[0])
  ours = gradient['stack']['blocks']['attention']['query']['kernel'][0]
  close(ours.reshape(tower.width, -1), query.T)


def test_order_of_kept_patches_is_without_effect():
  config, golden = CASES['eva_rope'], load('eva_rope')
  params = from_reference(golden, config, 'param/')['vision']
  kept = load('eva_rope_dropout')['kept']
  encode = jax.jit(lambda kept: vision_encoder.VisionEncoder(
      config.vision).apply({'params': params}, golden['images'], (), kept,
                           method='encode')[0])
  close(encode(np.sort(kept)), encode(kept))
  everything = np.broadcast_to(np.arange(25)[None], (3, 25))
  close(encode(everything), golden['vision/pooled'])


@pytest.mark.parametrize('share, kept', [
    (0.5, 12), (0.75, 6), (0.3, 17), (0.99, 1)])
def test_exactly_so_many_patches_are_kept(share, kept):
  config = dataclasses.replace(CASES['eva_rope'].vision, patch_dropout=share)
  keys = jax.random.split(jax.random.key(0), 400)
  found = np.asarray(vision_encoder.draw_patches(config, keys))
  assert config.kept == kept and found.shape == (400, kept)
  assert found.min() == 0 and found.max() == 24
  assert all(len(set(row)) == kept for row in found.tolist())
  assert len({tuple(sorted(row)) for row in found.tolist()}) > (
      20 if kept == 1 else 200)
  # Every patch is as likely as every other: 4.5 sigma.
  counts = np.bincount(found.ravel(), minlength=25) / 400
  p = kept / 25
  assert np.abs(counts - p).max() < 4.5 * (p * (1 - p) / 400) ** 0.5


def test_published_share_of_patches():
  for size, tokens in (('eva02-e14', 256), ('eva02-b16', 196)):
    config = dataclasses.replace(
        vision_encoder.SIZES[size], patch_dropout=0.5)
    assert config.kept == tokens // 2


def test_dropout_is_off_unless_patches_are_given():
  config = CASES['eva_post']
  golden = load('eva_post')
  params = from_reference(golden, config, 'param/')
  tower = dataclasses.replace(config.vision, patch_dropout=0.5)
  model = clip.Clip(dataclasses.replace(config, vision=tower))
  embed = jax.jit(lambda batch: model.apply({'params': params}, batch)[0][0])
  batch = dict(images=golden['images'], tokens=golden['tokens'],
               valid=golden['tokens'] > 0)
  close(embed(batch), golden['image_embeds'])
  kept = load('eva_post_dropout')['kept']
  head = load('eva_post_dropout')['head']
  close(embed(batch | dict(kept=kept)),
        head / np.linalg.norm(head, axis=1, keepdims=True))
  table, _ = jax.jit(lambda images: vision_encoder.VisionEncoder(tower).apply(
      {'params': params['vision']}, images, None))(golden['images'][:, None])
  close(table[:, 0], golden['vision/2'][:, 1:])


@pytest.mark.parametrize('name, change', [
    ('eva_rope', dict()), ('eva_rope', dict(unroll=True)),
    ('eva_rms_post', dict(remat=True))], ids=str)
def test_branches_are_left_out_as_in_the_reference(name, change):
  """The reference in training, with the factors that it happened to draw."""
  golden, dropped = load(name), load('eva_drop_path')
  dropped = {key.partition('/')[2]: value for key, value in dropped.items()
             if key.startswith(f'{name}/')}
  config = CASES[name]
  tower = dataclasses.replace(config.vision, drop_path=0.5, **change)
  params = from_reference(golden, config, 'param/')

  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, taps=()):
    pooled, _ = vision_encoder.VisionEncoder(tower).apply(
        {'params': params['vision']}, golden['images'], taps, None,
        dropped['factors'], method='encode')
    head = projected(params, pooled)
    factors = jnp.linspace(-1, 1, head.size).reshape(head.shape)
    return jnp.sum(head * factors), head

  (_, head), gradient = jax.jit(run)(params)
  close(head, dropped['head'])
  # 1.5e-5 with jax 0.12.0.1, less than 1e-5 with 0.10.1.
  close(gradient['vision']['position_embedding'], dropped['pos_grad'], 3e-5)
  if name == 'eva_rms_post':  # cut into segments
    close(jax.jit(lambda params: run(params, (1, 3))[0][1])(params),
          dropped['head'])
    # Without factors nothing is left out.
    model = clip.Clip(dataclasses.replace(config, vision=tower))
    embed = lambda **more: model.apply({'params': params}, dict(
        images=golden['images'], tokens=golden['tokens'],
        valid=golden['tokens'] > 0, **more))[0][0]
    close(embed(), golden['image_embeds'])
    close(embed(factors=dropped['factors']),
          head / np.linalg.norm(head, axis=1, keepdims=True))


# vision with its projection, text with its projection, both and a temperature
COUNTS = {
    'eva01-g14': (1_012_588_928, 123_846_912, 1_136_435_841),
    'eva01-g14-plus': (1_012_588_928, 354_032_640, 1_366_621_569),
    'eva02-b16': (86_263_040, 63_428_096, 149_691_137),
    'eva02-l14': (304_105_152, 123_650_304, 427_755_457),
    'eva02-l14-336': (304_432_832, 123_650_304, 428_083_137),
    'eva02-e14': (4_350_556_928, 354_032_640, 4_704_589_569),
    'eva02-e14-plus': (4_350_556_928, 694_332_160, 5_044_889_089),
    'eva-8b': (7_526_088_704, 694_659_840, 8_220_748_545),
    'eva-8b-448': (7_529_234_432, 694_659_840, 8_223_894_273),
    'eva-18b': (17_630_494_720, 694_987_520, 18_325_482_241),
}


@pytest.mark.parametrize('size', COUNTS)
def test_published_parameter_counts(size):
  config = clip.SIZES[size]
  tree = jax.eval_shape(lambda: clip.Clip(config).init(
      jax.random.key(0),
      clip.example_batch(config, config.vision.image_size)))['params']
  count = lambda tree: sum(p.size for p in jax.tree.leaves(tree))
  of = lambda side: count(tree[side]) + count(tree[f'{side}_projection'])
  assert (of('vision'), of('text'), count(tree)) == COUNTS[size]
  assert vision_encoder.SIZES[size] == config.vision


def test_published_sizes_have_the_quirks_of_their_family():
  # Counts see none of these, and a wrong one costs accuracy without an error.
  assert set(COUNTS) == {s for s in clip.SIZES if s.startswith('eva')}
  rope = {'eva02-b16', 'eva02-l14', 'eva02-l14-336'}
  post = {'eva02-e14', 'eva02-e14-plus', 'eva-18b'}
  rms = {'eva-8b', 'eva-8b-448', 'eva-18b'}
  width = {'eva01-g14': 88, 'eva01-g14-plus': 88, 'eva02-b16': 64,
           'eva02-l14': 64, 'eva02-l14-336': 64, 'eva02-e14': 112,
           'eva02-e14-plus': 112, 'eva-8b': 128, 'eva-8b-448': 128,
           'eva-18b': 128}
  for size in COUNTS:
    v, t = clip.SIZES[size].vision, clip.SIZES[size].text
    assert v.stack.H == width[size] and t.stack.H == 64, size
    assert (v.placement == 'post') == (size in post), size
    assert (v.norm == 'rms') == (v.qkv_bias is False) == (size in rms), size
    assert v.rope_grid == ((16, 16) if size in rope else None), size
    assert v.mlp == ('swiglu' if size in rope else 'gelu'), size
    assert (v.inner_attention_norm, v.inner_mlp_norm) == (size in rope,) * 2
    assert (v.norm_eps, t.norm_eps, t.mlp) == (1e-6, 1e-5, 'gelu'), size
    assert (v.pooling, v.pre_norm, v.stem_bias) == ('cls', False, True), size
    assert (v.mean, v.std) == (vision_encoder.CLIP_MEAN,
                               vision_encoder.CLIP_STD), size
    assert (t.causal, t.pooling, t.length) == (True, 'eot', 77), size
    assert clip.SIZES[size].logit_scale == (
        100 if size in rms else 1 / 0.07), size


def test_first_parameters():
  """Outputs of block i are 0.02 / sqrt(2 i) wide, the projection 2e-5."""
  tower = vision((8, 8), 4, 3, 60, 3, 150, init='eva', **EVA02)
  config = pair(tower, 4, 1, 8, 2, 50)
  params = jax.jit(lambda: clip.Clip(config).init(
      jax.random.key(0), clip.example_batch(config, (8, 8))))()['params']
  blocks = jax.tree.map(np.asarray, params['vision']['stack']['blocks'])
  for part, name, lowered in (
      ('attention', 'out', 1), ('mlp', 'down', 1), ('attention', 'query', 0),
      ('mlp', 'gate', 0)):
    kernel = blocks[part][name]['kernel']
    for i in range(3):
      expected = 0.02 / (2 * i + 2) ** (0.5 * lowered)
      np.testing.assert_allclose(kernel[i].std(), expected, rtol=0.05)
  for name in ('class_embedding', 'position_embedding'):
    np.testing.assert_allclose(
        params['vision'][name].std(), 0.02, rtol=0.25)
  np.testing.assert_allclose(
      params['vision_projection']['kernel'].std(), 2e-5, rtol=0.05)


def test_flops_count_kept_patches_in_training():
  c = dataclasses.replace(CASES['eva_rope'].vision, patch_dropout=0.5)
  block = lambda tokens: tokens * transformer.block_flops(c.stack, tokens)
  assert block(26) == 26 * 2 * (4 * 24 * 24 + 2 * 26 * 24 + 3 * 24 * 45)
  stem = 2 * 3 * 25 * 24
  assert vision_encoder.flops(c) == 25 * stem + 2 * block(26)
  assert vision_encoder.flops(c, train=True) == 12 * stem + 2 * block(13)
  whole = dataclasses.replace(CASES['eva_rope'], vision=c)
  assert (clip.flops(whole) - clip.flops(whole, train=True)
          == vision_encoder.flops(c) - vision_encoder.flops(c, train=True))


@pytest.mark.parametrize('share', [-0.1, 1.0])
def test_impossible_shares(share):
  with pytest.raises(ValueError, match='vision.patch_dropout is .* below 1'):
    dataclasses.replace(CASES['eva_rope'].vision, patch_dropout=share)
