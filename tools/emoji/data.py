"""The data: emoji artwork from npm packages, composed into captioned 64x64 pictures.

Every picture is "a {style} {name} {background}". Which (style, animal, background) combinations are held out, which
pictures are composed and how each is jittered follows from the seeds below; the pictures themselves are not committed.
"""
import io, json, math, os, random, shutil, subprocess, tarfile, zlib
import numpy as np
from PIL import Image

SIZE = 64
SEED = 20
PICTURES = 48000
ANIMAL_SHARE = 0.7
HELD_OUT_PER_ANIMAL = 4

PACKAGES = {  # style word of the captions -> npm package and the version the weights were made from
    "cartoon": ("@iconify-json/noto", "1.2.9"),
    "retro": ("@iconify-json/noto-v1", "1.2.5"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "glossy": ("@iconify-json/fluent-emoji", "1.2.7"),
    "simple": ("@iconify-json/fxemoji", "1.2.2"),
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0"),
}
NAMES = ("unicode-emoji-json", "0.9.0")
STYLES = list(PACKAGES)

# The animals of AlignProp's prompt list. Where the emoji has another name, that name follows a colon.
ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep:ewe deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant "
    "butterfly fish shark whale dolphin squirrel:chipmunk mouse rat snake turtle frog chicken duck goose bee:honeybee pig turkey "
    "fly llama camel:two-hump_camel bat gorilla hedgehog kangaroo"
).split()
# Everything else, drawn less often: faces of some of the animals, other animals, food, plants, things.
OTHERS = (
    "cat_face dog_face horse_face monkey_face rabbit_face tiger_face cow_face pig_face mouse_face "
    "penguin elephant panda koala owl octopus crab snail unicorn giraffe dragon "
    "apple:red_apple banana pear grapes strawberry lemon pineapple watermelon carrot pizza hamburger doughnut "
    "cactus palm_tree sunflower rose tulip mushroom car:automobile bus rocket sailboat house castle star sun cloud snowman "
    "umbrella heart:red_heart guitar key bell crown balloon"
).split()
FXEMOJI = {  # the names of this set are its own
    "cat": "catside", "dog": "dogside", "rabbit": "bunnyside", "tiger": "tigerside", "mouse": "mouseside", "pig": "pigside",
    "wolf": "wolfface", "squirrel": "chipmunk", "bee": "honeybee", "camel": "bactriancamel", "cat face": "cat", "dog face": "dog",
    "horse face": "horseface", "monkey face": "monkeyface", "rabbit face": "bunny", "tiger face": "tiger", "cow face": "cowface",
    "pig face": "pig", "mouse face": "mouse", "panda": "pandaface", "dragon": "dragonside", "apple": "redapple", "pizza": "sliceofpizza",
    "palm tree": "palmtree", "car": "automobile", "house": "housebuilding", "castle": "europeancastle", "star": "whitemediumstar",
    "sun": "sunrays", "snowman": "snowmanwithoutsnow", "heart": "redheart", "bell": "ringingbell",
}

COLOURS = {
    "red": (214, 52, 48), "orange": (240, 140, 40), "yellow": (246, 214, 70), "green": (72, 168, 84), "blue": (62, 110, 214),
    "purple": (136, 84, 190), "pink": (242, 154, 190), "white": (246, 246, 246), "black": (24, 24, 26), "gray": (140, 142, 146),
}
SCENES = {"beach": "on the beach", "night": "in the night sky", "sunset": "at sunset", "snow": "in the snow", "meadow": "on a meadow", "sea": "in the sea"}
BACKGROUNDS = [*COLOURS, *SCENES]


def concepts():
    """[(name in captions, name in Unicode, is it an animal of the list)]"""
    out = []
    for group, animal in ((ANIMALS, True), (OTHERS, False)):
        for entry in group:
            name, _, unicode_name = entry.partition(":")
            out.append((name.replace("_", " "), (unicode_name or name).replace("_", " "), animal))
    return out


