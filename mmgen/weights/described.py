"""The JSON files that others look for beside weights, of a model of ours.

What they say is what a layout's `recognise` and `image` read back, and what
transformers and open_clip build their models by.
"""

import functools
import math

from mmgen.weights import clip as clip_layouts
from mmgen.weights import decoders


def files(layout, config, image, tokenizer):
  """Describes a model in the words of a layout.

  Args:
    layout: a name of `weights.FAMILIES`.
    config: of the model.
    image: how a picture becomes pixels, as in `weights.Loaded`; {} if nothing
      says so.
    tokenizer: of the model, or None.

  Returns:
    {name: content}; {} for a layout whose files are not written here.
  """
  write = _WRITERS.get(layout)
  return write(config, image, tokenizer) if write else {}


def differences(config, found):
  """What is not the same in a config that was read back, in words.

  Args:
    config: of the model.
    found: read off its tensors and the files beside them; None for nothing.

  Returns:
    A list, without what changes training alone.
  """
  if found is None:
    return ['it is one of its models']
  lines = []
  untapped = hasattr(config, 'text')  # a CLIP reads the end of its tower
  for part in ('vision', 'text', 'decoder', 'connector'):
    ours, theirs = (_plain(getattr(c, part, None)) for c in (config, found))
    if untapped:
      ours.pop('tap', None)
    lines += [f'{part}.{field} is {value!r}' for field, value in ours.items()
              if theirs.get(field) != value]
  return lines


def _plain(c):
  """{field: value} of a part, where None stands for a value, that value."""
  if c is None:
    return {}
  own = {name: x for name, x in vars(c).items() if name not in _OF_TRAINING}
  if hasattr(c, 'kv_heads'):
    own |= dict(kv_heads=c.stack.K, head_dim=c.stack.H)
  return own


# ---------------------------------------------------------------------------
# transformers


def _hf_pair(config, image, tokenizer, kind):
  """Of a `ClipConfig`; kind is 'clip' or 'siglip'."""
  v, t = config.vision, config.text
  width = 'projection_dim' if kind == 'clip' else 'projection_size'
  text = _tower(t) | {
      'vocab_size': t.vocab, 'max_position_embeddings': t.length,
      width: config.embed} | _ends(tokenizer)
  # Without it transformers looks for the largest id, or for one of its own.
  text.setdefault('eos_token_id', t.vocab - 1)
  own = dict(model_type=kind, architectures=[_MODELS[kind]], text_config=text,
             vision_config=_image_tower(v))
  if kind == 'clip':
    own['projection_dim'] = own['vision_config'][width] = config.embed
  return {'config.json': own} | _preprocessor(image, _PROCESSORS[kind])


def _tower(c):
  return dict(
      num_hidden_layers=c.layers, hidden_size=c.width,
      num_attention_heads=c.heads, intermediate_size=c.hidden,
      layer_norm_eps=c.norm_eps, hidden_act=_ACTIVATIONS[c.mlp])


def _image_tower(c):
  return _tower(c) | dict(patch_size=c.patch, image_size=_edges(c.image_size))


def _edges(size):
  """One number for a square, as nearly everybody writes it."""
  return size[0] if size[0] == size[1] else list(size)


def _ends(tokenizer):
  """Ids of the tokens that begin and end a text."""
  found = {}
  for name in ('bos', 'eos', 'pad'):
    if tokenizer is not None and tokenizer.has(f'<{name}>'):
      found[f'{name}_token_id'] = tokenizer.id(f'<{name}>')
  return found


def _preprocessor(image, kind):
  if not image:
    return {}
  size = dict(zip(('height', 'width'), image['size']))
  cut = image['fit'] in ('clip', 'open_clip', 'expand')
  own = dict(
      image_processor_type=kind, do_resize=True, do_center_crop=cut,
      size=dict(shortest_edge=image['size'][0]) if cut else size,
      resample=clip_layouts.PILLOW_KERNELS.index(image['kernel']),
      do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
      image_mean=list(image['mean']), image_std=list(image['std']))
  if cut:
    own['crop_size'] = size
  if image['fit'] == 'expand':
    own['do_pad'] = True
  return {'preprocessor_config.json': own}


