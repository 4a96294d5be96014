"""DeCo written down once more, as literally as the paper's equations read.

The oracle of the tests and the yardstick of the speed comparison. Slow on purpose: complex rotary arithmetic,
positions concatenated to every pixel, two DCTs, a doubled batch at every sampling step. It takes the
parameters of a `deco.DeCo` by name and shares no other code with it.
"""
import math
import torch
import torch.nn.functional as F


def rms_norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotary(h, w, head_width, device="cpu"):
    "Unit complex numbers (h*w, head_width/2): even pairs turn with x, odd ones with y."
    freqs = 1 / 10000 ** (torch.arange(0, head_width, 4, device=device).float() / head_width)
    rows, columns = (torch.linspace(0, 16, n, device=device) for n in (h, w))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = torch.stack([torch.outer(x.flatten(), freqs), torch.outer(y.flatten(), freqs)], -1).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, cis):
    pairs = torch.view_as_complex(torch.stack(x.float().chunk(2, -1), -1).contiguous())  # (B, N, heads, hw/2)
    turned = torch.view_as_real(pairs * cis[None, :, None])
    return torch.cat([turned[..., 0], turned[..., 1]], -1)


def attention(p, x, cis, heads):
    B, N, D = x.shape
    q, k, v = F.linear(x, p["qkv.weight"]).reshape(B, N, 3, heads, D // heads).permute(2, 0, 1, 3, 4)
    q, k = rotate(rms_norm(q, p["q_norm.weight"]), cis), rotate(rms_norm(k, p["k_norm.weight"]), cis)
    q, k, v = (z.transpose(1, 2).contiguous() for z in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
    return F.linear(x, p["proj.weight"], p["proj.bias"])


def mlp(p, x):
    gate, up = p["gate_up.weight"].chunk(2)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), p["down.weight"])


def block(p, x, c, cis, heads):
    modulation = F.linear(c, p["modulation.weight"], p["modulation.bias"])
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
    normed = rms_norm(x, p["norm1.weight"]) * (1 + scale1) + shift1
    x = x + gate1 * attention(sub(p, "attn"), normed, cis, heads)
    return x + gate2 * mlp(sub(p, "mlp"), rms_norm(x, p["norm2.weight"]) * (1 + scale2) + shift2)


def time_embedding(p, t):
    freqs = torch.exp(-math.log(10) * torch.arange(128, device=t.device).float() / 128)
    args = t[:, None] * freqs[None]
    h = F.silu(F.linear(torch.cat([args.cos(), args.sin()], -1), p["mlp.0.weight"], p["mlp.0.bias"]))
    return F.linear(h, p["mlp.2.weight"], p["mlp.2.bias"])


def positions(P, device="cpu"):
    pos, f = torch.linspace(0, 1, P, device=device), torch.linspace(0, 8, 8, device=device)
    y, x = torch.meshgrid(pos, pos, indexing="ij")
    fx, fy = f[None, :, None], f[None, None, :]
    waves = torch.cos(torch.pi * x.reshape(-1, 1, 1) * fx) * torch.cos(torch.pi * y.reshape(-1, 1, 1) * fy)
    return (waves / (1 + fx * fy)).reshape(P * P, 64)


def decoder(p, pixels, tokens, P):
    "pixels: (M, P*P, C); tokens: (M, D), one row a patch. Eqs. 7-9."
    M = len(pixels)
    d = p["input_proj.weight"].shape[0]
    pos = positions(P, pixels.device)[None].repeat(M, 1, 1)
    h = F.linear(torch.cat([pixels, pos], -1), p["pixel_embed.weight"], p["pixel_embed.bias"])
    h = F.linear(h, p["input_proj.weight"], p["input_proj.bias"])
    cond = F.linear(tokens, p["cond_embed.weight"], p["cond_embed.bias"]).reshape(M, P * P, d)
    for i in range(sum(k.endswith("norm.weight") for k in p)):
        q = sub(p, f"blocks.{i}")
        shift, scale, gate = F.linear(F.silu(cond), q["modulation.weight"], q["modulation.bias"]).chunk(3, -1)
        u = F.layer_norm(h, (d,), q["norm.weight"], q["norm.bias"], 1e-6) * (1 + scale) + shift
        u = F.silu(F.linear(u, q["mlp.0.weight"], q["mlp.0.bias"]))
        u = F.linear(u, q["mlp.2.weight"], q["mlp.2.bias"])
        h = h + gate * u
    return F.linear(F.layer_norm(h, (d,), eps=1e-6), p["linear.weight"], p["linear.bias"])


def sub(p, name): return {k[len(name) + 1:]: v for k, v in p.items() if k.startswith(name + ".")}


def forward(p, config, x, t, y):
    "Velocity of the DeCo with parameters p (by name) and configuration config."
    B, C, H, W = x.shape
    P, D, heads = config["patch_size"], config["width"], config["heads"]
    h, w = H // P, W // P
    pixels = F.unfold(x, P, stride=P).transpose(1, 2).reshape(B, h * w, C, P * P)
    pixels = pixels.transpose(2, 3)                                                         # (B, N, P*P, C)
    tokens = F.linear(pixels.reshape(B, h * w, -1), p["patch_embed.weight"], p["patch_embed.bias"])
    time = time_embedding(sub(p, "time_embed"), t)[:, None]
    c = F.silu(time + p["label_embed.weight"][y][:, None])
    for i in range(config["depth"]):
        tokens = block(sub(p, f"blocks.{i}"), tokens, c, rotary(h, w, D // heads, x.device), heads)
    s = F.silu(tokens + time).reshape(B * h * w, D)
    v = decoder(sub(p, "head"), pixels.reshape(B * h * w, P * P, C), s, P)                  # (M, P*P, C)
    v = v.reshape(B, h * w, P * P, C).transpose(2, 3).reshape(B, h * w, -1).transpose(1, 2)
    return F.fold(v.contiguous(), (H, W), P, stride=P)


def ycbcr_dct(x):
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    blue = -0.168736 * r - 0.331264 * g + 0.5 * b
    red = 0.5 * r - 0.418688 * g - 0.081312 * b
    x = torch.cat([luma, blue, red], 1)
    n = torch.arange(8, device=x.device).float()
    D = torch.cos(math.pi * (2 * n + 1) * n[:, None] / 16) / 2
    D[0] = 1 / math.sqrt(8)
    blocks = x.unfold(2, 8, 8).unfold(3, 8, 8).contiguous()
    return torch.matmul(torch.matmul(D, blocks), D.t())


def loss(p, config, x, noise, t, y, w):
    "L_FM + L_FreqFM (Eqs. 1 and 12); w: (3, 8, 8)."
    x_t = t.view(-1, 1, 1, 1) * x + (1 - t.view(-1, 1, 1, 1)) * noise
    v, target = forward(p, config, x_t, t, y), x - noise
    return ((v - target) ** 2).mean() + (w[:, None, None] * (ycbcr_dct(v) - ycbcr_dct(target)) ** 2).mean()


@torch.no_grad()
def euler(p, config, noise, y, steps, guidance, interval):
    "Euler with guidance; both passes at every step."
    x, null = noise, torch.full_like(y, config["num_classes"])
    for i in range(steps):
        t = torch.full((2 * len(x),), i / steps, device=x.device)
        u, v = forward(p, config, torch.cat([x, x]), t, torch.cat([null, y])).chunk(2)
        g = guidance if interval[0] < i / steps <= interval[1] else 1.0
        x = x + (u + g * (v - u)) / steps
    return x
