"""Tiny random models of odd sizes, written by the libraries they are of."""

import json

import open_clip
from open_clip import model as open_clip_model
import timm
import torch
import transformers


def randomise(model, seed):
  """Draws all parameters, norms and biases too, at the scale of their width."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      draw = torch.randn(parameter.shape, generator=generator)
      if name.endswith('logit_scale'):
        draw = torch.full_like(draw, 1.3)
      elif parameter.ndim >= 2 and 'embed' not in name:
        draw /= parameter[0].numel() ** 0.5
      elif parameter.ndim < 2:
        norm = name.endswith('weight')
        draw = norm + 0.3 * draw
      else:
        draw *= 0.5
      parameter.copy_(draw)
  return model.eval()


def _transformers(kind, config, folder, seed, dtype=torch.float32):
  model = randomise(getattr(transformers, kind)(config), seed).to(dtype)
  model.save_pretrained(folder, max_shard_size='60KB')


def clip(folder, seed=0, *, vision, text, embed, **processor):
  _transformers('CLIPModel', transformers.CLIPConfig(
      vision_config=vision, text_config=text, projection_dim=embed),
                folder, seed)
  if processor:
    transformers.CLIPImageProcessorPil(**processor).save_pretrained(folder)


def siglip(folder, seed=0, *, vision, text, dtype=torch.float32):
  _transformers('SiglipModel', transformers.SiglipConfig(
      vision_config=vision, text_config=text), folder, seed, dtype)


def llama(folder, seed=0, *, dtype=torch.float32, **fields):
  _transformers('LlamaForCausalLM', transformers.LlamaConfig(**fields), folder,
                seed, dtype)


def qwen2(folder, seed=0, **fields):
  _transformers('Qwen2ForCausalLM', transformers.Qwen2Config(**fields), folder,
                seed)


def llava(folder, seed=0, *, vision, text, picture, dtype=torch.float32):
  _transformers('LlavaForConditionalGeneration', transformers.LlavaConfig(
      vision_config=transformers.CLIPVisionConfig(**vision),
      text_config=transformers.LlamaConfig(**text),
      image_token_index=picture), folder, seed, dtype)


def fuyu(folder, seed=0, *, canvas, patch, text, picture):
  _transformers('FuyuForCausalLM', transformers.FuyuConfig(
      patch_size=patch, image_token_id=picture,
      text_config=dict(text, model_type='persimmon')), folder, seed)
  transformers.FuyuImageProcessorPil(
      size=dict(zip(('height', 'width'), canvas)),
      patch_size=dict(height=patch, width=patch)).save_pretrained(folder)


def timm_folder(folder, seed=0, *, architecture, pictures=None, **args):
  """A tower of timm; what is given overrides a published architecture."""
  model = randomise(timm.create_model(
      architecture, pretrained_cfg_overlay=pictures, **args), seed)
  timm.models.save_for_hf(model, folder, model_args=args)


def siglip_trunk(**fields):
  """timm's image tower of a SigLIP."""
  return timm.models.vision_transformer.VisionTransformer(
      class_token=False, **fields)


def open_clip_folder(folder, seed=0, *, custom=False, trunk=None, preprocess=(),
                     kind=timm.models.eva.Eva, pool='token', wrap=None,
                     **config):
  """A model of open_clip, with its config beside it unless `wrap` is a file.

  Args:
    folder: to make.
    seed: of its weights.
    custom: whether the names of the text tower are below 'text.'.
    trunk: fields of a tower of timm, to be found under a name of its own.
    kind: of that tower.
    pool: by which it pools.
    preprocess: of the config.
    wrap: name of a file of torch.save, in place of safetensors and a config.
    **config: of the model.
  """
  folder.mkdir()
  if trunk is not None:
    name = f'tiny_{pool}_{seed}'
    make = lambda pretrained=False, **fields: kind(
        **trunk, **{key: value for key, value in fields.items()
                    if key in ('num_classes', 'global_pool')})
    make.__name__ = make.__qualname__ = name
    make.__module__ = 'timm.models.eva'
    timm.models.register_model(make)
    config['vision_cfg'] = dict(config['vision_cfg'], timm_model_name=name,
                                timm_pool=pool, timm_proj='none'
                                if pool == 'map' else None)
  whole = open_clip_model.CustomTextCLIP if custom else open_clip.CLIP
  model = randomise(whole(**config), seed)
  state = {name: x.contiguous() for name, x in model.state_dict().items()}
  if wrap is not None:
    torch.save(dict(epoch=1, state_dict=state), folder / wrap)
    return
  from safetensors import torch as safetensors_torch
  safetensors_torch.save_file(state, folder / 'open_clip_model.safetensors')
  (folder / 'open_clip_config.json').write_text(json.dumps(dict(
      model_cfg=config, preprocess_cfg=dict(preprocess))))
