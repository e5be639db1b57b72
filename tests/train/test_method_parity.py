"""Ten float32 steps of BYOL, MoCo, SwAV and iBOT compared with plain float64 re-implementations from their papers.

They share no code with the trainer but layer names: networks are functions of state dicts, losses are written pair
by pair, MoCo moves its teacher before it computes the keys and has a queue that is shifted.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from dino_train.config.presets import recipe
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner
from test_parity import PlainDINO, relative, without_key_bias

STEPS_PER_EPOCH, EPOCHS, BATCH = 2, 5, 8
SETTINGS = {
    "arch": "vit_nano",
    "patch_size": 8,
    "out_dim": 32,
    "head_hidden_dim": 64,
    "drop_path_rate": 0.0,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "batch_size_per_gpu": BATCH,
    "epochs": EPOCHS,
    "warmup_epochs": 1,
    "optimizer": "sgd",  # AdamW divides rounding by rounding where a gradient is near 0
    "lr": 0.3,
    "momentum_teacher": 0.9,
    "device": "cpu",
}


SWAV = {"method": "swav", "local_crops_number": 2, "head_bottleneck_dim": 16, "clip_grad": 0.0, "momentum_teacher": 0.0}


class Plain:
    """Nets as state dicts, SGD with the schedules of the paper, moving average of the parameters."""

    backbone, tokens = PlainDINO.backbone, PlainDINO.tokens  # of a ViT, for images of one size

    def __init__(self, learner, config):
        self.c = config
        self.student = {
            name: p.detach().double().requires_grad_(p.requires_grad) for name, p in learner.student.named_parameters()
        }
        self.teacher = {name: p.detach().clone() for name, p in self.student.items()}
        self.statistics = {}
        decayed = [p for name, p in self.student.items() if p.dim() > 1 and not name.endswith(".bias")]
        rest = [p for name, p in self.student.items() if p.dim() == 1 or name.endswith(".bias")]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9)
        if config.freeze_patch_embed:
            for name in ("backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"):
                self.student[name].requires_grad_(False)

    def mlp(self, w, prefix, x):
        """Layers by their names in a Sequential; a batch norm takes statistics of x alone; `last` has no weights."""
        layers = sorted({int(name.split(".")[1]) for name in w if name.startswith(prefix)})
        for i in layers:
            weight, bias = w[f"{prefix}.{i}.weight"], w.get(f"{prefix}.{i}.bias")
            if weight.dim() == 2:
                x = F.linear(x, weight, bias)
                normed = f"{prefix}.{i + 1}.weight" in w and w[f"{prefix}.{i + 1}.weight"].dim() == 1
                if i != layers[-1] and not normed:
                    x = x.relu()
            else:
                x = F.batch_norm(x, None, None, weight, bias, training=True).relu()
        return x

    def scheduled(self, step):
        c, steps = self.c, EPOCHS * STEPS_PER_EPOCH
        warmup, peak = c.warmup_epochs * STEPS_PER_EPOCH, c.lr * BATCH / 256
        if step < warmup:
            lr = peak * step / (warmup - 1)
        else:
            lr = c.min_lr + (peak - c.min_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        decay = c.weight_decay_end + (c.weight_decay - c.weight_decay_end) * cosine
        return lr, decay, c.momentum_teacher_end + (c.momentum_teacher - c.momentum_teacher_end) * cosine

    def move_teacher(self, momentum):
        with torch.no_grad():
            for name, p in self.student.items():
                self.teacher[name] = self.teacher[name] * momentum + (1 - momentum) * p

    def step(self, step, crops):
        lr, decay, momentum = self.scheduled(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = decay
        self.optimizer.zero_grad()
        loss = self.loss([crop.double() for crop in crops], step)
        loss.backward()
        if step < self.c.freeze_last_layer * STEPS_PER_EPOCH:
            for name in (name for name in self.student if name.endswith(("weight_v", "weight_g"))):
                self.student[name].grad = None
        self.optimizer.step()
        self.after(momentum)
        return loss.item()

    def after(self, momentum):
        self.move_teacher(momentum)


class PlainBYOL(Plain):
    def loss(self, crops, step):
        online = [self.mlp(self.student, "projector", self.backbone(self.student, crop)) for crop in crops]
        predictions = [F.normalize(self.mlp(self.student, "predictor", z), dim=1) for z in online]
        with torch.no_grad():
            targets = [self.mlp(self.teacher, "projector", self.backbone(self.teacher, crop)) for crop in crops[:2]]
            targets = [F.normalize(z, dim=1) for z in targets]
        one = (predictions[0] - targets[1]).square().sum(1)
        two = (predictions[1] - targets[0]).square().sum(1)
        return (one + two).mean()


class PlainMoCo2(Plain):
    def __init__(self, learner, config):
        super().__init__(learner, config)
        self.queue, self.momentum = learner.method.queue.rows.double(), None

    def loss(self, crops, step):
        if self.momentum is not None:  # before the keys (builder.py:130), by what the last step's schedule says
            self.move_teacher(self.momentum)
        q = F.normalize(self.mlp(self.student, "projector", self.backbone(self.student, crops[0])), dim=1)
        with torch.no_grad():
            k = F.normalize(self.mlp(self.teacher, "projector", self.backbone(self.teacher, crops[1])), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.t()], dim=1) / self.c.student_temp
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
        self.queue = torch.cat([self.queue, k])[len(k) :]
        return loss

    def after(self, momentum):
        self.momentum = momentum


class PlainMoCo3(Plain):
    def last_norm(self, x):
        return F.batch_norm(x, None, None, training=True)

    def loss(self, crops, step):
        def queries(crop):
            z = self.last_norm(self.mlp(self.student, "projector", self.backbone(self.student, crop)))
            z = self.mlp(self.student, "predictor", z)
            return F.normalize(z if self.c.arch == "resnet50" else self.last_norm(z), dim=1)

        with torch.no_grad():
            k1, k2 = (
                F.normalize(
                    self.last_norm(self.mlp(self.teacher, "projector", self.backbone(self.teacher, crop))), dim=1
                )
                for crop in crops
            )

        def contrast(q, k):
            logits = q @ k.t() / self.c.student_temp
            return F.cross_entropy(logits, torch.arange(len(q))) * 2 * self.c.student_temp

        return contrast(queries(crops[0]), k2) + contrast(queries(crops[1]), k1)


def difference(ours, plain):
    """Biases before a batch norm start at 0 and have a gradient of rounding alone."""
    return ((ours.double() - plain).norm() / plain.norm().clamp_min(0.1)).item()


class PlainSwAV(Plain):
    """With the head of DINO, and assignments as 3 divisions of rows and columns."""

    def __init__(self, learner, config):
        super().__init__(learner, config)
        self.queue = torch.zeros(2, 0, config.head_bottleneck_dim, dtype=torch.float64)

    def features(self, crop):
        x = self.backbone(self.student, crop)
        for layer in (0, 2):
            x = F.gelu(F.linear(x, self.student[f"head.mlp.{layer}.weight"], self.student[f"head.mlp.{layer}.bias"]))
        x = F.linear(x, self.student["head.mlp.4.weight"], self.student["head.mlp.4.bias"])
        return F.normalize(x, dim=1)

    @torch.no_grad()
    def assignments(self, scores):
        q = (scores / self.c.teacher_temp).exp()
        for _ in range(3):
            q = q / q.sum(0, keepdim=True) / q.shape[1]
            q = q / q.sum(1, keepdim=True) / q.shape[0]
        return q * q.shape[0]

    def loss(self, crops, step):
        prototypes = F.normalize(self.student["head.last_layer.weight_v"], dim=1)
        z = [self.features(crop) for crop in crops]
        scores = [x @ prototypes.t() for x in z]
        full = self.c.queue_size > 0 and self.queue.shape[1] == self.c.queue_size
        total = 0.0
        for u in range(2):
            rows = torch.cat([scores[u], self.queue[u] @ prototypes.t()]) if full else scores[u]
            q = self.assignments(rows)[:BATCH]
            others = [s for v, s in enumerate(scores) if v != u]
            losses = [-(q * (s / self.c.student_temp).log_softmax(1)).sum(1).mean() for s in others]
            total = total + sum(losses) / len(losses) / 2
        if self.c.queue_size and step >= self.c.queue_start_epoch * STEPS_PER_EPOCH:
            self.queue = torch.cat([self.queue, torch.stack(z[:2]).detach()], dim=1)[:, -self.c.queue_size :]
        return total


class PlainIBOT(Plain):
    """Losses image by image and view by view."""

    def __init__(self, learner, config):
        super().__init__(learner, config)
        self.centers = {
            "head": torch.zeros(config.out_dim),
            "patch": torch.zeros(config.patch_out_dim or config.out_dim),
        }

    def bottleneck(self, w, head, x):
        for layer in (0, 2):
            x = F.gelu(F.linear(x, w[f"{head}.mlp.{layer}.weight"], w[f"{head}.mlp.{layer}.bias"]))
        return F.normalize(F.linear(x, w[f"{head}.mlp.4.weight"], w[f"{head}.mlp.4.bias"]), dim=-1)

    def logits(self, w, kind, x):
        separate, untied = (f"patch_head.{name}" in w for name in ("mlp.0.weight", "weight_v"))
        own = kind == "patch" and separate
        x = self.bottleneck(w, "patch_head" if own else "head", x)
        last = "patch_head" if kind == "patch" and untied else "patch_head.last_layer" if own else "head.last_layer"
        return x @ (w[f"{last}.weight_g"] * F.normalize(w[f"{last}.weight_v"], dim=1)).t()

    def targets(self, kind, rows, balanced, temp):
        """Of rows [n, K]; `balanced` are all those that a center or Sinkhorn-Knopp is of."""
        if self.c.centering == "sinkhorn":
            return PlainSwAV.assignments(self, rows)
        targets = ((rows - self.centers[kind]) / temp).softmax(1)
        self.centers[kind] = self.centers[kind] * 0.9 + balanced.mean(0) * 0.1
        return targets

    def loss(self, crops, step):
        c, (*crops, masks) = self.c, crops
        masks, first = masks.bool(), 1 + c.registers
        with torch.no_grad():
            seen = torch.cat([self.tokens(self.teacher, crop) for crop in crops[:2]])
            rows = self.logits(self.teacher, "head", seen[:, 0])
            q = self.targets("head", rows, rows, c.teacher_temp).chunk(2)
            hidden = torch.cat([masks[:, 0], masks[:, 1]])
            rows = self.logits(self.teacher, "patch", seen[:, first:])
            patch_q = self.targets("patch", rows[hidden], rows.flatten(0, 1), c.teacher_temp)
        tokens = [self.tokens(self.student, crop, masks[:, v] if v < 2 else None) for v, crop in enumerate(crops)]
        p = [(self.logits(self.student, "head", x[:, 0]) / c.student_temp).log_softmax(1) for x in tokens]
        pairs = [-(q[u] * p[v]).sum(1).mean() for u in range(2) for v in range(len(p)) if u != v]
        total, row = sum(pairs) / len(pairs), 0
        for view, image in ((view, image) for view in range(2) for image in range(BATCH)):
            x = tokens[view][image, first:][masks[image, view]]
            if len(x):
                log_p = (self.logits(self.student, "patch", x) / c.student_temp).log_softmax(1)
                total = total - (patch_q[row : row + len(x)] * log_p).sum(1).mean() / (2 * BATCH)
                row += len(x)
        for x in tokens[:2] if c.koleo else ():
            x = F.normalize(x[:, 0], dim=1)
            distances = (x[:, None] - x[None]).square().sum(2) + 9 * torch.eye(BATCH)
            total = total - c.koleo * (distances.min(1).values.sqrt() + 1e-8).log().mean()
        return total


IBOT = {"method": "ibot", "local_crops_number": 2, "head_bottleneck_dim": 16, "clip_grad": 0.0, "teacher_temp": 0.06}
CASES = {
    "ibot": (PlainIBOT, {**IBOT, "norm_last_layer": False}),
    "ibot with an untied patch head": (PlainIBOT, {**IBOT, "patch_head": "untied", "patch_out_dim": 24}),
    "dinov2": (
        PlainIBOT,
        {
            **IBOT,
            "patch_head": "separate",
            "centering": "sinkhorn",
            "koleo": 0.1,
            "registers": 2,
            "mask_ratio": (0.2, 0.6),
        },
    ),
    "byol": (PlainBYOL, {"method": "byol"}),
    "byol with a frozen patch embedding": (PlainBYOL, {"method": "byol", "freeze_patch_embed": True}),
    "mocov2": (PlainMoCo2, {"method": "moco", "queue_size": 20}),  # not a multiple of the batch
    "mocov3": (PlainMoCo3, {"method": "moco", "predictor": True, "queue_size": 0, "student_temp": 0.2}),
    "swav": (PlainSwAV, {**SWAV}),
    "swav with a queue": (PlainSwAV, {**SWAV, "queue_size": 24, "queue_start_epoch": 1}),  # used from step 5 on
}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps(name):
    kind, changes = CASES[name]
    config = PretrainConfig(**{**recipe(changes["method"], "none"), **SETTINGS, **changes})
    torch.manual_seed(3)
    learner = Learner(config, STEPS_PER_EPOCH, torch.device("cpu"))
    plain = kind(learner, config)
    # A unit whose input is 0 but for rounding can be off in one and on in the other, which shows in later steps.
    tolerances = [1e-5] * 4 + [5e-4] * 6
    start = {name: p.clone() for name, p in learner.teacher.named_parameters()}
    sizes = [32] * 2 + [16] * config.local_crops_number
    for step, tolerance in enumerate(tolerances):
        crops = [torch.randn(BATCH, 3, size, size) for size in sizes]
        if config.mask_kind is not None:
            crops.append(torch.stack([torch.from_numpy(config.mask_kind.draw(0, step, i, i)) for i in range(BATCH)]))
        loss = plain.step(step, crops)
        assert learner.step(step, crops).loss == pytest.approx(loss, rel=tolerance), f"step {step}"
        for net, expected in (("student", plain.student), ("teacher", plain.teacher)):
            if net == "teacher" and kind is PlainMoCo2:
                continue  # moved by a step less, compared below
            for name, ours in getattr(learner, net).named_parameters():
                error = difference(without_key_bias(name, ours), without_key_bias(name, expected[name]))
                assert error < tolerance, f"{net} {name} differs by {error:.1e} at step {step}"
    if kind is PlainMoCo2:
        plain.move_teacher(plain.momentum)
        assert max(difference(p, plain.teacher[name]) for name, p in learner.teacher.named_parameters()) < tolerance
        order = (learner.method.queue.position + torch.arange(len(plain.queue))) % len(plain.queue)
        assert relative(learner.method.queue.rows[order], plain.queue) < tolerance
    name = "head.mlp.0.weight" if kind in (PlainSwAV, PlainIBOT) else "projector.0.weight"
    assert relative(dict(learner.teacher.named_parameters())[name], start[name]) > 1e-4
