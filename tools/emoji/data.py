"""The data: emoji artwork from npm packages, composed into captioned 64x64 scenes of one to five animals.

A scene has one style, one background, one or two kinds of animals, and sometimes a position: "three flat cats on the
beach", "a glossy cat on the left of two glossy dogs, in the snow". Its combination is what a caption says apart from
the position. A hash of the combination decides whether it is held out (no stage ever trains on it) or else in which half it
is: A trains the reward models, B the judges. Scenes follow from the seeds below and are not committed.
"""
import io, json, math, multiprocessing, os, shutil, subprocess, tarfile, textwrap, zlib
from typing import NamedTuple
import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SEED = 20
PICTURES, HELD_OUT_PICTURES = 80000, 3000
HELD_OUT_PERCENT = 8
MOST = 5  # animals of a scene

PACKAGES = {  # style word of the captions -> npm package and the version the weights were made from
    "cartoon": ("@iconify-json/noto", "1.2.9"),
    "retro": ("@iconify-json/noto-v1", "1.2.5"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "glossy": ("@iconify-json/fluent-emoji", "1.2.7"),
    "simple": ("@iconify-json/fxemoji", "1.2.2"),
}
STYLES = list(PACKAGES)
ANIMALS = {  # name -> (icon of Noto and Fluent, icon of FxEmoji): of face and body the one that is clearer when small
    "cat": ("cat-face", "cat"), "dog": ("dog-face", "dog"), "rabbit": ("rabbit-face", "bunny"), "pig": ("pig-face", "pig"),
    "cow": ("cow-face", "cowface"), "bear": ("bear", "bear"), "fox": ("fox", "foxgrin"), "panda": ("panda", "pandaface"),
    "frog": ("frog", "frog"), "monkey": ("monkey", "monkey"), "elephant": ("elephant", "elephant"), "sheep": ("ewe", "sheep"),
    "penguin": ("penguin", "penguin"), "chicken": ("chicken", "chicken"), "turtle": ("turtle", "turtle"),
    "octopus": ("octopus", "octopus"), "bee": ("honeybee", "honeybee"), "whale": ("whale", "whale"), "snail": ("snail", "snail"),
    "ladybug": ("lady-beetle", "ladybeetle"),
}
KINDS = list(ANIMALS)
PLURALS = {"fox": "foxes", "octopus": "octopuses", "sheep": "sheep"}  # of the others: + s
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}

COLOURS = {
    "red": (208, 58, 52), "yellow": (246, 214, 84), "green": (78, 164, 88), "blue": (64, 108, 206),
    "purple": (134, 88, 186), "pink": (244, 172, 204), "white": (244, 245, 248), "gray": (140, 143, 148),
}
SCENES = {
    "beach": "on the beach", "night": "at night", "sunset": "at sunset", "snow": "in the snow",
    "meadow": "on a meadow", "sea": "in the sea", "desert": "in the desert", "forest": "in the forest",
}
BACKGROUNDS = [*COLOURS, *SCENES]
# Where one kind is in the picture, or where the first kind is as seen from the second.
POSITIONS = {"left": ("on the left", "on the left of"), "right": ("on the right", "on the right of"),
             "top": ("at the top", "above"), "bottom": ("at the bottom", "below")}
PLACES = [None, *POSITIONS]


class Label(NamedTuple):
    """What a scene shows. Stored as a row of int8: indices into STYLES, KINDS, BACKGROUNDS, PLACES; -1 and 0 for no second kind."""
    style: int
    kind: int
    count: int
    second: int  # kind
    second_count: int
    background: int
    place: int  # 0: the caption says nothing of it

    @property
    def total(self):
        return self.count + self.second_count

    @property
    def parts(self):
        """[(kind, count)] of the one or two kinds, in the caption's order."""
        return [(self.kind, self.count)] + [(self.second, self.second_count)] * (self.second >= 0)


# ---------------------------------------------------------------- captions

def some(count, kind, style=None):
    """ "a cat", "an octopus", "two flat cats". """
    words = " ".join(filter(None, [style, kind if count == 1 else PLURALS.get(kind, kind + "s")]))
    return f"{NUMBERS[count]} {words}" if count > 1 else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def background_phrase(background):
    return SCENES.get(background) or f"on a {background} background"


