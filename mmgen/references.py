"""Stages of published models as their own libraries compute them.

Of transformers, open_clip and timm (extra `parity`), which are imported here
alone and only by what runs them. Stages have the names of `mmgen/stages.py`.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import importlib
import pathlib
import re

import numpy as np
import PIL.Image

from mmgen import errors
from mmgen import stages as stages_lib
from mmgen import weights
from mmgen.weights import files


def require(layout):
  """Raises UserError unless the reference of a layout can be run."""
  if layout not in REFERENCES:
    raise errors.UserError(
        f'of the layout {layout} no package index has a reference. Write our '
        'inputs and stages with --stages=FILE.npz, run the reference on these '
        'inputs where you have it, and compare with --against=FILE.npz.')
  for name in REFERENCES[layout].needs:
    try:
      importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
      raise errors.UserError(
          f'--check runs {REFERENCES[layout].needs[-1]} beside this model, and '
          f'{name} cannot be imported ({str(error).splitlines()[0]}). Install '
          "it: pip install 'mmgen[parity]'") from error


@dataclasses.dataclass(frozen=True)
class Reference:
  """How a layout is run elsewhere.

  Attributes:
    run: function (path, loaded, inputs, *paths of what was attached) -> stages.
    needs: what it imports.
  """
  run: Callable[..., dict]
  needs: tuple[str, ...]


_TRANSFORMERS = ('torch', 'torchvision', 'transformers')
_OPEN_CLIP = ('torch', 'torchvision', 'timm', 'open_clip')

# How names of LLaVA's authors, and of a CLIP, begin in transformers' files;
# the first that fits.
_LLAVA_NAMES = {
    'model.vision_tower.vision_tower.': 'vision_tower.',
    'vision_model.': 'vision_tower.vision_model.',
    'model.mm_projector.0.': 'multi_modal_projector.linear_1.',
    'model.mm_projector.2.': 'multi_modal_projector.linear_2.',
    'model.': 'language_model.model.',
    'lm_head.': 'language_model.lm_head.'}


@contextlib.contextmanager
def _watched(model, tower, marks=()):
  """Records inputs of first blocks, outputs of all, in each tower.

  A block whose weights have 16 bits computes in 32.

  Args:
    model: a torch module.
    tower: name of its tower, or of that which does not see.
    marks: (end of a module's name, stage of its input, stage of its output),
      None for what is not asked for.

  Yields:
    {stage: array}, which fills as the model runs.
  """
  import torch
  found = {}

  def keep(stage, x):
    x = x[0] if isinstance(x, tuple) else x
    found[stage] = x.detach().float().numpy()

  def watch(module, before, after):
    if before is not None:
      module.register_forward_pre_hook(
          lambda _, args, kwargs: keep(
              before, args[0] if args else kwargs['hidden_states']),
          with_kwargs=True)
    if after is not None:
      module.register_forward_hook(lambda _, args, out: keep(after, out))

  def widen(module):
    dtype = next(module.parameters()).dtype
    module.register_forward_pre_hook(lambda module, _: module.float() and None)
    module.register_forward_hook(
        lambda module, *_: module.to(dtype) and None)

  within = set()
  for name, module in model.named_modules():
    if re.search(r'\b(layers|blocks|resblocks)$', name) and isinstance(
        module, torch.nn.ModuleList | torch.nn.Sequential):
      here = 'vision' if 'vis' in name else tower
      for i, block in enumerate(module):
        watch(block, f'{here}/0' if i == 0 else None, f'{here}/{i + 1}')
        widen(block)
      within.update(module.modules())
    for end, before, after in marks:
      if name.endswith(end):
        watch(module, before, after)
  for module in model.modules():
    if module not in within:
      for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.float()
  with torch.inference_mode():
    yield found


def _folder(path):
  path = pathlib.Path(path)
  return path if path.is_dir() else path.parent


def _numpy(tensors):
  return {name: x.detach().float().numpy() for name, x in tensors.items()}


# ---------------------------------------------------------------------------
# transformers


def _config_of(path, loaded):
  """config.json, without which transformers builds no model."""
  if 'config.json' not in loaded.beside:
    raise errors.UserError(f'--check={path}: transformers needs the '
                           'config.json of the model beside its weights')
  return loaded.beside['config.json']


def _from_transformers(kind, path, loaded):
  """A model of transformers; weights of 16 bits stay so."""
  import torch
  import transformers
  _config_of(path, loaded)
  return getattr(transformers, kind).from_pretrained(
      _folder(path), attn_implementation='eager', local_files_only=True,
      dtype=getattr(torch, stages_lib.dtype(loaded.dtypes.values()))).eval()


def _pixel_values(kind, path, loaded, inputs, **options):
  """What an image processor of transformers makes of each picture."""
  import transformers
  kind = getattr(transformers, f'{kind}ImageProcessorPil')
  if (_folder(path) / 'preprocessor_config.json').exists():
    processor = kind.from_pretrained(_folder(path), **options)
  else:
    image, sides = loaded.image, ('height', 'width')
    exact = dict(zip(sides, image['size']))
    size = (dict(shortest_edge=image['size'][0]) if image['fit'] != 'square'
            and 'patch_size' not in options else exact)
    processor = kind(size=size, crop_size=exact, image_mean=image['mean'],
                     image_std=image['std'], **options)
  made = processor(
      [PIL.Image.fromarray(pixels) for pixels in stages_lib.pictures(inputs)],
      return_tensors='pt')
  # Fuyu's takes several pictures for a document each.
  return made['pixel_values'] if 'pixel_values' in made else [
      image[0] for image in made['images']]


def _run_transformers_clip(path, loaded, inputs, *, kind, marks):
  """The stages of `CLIPModel` and `SiglipModel`."""
  import torch
  model = _from_transformers(f'{kind}Model', path, loaded)
  pixels = torch.as_tensor(_pixel_values(kind, path, loaded, inputs))
  with _watched(model, 'text', marks) as found:
    out = model(input_ids=torch.tensor(inputs['tokens']).long(),
                pixel_values=pixels)
  return found | _numpy({
      'vision/pixels': pixels.movedim(1, -1),
      'vision/embedding': out.image_embeds, 'text/embedding': out.text_embeds,
      'logits': out.logits_per_image})


def _from_llavas_authors(path, loaded, *attached):
  """Files of LLaVA's authors, and a CLIP's, as a model of transformers.

  Of the tower the shapes and the choices are those that ours was read as.
  """
  import torch
  import transformers
  own = _config_of(path, loaded)
  vision, tensors = loaded.model.config.vision, {}
  for file in (path, *attached):
    for name, tensor in files.open(file).items():
      old = next(filter(name.startswith, _LLAVA_NAMES), None)
      if old is not None:
        tensors[_LLAVA_NAMES[old] + name.removeprefix(old)] = tensor
  tower = {name: _torch(tensors.pop(name)) for name in list(tensors)
           if name.startswith('vision_tower.')}
  if not tower:
    raise errors.UserError('transformers needs the CLIP as its own files have '
                           f'it; that in {", ".join(attached)} is another.')
  config = transformers.LlavaConfig(
      text_config=transformers.LlamaConfig.from_dict(
          own | dict(model_type='llama')),
      vision_config=transformers.CLIPVisionConfig(
          image_size=vision.image_size[0], patch_size=vision.patch,
          num_hidden_layers=vision.layers, hidden_size=vision.width,
          intermediate_size=vision.hidden, hidden_act=vision.mlp,
          num_attention_heads=vision.heads, layer_norm_eps=vision.norm_eps),
      vision_feature_layer=own.get('mm_vision_select_layer', -2),
      image_token_index=stages_lib.picture_id(loaded))
  model = transformers.LlavaForConditionalGeneration.from_pretrained(
      None, config=config, attn_implementation='eager', state_dict=tower | {
          name: _torch(tensor) for name, tensor in tensors.items()},
      dtype=getattr(torch, stages_lib.dtype(
          tensor.dtype for tensor in tensors.values())))
  # A tower of other files keeps its own bits.
  for name, parameter in model.model.vision_tower.named_parameters():
    parameter.data = tower['vision_tower.vision_model.'
                           + name.removeprefix('vision_model.')]
  return model.eval()


def _torch(tensor):
  """A tensor of a file, in its dtype."""
  import torch
  array = np.array(tensor.array())
  if array.dtype.name != 'bfloat16':
    return torch.from_numpy(array)
  return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _run_decoder(path, loaded, inputs, *attached, make):
  """The stages of a decoder of transformers, and of what it sees with."""
  import torch
  model = make(path, loaded, *attached)
  seen, found = {}, {}
  if 'images' in inputs:
    found['vision/pixels'], seen['pixel_values'] = (
        _fuyu_patches if loaded.image['fit'] == 'fuyu' else _llava_pixels)(
            path, loaded, inputs)
  slots = inputs['segments'] > 0
  with _watched(model, 'decoder', [
      ('multi_modal_projector', None, 'connector'),
      ('lm_head', 'decoder/hidden', 'logits')]) as watched:
    model(input_ids=torch.tensor(inputs['tokens']).long(),
          attention_mask=torch.tensor(slots).long(), use_cache=False, **seen)
  if 'connector' in watched:  # one picture behind the other
    watched['connector'] = watched['connector'].reshape(
        -1, watched['connector'].shape[-1])
  return _numpy(found) | {
      name: x[slots] if x.shape[:2] == slots.shape else x
      for name, x in watched.items()}


def _llava_pixels(path, loaded, inputs):
  """(pixels, as the model takes them)."""
  import torch
  kind, options = ('Llava', dict(do_pad=True)) if (
      loaded.image['fit'] == 'expand') else ('CLIP', {})
  pixels = torch.as_tensor(
      _pixel_values(kind, path, loaded, inputs, **options))
  return pixels.movedim(1, -1), pixels


def _fuyu_patches(path, loaded, inputs):
  """(patches that hold any picture, of one picture behind the other; same)."""
  import torch
  patch = loaded.model.config.vision.patch
  side = dict(height=patch, width=patch)
  cells = []
  for image, picture in zip(
      _pixel_values('Fuyu', path, loaded, inputs, patch_size=side),
      stages_lib.pictures(inputs)):
    y, x = (-(-size // patch) * patch for size in picture.shape[:2])
    cells.append(image[:, :y, :x].unfold(1, patch, patch).unfold(
        2, patch, patch).permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1))
  return torch.cat(cells), torch.cat(cells)[None]


# ---------------------------------------------------------------------------
# open_clip, and timm within it


def _run_open_clip(path, loaded, inputs, *, kind):
  """The stages of a model of open_clip.

  Its config is the file beside the weights, or else what our model was read
  as. The tensors are read here: archives of OpenAI's hold a program, too.
  """
  import open_clip
  import torch
  own = loaded.beside.get('open_clip_config.json', {})
  made = dict(own.get('model_cfg') or _open_clip_config(loaded))
  made.pop('custom_text', None)
  made['vision_cfg'] = {**made['vision_cfg'], 'timm_model_pretrained': False}
  model = getattr(open_clip, kind)(**made).eval()
  _fill(model, path, loaded)
  pixels = open_clip.transform.image_transform_v2(
      open_clip.transform.PreprocessCfg(**{
          'size': model.visual.image_size, **own.get('preprocess_cfg', {})}),
      is_train=False)
  images = torch.stack([
      pixels(PIL.Image.fromarray(x)) for x in stages_lib.pictures(inputs)])
  tokens = torch.tensor(inputs['tokens']).long()
  with _watched(
      model, 'text', [('trunk.head', 'vision/pooled', None)]) as found:
    image, text, scale = model(images, tokens)[:3]
  bias = 0 if model.logit_bias is None else model.logit_bias
  return found | _numpy({
      'vision/pixels': images.movedim(1, -1), 'vision/embedding': image,
      'text/embedding': text, 'logits': scale * image @ text.T + bias})


def _run_timm(path, loaded, inputs):
  """The stages of an image tower of timm, pictures uncropped as ours."""
  import timm
  import torch
  own = loaded.beside.get('config.json', {})
  if 'architecture' not in own:
    raise errors.UserError(
        f'--check={path}: timm needs its config.json beside the weights')
  image = loaded.image
  model = timm.create_model(own['architecture'], **{
      name: own[name] for name in ('num_classes', 'global_pool') if name in own
  } | own.get('model_args', {})).eval()
  _fill(model, path, loaded)
  pixels = timm.data.create_transform(
      (3, *image['size']), interpolation=image['kernel'], mean=image['mean'],
      std=image['std'], crop_pct=1.0,
      crop_mode='squash' if image['fit'] == 'square' else 'center')
  images = torch.stack([
      pixels(PIL.Image.fromarray(x)) for x in stages_lib.pictures(inputs)])
  with _watched(model, 'vision') as found:
    hidden = model.forward_features(images)
    embedding = model.forward_head(hidden)
  found |= _numpy({'vision/pixels': images.movedim(1, -1)})
  if loaded.layout == 'timm_eva_avg':  # its norm comes after an average
    return found
  return found | _numpy({'vision/hidden': hidden,
                         'vision/embedding': embedding})


def _fill(model, path, loaded):
  """Gives a model of torch its weights, in 32 bits."""
  import torch
  ignored = weights.FAMILIES[loaded.layout].ignored
  model.load_state_dict({
      name: torch.tensor(np.asarray(tensor, np.float32))
      for name, tensor in files.open(path).items()
      if not any(re.fullmatch(pattern, name) for pattern in ignored)})


def _open_clip_config(loaded):
  """Fields of open_clip's model, from ours."""
  config = loaded.model.config
  vision, text = config.vision, config.text
  if loaded.layout in ('eva_open_clip', 'open_clip_siglip') or (
      vision.mlp != text.mlp):
    raise errors.UserError(
        'open_clip needs the open_clip_config.json of the model beside its '
        'weights')
  ratio = lambda tower: (tower.hidden + 0.5) / tower.width  # is rounded down
  return dict(
      embed_dim=config.embed, quick_gelu=vision.mlp == 'quick_gelu',
      init_logit_bias=config.logit_bias, vision_cfg=dict(
          image_size=vision.image_size, patch_size=vision.patch,
          layers=vision.layers, width=vision.width, mlp_ratio=ratio(vision),
          head_width=vision.width // vision.heads),
      text_cfg=dict(
          context_length=text.length, vocab_size=text.vocab, heads=text.heads,
          layers=text.layers, width=text.width, mlp_ratio=ratio(text)))


def _decoder(kind):
  return Reference(functools.partial(_run_decoder, make=functools.partial(
      _from_transformers, kind)), _TRANSFORMERS)


_HF_CLIP = Reference(functools.partial(
    _run_transformers_clip, kind='CLIP', marks=(
        ('visual_projection', 'vision/pooled', None),
        ('text_projection', 'text/pooled', None))), _TRANSFORMERS)
_LLAVA = _decoder('LlavaForConditionalGeneration')
_LLAVAS_AUTHORS = Reference(functools.partial(
    _run_decoder, make=_from_llavas_authors), _TRANSFORMERS)
_FUYU = _decoder('FuyuForCausalLM')
_CUSTOM = Reference(functools.partial(
    _run_open_clip, kind='CustomTextCLIP'), _OPEN_CLIP)

_TIMM = Reference(_run_timm, ('torch', 'torchvision', 'timm'))

# Of these layouts of `weights.FAMILIES` the reference can be installed.
REFERENCES = {
    'hf_clip': _HF_CLIP,
    'hf_siglip': Reference(functools.partial(
        _run_transformers_clip, kind='Siglip', marks=(
            ('vision_model.head', None, 'vision/pooled'),
            ('text_model.head', 'text/pooled', None))), _TRANSFORMERS),
    'openai_clip': Reference(functools.partial(
        _run_open_clip, kind='CLIP'), _OPEN_CLIP),
    'open_clip': _CUSTOM,
    'open_clip_siglip': _CUSTOM,
    'eva_open_clip': _CUSTOM,
    'timm_eva': _TIMM,
    'timm_eva_avg': _TIMM,
    'timm_siglip': _TIMM,
    'llama': _decoder('AutoModelForCausalLM'),
    'llava': _LLAVAS_AUTHORS,
    'llava_tower': _LLAVAS_AUTHORS,
    'hf_llava': _LLAVA,
    'hf_llava_new': _LLAVA,
    'hf_llava_flat': _LLAVA,
    'hf_fuyu': _FUYU,
    'hf_fuyu_new': _FUYU,
}
