#!/usr/bin/env python3
"""The peer of bench/cuda/router.cu: the same in eager PyTorch on the same card. JSON lines on stdout."""
import json

import torch


def median_ms(f, runs=20):
    for _ in range(3):
        f()
    times = []
    for _ in range(runs):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[runs // 2]


def route(logits, k):
    w, e = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), k, dim=-1)
    return w / w.sum(-1, keepdim=True), e


def route_groups(logits, bias, k):
    p = logits.sigmoid()
    choice = p + bias
    group = choice.view(-1, 8, 32).topk(2, dim=-1)[0].sum(-1)
    mask = torch.zeros_like(group).scatter_(1, torch.topk(group, 4, dim=-1, sorted=False)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, 8, 32).reshape(-1, 256)
    e = torch.topk(choice.masked_fill(~mask.bool(), float("-inf")), k, dim=-1, sorted=False)[1]
    w = p.gather(1, e)
    return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, e


torch.manual_seed(0)
T = 1 << 20
print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name()}))
for experts in (8, 64, 128, 256, 384):
    logits = torch.randn(T, experts, device="cuda")
    ms = median_ms(lambda: route(logits, 2 if experts == 8 else 8))
    print(json.dumps({"what": "route", "tokens": T, "experts": experts, "ms": ms, "gtokens_per_s": T / ms * 1e-6}))
logits, bias = torch.randn(T, 256, device="cuda"), torch.randn(256, device="cuda") * 0.05
ms = median_ms(lambda: route_groups(logits, bias, 8))
print(json.dumps({"what": "route (sigmoid, bias, groups)", "tokens": T, "experts": 256, "ms": ms, "gtokens_per_s": T / ms * 1e-6}))
del logits
T = 1 << 19
for experts in (8, 64, 128, 256):
    x = torch.randn(T, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(experts, 4096, device="cuda") * 0.05).bfloat16().requires_grad_()
    up = torch.randn(T, 2 if experts == 8 else 8, device="cuda")

    def forward():
        return route(torch.nn.functional.linear(x, w), up.shape[1])[0]

    def both():
        x.grad = w.grad = None
        forward().backward(up)

    with torch.no_grad():
        fused = median_ms(forward)
    print(json.dumps({"what": "gate and route", "tokens": T, "experts": experts, "forward_ms": fused, "forward_backward_ms": median_ms(both)}))
    del x, w, up