def caption(label, style=True, background=True, place=True):
    """The caption, or one of its shorter forms, which do not name style, background or position."""
    label = Label(*map(int, label))
    parts = [some(n, KINDS[k], STYLES[label.style] if style else None) for k, n in label.parts]
    position = POSITIONS[PLACES[label.place]][len(parts) - 1] if place and label.place else None
    what = (f" {position or 'and'} ").join(parts) if len(parts) == 2 else " ".join(filter(None, [parts[0], position]))
    return what + ((", " if position else " ") + background_phrase(BACKGROUNDS[label.background]) if background else "")


def words():
    """Every word of the captions, and the comma: what the tokenizer needs."""
    phrases = ["a an and ,", *NUMBERS.values(), *STYLES, *KINDS, *(some(2, k) for k in KINDS), *map(background_phrase, BACKGROUNDS), *(p for ps in POSITIONS.values() for p in ps)]
    return sorted({w for p in phrases for w in p.split()})


# ---------------------------------------------------------------- combinations

def combination(label):
    what = " ".join(sorted(f"{n} {KINDS[k]}" for k, n in label.parts))
    return f"{STYLES[label.style]}: {what}, {BACKGROUNDS[label.background]}"


def bucket(text, size=100):
    return zlib.crc32(text.encode()) % size


def is_held_out(label):
    return bucket(combination(label)) < HELD_OUT_PERCENT


def half(label):
    """0 for A (reward models), 1 for B (judges)."""
    return bucket("half of " + combination(label), 2)


def draw(rng, held):
    """A random label that is held out, or that is not."""
    while True:
        style, background = int(rng.integers(len(STYLES))), int(rng.integers(len(BACKGROUNDS)))
        kind, second = map(int, rng.choice(len(KINDS), 2, replace=False))
        total, place = 1, 0
        if rng.random() >= 0.5:
            total = int(rng.choice([2, 3, 4, 5], p=[0.34, 0.26, 0.2, 0.2]))
        two = total > 1 and rng.random() < 0.5
        count = int(rng.integers(1, total)) if two else total
        if total <= (4 if two else 3) and rng.random() < (0.5 if two else 0.15):
            place = int(rng.integers(1, len(PLACES)))
        label = Label(style, kind, count, second if two else -1, total - count, background, place)
        if is_held_out(label) == held:
            return label


# ---------------------------------------------------------------- artwork

def download(folder):
    """`npm pack` of every package; returns {style: unpacked folder}."""
    os.makedirs(folder, exist_ok=True)
    out = {}
    for style, (name, version) in PACKAGES.items():
        flat = name.lstrip("@").replace("/", "-") + "-" + version
        unpacked = os.path.join(folder, flat)
        if not os.path.isdir(unpacked):
            os.makedirs(unpacked + ".tmp", exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=unpacked + ".tmp", check=True)
            with tarfile.open(os.path.join(unpacked + ".tmp", flat + ".tgz")) as tar:
                tar.extractall(unpacked + ".tmp", filter="data")
            shutil.move(os.path.join(unpacked + ".tmp", "package"), unpacked)
            shutil.rmtree(unpacked + ".tmp")
        out[style] = unpacked
    return out


def rasterise(icons, key, size=320):
    """An icon of an Iconify collection as RGBA, cropped to what is visible, its longer side 160 pixels."""
    import resvg_py
    key = icons.get("aliases", {}).get(key, {}).get("parent", key)
    icon = icons["icons"][key]
    box = f"0 0 {icon.get('width', icons.get('width', 16))} {icon.get('height', icons.get('height', 16))}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)))).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox())
    scale = 160 / max(image.size)
    return image.resize([max(1, round(s * scale)) for s in image.size], Image.LANCZOS)


