"""Ten steps compared with a plain re-implementation of the reference's step.

It shares no code with the trainer: per-resolution forwards, naive attention, pair-by-pair loss, loops for clipping,
teacher and schedules. Same weights, same crops, float32.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner

STEPS_PER_EPOCH, EPOCHS, BATCH, HEADS, PATCH = 2, 5, 4, 3, 8


class PlainDINO:
    """State dicts instead of modules; otherwise line by line as in the paper or main_dino.py."""

    def __init__(self, student, config):
        self.c = config
        self.student = {name: p.clone().requires_grad_() for name, p in student.items()}
        self.teacher = {name: p.clone() for name, p in student.items()}
        if config.norm_last_layer:
            self.student["head.last_layer.weight_g"].requires_grad_(False)
        self.center = torch.zeros(1, config.out_dim)
        regularized, rest = [], []
        for name, p in self.student.items():
            if p.requires_grad:
                (rest if name.endswith(".bias") or p.dim() == 1 else regularized).append(p)
        groups = [{"params": regularized}, {"params": rest, "weight_decay": 0.0}]
        if config.optimizer == "adamw":
            factor = {id(p): self.factor(name) for name, p in self.student.items()}
            each = [{**g, "params": [p], "factor": factor[id(p)]} for g in groups for p in g["params"]]
            self.optimizer = torch.optim.AdamW(each, weight_decay=1.0, foreach=False, fused=False)
        elif config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9, weight_decay=1.0)
        else:
            self.optimizer, self.groups, self.buffers = None, groups, {}

    def factor(self, name):
        """Of the learning rate, for 3 blocks."""
        rate, patches = self.c.layer_decay, self.c.patch_embed_lr
        layers = {"blocks.0": rate**3, "blocks.1": rate**2, "blocks.2": rate}
        layers |= {"patch_embed": rate**4 * patches, "cls_token": rate**4, "pos_embed": rate**4}
        return next((layers[part] for part in layers if name.startswith(f"backbone.{part}")), 1.0)

    def backbone(self, w, images):
        return self.tokens(w, images)[:, 0]

    def tokens(self, w, images, hidden=None):
        """Class token, registers and patches; hidden [B, patches] is true where the mask token stands."""
        p = {k.removeprefix("backbone."): v for k, v in w.items()}
        x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=PATCH)
        side = x.shape[-1]
        patches = x.flatten(2).transpose(1, 2)
        if hidden is not None:
            patches = torch.where(hidden[:, :, None], p["mask_token"], patches)
        x = torch.cat([p["cls_token"].expand(len(x), -1, -1), patches], dim=1)
        pos = p["pos_embed"]
        n = math.isqrt(pos.shape[1] - 1)
        if side != n:
            grid = pos[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
            if "register_tokens" in p:
                grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
            else:
                grid = F.interpolate(grid, scale_factor=((side + 0.1) / n, (side + 0.1) / n), mode="bicubic")
            pos = torch.cat([pos[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)
        x = x + pos
        if "register_tokens" in p:
            x = torch.cat([x[:, :1], p["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for i in range(sum(k.endswith("attn.qkv.weight") for k in p)):
            b = f"blocks.{i}."
            y = F.layer_norm(x, x.shape[-1:], p[b + "norm1.weight"], p[b + "norm1.bias"], 1e-6)
            qkv = F.linear(y, p[b + "attn.qkv.weight"], p[b + "attn.qkv.bias"])
            q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
            y = (weights @ v).transpose(1, 2).flatten(2)
            x = x + p.get(b + "ls1.gamma", 1.0) * F.linear(y, p[b + "attn.proj.weight"], p[b + "attn.proj.bias"])
            y = F.layer_norm(x, x.shape[-1:], p[b + "norm2.weight"], p[b + "norm2.bias"], 1e-6)
            y = F.gelu(F.linear(y, p[b + "mlp.fc1.weight"], p[b + "mlp.fc1.bias"]))
            x = x + p.get(b + "ls2.gamma", 1.0) * F.linear(y, p[b + "mlp.fc2.weight"], p[b + "mlp.fc2.bias"])
        return F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"], 1e-6)

    def forward(self, w, crops):
        features, i = [], 0
        while i < len(crops):  # one forward for consecutive crops of equal size
            j = i
            while j < len(crops) and crops[j].shape == crops[i].shape:
                j += 1
            features.append(self.backbone(w, torch.cat(crops[i:j])))
            i = j
        x = torch.cat(features)
        for layer in (0, 2):
            x = F.gelu(F.linear(x, w[f"head.mlp.{layer}.weight"], w[f"head.mlp.{layer}.bias"]))
        x = F.linear(x, w["head.mlp.4.weight"], w["head.mlp.4.bias"])
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        v, g = w["head.last_layer.weight_v"], w["head.last_layer.weight_g"]
        return x @ (g * v / v.norm(dim=1, keepdim=True)).T

    def loss(self, student, teacher, temp):
        s = (student / 0.1).chunk(len(student) // BATCH)
        q = ((teacher - self.center) / temp).softmax(dim=-1).detach().chunk(2)
        total, terms = 0.0, 0
        for iq in range(2):
            for v in range(len(s)):
                if v != iq:
                    total, terms = total + (-q[iq] * s[v].log_softmax(dim=-1)).sum(dim=-1).mean(), terms + 1
        self.center = self.center * 0.9 + teacher.sum(dim=0, keepdim=True) / len(teacher) * 0.1
        return total / terms

    def step(self, step, crops):
        c, epoch = self.c, step // STEPS_PER_EPOCH
        steps, warmup = EPOCHS * STEPS_PER_EPOCH, c.warmup_epochs * STEPS_PER_EPOCH
        peak = c.lr * BATCH / 256
        if step < warmup:
            lr = peak * step / (warmup - 1)
        else:
            lr = c.min_lr + (peak - c.min_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        decay = c.weight_decay_end + (c.weight_decay - c.weight_decay_end) * cosine
        m = 1 + (c.momentum_teacher - 1) * cosine
        if epoch < c.warmup_teacher_temp_epochs:
            grow = (c.teacher_temp - c.warmup_teacher_temp) / (c.warmup_teacher_temp_epochs - 1)
            temp = c.warmup_teacher_temp + grow * epoch
        else:
            temp = c.teacher_temp
        with torch.no_grad():
            teacher = self.forward(self.teacher, crops[:2])
        loss = self.loss(self.forward(self.student, crops), teacher, temp)
        for p in self.student.values():
            p.grad = None
        loss.backward()
        for name, p in self.student.items():
            if "last_layer" in name and epoch < c.freeze_last_layer:
                p.grad = None
        together = [[p] for p in self.student.values()]
        if c.clip_per_module:
            together = [[p for name, p in self.student.items() if name.startswith(part)] for part in ("back", "head")]
        for parameters in together if c.clip_grad else ():
            torch.nn.utils.clip_grad_norm_(parameters, c.clip_grad)
        self.update(lr, decay)
        with torch.no_grad():
            for name, p in self.student.items():
                self.teacher[name] = self.teacher[name] * m + (1 - m) * p
        return loss.item()

    def update(self, lr, decay):
        if self.optimizer is None:
            return self.lars(lr, decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1)
            if group["weight_decay"]:
                group["weight_decay"] = decay
        self.optimizer.step()

    @torch.no_grad()
    def lars(self, lr, decay):
        for p in (p for group in self.groups for p in group["params"] if p.grad is not None):
            d = p.grad
            if self.c.optimizer == "larc":  # apex's, with decay of all tensors
                d = d + decay * p
                if p.norm() > 0 and p.grad.norm() > 0:
                    d = d * (0.001 * p.norm() / (p.grad.norm() + decay * p.norm() + 1e-8))
            elif p.dim() != 1:
                # The reference applies the schedule of weight decay only to its first group, which has all matrices.
                d = d + decay * p
                if p.norm() > 0 and d.norm() > 0:
                    d = d * (0.001 * p.norm() / d.norm())
            self.buffers[p] = self.buffers.get(p, torch.zeros_like(p)) * 0.9 + d
            p.sub_(lr * self.buffers[p])


def relative(ours, plain):
    return ((ours - plain).norm() / plain.norm().clamp_min(1e-12)).item()


def without_key_bias(name, tensor):
    """A key bias shifts all logits of a query equally: its gradient is only rounding error, which AdamW amplifies."""
    if name.endswith("attn.qkv.bias"):
        q, k, v = tensor.chunk(3)
        return torch.cat([q, v])
    return tensor


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_last_layer": False, "clip_grad": 0.02, "freeze_last_layer": 2, "warmup_epochs": 3},
        {"layer_decay": 0.7, "patch_embed_lr": 0.2, "clip_per_module": True, "clip_grad": 0.1, "layer_scale": 0.1},
        {"optimizer": "sgd", "lr": 0.3, "clip_grad": 0.0},
        {"optimizer": "lars", "lr": 5.0, "freeze_last_layer": 0},
        {"optimizer": "larc", "lr": 20.0, "decay_all": True},
    ],
    ids=["adamw", "adamw-free-norm", "adamw-dinov2", "sgd", "lars", "larc"],
)
def test_ten_steps(changes):
    settings = {
        "arch": "vit_nano",
        "patch_size": PATCH,
        "out_dim": 512,
        "head_hidden_dim": 64,
        "drop_path_rate": 0.0,
        "global_crops_size": 32,
        "local_crops_size": 16,
        "local_crops_number": 3,
        "batch_size_per_gpu": BATCH,
        "epochs": EPOCHS,
        "warmup_epochs": 1,
        "lr": 0.02,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 3,
        "momentum_teacher": 0.9,
        "device": "cpu",
    }
    config = PretrainConfig(**settings | changes)
    torch.manual_seed(3)
    learner = Learner(config, STEPS_PER_EPOCH, torch.device("cpu"))
    plain = PlainDINO(learner.student.state_dict(), config)
    start = {name: p.clone() for name, p in learner.teacher.state_dict().items()}
    for step in range(10):
        crops = [torch.randn(BATCH, 3, 32, 32) for _ in range(2)] + [torch.randn(BATCH, 3, 16, 16) for _ in range(3)]
        loss = plain.step(step, crops)
        assert learner.step(step, crops).loss == pytest.approx(loss, rel=1e-5), f"step {step}"
        assert relative(learner.method.center, plain.center) < 1e-5, f"center, step {step}"
        for net, expected in (("student", plain.student), ("teacher", plain.teacher)):
            for name, ours in getattr(learner, net).state_dict().items():
                error = relative(without_key_bias(name, ours), without_key_bias(name, expected[name]))
                assert error < 1e-5, f"{net} {name} differs by {error:.1e} at step {step}"
    moved = learner.teacher.state_dict()
    assert relative(moved["head.last_layer.weight_v"], start["head.last_layer.weight_v"]) > 1e-4
    assert relative(moved["backbone.blocks.0.attn.qkv.weight"], start["backbone.blocks.0.attn.qkv.weight"]) > 1e-4
