"""ResNets without their classifier, under torchvision's state-dict names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NO_TOKENS = "a ResNet has no blocks of tokens and no attention: call it for its pooled features, or take a ViT"


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride is in the 3x3 ("v1.5")."""

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(out)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """Residual network of bottleneck blocks (He et al. 2016), features only.

    Args:
        blocks: number of bottlenecks in each of the four stages.
        width: channels of the first convolution; there are 32 times as many features.
        tiny: for images of some 32 pixels: a 3x3 convolution in place of a 7x7 and a pooling of stride 2 each.
        channels: of an image.
    """

    def __init__(self, blocks: tuple[int, int, int, int], width: int = 64, tiny: bool = False, channels: int = 3):
        super().__init__()
        self.tiny, self.embed_dim, self.channels = tiny, 32 * width, channels
        self.conv1 = nn.Conv2d(channels, width, *((3, 1, 1) if tiny else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(4 * width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(8 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(16 * width, 8 * width, blocks[3], stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """images [B, channels, h, w] -> globally average-pooled features [B, embed_dim]."""
        # Of which convolutions are faster: of small maps on a CPU by half, in 16 bit on a GPU.
        images = images.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        if not self.tiny:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))

    def features(self, images: Tensor, n_blocks: int = 1) -> list[Tensor]:
        """A ViT's; raises ValueError."""
        raise ValueError(_NO_TOKENS)

    def attention(self, images: Tensor) -> Tensor:
        """A ViT's; raises ValueError."""
        raise ValueError(_NO_TOKENS)


class SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of parts of a batch by themselves: those of image b are the images of equal b modulo `splits`.

    [N, C, ...] with N a multiple of splits; in eval mode as any batch norm, with the mean of the parts' statistics.
    """

    splits = 1

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None and self.num_batches_tracked is not None
        if not self.training:
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        means, variances, weight, bias = (
            None if each is None else each.repeat(self.splits) for each in (mean, var, self.weight, self.bias)
        )
        parts = x.reshape(len(x) // self.splits, self.splits * x.shape[1], *x.shape[2:])
        out = F.batch_norm(parts, means, variances, weight, bias, True, self.momentum or 0.0, self.eps)
        for kept, of_parts in ((mean, means), (var, variances)):
            kept.copy_(of_parts.view(self.splits, -1).mean(0))
        self.num_batches_tracked.add_(1)
        return out.view_as(x)


def split_batch_norm(net: nn.Module, splits: int) -> None:
    """Replace every batch norm of a new net by a `SplitBatchNorm`."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                split = SplitBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
                split.splits = splits
                setattr(module, name, split)


def _stage(in_channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    rest = [Bottleneck(4 * width, width, stride=1) for _ in range(depth - 1)]
    return nn.Sequential(Bottleneck(in_channels, width, stride), *rest)


def resnet50(channels: int = 3) -> ResNet:
    """ResNet-50 without `fc` (the identity in the reference, `utils.py:604`); 23.5 M parameters."""
    return ResNet((3, 4, 6, 3), channels=channels)


def resnet_nano(channels: int = 3) -> ResNet:
    """4 blocks, a quarter of the channels, for images of some 32 pixels; 0.5 M parameters. To try convnets on a CPU."""
    return ResNet((1, 1, 1, 1), 16, tiny=True, channels=channels)


RESNETS = {"resnet50": resnet50, "resnet_nano": resnet_nano}
