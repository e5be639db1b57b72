"""iBOT (Zhou et al. 2021, arXiv 2111.07832) and the recipe of DINOv2 (Oquab et al. 2023, arXiv 2304.07193).

DINO's loss of class tokens, where patches of the student's global crops are hidden, and the same cross-entropy between
the student's outputs at hidden patches and the teacher's, which sees them. DINOv2 adds KoLeo and takes Sinkhorn-Knopp
in place of the centers.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino_kernels import dino_loss, patch_loss
from dino_kernels.nn import WeightNormLinear
from dino_train.config.pretrain import PretrainConfig
from dino_train.methods import Method, Part
from dino_train.methods.dino import CENTER_MOMENTUM, entropies
from dino_train.methods.koleo import koleo
from dino_train.models.head import DINOHead
from dino_train.models.vit import DINOModel, VisionTransformer

logger = logging.getLogger(__name__)

_LOSSES = ("class_loss", "patch_loss", "koleo_loss")


class IbotModel(DINOModel):
    """A ViT, the head of class tokens and that of patches, of which a part or all is the same.

    Args:
        head: of class tokens.
        patch_head: a last layer behind the same MLP, a head, or None for the same head.
    """

    backbone: VisionTransformer

    def __init__(self, backbone: VisionTransformer, head: DINOHead, patch_head: WeightNormLinear | DINOHead | None):
        super().__init__(backbone, head)
        self.patch_head: Any = patch_head

    def bottlenecks(self, class_tokens: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of norm 1 that the two last layers take."""
        if isinstance(self.patch_head, DINOHead):
            return self.head.bottleneck(class_tokens), self.patch_head.bottleneck(patches)
        both = self.head.bottleneck(torch.cat((class_tokens, patches)))
        of_class, of_patches = both.split([len(class_tokens), len(patches)])
        return of_class, of_patches

    @property
    def patch_last_layer(self) -> WeightNormLinear:
        if self.patch_head is None:
            return self.head.last_layer
        return self.patch_head.last_layer if isinstance(self.patch_head, DINOHead) else self.patch_head


