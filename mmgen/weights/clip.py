"""CLIP and SigLIP as they are published.

  openai_clip         openai/CLIP, and open_clip's towers of that kind
  open_clip           the same, with the text tower's names below 'text.'
  open_clip_siglip    open_clip's SigLIP; the image tower has timm's names
  hf_clip, hf_siglip  transformers' CLIPModel and SiglipModel
  big_vision          SigLIP's own npz: a tensor for each layer
  big_vision_scanned  the same: a tensor for all layers
"""

import functools
import re

from mmgen import errors
from mmgen.models import clip
from mmgen.weights import layout
from mmgen.weights import two_towers

_QKV = ('query', 'key', 'value')


# ---------------------------------------------------------------------------
# JSON files beside the tensors


def _openai_stated(tensors, beside, base):
  """What open_clip's config says, or OpenAI's own archive by its contents.

  Raises:
    UserError: it asks for what these towers cannot do.
  """
  bias = {'logit_bias': -10.0} if 'logit_bias' in tensors else {}
  if 'open_clip_config.json' not in beside:
    # Only OpenAI's own archives hold this number, as a tensor. Their program
    # makes a head of each 64 channels.
    if 'input_resolution' not in tensors:
      return {'vision.mlp': None, 'text.mlp': None} | bias
    return {'vision.mlp': 'quick_gelu', 'text.mlp': 'quick_gelu'} | bias | {
        f'{tower}.heads': max(tensors[name].shape[0] // 64, 1)
        for tower, name in (('vision', 'visual.ln_post.weight'),
                            ('text', 'ln_final.weight')) if name in tensors}
  own, vision, text = two_towers.open_clip_config(beside)
  mlp = 'quick_gelu' if own.get('quick_gelu') else 'gelu'
  return bias | {
      'vision.image_size': two_towers.pair(vision['image_size']),
      'vision.mlp': mlp,
      'vision.heads': vision['width'] // vision.get('head_width', 64),
      'text.heads': text.get('heads', base.text.heads), 'text.mlp': mlp}


def _siglip_stated(tensors, beside, base):
  """What open_clip's config says of SigLIP; None for what has to be said.

  Its first towers have the exact GELU, though they were trained with the other.

  Raises:
    UserError: it asks for what these towers cannot do.
  """
  if 'open_clip_config.json' not in beside:
    return {'vision.mlp': None, 'text.mlp': None}
  _, vision, text = two_towers.open_clip_config(
      beside, timm_pool=('map',), timm_proj=('none', ''), pool_type=('last',),
      no_causal_mask=(True,), norm_kwargs=({'eps': base.text.norm_eps},),
      act_kwargs=({'approximate': 'tanh'},))
  return {
      'vision.image_size': two_towers.pair(vision['image_size']),
      'vision.mlp': timm_activation(vision.get('timm_model_name', '')),
      'text.heads': text.get('heads', base.text.heads),
      'text.mlp': 'gelu_tanh' if text.get('act_kwargs') else 'gelu'}


def timm_activation(name):
  """That of the MLPs of timm's SigLIP image tower of that name."""
  return 'gelu_tanh' if _TIMM_TANH.fullmatch(name) else 'gelu'


def _hf_stated(tensors, beside, base):
  """What transformers' config says; what it leaves out is as in the base."""
  own = beside.get('config.json', {})
  if own.get('model_type') not in ('clip', 'siglip'):  # none, or another's
    ask = base.vision.mlp == 'quick_gelu'  # CLIP; SigLIP has but one way
    return {'vision.mlp': None, 'text.mlp': None} if ask else {}
  stated = {'vision.heads': base.vision.heads, 'text.heads': base.text.heads,
            'vision.image_size': base.vision.image_size}
  for tower in two_towers.TOWERS:
    fields = own.get(f'{tower}_config_dict') or own.get(f'{tower}_config') or {}
    stated |= {f'{tower}.{ours}': fields[theirs]
               for theirs, ours in _HF_FIELDS.items() if theirs in fields}
    if 'hidden_act' in fields:
      if fields['hidden_act'] not in HF_ACTIVATIONS:
        raise errors.UserError(
            f'config.json has {tower}_config.hidden_act '
            f'{fields["hidden_act"]!r}; known: {", ".join(HF_ACTIVATIONS)}.')
      stated[f'{tower}.mlp'] = HF_ACTIVATIONS[fields['hidden_act']]
  return stated | {
      'vision.image_size': two_towers.pair(stated['vision.image_size'])}


def pixels_beside(beside):
  """What JSON files say of mean, std, kernel and fit, as far as they do."""
  hf = beside.get('preprocessor_config.json', {})
  own = beside.get('open_clip_config.json', {}).get('preprocess_cfg', {})
  mode = own.get('resize_mode')
  if mode not in _OPEN_CLIP_FITS:
    raise errors.UserError(f'open_clip_config.json has resize_mode {mode!r}, '
                           'which is not supported.')
  said = dict(mean=hf.get('image_mean', own.get('mean')),
              std=hf.get('image_std', own.get('std')),
              kernel=own.get('interpolation'), fit=_OPEN_CLIP_FITS[mode])
  if 'resample' in hf:
    said['kernel'] = PILLOW_KERNELS[hf['resample']]
  if 'do_center_crop' in hf:
    said['fit'] = 'clip' if hf['do_center_crop'] else 'square'
  return {field: tuple(value) if isinstance(value, list) else value
          for field, value in said.items() if value is not None}


def _image(config, beside, fit):
  """How a picture becomes pixels."""
  return dict(size=config.vision.image_size, fit=fit, kernel='bicubic',
              mean=config.vision.mean, std=config.vision.std
              ) | pixels_beside(beside)


# ---------------------------------------------------------------------------
# Rules


def _openai_rules(config, text):
  return [
      *layout.patches('vision/patch_embedding', 'visual.conv1',
                      config.vision.patch, bias=False),
      layout.same('vision/class_embedding', 'visual.class_embedding'),
      layout.same('vision/position_embedding', 'visual.positional_embedding'),
      *layout.norm('vision/pre_norm', 'visual.ln_pre'),
      *_openai_blocks('vision', 'visual.'),
      *layout.norm('vision/stack/final_norm', 'visual.ln_post'),
      layout.same('vision_projection/kernel', 'visual.proj'),
      *openai_text_rules(text),
      *_scalars(config)]


def openai_text_rules(prefix):
  """Rules of a text tower and its projection; their names begin so."""
  return [
      layout.same('text/token_embedding/embedding',
                  f'{prefix}token_embedding.weight'),
      layout.same('text/position_embedding', f'{prefix}positional_embedding'),
      *_openai_blocks('text', prefix),
      *layout.norm('text/stack/final_norm', f'{prefix}ln_final'),
      layout.same('text_projection/kernel', f'{prefix}text_projection')]


def _openai_blocks(ours, theirs):
  ours = f'{ours}/stack/blocks/'
  theirs += 'transformer.resblocks.{layer}.'
  return [
      *layout.fused([f'{ours}attention/{name}' for name in _QKV],
                    f'{theirs}attn.in_proj_weight',
                    f'{theirs}attn.in_proj_bias'),
      *layout.modules(_OPENAI_BLOCK, ours, theirs)]


def _hf_rules(config, siglip):
  stem = 'vision_model.embeddings.'
  rules = [
      *layout.patches('vision/patch_embedding', f'{stem}patch_embedding',
                      config.vision.patch, bias=siglip),
      layout.same('text/token_embedding/embedding',
                  'text_model.embeddings.token_embedding.weight'),
      *layout.norm('vision/stack/final_norm', 'vision_model.post_layernorm'),
      *layout.norm('text/stack/final_norm', 'text_model.final_layer_norm'),
      *_scalars(config, lead=int(siglip))]
  for name in ('vision', 'text'):
    rules += [
        layout.same(f'{name}/position_embedding',
                    f'{name}_model.embeddings.position_embedding.weight'),
        *layout.modules(_HF_BLOCK, f'{name}/stack/blocks/',
                        f'{name}_model.encoder.layers.{{layer}}.')]
  if siglip:
    head = 'vision_model.head.'
    return rules + [
        layout.same('vision/head/probe', f'{head}probe', lead=2),
        *layout.fused([f'vision/head/{name}' for name in _QKV],
                      f'{head}attention.in_proj_weight',
                      f'{head}attention.in_proj_bias'),
        *layout.modules(_HF_HEAD, 'vision/head/', head),
        *layout.linear('text_projection', 'text_model.head')]
  return rules + [
      layout.same('vision/class_embedding', f'{stem}class_embedding'),
      *layout.norm('vision/pre_norm', 'vision_model.pre_layrnorm'),  # so named
      *layout.linear('vision_projection', 'visual_projection', bias=False),
      *layout.linear('text_projection', 'text_projection', bias=False)]


def timm_siglip_rules(c, prefix=''):
  """Rules of SigLIP's image tower as timm has it.

  Args:
    c: a `VisionEncoderConfig`.
    prefix: of their names.
  """
  blocks, head = f'{prefix}blocks.{{layer}}.', f'{prefix}attn_pool.'
  ours = 'vision/stack/blocks/'
  return [
      *layout.patches('vision/patch_embedding', f'{prefix}patch_embed.proj',
                      c.patch),
      layout.same('vision/position_embedding', f'{prefix}pos_embed', lead=1),
      *layout.fused([f'{ours}attention/{name}' for name in _QKV],
                    f'{blocks}attn.qkv.weight', f'{blocks}attn.qkv.bias'),
      *layout.modules(_TIMM_BLOCK, ours, blocks),
      *layout.norm('vision/stack/final_norm', f'{prefix}norm'),
      layout.same('vision/head/probe', f'{head}latent', lead=2),
      *layout.fused([f'vision/head/{name}' for name in _QKV[1:]],
                    f'{head}kv.weight', f'{head}kv.bias'),
      *layout.modules(_TIMM_HEAD, 'vision/head/', head)]


def _open_clip_siglip_rules(config):
  return [
      *timm_siglip_rules(config.vision, 'visual.trunk.'),
      *(rule for rule in openai_text_rules('text.')
        if rule.ours[0] != 'text_projection/kernel'),
      *layout.linear('text_projection', 'text.text_projection'),
      *_scalars(config)]


def _big_vision_rules(config, scanned):
  """Flax, as ours; leaves differ in name, in axes of length 1 and of heads."""
  patch, block = config.vision.patch, 'encoderblock'
  block += '' if scanned else '_{layer}'
  pairs = {'vision/position_embedding': ('img/pos_embedding', 1),
           'text/position_embedding': ('txt/pos_embedding', 1),
           'text/token_embedding/embedding': ('txt/Embed_0/embedding', 0),
           'vision/patch_embedding/bias': ('img/embedding/bias', 0),
           'vision/head/probe': ('img/MAPHead_0/probe', 2),
           'logit_scale': ('t', 1), 'logit_bias': ('b', 1)}
  modules, attention = {'text_projection': 'txt/head'}, []
  for ours, theirs in _BIG_VISION_HEAD.items():
    modules[f'vision/head/{ours}'] = f'img/MAPHead_0/{theirs}'
  attention += _flax_attention('vision/head', 'params/img/MAPHead_0',
                               config.vision)
  for tower, encoder in (('vision', 'img/Transformer'),
                         ('text', 'txt/Encoder_0')):
    modules[f'{tower}/stack/final_norm'] = f'{encoder}/encoder_norm'
    attention += _flax_attention(
        f'{tower}/stack/blocks/attention', f'params/{encoder}/{block}',
        getattr(config, tower))
    for ours, theirs in _BIG_VISION_BLOCK.items():
      modules[f'{tower}/stack/blocks/{ours}'] = f'{encoder}/{block}/{theirs}'
  for ours, theirs in modules.items():
    for leaf in ('scale' if ours.endswith('norm') else 'kernel', 'bias'):
      pairs[f'{ours}/{leaf}'] = f'{theirs}/{leaf}', 0
  return [
      layout.Rule(
          ('vision/patch_embedding/kernel',), ('params/img/embedding/kernel',),
          lambda x: (x.reshape(-1, x.shape[-1]),),
          lambda x: (x.reshape(patch, patch, -1, x.shape[-1]),)),
      *attention,
      *(layout.same(ours, f'params/{theirs}', lead)
        for ours, (theirs, lead) in pairs.items())]


def _flax_attention(ours, theirs, tower):
  """Projections whose heads are an axis there: [..., N, H, D] and [D, N, H]."""
  N, H = tower.heads, tower.width // tower.heads
  theirs += '/MultiHeadDotProductAttention_0'
  rules = [layout.same(f'{ours}/out/bias', f'{theirs}/out/bias'), layout.Rule(
      (f'{ours}/out/kernel',), (f'{theirs}/out/kernel',),
      lambda x: (x.reshape(*x.shape[:-3], N * H, x.shape[-1]),),
      lambda x: (x.reshape(*x.shape[:-2], N, H, x.shape[-1]),))]
  for name in _QKV:
    rules += [layout.Rule(
        (f'{ours}/{name}/{leaf}',), (f'{theirs}/{name}/{leaf}',),
        lambda x: (x.reshape(*x.shape[:-2], N * H),),
        lambda x: (x.reshape(*x.shape[:-1], N, H),))
        for leaf in ('kernel', 'bias')]
  return rules


def _scalars(config, lead=0):
  """The temperature, and the bias of the logits if there is one."""
  names = ['logit_scale'] + ['logit_bias'] * (config.logit_bias is not None)
  return [layout.same(name, name, lead) for name in names]


# ---------------------------------------------------------------------------
# Names and values


_OPENAI_BLOCK = {
    'attention_norm': 'ln_1', 'attention/out': 'attn.out_proj',
    'mlp_norm': 'ln_2', 'mlp/up': 'mlp.c_fc', 'mlp/down': 'mlp.c_proj'}
_HF_BLOCK = {
    'attention_norm': 'layer_norm1', 'attention/query': 'self_attn.q_proj',
    'attention/key': 'self_attn.k_proj', 'attention/value': 'self_attn.v_proj',
    'attention/out': 'self_attn.out_proj', 'mlp_norm': 'layer_norm2',
    'mlp/up': 'mlp.fc1', 'mlp/down': 'mlp.fc2'}
_HF_HEAD = {
    'out': 'attention.out_proj', 'norm': 'layernorm', 'mlp/up': 'mlp.fc1',
    'mlp/down': 'mlp.fc2'}
_TIMM_BLOCK = {
    'attention_norm': 'norm1', 'attention/out': 'attn.proj',
    'mlp_norm': 'norm2', 'mlp/up': 'mlp.fc1', 'mlp/down': 'mlp.fc2'}
_TIMM_HEAD = {'query': 'q', 'out': 'proj', 'norm': 'norm', 'mlp/up': 'mlp.fc1',
              'mlp/down': 'mlp.fc2'}
_TIMM_TANH = re.compile(
    'vit_(base_patch32_siglip_256|large_patch16_siglip_512|'
    r'(so400m|giantopt)_patch16_siglip_\d+)(\..*)?')
_FLAX_MLP = {'mlp/up': 'MlpBlock_0/Dense_0', 'mlp/down': 'MlpBlock_0/Dense_1'}
_BIG_VISION_BLOCK = {
    'attention_norm': 'LayerNorm_0', 'mlp_norm': 'LayerNorm_1', **_FLAX_MLP}
_BIG_VISION_HEAD = {'norm': 'LayerNorm_0', **_FLAX_MLP}

_HF_FIELDS = {
    'num_hidden_layers': 'layers', 'hidden_size': 'width',
    'num_attention_heads': 'heads', 'intermediate_size': 'hidden',
    'layer_norm_eps': 'norm_eps', 'patch_size': 'patch',
    'image_size': 'image_size', 'vocab_size': 'vocab',
    'max_position_embeddings': 'length',
}
HF_ACTIVATIONS = {'quick_gelu': 'quick_gelu', 'gelu': 'gelu',
                   'gelu_pytorch_tanh': 'gelu_tanh'}
# Pillow's numbers, as transformers writes them.
PILLOW_KERNELS = ('nearest', 'lanczos', 'bilinear', 'bicubic', 'box',
                   'hamming')
_OPEN_CLIP_FITS = {None: None, 'shortest': 'open_clip', 'squash': 'square'}


def _layout(rules, base, fit, resize, stated=lambda *_: {}, ignored=(),
            **variant):
  def with_pixels(tensors, beside, base):
    pixels = {f'vision.{field}': value
              for field, value in pixels_beside(beside).items()
              if field in ('mean', 'std')}
    return pixels | stated(tensors, beside, base)

  rules = functools.partial(rules, **variant)
  return layout.Layout(
      recognise=functools.partial(two_towers.recognise, rules=rules,
                                  stated=with_pixels, base=clip.SIZES[base]),
      build=two_towers.build, rules=rules,
      image=functools.partial(_image, fit=fit), ignored=ignored,
      resize=resize, family=base.partition('-')[0])


_NUMBERS = (r'input_resolution|context_length|vocab_size|.*\battn_mask',)
_IDS = (r'.*\.position_ids',)
LAYOUTS = {
    'openai_clip': _layout(_openai_rules, 'clip-b32', 'open_clip', 'antialias',
                           _openai_stated, _NUMBERS, text=''),
    'open_clip': _layout(_openai_rules, 'clip-b32', 'open_clip', 'antialias',
                         _openai_stated, _NUMBERS, text='text.'),
    'open_clip_siglip': _layout(
        _open_clip_siglip_rules, 'siglip-b16', 'square', 'antialias',
        _siglip_stated),
    # SigLIP is CLIP with a pooling head: look for that first.
    'hf_siglip': _layout(_hf_rules, 'siglip-b16', 'square', 'plain',
                         _hf_stated, _IDS, siglip=True),
    'hf_clip': _layout(_hf_rules, 'clip-b32', 'clip', 'plain', _hf_stated, _IDS,
                       siglip=False),
    'big_vision': _layout(_big_vision_rules, 'siglip-b16', 'square', 'linear',
                          scanned=False),
    'big_vision_scanned': _layout(_big_vision_rules, 'siglip-b16', 'square',
                                  'linear', scanned=True),
}
