"""EfficientNet-lite, a small convolutional image encoder, as a Hugging Face model.

The EfficientNet of Tan & Le (2019, https://arxiv.org/abs/1905.11946, table 1 and equation 3) without squeeze and
excitation, with ReLU6 for swish, and with stem and head that do not grow. Made to be used frozen, so there is
neither dropout nor stochastic depth.

Shapes: B images, S side in pixels, h = w = S / 32, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

STAGES = (  # repeats, kernel, stride, expansion, channels: table 1's stages 2 to 8
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PretrainedConfig):
    """The defaults are lite0.

    Width and depth coefficients at image size: lite0 1, 1 at 224; lite1 1, 1.1 at 240; lite2 1.1, 1.2 at 260;
    lite3 1.2, 1.4 at 280; lite4 1.4, 1.8 at 300.
    """

    model_type = "efficientnet-lite"

    width_coefficient: float = 1.0
    depth_coefficient: float = 1.0
    image_size: int = 224
    num_channels: int = 3
    stem_channels: int = 32
    hidden_size: int = 1280
    batch_norm_eps: float = 1e-3
    stages: list | tuple = STAGES

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels after every block."""
        return [after for _, after, *_ in self.blocks()]

    def blocks(self) -> list[tuple[int, int, int, int, int]]:
        """(channels in, channels out, kernel, stride, expansion) of every block, scaled by eq. 3."""
        blocks, before = [], self.stem_channels
        for index, (repeats, kernel, stride, expansion, channels) in enumerate(self.stages):
            channels = rounded(channels * self.width_coefficient)
            if 0 < index < len(self.stages) - 1:  # the first and the last stage do not deepen
                repeats = math.ceil(repeats * self.depth_coefficient)
            for repeat in range(repeats):
                blocks.append((before, channels, kernel, stride if repeat == 0 else 1, expansion))
                before = channels
        return blocks


def rounded(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of ``divisor``, or the next one where that would lose more than a tenth."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


class ConvNorm(nn.Module):
    """Convolution padded as TensorFlow's "same", batch norm, ReLU6 if ``active``.

    (B, before, h, w) → (B, after, ⌈h/stride⌉, ⌈w/stride⌉).
    """

    def __init__(
        self, before: int, after: int, eps: float, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(after, eps=eps, momentum=0.01)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(pad_same(x, self.conv.kernel_size[0], self.conv.stride[0])))
        return F.relu6(x) if self.active else x


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around (B, C, h, w) so that the output is ⌈h/stride⌉ high; an odd one goes to the bottom and right."""
    missing = [max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    if not any(missing):
        return x
    top, left = missing[0] // 2, missing[1] // 2
    return F.pad(x, (left, missing[1] - left, top, missing[0] - top))


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise k×k, project 1×1; added to its input where both have one shape (MobileNetV2's block)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int, eps: float):
        super().__init__()
        wide = before * expansion
        self.expand = ConvNorm(before, wide, eps) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, eps, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, after, eps, active=False)
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class EfficientNetLiteModel(PreTrainedModel):
    """``pixel_values`` (B, 3, S, S) → ``last_hidden_state`` (B, C, h, w) and its mean ``pooler_output`` (B, C).

    C is ``config.hidden_size``. With ``output_hidden_states``, ``hidden_states`` holds the feature maps of the stem and
    of every block.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        eps, blocks = config.batch_norm_eps, config.blocks()
        self.stem = ConvNorm(config.num_channels, config.stem_channels, eps, kernel=3, stride=2)
        self.blocks = nn.ModuleList(InvertedResidual(*block, eps) for block in blocks)
        self.head = ConvNorm(blocks[-1][1], config.hidden_size, eps)
        self.post_init()

    def cut(self, count: int) -> None:
        """Keep ``count`` blocks, whose output then is the last hidden state."""
        del self.blocks[count:]
        self.head = nn.Identity()
        self.config.hidden_size = self.config.hidden_sizes[count - 1]

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple:
        # With channels last, oneDNN brings neither what enters a convolution nor what leaves it into another order.
        maps = [self.stem(pixel_values.contiguous(memory_format=torch.channels_last))]
        for block in self.blocks:
            maps = [*maps, block(maps[-1])] if output_hidden_states else [block(maps[-1])]
        last = self.head(maps[-1])
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last,
            pooler_output=last.mean((2, 3)),
            hidden_states=tuple(maps) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


def register() -> None:
    """Make AutoConfig and AutoModel know the family. Calling it again changes nothing."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
