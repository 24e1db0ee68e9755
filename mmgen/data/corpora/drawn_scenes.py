"""Drawn scenes as a TFDS data set: array_record files, no TensorFlow.

Pictures are handed to TFDS as encoded PNG (arrays would make it import
TensorFlow) and in the order of their index, so that record i is scene i.
Names in other languages are not repeated in each record: the manifest holds
them by concept, and the reader joins them.
"""

import io

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from mmgen.data import scenes

CAPTIONS = ('raw', 'synthetic', 'fused')


class DrawnScenes(tfds.core.GeneratorBasedBuilder):
  """Scenes drawn from a picture set, with exact ground truth."""

  VERSION = tfds.core.Version(f'{scenes.VERSION}.0.0')
  # Nothing to download; TFDS would look for checksums beside its own builders.
  url_infos = {}

  def __init__(self, *, pictures, plan, seed, sizes, progress, **kwargs):
    """Builds the builder.

    Args:
      pictures: `pictures.PictureSet`.
      plan: `scenes.Plan` of these pictures.
      seed: int.
      sizes: {split: number of scenes}.
      progress: function (split, Scene, image, mask), called for every scene.
      **kwargs: of the TFDS builder, such as `data_dir`.
    """
    self._pictures, self._plan, self._seed = pictures, plan, seed
    self._sizes, self._progress = sizes, progress
    # The default format, tfrecord, cannot be written without TensorFlow.
    super().__init__(file_format='array_record', **kwargs)

  def _info(self):
    text = tfds.features.Text()
    side = self._plan.config.pixels
    picture = lambda channels: tfds.features.Image(
        shape=(side, side, channels), encoding_format='png')
    features = tfds.features.FeaturesDict({
        'id': text,
        'image': picture(3),
        'mask': picture(1),
        'ground': text,
        'captions': {name: text for name in CAPTIONS},
        'objects': tfds.features.Sequence({
            'concept': text, 'style': text, 'where': text,
            'box': tfds.features.Tensor(shape=(4,), dtype=np.float32)}),
        'questions': tfds.features.Sequence({
            'question': text, 'answer': text, 'type': text})})
    return tfds.core.DatasetInfo(
        builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(split) for split in self._sizes}

  def _generate_examples(self, split):
    for index in range(self._sizes[split]):
      scene = scenes.specify(self._plan, split, self._seed, index)
      image, mask, boxes = scenes.draw(self._pictures, self._plan, scene)
      self._progress(split, scene, image, mask)
      yield index, {
          'id': scene.id,
          'image': png(image),
          'mask': png(mask),
          'ground': scene.ground,
          'captions': scene.captions,
          'objects': [
              {'concept': o.concept, 'style': o.style, 'where': o.where,
               'box': np.asarray(box, np.float32)}
              for o, box in zip(scene.objects, boxes)],
          'questions': list(scene.questions)}


def png(array):
  """Encodes uint8 [Y, X] or [Y, X, 3] as PNG, in a BytesIO."""
  out = io.BytesIO()
  Image.fromarray(array).save(out, 'PNG', compress_level=6)
  out.seek(0)
  return out
