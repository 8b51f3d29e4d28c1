"""The patch discriminator and its hinge losses. HYDRA, section 3.3: L_gan; the architecture is our choice."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutions that judge overlapping patches of an image: (B, 3, H, W) -> logits (B, 1, h, w), high is real.

    Three halvings, a receptive field of 70 pixels, 2.8M parameters. The norm is over groups of channels, so that the
    judgement of one image does not depend on the others of its batch.
    """

    def __init__(self, hidden_size: int = 64, num_channels: int = 3):
        super().__init__()
        sizes = [hidden_size, 2 * hidden_size, 4 * hidden_size, 8 * hidden_size]
        layers = [nn.Conv2d(num_channels, sizes[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for size, next_size, stride in zip(sizes, sizes[1:], (2, 2, 1)):
            layers += [
                nn.Conv2d(size, next_size, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, next_size),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(sizes[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layers(pixel_values.float())


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of logits (B, 1, h, w): real patches should be above 1, reconstructed ones below -1."""
    return 0.5 * (nn.functional.relu(1 - real_logits).mean() + nn.functional.relu(1 + fake_logits).mean())


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """L_gan, the decoder's loss: reconstructed patches should be judged real."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """The ratio of two gradients of the decoder's last layer, at most 1e4 (Esser et al., 2021, eq. 7)."""
    ratio = reconstruction_gradient.float().norm() / (adversarial_gradient.float().norm() + 1e-4)
    return ratio.clamp(max=1e4).detach()
