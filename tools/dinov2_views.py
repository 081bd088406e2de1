"""DINOv2's host augmentation with torchvision."""

import io
from collections.abc import Callable

import torch
from PIL import Image
from torchvision import transforms as T


def make_dinov2_views() -> Callable[[bytes], list[torch.Tensor]]:
  """A function from an encoded image to DINOv2's views.

  Parameters follow `DataAugmentationDINO` and DINOv2's default config (Oquab et
  al. 2023).
  """
  torch.manual_seed(0)

  def crop(size: int, scale: tuple[float, float]) -> T.Compose:
    bicubic = T.InterpolationMode.BICUBIC
    resized = T.RandomResizedCrop(size, scale=scale, interpolation=bicubic)
    return T.Compose([resized, T.RandomHorizontalFlip(0.5)])

  def photometrics(blur: float, solarize: float) -> T.Compose:
    ops = [
      T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
      T.RandomGrayscale(0.2),
      T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur),
    ]
    if solarize:
      ops.append(T.RandomSolarize(128, p=solarize))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return T.Compose([*ops, T.ToTensor(), T.Normalize(mean, std)])

  large, small = crop(224, (0.32, 1.0)), crop(96, (0.05, 0.32))
  views = [
    T.Compose([large, photometrics(1.0, 0.0)]),
    T.Compose([large, photometrics(0.1, 0.2)]),
    *[T.Compose([small, photometrics(0.5, 0.0)])] * 8,
  ]

  def transform(file: bytes) -> list[torch.Tensor]:
    image = Image.open(io.BytesIO(file)).convert("RGB")
    return [view(image) for view in views]

  return transform
