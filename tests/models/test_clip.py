"""CLIP and SigLIP against references, published sizes, and configs.

The arrays in tests/golden/{clip,siglip}_*.npz hold random weights, inputs, all
hidden states, logits, loss and (of two) gradients of tiny `CLIPModel` and
`SiglipModel` (transformers 4.56.2, torch 2.13.0, fp32, CPU).
"""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import reference

from mmgen.models import clip
from mmgen.models import text_encoder
from mmgen.models import vision_encoder
from mmgen.objectives import contrastive

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
TOLERANCE = 2e-5  # of stages
HALVES = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

CLIP = clip.ClipConfig(
    vision_encoder.VisionEncoderConfig(
        image_size=(15, 15), patch=4, layers=3, width=18, heads=3, hidden=29),
    text_encoder.TextEncoderConfig(
        vocab=37, length=9, layers=2, width=20, heads=5, hidden=31),
    embed=10)
CLIP_GELU = clip.ClipConfig(
    vision_encoder.VisionEncoderConfig(
        image_size=(10, 10), patch=5, layers=2, width=16, heads=1, hidden=24,
        mlp='gelu'),
    text_encoder.TextEncoderConfig(
        vocab=37, length=6, layers=3, width=12, heads=3, hidden=20,
        mlp='gelu'),
    embed=7)


def siglip(size, patch, layers, width, heads, hidden, text):
  shared = dict(mlp='gelu_tanh', norm_eps=1e-6)
  return clip.ClipConfig(
      vision_encoder.VisionEncoderConfig(
          image_size=(size, size), patch=patch, layers=layers, width=width,
          heads=heads, hidden=hidden, stem_bias=True, class_token=False,
          pre_norm=False, pooling='map', **HALVES, **shared),
      text_encoder.TextEncoderConfig(
          vocab=37, causal=False, pooling='last', width=width, **text,
          **shared),
      embed=width, vision_projection=False, text_projection_bias=True,
      logit_bias=-10.0, logit_scale_max=None)


CASES = {
    'clip_tiny': (CLIP, 'softmax'),
    'clip_tiny_gelu': (CLIP_GELU, 'softmax'),
    'siglip_tiny': (siglip(13, 3, 3, 18, 3, 29, dict(
        length=7, layers=2, heads=3, hidden=31)), 'sigmoid'),
    'siglip_tiny_wide': (siglip(8, 4, 2, 20, 5, 24, dict(
        length=5, layers=3, heads=2, hidden=28)), 'sigmoid'),
}


def linear(get, name):
  tree = {'kernel': get(f'{name}.weight').T}
  return tree | {'bias': get(f'{name}.bias')} if get(
      f'{name}.bias', True) is not None else tree


def norm(get, name):
  return {'scale': get(f'{name}.weight'), 'bias': get(f'{name}.bias')}


def block(get, name):
  attention = {}
  for ours, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v')):
    attention[ours] = linear(get, f'{name}.self_attn.{theirs}_proj')
  out = linear(get, f'{name}.self_attn.out_proj')
  return {
      'attention_norm': norm(get, f'{name}.layer_norm1'),
      'attention': attention | {'out': out},
      'mlp_norm': norm(get, f'{name}.layer_norm2'),
      'mlp': {'up': linear(get, f'{name}.mlp.fc1'),
              'down': linear(get, f'{name}.mlp.fc2')}}


def stack(get, config, name, final):
  blocks = [block(get, f'{name}.encoder.layers.{i}')
            for i in range(config.layers)]
  return {'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks),
          'final_norm': norm(get, final)}


def map_head(get, name):
  attention = {}
  weight = np.split(get(f'{name}.attention.in_proj_weight'), 3)
  bias = np.split(get(f'{name}.attention.in_proj_bias'), 3)
  for i, ours in enumerate(('query', 'key', 'value')):
    attention[ours] = {'kernel': weight[i].T, 'bias': bias[i]}
  out = linear(get, f'{name}.attention.out_proj')
  return attention | {
      'probe': get(f'{name}.probe')[0, 0], 'out': out,
      'norm': norm(get, f'{name}.layernorm'),
      'mlp': {'up': linear(get, f'{name}.mlp.fc1'),
              'down': linear(get, f'{name}.mlp.fc2')}}