def artwork(folder):
    """{(style index, kind index): RGBA picture}; cached as PNG files beside the packages."""
    cache = os.path.join(folder, "artwork")
    os.makedirs(cache, exist_ok=True)
    out, icons = {}, {}
    for s, style in enumerate(STYLES):
        for k, kind in enumerate(KINDS):
            path = os.path.join(cache, f"{style}-{kind}.png")
            if not os.path.exists(path):
                if style not in icons:
                    with open(os.path.join(download(os.path.join(folder, "packages"))[style], "icons.json")) as f:
                        icons[style] = json.load(f)
                rasterise(icons[style], ANIMALS[kind][style == "simple"]).save(path + ".tmp", "PNG")
                os.replace(path + ".tmp", path)
            with Image.open(path) as image:
                out[s, k] = image.convert("RGBA")
    return out


# ---------------------------------------------------------------- pictures

def gradient(top, bottom):
    t = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    return (1 - t) * np.array(top, np.float32) + t * np.array(bottom, np.float32) + np.zeros((SIZE, SIZE, 1), np.float32)


def paint(out, inside, colour):
    """A colour where `inside`, a signed distance in pixels, is positive, with a soft edge of one pixel."""
    a = np.clip(inside + 0.5, 0, 1)[..., None]
    out += a * (np.array(colour, np.float32) - out)


def backdrop(background, rng):
    """A 64x64 picture, float, 0..255: one colour, or a calm scene of a few large smooth shapes."""
    if background in COLOURS:
        return np.broadcast_to(np.array(COLOURS[background], np.float32) + rng.uniform(-8, 8), (SIZE, SIZE, 3)).copy()
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    horizon, shift = rng.uniform(34, 42), rng.uniform(0, 2 * np.pi)
    circle = lambda cx, cy, r: r - np.hypot(x - cx, y - cy)
    hills = lambda level, height, length, phase=0: y - level - height * np.sin(x / length + shift + phase)
    if background == "beach":
        out = gradient((120, 196, 246), (200, 232, 250))
        paint(out, y - horizon + 9, (44, 130, 190))
        paint(out, hills(horizon, 1.2, 11), (234, 208, 144))
    elif background == "night":
        out = gradient((16, 20, 58), (50, 50, 116))
        for cx in (9, 24, 39):
            paint(out, circle(cx + rng.uniform(-4, 4), rng.uniform(5, 30), 1.3), (226, 226, 214))
        paint(out, circle(54, 10, 6), (250, 240, 190))
        paint(out, hills(horizon + 14, 2, 12), (26, 30, 60))
    elif background == "sunset":
        out = gradient((96, 60, 140), (255, 168, 84))
        paint(out, circle(rng.uniform(12, 52), horizon, 10), (255, 228, 128))
        paint(out, y - horizon, (88, 46, 72))
    elif background == "snow":
        out = gradient((160, 190, 220), (206, 222, 236))
        paint(out, hills(horizon - 4, 4, 8, 2), (222, 232, 242))
        paint(out, hills(horizon + 4, 3, 10), (246, 249, 252))
    elif background == "meadow":
        out = gradient((134, 200, 246), (204, 232, 250))
        paint(out, hills(horizon - 4, 4, 8, 2), (134, 196, 96))
        paint(out, hills(horizon + 4, 3, 10), (104, 176, 70))
    elif background == "sea":
        out = gradient((96, 190, 230), (18, 70, 146))
        for level in (12, 28, 44):
            wave = hills(level + rng.uniform(-3, 3), 1.5, 4, level)
            paint(out, 1.0 - np.abs(wave), out.mean((0, 1)) + 20)
    elif background == "desert":
        out = gradient((250, 220, 170), (252, 236, 206))
        paint(out, circle(11, 10, 6), (255, 244, 200))
        paint(out, hills(horizon - 4, 5, 9, 2), (226, 168, 96))
        paint(out, hills(horizon + 5, 4, 12), (206, 142, 74))
    elif background == "forest":
        out = gradient((150, 196, 160), (96, 152, 104))
        for cx in (4, 20, 36, 52):
            cx, top = cx + rng.uniform(0, 8), rng.uniform(4, 14)
            paint(out, np.minimum((y - top) * 0.4 - np.abs(x - cx), horizon + 4 - y), (44, 104, 66))
        paint(out, hills(horizon + 3, 2, 11), (66, 116, 58))
    return out


