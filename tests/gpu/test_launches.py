"""How many kernels a GPU would launch in a training step."""

import torch
from launches import counted, of_a_step

LIMIT = 600


def test_a_step_of_vit_small_launches_few_kernels():
    counts = of_a_step()
    assert 300 < counts.total() <= LIMIT, counts.most_common()
    assert counts == of_a_step(batch_size_per_gpu=2)
    # Sums over rows are fused into other kernels, or computed by our column sum kernel.
    assert not [key for key in counts if key[0].startswith("dino_kernels/ops/") and key[1] == "aten::sum"]
    assert sum(count for (where, _), count in counts.items() if where.startswith("dino_kernels/ops/linear")) > 100


def test_what_counts_as_a_launch():
    x = torch.empty(4, 6, device="meta")
    with counted() as counts:
        x.t().reshape(6, 4)[1:].add_(1)  # views and a launch
        torch.nn.functional.linear(x, torch.empty(5, 6, device="meta"))
        torch.zeros(3)  # on the host
    assert {name: count for (_, name), count in counts.items()} == {"aten::add_": 1, "aten::mm": 1}