def from_reference(arrays, prefix, config):
  """Our tree from arrays named as in the reference's state dict."""
  def get(name, optional=False):
    found = arrays.get(prefix + name)
    assert optional or found is not None, name
    return found
  v, t = config.vision, config.text
  conv = get('vision_model.embeddings.patch_embedding.weight')
  stem = {'kernel': conv.transpose(2, 3, 1, 0).reshape(-1, v.width)}
  if v.stem_bias:
    stem['bias'] = get('vision_model.embeddings.patch_embedding.bias')
  vision = {
      'patch_embedding': stem,
      'position_embedding': get(
          'vision_model.embeddings.position_embedding.weight'),
      'stack': stack(get, v, 'vision_model', 'vision_model.post_layernorm')}
  if v.class_token:
    vision['class_embedding'] = get('vision_model.embeddings.class_embedding')
  if v.pre_norm:
    vision['pre_norm'] = norm(get, 'vision_model.pre_layrnorm')
  if v.pooling == 'map':
    vision['head'] = map_head(get, 'vision_model.head')
  text = {
      'token_embedding': {'embedding': get(
          'text_model.embeddings.token_embedding.weight')},
      'position_embedding': get(
          'text_model.embeddings.position_embedding.weight'),
      'stack': stack(get, t, 'text_model', 'text_model.final_layer_norm')}
  tree = {'vision': vision, 'text': text,
          'logit_scale': get('logit_scale').reshape(())}
  if config.vision_projection:
    tree['vision_projection'] = linear(get, 'visual_projection')
    tree['text_projection'] = linear(get, 'text_projection')
  else:
    tree['text_projection'] = linear(get, 'text_model.head')
    tree['logit_bias'] = get('logit_bias').reshape(())
  return tree


@pytest.mark.parametrize('name', CASES)
def test_every_stage_equals_the_reference(name):
  config, loss = CASES[name]
  with np.load(GOLDEN / f'{name}.npz') as file:
    golden = dict(file)
  model = clip.Clip(config)
  params = from_reference(golden, 'param/', config)
  tokens = golden['tokens']
  # Reference: the highest id ends a text, and what follows is padding.
  end = tokens.argmax(1) if config.text.causal else np.full(len(tokens), 99)
  valid = np.arange(tokens.shape[1])[None] <= end[:, None]
  batch = dict(images=golden['images'], tokens=tokens, valid=valid,
               example_valid=np.ones(len(tokens), bool))
  objective = contrastive.Contrastive(model, loss)
  expected = jax.eval_shape(
      lambda: model.init(jax.random.key(0), batch))['params']
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)

  def run(params):
    taps = lambda tower: tuple(range(tower.layers + 1))
    apply = lambda method, *x: model.apply({'params': params}, *x,
                                           method=method)
    image = apply('encode_image', batch['images'], taps(config.vision))
    text = apply('encode_text', tokens, valid, taps(config.text))
    sums, _ = objective.couple(
        params, {}, {'s': (image[0], text[0])}, {'s': batch})
    total, weight = sums['contrastive']
    return total / weight, (image, text, apply('temperature'))

  if 'grad/logit_scale' in golden:
    (value, found), gradient = jax.jit(
        jax.value_and_grad(run, has_aux=True))(params)
    theirs = from_reference(golden, 'grad/', config)
    jax.tree_util.tree_map_with_path(close_gradient, gradient, theirs)
  else:
    value, found = jax.jit(run)(params)
  image, text, (scale, bias) = jax.tree.map(np.asarray, found)
  for side, (embedding, out) in (('vision', image), ('text', text)):
    for i, state in out['taps'].items():
      reference.close(state, golden[f'{side}/{i}'], TOLERANCE)
    pooled = out['pooled']
    if side == 'text' and not config.vision_projection:
      # There the reference calls what stands behind the projection pooled.
      tree = params['text_projection']
      pooled = pooled @ tree['kernel'] + tree['bias'][None]
    reference.close(pooled, golden[f'{side}/pooled'], TOLERANCE)
    reference.close(embedding, golden[
        'image_embeds' if side == 'vision' else 'text_embeds'], TOLERANCE)
  reference.close(scale * image[0] @ text[0].T + bias, golden['logits'],
                  TOLERANCE)
  reference.close(value, golden['loss'], TOLERANCE)