SIDES = {1: (36, 50), 2: (25, 31), 3: (22, 28), 4: (21, 25), 5: (20, 23)}  # longer side of an animal, by the number of animals


def region(label, index, margin):
    """((left, right), (top, bottom)): where the centre of an animal of the first (0) or second kind may be."""
    whole, name = (0, SIZE), PLACES[label.place]
    if name is None:
        return whole, whole
    first = index == 0
    low = name in ("left", "top")
    if label.second < 0:
        part = (0, 0.42 * SIZE) if low else (0.58 * SIZE, SIZE)
    else:  # either side of a line, which leaves more room to the more numerous kind
        share = label.count / label.total
        line = SIZE * (0.34 + 0.32 * (share if low else 1 - share))
        part = (0, line - margin) if low == first else (line + margin, SIZE)
    return (part, whole) if name in ("left", "right") else (whole, part)


def place(label, extents, rng):
    """Boxes (left, top, width, height) in pixels that hardly overlap; `extents`: width and height of each artwork, the longer one 1."""
    low, high = SIDES[label.total]
    if label.total == 1 and label.place:
        low, high = 26, 34
    kinds = [i for i, (_, n) in enumerate(label.parts) for _ in range(n)]
    shrink = 1.0
    while True:
        boxes = []
        for i in kinds:
            side = rng.uniform(low, high) * shrink
            w, h = (max(4, round(side * e)) for e in extents[i])
            (x0, x1), (y0, y1) = region(label, i, 6 if label.total < 4 else 4)
            x0, x1, y0, y1 = max(x0, w / 2 + 1), min(x1, SIZE - 1 - w / 2), max(y0, h / 2 + 1), min(y1, SIZE - 1 - h / 2)
            for _ in range(40):
                if x0 > x1 or y0 > y1:
                    break
                left, top = int(rng.uniform(x0, x1) - w / 2), int(rng.uniform(y0, y1) - h / 2)
                shared = (max(0, min(left + w, l + ww) - max(left, l)) * max(0, min(top + h, t + hh) - max(top, t)) / min(w * h, ww * hh) for l, t, ww, hh in boxes)
                if max(shared, default=0) < 0.1:
                    boxes.append((left, top, w, h))
                    break
            else:
                break
        if len(boxes) == len(kinds):
            return boxes
        shrink *= 0.985


def compose(label, art, scaled, rng, behind=None):
    """(picture, boxes): uint8 64x64x3, and MOST rows (cx, cy, w, h) in 0..1, zero where there is no animal. `scaled` caches.
    `behind`: a picture in the place of the label's background."""
    sizes = [art[label.style, k].size for k, _ in label.parts]
    placed = place(label, [(w / max(w, h), h / max(w, h)) for w, h in sizes], rng)
    behind = backdrop(BACKGROUNDS[label.background], rng) if behind is None else behind
    picture = Image.fromarray(np.clip(behind, 0, 255).round().astype(np.uint8))
    boxes = np.zeros((MOST, 4), np.float32)
    kinds = [k for k, n in label.parts for _ in range(n)]
    for j in rng.permutation(len(placed)):
        left, top, w, h = placed[j]
        key = label.style, kinds[j], w, h
        if key not in scaled:
            scaled[key] = art[key[:2]].resize((w, h), Image.LANCZOS, reducing_gap=3)
        sprite = scaled[key]
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.FLIP_LEFT_RIGHT)
        picture.paste(sprite, (left, top), sprite)
        boxes[j] = (left + w / 2) / SIZE, (top + h / 2) / SIZE, w / SIZE, h / SIZE
    return np.asarray(picture), boxes


class Scenes(NamedTuple):
    """N scenes. `half` is 0 for A, 1 for B. Animals of the first kind come first in `boxes` and `classes`."""
    pictures: np.ndarray  # (N, 64, 64, 3) uint8
    labels: np.ndarray  # (N, 7) int8, the fields of Label
    boxes: np.ndarray  # (N, 5, 4) f32: cx, cy, w, h in 0..1
    classes: np.ndarray  # (N, 5) int8: index into KINDS, -1 where there is no animal
    half: np.ndarray  # (N,) int8

    def counts(self):
        """(N, 20): how many of each animal."""
        return (self.classes[:, :, None] == np.arange(len(KINDS))).sum(1)


