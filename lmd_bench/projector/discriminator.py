"""The patch discriminator of VQGAN: one logit per overlapping patch, for real images against reconstructions."""

from __future__ import annotations

from torch import Tensor, nn

_LARGEST_MULTIPLE = 8  # widths double per layer up to this multiple of the first
_INIT_STD = 0.02


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv 1611.07004) as VQGAN has it, with the parameter names of its checkpoints.

    One convolution of stride 2, then `num_layers - 1` more with batch norm, one of stride 1 with batch norm, and one
    to a single channel; all kernels 4 x 4, leaky ReLU 0.2 between. With 3 layers a logit sees 70 x 70 pixels.

    in_channels: of the images. width: channels of the first layer. num_layers: convolutions of stride 2, at least 1.
    Raises ValueError for a number below 1.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if min(in_channels, width, num_layers) < 1:
            raise ValueError(f"in_channels {in_channels}, width {width}, num_layers {num_layers}: all must be >= 1")
        self.num_layers = num_layers
        widths = [width * min(2**layer, _LARGEST_MULTIPLE) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            # No bias: the batch norm behind it has one.
            layers += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[layer]),
                nn.LeakyReLU(0.2, True),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.apply(_initialise)

    @property
    def smallest_image_px(self) -> int:
        """Images with a shorter side leave no logit."""
        return int(3 * 2**self.num_layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W), nominally in [-1, 1] -> logits (B, 1, h, w), positive for real.

        h = H / 2**num_layers - 2, rounded down at each halving.
        """
        logits: Tensor = self.main(images)
        return logits


def _initialise(module: nn.Module) -> None:
    """Normal weights of deviation 0.02 around 0 (convolutions) and 1 (batch norms), after pix2pix.

    Biases of convolutions keep PyTorch's own start, as in the released code.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, _INIT_STD)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, _INIT_STD)
        nn.init.zeros_(module.bias)