def close_gradient(path, ours, theirs):
  if path[-2:] == (jax.tree_util.DictKey('key'), jax.tree_util.DictKey('bias')):
    # A constant on all keys does not change a softmax: truly zero.
    assert np.abs(ours).max() < 1e-6 and np.abs(theirs).max() < 1e-6
  else:
    reference.close(ours, theirs, 1e-4)


@pytest.mark.parametrize('size, expected', [
    ('clip-b32', 151_277_313),
    ('clip-b16', 149_620_737),
    ('clip-l14', 427_616_513),
    ('clip-l14-336', 427_944_193),
    ('siglip-b16', 203_155_970),
    ('siglip-l16-256', 652_150_786),
    ('siglip-so400m', 877_360_306),
    ('siglip-so400m-384', 877_960_498),
])
def test_published_parameter_counts(size, expected):
  config = clip.SIZES[size]
  shapes = jax.eval_shape(lambda: clip.Clip(config).init(
      jax.random.key(0),
      clip.example_batch(config, config.vision.image_size)))['params']
  assert sum(p.size for p in jax.tree.leaves(shapes)) == expected


def test_published_sizes_have_the_quirks_of_their_family():
  # Counts see none of these, and a wrong one costs accuracy without an error.
  for size, config in clip.SIZES.items():
    towers = (config.vision, config.text)
    found = ({c.mlp for c in towers}, {c.norm_eps for c in towers},
             config.text.causal, config.text.pooling, config.vision.mean)
    if size.startswith('clip'):
      assert found == ({'quick_gelu'}, {1e-5}, True, 'eot',
                       vision_encoder.CLIP_MEAN), size
    elif size.startswith('siglip'):
      assert found == ({'gelu_tanh'}, {1e-6}, False, 'last', (0.5,) * 3), size


def test_first_temperature_and_bias():
  for size, scale, bias in (('clip-b32', 1 / 0.07, 0), ('siglip-b16', 10, -10)):
    model = clip.Clip(clip.SIZES[size])
    found, _ = model.init_with_output(jax.random.key(0), method='temperature')
    np.testing.assert_allclose(found, (scale, bias), rtol=1e-6)


def test_normalise_is_float32_and_safe_at_zero():
  x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16)
  unit = clip.normalise(x)
  assert unit.dtype == jnp.float32
  np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0]], rtol=1e-6)
  gradient = jax.grad(lambda x: clip.normalise(x)[0].sum())(
      jnp.zeros((1, 2)))
  assert np.isfinite(gradient).all()


def test_build_overrides_a_size():
  config = ml_collections.ConfigDict(dict(dtype='bfloat16', model=dict(
      name='clip', size='mini', embed=24, vision=dict(image_size=(16, 24)),
      text=dict(length=7))))
  model = clip.build(config, vocab=50)
  c = model.config
  assert (c.embed, c.vision.image_size, c.text.length, c.text.vocab) == (
      24, (16, 24), 7, 50)
  assert c.vision.dtype == c.text.dtype == 'bfloat16'
  assert c.vision.width == clip.SIZES['mini'].vision.width


@pytest.mark.parametrize('model, said', [
    (dict(size='huge'), "model.size: 'huge'; allowed: mini, clip-b32"),
    (dict(size='mini', embd=3), "'embd'. Did you mean 'embed'"),
    (dict(size='mini', vision=dict(heds=3)), "vision has no field 'heds'. Did"),
    (dict(size='siglip-b16', embed=3), 'clip.embed is 3; without vision_proj'),
])
def test_build_refuses(model, said):
  config = ml_collections.ConfigDict(dict(dtype='float32', model=model))
  with pytest.raises(ValueError, match=said):
    clip.build(config)


def test_flops_are_the_sum_of_the_parts():
  c = CLIP
  assert clip.flops(c, 5) == (
      vision_encoder.flops(c.vision) + text_encoder.flops(c.text, 5)
      + 2 * 10 * (18 + 20))


def test_models_import_without_the_data_pipeline():
  code = ('import sys; from mmgen.models import alignment, clip; '
          'print([m for m in ("tensorflow_datasets", "grain", "orbax", '
          '"tensorstore") if m in sys.modules])')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                        text=True, check=True)
  assert done.stdout.strip() == '[]'
