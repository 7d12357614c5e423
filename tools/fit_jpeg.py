"""Fit the constants of the smooth JPEG size (src/ops/jpeg_size) to real sizes, and measure the agreement.

    pip install numpy pillow torch diffusers
    python tools/fit_jpeg.py

Real sizes are PIL's at quality 95 (libjpeg: 4:2:0, standard Huffman tables). The pictures are generated or cut from
docs/img; half of them are for the fit, the other half for the correlations that are printed.
"""
import io, os
import numpy as np
from PIL import Image, ImageFilter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LUMA = np.array([16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
                 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99]).reshape(8, 8)
CHROMA = np.full((8, 8), 99)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
DCT = np.array([[np.sqrt((1 if k == 0 else 2) / 8) * np.cos(np.pi * (2 * n + 1) * k / 16) for n in range(8)] for k in range(8)])
SCALE, NONZERO = 0.5, 0.5  # of |coefficient| / step: where the logarithm bends, and where a coefficient counts as half non-zero


def tables(quality=95):
    scale = 200 - 2 * quality
    return [np.clip((t * scale + 50) // 100, 1, 255) for t in (LUMA, CHROMA)]


def size(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.tell()


def blocks(plane, table):
    """(H, W) -> coefficients in steps of the table, (rows, columns, 8, 8)."""
    h, w = plane.shape
    tiles = plane.reshape(h // 8, 8, w // 8, 8).transpose(0, 2, 1, 3)
    return DCT @ tiles @ DCT.T / table


def features(picture):
    """What is counted, linearly in the constants: header, blocks, and (bits, non-zeros) of luma and chroma, bits of the DCs' differences."""
    x = np.asarray(picture.convert("RGB"), dtype=np.float64)
    h, w, _ = x.shape
    x = np.pad(x, ((0, -h % 16), (0, -w % 16), (0, 0)), mode="edge")
    r, g, b = np.moveaxis(x, 2, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b - 128
    half = lambda p: p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3))
    cb, cr = half(-0.168735892 * r - 0.331264108 * g + 0.5 * b), half(0.5 * r - 0.418687589 * g - 0.081312411 * b)
    luma, chroma = tables()
    out = np.zeros(7)
    out[0] = 1
    for plane, table, first in ((y, luma, 2), (cb, chroma, 4), (cr, chroma, 4)):
        u = blocks(plane, table)
        out[1] += u.shape[0] * u.shape[1]
        ac = u.reshape(-1, 64)[:, 1:] ** 2
        out[first] += 0.5 * np.log2(1 + ac / SCALE**2).sum()
        out[first + 1] += (ac / (ac + NONZERO**2)).sum()
        dc = np.diff(u[..., 0, 0], axis=1, prepend=0)
        out[6] += 0.5 * np.log2(1 + dc**2 / SCALE**2).sum()
    return out


def cut(name, side, rng):
    sheet = Image.open(os.path.join(ROOT, "docs", "img", name)).convert("RGB")
    for _ in range(30):
        left, top = rng.integers(0, sheet.width - side), rng.integers(0, sheet.height - side)
        yield sheet.crop((left, top, left + side, top + side))


def decoded(rng):
    """The embedded decoder's pictures of renders with noise in their latents, and of noise."""
    import torch
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(os.path.join(ROOT, "assets", "emoji-sd", "vae"))
    torch.manual_seed(0)
    sheet = np.asarray(Image.open(os.path.join(ROOT, "docs", "img", "emoji-sd-trained.png")).convert("RGB"))
    tiles = [sheet[r * 66:r * 66 + 64, c * 66:c * 66 + 64] for r in range(3) for c in range(15)]
    x = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        spread = z.std()
        for level in (0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
            noisy = z + level * spread * torch.randn_like(z)
            for image in vae.decode(noisy).sample:
                yield Image.fromarray(((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def pictures(rng):
    """(kind, picture)"""
    sides = [(64, 64)] * 4 + [(128, 96), (50, 37), (17, 90), (200, 200)]
    for i in range(160):
        h, w = sides[i % len(sides)]
        noise = rng.normal(128, 60 * rng.random(), (h, w, 1 if i % 3 == 0 else 3)).repeat(3 if i % 3 == 0 else 1, 2)
        picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        yield "noise", picture
        yield "blurred noise", picture.filter(ImageFilter.GaussianBlur(0.3 + 2 * rng.random()))
        y, x = np.mgrid[:h, :w] / 64
        ramp = np.stack([128 + 127 * rng.random() * np.sin(rng.normal(0, 4) * x + rng.normal(0, 4) * y + rng.normal()) for _ in range(3)], 2)
        yield "gradients", Image.fromarray(ramp.clip(0, 255).astype(np.uint8))
    for name in sorted(os.listdir(os.path.join(ROOT, "docs", "img"))):
        if name.endswith(".png"):
            for i, tile in enumerate(cut(name, 64 if "emoji-sd" in name else 100, rng)):
                yield "tiles of docs/img", tile
                if i % 3 == 0:
                    yield "blurred tiles", tile.filter(ImageFilter.GaussianBlur(0.3 + 2 * rng.random()))
    for picture in decoded(rng):
        yield "decoded latents", picture


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1]


def ranks(x):
    return np.argsort(np.argsort(x))


def main():
    rng = np.random.default_rng(0)
    kinds, rows, sizes = [], [], []
    for kind, picture in pictures(rng):
        kinds.append(kind)
        rows.append(features(picture))
        sizes.append(size(picture))
    kinds, rows, sizes = np.array(kinds), np.array(rows), np.array(sizes, dtype=np.float64)
    fit = np.arange(len(sizes)) % 2 == 0
    weight = 1 / sizes[fit]  # the relative error is what is made small
    constants = np.linalg.lstsq(rows[fit] * weight[:, None], np.ones(fit.sum()), rcond=None)[0]
    names = ("header", "block", "luma bits", "luma non-zero", "chroma bits", "chroma non-zero", "DC bits")
    print("bytes for each:", ", ".join(f"{n} {c:.5g}" for n, c in zip(names, constants)))
    found = rows @ constants
    for kind in ["all", *dict.fromkeys(kinds)]:
        at = ~fit & ((kinds == kind) | (kind == "all"))
        error = np.abs(found[at] / sizes[at] - 1)
        print(f"{kind:20} {at.sum():4} pictures, {sizes[at].min() / 1e3:.2f} to {sizes[at].max() / 1e3:.2f} kB: Pearson {correlation(found[at], sizes[at]):.4f}, "
              f"Spearman {correlation(ranks(found[at]), ranks(sizes[at])):.4f}, relative error {error.mean():.3f} (worst {error.max():.3f})")
    small = ~fit & (rows[:, 1] == 96)
    print(f"64x64 alone: Pearson {correlation(found[small], sizes[small]):.4f}, Spearman {correlation(ranks(found[small]), ranks(sizes[small])):.4f}")


if __name__ == "__main__":
    main()
