"""For tests beside the reference libraries; launch/parity.sh runs them."""

import os

# No reference may look for anything elsewhere.
os.environ['HF_HUB_OFFLINE'] = '1'

import torch

torch.set_num_threads(1)
try:
  import torchvision  # noqa: F401
except RuntimeError:
  # PyPI's cannot load its compiled operators into a torch that was built for
  # CPUs alone, and then misses two when it describes them. None is run here.
  _LIBRARY = torch.library.Library('torchvision', 'FRAGMENT')
  for _name in ('nms', 'qnms'):
    _LIBRARY.define(
        f'{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
