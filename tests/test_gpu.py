"""What only a GPU can show: the ops inside a captured CUDA graph, which proves that they never wait for the host."""

import pytest
import torch

from dino_kernels import attention, dino_loss, ema_update_

pytestmark = pytest.mark.gpu


def test_ops_replay_in_a_cuda_graph():
    student = torch.randn(20, 1000, device="cuda", requires_grad=True)
    teacher, center = torch.randn(4, 1000, device="cuda"), torch.zeros(1000, device="cuda")
    qkv = torch.randn(100, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bounds = torch.tensor([0, 37, 100], device="cuda", dtype=torch.int32)
    target, source = torch.zeros(5000, device="cuda"), torch.ones(5000, device="cuda")
    momentum = torch.tensor(0.5, device="cuda")

    def step():
        loss, _ = dino_loss(student, teacher, center)
        out = attention(qkv, bounds)
        grads = torch.autograd.grad([loss, out.float().sum()], [student, qkv])
        ema_update_([target], [source], momentum)
        return loss.detach(), out.detach(), *grads

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile and warm up outside the graph
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():  # new values in the same memory
        student.normal_()
        qkv.normal_()
        target.zero_()
    graph.replay()
    torch.testing.assert_close(target, torch.full_like(target, 0.5))
    for ours, eager in zip(captured, step(), strict=True):
        assert torch.equal(ours, eager)
