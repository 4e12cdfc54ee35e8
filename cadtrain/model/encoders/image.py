"""DINOv2 as the image encoder: a view becomes one token for each of its patches.

Legend: V views, H = W side in pixels, N patches of a view, D width.
"""

from __future__ import annotations

import torch
from transformers import Dinov2Config, Dinov2Model

from cadtrain.model.encoders.frozen import Freezable

# ImageNet's, with which DINOv2 was trained. Python numbers and not buffers, so that no cast of the model reaches them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ImageEncoder(Freezable):
    """Patch tokens [V, N, D] of views float32[V, 3, H, W] with values in [0, 1]; the class token is dropped.

    Position embeddings made for another image size are interpolated.
    """

    def __init__(
        self, config: Dinov2Config, *, image_size: int, trainable: bool = False, model: Dinov2Model | None = None
    ):
        super().__init__(trainable)
        self.image_size = image_size
        self.model = model if model is not None else Dinov2Model._from_config(config, attn_implementation="sdpa")
        self.width = int(config.hidden_size)
        self.num_tokens = (image_size // int(config.patch_size)) ** 2
        self.settle()
        mask_token = getattr(self.model.embeddings, "mask_token", None)
        if mask_token is not None:
            mask_token.requires_grad_(False)  # only masked pre-training uses it, so it would never see a gradient

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with self.recording():
            pixels = pixel_values.float()
            # Channel by channel: a tensor of the constants would have to be copied to the device, which the host waits for.
            pixels = torch.stack([(pixels[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
            pixels = pixels.to(self.model.embeddings.patch_embeddings.projection.weight.dtype)
            tokens: torch.Tensor = self.model(pixel_values=pixels).last_hidden_state
            return tokens[:, 1:]