CONCEPTS = concepts()


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def background_phrase(background):
    return SCENES.get(background) or f"on {article(background)} {background} background"


def caption(style, name, background):
    """The caption, or one of its shorter forms where style or background is None."""
    return " ".join(filter(None, [article(style or name), style, name, background and background_phrase(background)]))


# ---------------------------------------------------------------- artwork

def download(folder):
    """`npm pack` of every package; returns {package name: unpacked folder}."""
    os.makedirs(folder, exist_ok=True)
    out = {}
    for name, version in [*PACKAGES.values(), NAMES]:
        flat = name.lstrip("@").replace("/", "-") + "-" + version
        unpacked = os.path.join(folder, flat)
        if not os.path.isdir(unpacked):
            archive = os.path.join(folder, flat + ".tgz")
            if not os.path.exists(archive):
                os.makedirs(unpacked + ".tmp", exist_ok=True)
                subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=unpacked + ".tmp", check=True)
                os.replace(os.path.join(unpacked + ".tmp", flat + ".tgz"), archive)
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked + ".tmp", filter="data")
            shutil.move(unpacked + ".tmp/package", unpacked)
            os.rmdir(unpacked + ".tmp")
        out[name] = unpacked
    return out


def rasterise(svg, size):
    import resvg_py
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)))).convert("RGBA")


def centred(image, size=160):
    """The artwork cropped to what is visible and put in the middle of a square."""
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    image = image.crop(box)
    scale = size / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size], Image.LANCZOS)
    out = Image.new("RGBA", (size, size))
    out.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return out