def _decoder(c, tokenizer):
  """The fields of transformers' LLaMA, or Qwen2, of a `DecoderConfig`."""
  qwen = c.qkv_bias and not c.out_bias
  own = dict(
      model_type='qwen2' if qwen else 'llama', vocab_size=c.vocab,
      hidden_act='silu', num_attention_heads=c.heads,
      num_key_value_heads=c.stack.K, head_dim=c.stack.H,
      rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
      tie_word_embeddings=False) | {
          theirs: getattr(c, ours) for theirs, ours in decoders.SIZES.items()}
  if not qwen:
    own |= dict(attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)
  return own | {'bos_token_id': None, 'eos_token_id': None} | _ends(tokenizer)


def _llama(config, image, tokenizer):
  own = _decoder(config.decoder, tokenizer)
  return {'config.json': own | dict(
      architectures=[_MODELS[own['model_type']]])}


def _llava(config, image, tokenizer):
  """Of LLaVA, the image tower within."""
  picture = config.decoder.vocab - 1
  if tokenizer is not None:
    picture = tokenizer.id('<patch>')
  own = dict(
      model_type='llava', architectures=[_MODELS['llava']],
      text_config=_decoder(config.decoder, tokenizer),
      vision_config=_image_tower(config.vision) | dict(
          model_type='clip_vision_model'),
      projector_hidden_act='gelu', multimodal_projector_bias=True,
      image_token_index=picture, vision_feature_layer=config.vision.tap,
      vision_feature_select_strategy='default', tie_word_embeddings=False)
  pads = not image or image['fit'] == 'expand'
  if not pads:
    own['image_aspect_ratio'] = None
  return {'config.json': own} | _preprocessor(
      image, 'LlavaImageProcessor' if pads else 'CLIPImageProcessor')


# ---------------------------------------------------------------------------
# open_clip


def _open_clip(config, image, tokenizer, custom):
  """Of a CLIP; custom says whether its text tower's names are below 'text.'."""
  del tokenizer
  v, t = config.vision, config.text
  own = dict(
      embed_dim=config.embed, quick_gelu=v.mlp == 'quick_gelu',
      vision_cfg=dict(
          image_size=_edges(v.image_size), patch_size=v.patch, width=v.width,
          layers=v.layers, head_width=v.width // v.heads, mlp_ratio=_ratio(v)),
      text_cfg=dict(
          context_length=t.length, vocab_size=t.vocab, width=t.width,
          heads=t.heads, layers=t.layers, mlp_ratio=_ratio(t)))
  if custom:
    own['custom_text'] = True
  if config.logit_bias is not None:
    own['init_logit_bias'] = config.logit_bias
  shown = image and dict(
      size=_edges(image['size']), mode='RGB', mean=list(image['mean']),
      std=list(image['std']), interpolation=image['kernel'],
      resize_mode='squash' if image['fit'] == 'square' else 'shortest')
  return {'open_clip_config.json': dict(
      model_cfg=own, preprocess_cfg=dict(shown))}


def _ratio(c):
  """Such that open_clip's int(width * ratio) is the hidden width."""
  ratio = c.hidden / c.width
  return ratio if int(c.width * ratio) == c.hidden else math.nextafter(
      ratio, math.inf)


_OF_TRAINING = ('init', 'patch_dropout', 'drop_path', 'remat', 'unroll',
                'backend', 'dtype')
_MODELS = {'clip': 'CLIPModel', 'siglip': 'SiglipModel',
           'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM',
           'llava': 'LlavaForConditionalGeneration'}
_PROCESSORS = {'clip': 'CLIPImageProcessor', 'siglip': 'SiglipImageProcessor'}
_ACTIVATIONS = {ours: theirs for theirs, ours in
                clip_layouts.HF_ACTIVATIONS.items()}
_WRITERS = {
    'hf_clip': functools.partial(_hf_pair, kind='clip'),
    'hf_siglip': functools.partial(_hf_pair, kind='siglip'),
    'llama': _llama,
    'hf_llava': _llava, 'hf_llava_new': _llava, 'hf_llava_flat': _llava,
    'openai_clip': functools.partial(_open_clip, custom=False),
    'open_clip': functools.partial(_open_clip, custom=True),
}