class Ibot(Method):
    """The step of main_ibot.py:255-360 of bytedance/ibot and of dinov2/train/ssl_meta_arch.py:127-352."""

    student: IbotModel
    teacher: IbotModel

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.student = self._build(config.drop_path_rate, config.norm_last_layer)
        self.teacher = self._build(0.0, True)
        self.center = torch.zeros(1, config.out_dim, device=device)
        self.patch_center = torch.zeros(1, config.patch_out_dim or config.out_dim, device=device)
        self.losses = torch.zeros(len(_LOSSES), device=device)  # of the last step
        assert config.mask_kind is not None
        self.mask_kind = config.mask_kind
        if config.centering == "sinkhorn":
            self.warn_of_few_rows(2)
        if config.koleo and config.micro_batch == 1:
            logger.warning("KoLeo compares the images of a micro-batch, and one image has none to be compared with")

    def _build(self, drop_path_rate: float, norm_last_layer: bool) -> IbotModel:
        c = self.config
        backbone = self.build_backbone(drop_path_rate, mask_token=True)
        assert isinstance(backbone, VisionTransformer)

        def head(out_dim: int) -> DINOHead:
            return DINOHead(
                backbone.embed_dim,
                out_dim,
                norm_last_layer=norm_last_layer,
                hidden_dim=c.head_hidden_dim,
                bottleneck_dim=c.head_bottleneck_dim,
            )

        of_class, patch_out_dim = head(c.out_dim), c.patch_out_dim or c.out_dim
        of_patches: WeightNormLinear | DINOHead | None = None
        if c.patch_head == "separate":
            of_patches = head(patch_out_dim)
        elif c.patch_head == "untied":
            of_patches = WeightNormLinear(c.head_bottleneck_dim, patch_out_dim)
            of_patches.weight_g.requires_grad_(not norm_last_layer)
        return IbotModel(backbone, of_class, of_patches)

    def frozen(self, epoch: int) -> list[nn.Module]:
        last_layers = [self.student.head.last_layer, self.student.patch_last_layer]  # which may be one
        return super().frozen(epoch) + (last_layers if epoch < self.config.freeze_last_layer else [])

    def forward(self, crops: list[Tensor], teacher_temp: Tensor) -> Part:
        """With the mean over both views u of all images, and of a view over its hidden patches i:

            loss = loss of DINO + mean of -<p_ui, log_softmax(s_ui / student_temp)> + koleo * sum over u of KoLeo
            p_ui = softmax((t_ui - patch_center) / teacher_temp)

        crops: the last tensor is bool [B, 2, patches], true where a patch is hidden from the student.
        Told are both centers and the three terms of the loss; kept the inputs [2 B, 2, D] of the teacher's last layers,
        of the class tokens and of as many patches, spread over the batch.
        """
        *crops, masks = crops
        masks = masks.transpose(0, 1).flatten(0, 1)  # [2 B, patches], as sequences are packed
        config, lead, (views, count) = self.config, self.student.backbone.lead, masks.shape
        hidden, weights = self._hidden(masks)
        rows = hidden + (hidden // count + 1) * lead  # among the tokens of the global crops
        sinkhorn = config.centering == "sinkhorn"
        with torch.no_grad():
            tokens, packing = self.teacher.backbone.tokens(crops[:2])
            # The center is the mean over all patches (main_ibot.py:572), Sinkhorn-Knopp is of the hidden ones.
            patches = tokens[rows] if sinkhorn else tokens.view(views, -1, tokens.shape[1])[:, lead:].flatten(0, 1)
            z, patch_z = self.teacher.bottlenecks(tokens[packing.cu_seqlens[:-1]], patches)
            last_layer, patch_last_layer = self.teacher.head.last_layer, self.teacher.patch_last_layer
            logits = last_layer(z)
            if sinkhorn:
                patch_logits = patch_last_layer(patch_z)
                center = self.sinkhorn(logits, teacher_temp)
                patch_center = self.sinkhorn(patch_logits, teacher_temp, weights > 0)
            else:
                patch_logits = patch_last_layer(patch_z[hidden])
                patch_mean = patch_last_layer(patch_z.mean(0, keepdim=True)).float().flatten()
                center, patch_center = self.center, self.patch_center
        self.phase("teacher")
        tokens, packing = self.student.backbone.tokens(crops, masks)
        class_tokens = tokens.index_select(0, packing.cu_seqlens[:-1])
        student_z, student_patch_z = self.student.bottlenecks(class_tokens, tokens.index_select(0, rows))
        self.phase("student_forward")
        temps: dict[str, Any] = {"student_temp": config.student_temp, "teacher_temp": teacher_temp}
        class_loss, batch_center = dino_loss(
            self.student.head.last_layer(student_z), logits, center, inplace=True, **temps
        )
        hidden_loss, _ = patch_loss(
            self.student.patch_last_layer(student_patch_z),
            patch_logits,
            patch_center,
            weights=weights,
            inplace=True,
            **temps,
        )
        spread = class_loss.new_zeros(())
        if config.koleo:
            of_first, of_second = class_tokens[:views].chunk(2)
            spread = config.koleo * (koleo(of_first) + koleo(of_second))
        self.phase("loss")
        centers = (center, patch_center) if sinkhorn else (batch_center, patch_mean)
        losses = torch.stack([class_loss, hidden_loss, spread])
        # From the first to the last row: another place in each view, since one place may look alike in all images.
        some = torch.arange(views, device=z.device) * (len(patch_z) - 1) // (views - 1)
        return Part(losses.sum(), torch.cat([*centers, losses.detach()]), torch.stack([z, patch_z[some]], dim=1))

    def _hidden(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Of masks [2 B, P], as many rows as a micro-batch hides at most, whatever it hides: shapes are fixed.

        Returns:
            int64 [M], the hidden patches among the 2 B * P, filled up with others; float32 [M], the weight of each in
            the mean over views, and within a view over its hidden patches, 0 of others.
        """
        of_patches = (masks / masks.sum(1, keepdim=True).clamp_min(1) / len(masks)).flatten()
        hidden = (~masks).flatten().to(torch.int32).argsort(stable=True)[: self.mask_kind.most]
        return hidden, of_patches[hidden]

    def after(self, told: Tensor, kept: Tensor, refused: Tensor) -> None:
        *centers, losses = told.split([self.center.shape[1], self.patch_center.shape[1], len(_LOSSES)])
        for old, new in zip((self.center, self.patch_center), centers, strict=True):
            if self.config.centering == "ema":
                new = old.lerp(new, 1 - CENTER_MOMENTUM)
            old.copy_(torch.where(refused, old, new))
        self.losses.copy_(losses)

    def health(self, kept: Tensor, teacher_temp: float) -> dict[str, float]:
        """The entropies of DINO, of class tokens and of patches, and the terms of the loss."""
        z, patch_z = kept.unbind(1)
        centered = self.teacher.head.last_layer(z).float() - self.center
        patch_centered = self.teacher.patch_last_layer(patch_z).float() - self.patch_center
        losses = dict(zip(_LOSSES, self.losses.tolist(), strict=True))
        return entropies(centered, teacher_temp) | entropies(patch_centered, teacher_temp, "patch") | losses

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"method": {"center": self.center, "patch_center": self.patch_center}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.center.copy_(state["method"]["center"])
        self.patch_center.copy_(state["method"]["patch_center"])