def artwork(folder):
    """{(style, name): RGBA picture}; cached as PNG files beside the packages."""
    packages = download(os.path.join(folder, "packages"))
    cache = os.path.join(folder, "artwork")
    os.makedirs(cache, exist_ok=True)
    points = {}
    with open(os.path.join(packages[NAMES[0]], "data-by-emoji.json")) as f:
        for char, entry in json.load(f).items():
            points[entry["name"]] = "-".join(f"{ord(c):x}" for c in char)
    out = {}
    for style, (package, _) in PACKAGES.items():
        icons = None
        for name, unicode_name, _ in CONCEPTS:
            path = os.path.join(cache, f"{style}-{name}.png".replace(" ", "_"))
            if not os.path.exists(path):
                if style == "3d":
                    point = points[unicode_name]
                    files = [os.path.join(packages[package], "assets", p + ".webp") for p in (point, point.replace("-fe0f", ""))]
                    image = next((Image.open(f).convert("RGBA") for f in files if os.path.exists(f)), None)
                else:
                    if icons is None:
                        with open(os.path.join(packages[package], "icons.json")) as f:
                            icons = json.load(f)
                    key = FXEMOJI.get(name, name) if style == "simple" else unicode_name.replace(" ", "-")
                    key = icons.get("aliases", {}).get(key, {}).get("parent", key)
                    icon = icons["icons"].get(key)
                    w, h = (icon or {}).get("width", icons["width"]), (icon or {}).get("height", icons["height"])
                    image = icon and rasterise(f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {w} {h}">{icon["body"]}</svg>', 320)
                if image is None:
                    continue
                centred(image).save(path + ".tmp", "PNG")
                os.replace(path + ".tmp", path)
            out[style, name] = Image.open(path).convert("RGBA")
    return out


# ---------------------------------------------------------------- combinations

def held_out(art):
    """The (style, animal, background) triples that no stage ever trains on, four for each animal."""
    rng = random.Random(SEED)
    out = []
    for name, _, animal in CONCEPTS:
        if animal:
            own = [(s, name, b) for s in STYLES if (s, name) in art for b in BACKGROUNDS]
            out += rng.sample(own, HELD_OUT_PER_ANIMAL)
    return out


def prompt_lists(art):
    """(training prompts, held-out prompts): two of each for every animal."""
    held = held_out(art)
    rng = random.Random(SEED + 1)
    train = []
    for name, _, animal in CONCEPTS:
        if animal:
            own = [(s, name, b) for s in STYLES if (s, name) in art for b in BACKGROUNDS if (s, name, b) not in held]
            train += rng.sample(own, 2)
    return [caption(*t) for t in train], [caption(*t) for i, t in enumerate(held) if i % HELD_OUT_PER_ANIMAL < 2]


# ---------------------------------------------------------------- pictures

def gradient(top, bottom, rows):
    t = np.linspace(0, 1, rows)[:, None, None]
    return np.broadcast_to((1 - t) * np.array(top, np.float32) + t * np.array(bottom, np.float32), (rows, SIZE, 3)).copy()


def backdrop(background, rng):
    """A 64x64 picture, float, 0..255."""
    if background in COLOURS:
        shade = np.array(COLOURS[background], np.float32) + rng.uniform(-10, 10)
        return np.broadcast_to(shade, (SIZE, SIZE, 3)).copy()
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    horizon = int(rng.integers(34, 43))
    if background == "beach":
        out = gradient((120, 196, 246), (196, 230, 250), SIZE)
        out[horizon - 8:horizon] = (44, 130, 190)
        out[horizon:] = gradient((238, 214, 150), (222, 186, 118), SIZE - horizon)
    elif background == "night":
        out = gradient((14, 18, 52), (44, 44, 104), SIZE)
        for _ in range(14):
            r, c = rng.integers(1, SIZE - 1, 2)
            out[r, c] = (250, 250, 220)
            out[r, c - 1:c + 2] = np.maximum(out[r, c - 1:c + 2], 150)
        moon = (x - 53) ** 2 + (y - 10) ** 2 < 36
        out[moon] = (250, 240, 190)
    elif background == "sunset":
        out = gradient((86, 54, 130), (252, 150, 70), SIZE)
        sun = (x - rng.integers(8, 56)) ** 2 + (y - horizon) ** 2 < 100
        out[sun] = (255, 226, 120)
        out[horizon:] = gradient((120, 60, 80), (58, 32, 62), SIZE - horizon)
    elif background == "snow":
        out = gradient((170, 196, 220), (206, 220, 234), SIZE)
        hill = y > horizon + 3 * np.sin(x / 9 + rng.uniform(0, 6))
        out[hill] = (244, 248, 252)
        for _ in range(16):
            r, c = rng.integers(0, SIZE - 1, 2)
            out[r:r + 2, c:c + 2] = (255, 255, 255)
    elif background == "meadow":
        out = gradient((134, 200, 246), (204, 232, 250), SIZE)
        hill = y > horizon + 3 * np.sin(x / 10 + rng.uniform(0, 6))
        out[hill] = (104, 176, 70)
        for _ in range(12):
            r, c = rng.integers(horizon + 4, SIZE - 1), rng.integers(0, SIZE - 1)
            out[r:r + 2, c:c + 2] = [(250, 240, 110), (240, 120, 150), (250, 250, 250)][rng.integers(3)]
    elif background == "sea":
        out = gradient((90, 180, 226), (18, 66, 140), SIZE)
        waves = np.sin((x + rng.uniform(0, 30)) / 4 + np.floor(y / 8) * 2) > 0.93
        out[waves & (y % 8 < 1)] += 40
    return out


def compose(art, background, rng):
    """The artwork over the background at a random size and place; uint8, 64x64x3."""
    side = int(rng.integers(46, 55))
    left, top = ((SIZE - side) // 2 + rng.integers(-3, 4, 2)).tolist()
    layer = Image.new("RGBA", (SIZE, SIZE))
    layer.paste(art.resize((side, side), Image.LANCZOS, reducing_gap=3), (left, top))
    layer = np.asarray(layer).astype(np.float32)
    alpha = layer[..., 3:] / 255
    return np.clip(layer[..., :3] * alpha + backdrop(background, rng) * (1 - alpha), 0, 255).round().astype(np.uint8)


def make(folder, log):
    """Write pictures.npy and labels.npy (style, concept, background of each picture), and heldout.npz likewise."""
    art = artwork(folder)
    held = held_out(art)
    combos = {True: [], False: []}
    index = {name: i for i, (name, _, _) in enumerate(CONCEPTS)}
    for name, _, animal in CONCEPTS:
        combos[animal].append([(s, name, b) for s in STYLES if (s, name) in art for b in BACKGROUNDS if (s, name, b) not in set(held)])
    rng = np.random.default_rng(SEED)
    pictures = np.lib.format.open_memmap(os.path.join(folder, "pictures.npy"), "w+", np.uint8, (PICTURES, SIZE, SIZE, 3))
    labels = np.zeros((PICTURES, 3), np.int16)

    def put(i, combo, into, labels_into):
        style, name, background = combo
        into[i] = compose(art[style, name], background, rng)
        labels_into[i] = STYLES.index(style), index[name], BACKGROUNDS.index(background)

    for i in range(PICTURES):  # every concept of a kind equally often, whatever number of styles it has
        kind = combos[bool(rng.random() < ANIMAL_SHARE)]
        own = kind[rng.integers(len(kind))]
        put(i, own[rng.integers(len(own))], pictures, labels)
    pictures.flush()
    np.save(os.path.join(folder, "labels.npy"), labels)
    test, test_labels = np.zeros((len(held), SIZE, SIZE, 3), np.uint8), np.zeros((len(held), 3), np.int16)
    for i, combo in enumerate(held):
        put(i, combo, test, test_labels)
    np.savez(os.path.join(folder, "heldout.npz"), pictures=test, labels=test_labels)
    log(stage="data", artworks=len(art), concepts=len(CONCEPTS), pictures=PICTURES, held_out=len(held),
        missing={s: [n for n, _, _ in CONCEPTS if (s, n) not in art] for s in STYLES}, crc32=zlib.crc32(pictures[:1000].tobytes()))


def load(folder):
    return np.load(os.path.join(folder, "pictures.npy"), mmap_mode="r"), np.load(os.path.join(folder, "labels.npy"))


def load_held_out(folder):
    z = np.load(os.path.join(folder, "heldout.npz"))
    return z["pictures"], z["labels"]


def label_caption(label, style=True, background=True):
    s, c, b = (int(v) for v in label)
    return caption(STYLES[s] if style else None, CONCEPTS[c][0], BACKGROUNDS[b] if background else None)


def all_captions():
    """Every caption that training can use, in a fixed order, with the index of each."""
    out = [""]
    for style in [None, *STYLES]:
        for name, _, _ in CONCEPTS:
            for background in [None, *BACKGROUNDS]:
                out.append(caption(style, name, background))
    return out


def caption_index(labels, drop_style, drop_background):
    """Positions in all_captions() of these labels' captions; the two flags say where style and background are left out."""
    s = np.where(drop_style, 0, labels[:, 0].astype(np.int64) + 1)
    b = np.where(drop_background, 0, labels[:, 2].astype(np.int64) + 1)
    return 1 + (s * len(CONCEPTS) + labels[:, 1]) * (len(BACKGROUNDS) + 1) + b


def sheet(pictures, columns, path, zoom=1):
    """A contact sheet of uint8 pictures."""
    rows = math.ceil(len(pictures) / columns)
    out = np.full((rows * (SIZE + 2), columns * (SIZE + 2), 3), 255, np.uint8)
    for i, p in enumerate(pictures):
        r, c = divmod(i, columns)
        out[r * (SIZE + 2):r * (SIZE + 2) + SIZE, c * (SIZE + 2):c * (SIZE + 2) + SIZE] = p
    image = Image.fromarray(out)
    image.resize((image.width * zoom, image.height * zoom), Image.NEAREST).save(path)