def render(folder, name, count, held, part=0, parts=1):
    """Every `parts`th scene from `part` on, into the files that `make` created. A scene depends on its seed alone."""
    art, scaled = artwork(folder), {}
    arrays = Scenes(*(np.load(path(folder, name, f), mmap_mode="r+") for f in Scenes._fields))
    for i in range(part, count, parts):
        rng = np.random.default_rng([SEED, held, i])
        label = draw(rng, held)
        arrays.pictures[i], arrays.boxes[i] = compose(label, art, scaled, rng)
        arrays.labels[i], arrays.half[i] = label, half(label)
        arrays.classes[i] = ([k for k, n in label.parts for _ in range(n)] + [-1] * MOST)[:MOST]


def path(folder, name, field):
    return os.path.join(folder, f"{name}-{field}.npy")


def make(folder, log, processes=2):
    """Render train-*.npy and heldout-*.npy."""
    art = artwork(folder)
    for name, count, held in (("train", PICTURES, False), ("heldout", HELD_OUT_PICTURES, True)):
        for field, dtype, shape in zip(Scenes._fields, (np.uint8, np.int8, np.float32, np.int8, np.int8), ((SIZE, SIZE, 3), (len(Label._fields),), (MOST, 4), (MOST,), ())):
            np.lib.format.open_memmap(path(folder, name, field), "w+", dtype, (count, *shape)).flush()
        with multiprocessing.Pool(processes) as pool:
            pool.starmap(render, [(folder, name, count, held, p, processes) for p in range(processes)])
    train, test = load(folder), load_held_out(folder)
    log(stage="data", artworks=len(art), pictures=len(train.labels), held_out=len(test.labels), half_b=float(train.half.mean()),
        totals=np.bincount(train.labels[:, 2] + train.labels[:, 4])[1:].tolist(), crc32=zlib.crc32(train.pictures[:1000].tobytes()))
    sheet(test.pictures[:80], 10, os.path.join(folder, "sheets", "data.png"), 2, [caption(l) for l in test.labels[:80]])


def load(folder, name="train"):
    return Scenes(*(np.load(path(folder, name, f), mmap_mode="r" if f == "pictures" else None) for f in Scenes._fields))


def load_held_out(folder):
    return load(folder, "heldout")


def prompts(held, seed=SEED):
    """Prompts of the shipped lists as {"prompt", "count", "object"}: two of each animal and count from 1 to 5."""
    rng, out = np.random.default_rng([seed, held, 1 << 20]), []
    for kind, name in enumerate(KINDS):
        for count in range(1, MOST + 1):
            own = [l for s in range(len(STYLES)) for b in range(len(BACKGROUNDS)) if is_held_out(l := Label(s, kind, count, -1, 0, b, 0)) == held]
            out += [{"prompt": caption(own[i]), "count": count, "object": name} for i in rng.permutation(len(own))[:2]]
    return out


def sheet(pictures, columns, path, zoom=1, captions=None):
    """A contact sheet of uint8 pictures, with their captions below them where there are any."""
    rows, line = math.ceil(len(pictures) / columns), 38 if captions else 2
    side = SIZE * zoom + 2
    out = Image.new("RGB", (columns * side, rows * (SIZE * zoom + line)), (255, 255, 255))
    pen = ImageDraw.Draw(out)
    for i, p in enumerate(pictures):
        at = (i % columns) * side, (i // columns) * (SIZE * zoom + line)
        out.paste(Image.fromarray(np.asarray(p)).resize((SIZE * zoom, SIZE * zoom), Image.NEAREST), at)
        if captions:
            pen.text((at[0], at[1] + SIZE * zoom), "\n".join(textwrap.wrap(captions[i], 11 * zoom)), fill=(0, 0, 0), spacing=0)
    out.save(path)
