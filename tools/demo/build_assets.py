"""Build the asset packs of the demo model: pictograms, fonts and a word list.

Everything comes from public packages, named below with their licences, by package name only:

* icon sets from npm (``npm pack``), rendered with ``resvg-py``;
* fonts from npm's ``@fontsource`` families, reduced to printable ASCII with ``fonttools``;
* English words from Debian's ``wamerican-small``;
* the training split of ``easy-vqa`` from PyPI (not shipped: it goes to ``--training-out``).

Run it in an environment with ``pip install resvg-py fonttools brotli pillow numpy``::

    python tools/demo/build_assets.py --cache build/demo/downloads --training-out build/demo

The results under ``src/opsin/demo/assets`` are committed, so only a change of the lists below needs a new build.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "src" / "opsin" / "demo" / "assets"

TILE = 72
"""Side in pixels of one pictogram in the atlas: the model sees at most 128 pixels of a whole picture."""

COLUMNS = 28

TRAINING_STYLES = {
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
    "fluent-flat": "@iconify-json/fluent-emoji-flat",
    "fluent": "@iconify-json/fluent-emoji",
    "emojione": "@iconify-json/emojione",
}
HELD_OUT_STYLES = {"fxemoji": "@iconify-json/fxemoji"}
"""A style that training never draws: evaluation reports it beside the others."""

REQUIRED_STYLES = ("noto", "twemoji", "fluent-flat")
"""A pictogram is used when these styles have it; the other styles may lack it."""

TRAINING_FONTS = (
    "inter roboto open-sans lato montserrat poppins raleway oswald merriweather playfair-display nunito-sans pt-sans "
    "pt-serif source-sans-3 source-serif-4 roboto-slab roboto-mono fira-sans work-sans libre-franklin lora karla rubik "
    "quicksand josefin-sans bitter anton comic-neue kalam architects-daughter courier-prime inconsolata "
    "jetbrains-mono ibm-plex-sans ibm-plex-serif manrope barlow exo-2 arvo crimson-text eb-garamond tinos arimo "
    "cousine vollkorn alfa-slab-one fredoka titillium-web overpass public-sans outfit varela-round gelasio alegreya "
    "patrick-hand schoolbell"
).split()
HELD_OUT_FONTS = (
    "dm-sans noto-serif fira-code cabin zilla-slab lexend spectral archivo-narrow short-stack libre-baskerville"
).split()
BOLD_FONTS = frozenset(
    "inter roboto open-sans lato montserrat poppins merriweather playfair-display pt-serif source-sans-3 roboto-slab "
    "roboto-mono arimo tinos cousine comic-neue fira-sans work-sans exo-2 lora "
    "dm-sans noto-serif cabin zilla-slab".split()
)


def npm_package(name: str, cache: Path) -> tarfile.TarFile:
    """Return the tarball of an npm package, downloading it into ``cache`` once."""
    stem = name.lstrip("@").replace("/", "-")
    found = sorted(cache.glob(f"{stem}-[0-9]*.tgz"))
    if not found:
        subprocess.run(["npm", "pack", "--silent", name], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        found = sorted(cache.glob(f"{stem}-[0-9]*.tgz"))
    return tarfile.open(found[0])


def package_member(package: tarfile.TarFile, path: str) -> bytes | None:
    """Return one file of an npm tarball, or None where the package lacks it."""
    try:
        handle = package.extractfile(f"package/{path}")
    except KeyError:
        return None
    return None if handle is None else handle.read()


class IconSet:
    """One Iconify icon set: SVG bodies by key."""

    def __init__(self, package: tarfile.TarFile) -> None:
        raw = package_member(package, "icons.json")
        if raw is None:
            raise FileNotFoundError("icons.json")
        self.data = json.loads(raw)

    def __contains__(self, key: str) -> bool:
        return key in self.data["icons"] or key in self.data.get("aliases", {})

    def svg(self, key: str) -> str:
        """Return the picture as a complete SVG document."""
        icons, aliases = self.data["icons"], self.data.get("aliases", {})
        while key not in icons:
            key = aliases[key]["parent"]
        icon = icons[key]
        width = icon.get("width", self.data.get("width", 16))
        height = icon.get("height", self.data.get("height", 16))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )


def render(svg: str, size: int = TILE) -> Image.Image:
    """Draw an SVG, cropped to its ink and centred on a transparent square of ``size`` pixels."""
    import resvg_py

    big = 4 * size
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=big, height=big))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise ValueError("empty picture")
    picture = picture.crop(box)
    scale = (size - 2) / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    # Premultiplied resizing, so that no colour of the transparent surroundings bleeds into the edge.
    picture = picture.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    tile = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    tile.paste(picture, ((size - width) // 2, (size - height) // 2))
    return tile


def read_list(path: Path) -> list[dict]:
    """Parse ``pictograms.txt`` into dicts of name, category, countable and keys."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        category, items = line.split(":", 1)
        for item in items.split():
            keys, _, name = item.partition("=")
            key_list = keys.split("+")
            countable = not name.startswith("~")
            plain = (name.lstrip("~") or key_list[0]).replace("-", " ")
            entries.append({"name": plain, "category": category, "countable": countable, "keys": key_list})
    return entries


def build_pictograms(cache: Path) -> None:
    """Write one WebP atlas per style and ``pictograms.json``, which says what each tile shows."""
    packages = TRAINING_STYLES | HELD_OUT_STYLES
    sets = {style: IconSet(npm_package(package, cache)) for style, package in packages.items()}
    things = []
    for entry in read_list(HERE / "pictograms.txt"):
        keys = [key for key in entry["keys"] if all(key in sets[style] for style in REQUIRED_STYLES)]
        if keys:
            things.append({**entry, "keys": keys})
        else:
            print("dropped, not in every required style:", entry["name"])
    names = [thing["name"] for thing in things]
    duplicates = {name for name in names if names.count(name) > 1}
    if duplicates:
        raise ValueError(f"names used twice: {sorted(duplicates)}")

    styles: dict[str, list] = {}
    for style, icons in sets.items():
        tiles = [(index, key) for index, thing in enumerate(things) for key in thing["keys"] if key in icons]
        rows = -(-len(tiles) // COLUMNS)
        atlas = Image.new("RGBA", (COLUMNS * TILE, rows * TILE), (0, 0, 0, 0))
        for position, (_, key) in enumerate(tiles):
            row, column = divmod(position, COLUMNS)
            atlas.paste(render(icons.svg(key)), (column * TILE, row * TILE))
        path = ASSETS / f"pictograms-{style}.webp"
        atlas.save(path, quality=62, alpha_quality=50, method=6)
        styles[style] = [index for index, _ in tiles]
        print(f"{style}: {len(tiles)} tiles, {path.stat().st_size / 1e3:.0f} kB")
    table = {
        "tile": TILE,
        "columns": COLUMNS,
        "training_styles": list(TRAINING_STYLES),
        "held_out_styles": list(HELD_OUT_STYLES),
        "things": [{key: thing[key] for key in ("name", "category", "countable")} for thing in things],
        "tiles": styles,
    }
    (ASSETS / "pictograms.json").write_text(json.dumps(table, separators=(",", ":")) + "\n", encoding="utf-8")
    print(len(things), "things")


def subset_font(data: bytes) -> bytes:
    """Reduce a font to printable ASCII, without hinting and without layout features but kerning.

    The copyright and licence records stay; the family name goes, because a reduced font is a modified one and the Open
    Font License lets some families reserve their names.
    """
    from fontTools import subset
    from fontTools.ttLib import TTFont

    font = TTFont(io.BytesIO(data))
    options = subset.Options(hinting=False, layout_features=["kern"], name_IDs=[0, 13, 14], notdef_outline=True)
    worker = subset.Subsetter(options)
    worker.populate(unicodes=range(0x20, 0x7F))
    worker.subset(font)
    font.flavor = None
    for number, text in ((1, "opsin demo face"), (2, "Regular"), (4, "opsin demo face"), (6, "opsin-demo-face")):
        font["name"].setName(text, number, 3, 1, 0x409)
    out = io.BytesIO()
    font.save(out)
    return out.getvalue()


def build_fonts(cache: Path) -> None:
    """Write ``fonts.zip``: ``train/*.ttf``, ``held_out/*.ttf`` and each family's licence text."""
    path = ASSETS / "fonts.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:

        def add(name: str, data: bytes) -> None:
            # A fixed date, so that the same packages give the same bytes.
            info = zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)

        for split, families in (("train", TRAINING_FONTS), ("held_out", HELD_OUT_FONTS)):
            for family in families:
                package = npm_package(f"@fontsource/{family}", cache)
                for weight in (400, 700) if family in BOLD_FONTS else (400,):
                    data = package_member(package, f"files/{family}-latin-{weight}-normal.woff2")
                    if data is None:
                        raise FileNotFoundError(f"{family} {weight}")
                    add(f"{split}/{family}-{weight}.ttf", subset_font(data))
                licence = package_member(package, "LICENSE")
                if licence is None:
                    raise FileNotFoundError(f"licence of {family}")
                add(f"licences/{family}.txt", licence)
    print(f"fonts: {path.stat().st_size / 1e3:.0f} kB")


RUDE = re.compile(
    "anal|anus|arse|ass$|asses|bastard|bitch|boob|breast|clit|cock|crap|cunt|damn|dick|dildo|erot|fag|fart|fuck|genital|"
    "gook|hell$|homo|horn(y|ier)|incest|jew|kike|lesb|molest|naked|nazi|negro|nigg|nipple|nude|orgas|orgy|paki|pedo|"
    "pen(is|es)|perver|piss|poof|porn|prick|prostit|pubic|puss|queer|rape|rapi|rectum|scrot|semen|sex|shit|slave|slut|"
    "sperm|spic|squaw|suck|tart|testi|tit(s|ty)?$|turd|twat|vagin|vulva|wank|whor"
)
"""Words that no demonstration should print."""


def build_words(cache: Path) -> None:
    """Write ``words.txt``: lower-case English words of 3 to 8 letters, most common list of SCOWL."""
    found = sorted(cache.glob("wamerican-small_*.deb"))
    if not found:
        subprocess.run(["apt-get", "download", "wamerican-small"], cwd=cache, check=True)
        found = sorted(cache.glob("wamerican-small_*.deb"))
    listing = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(found[0])], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(listing)) as tree:
        handle = tree.extractfile("./usr/share/dict/american-english-small")
        if handle is None:
            raise FileNotFoundError("american-english-small")
        text = handle.read().decode("utf-8")
    words = sorted({word for word in text.split() if re.fullmatch(r"[a-z]{3,8}", word) and not RUDE.search(word)})
    # Every third word is plenty to make reading more than recall, and keeps the file small.
    kept = words[::3]
    (ASSETS / "words.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    print(len(kept), "words")


def build_easy_vqa(cache: Path, out: Path) -> None:
    """Write ``easy_vqa_train.npz``: uint8 pictures (4000, 64, 64, 3) and the training questions as JSON."""
    found = sorted(cache.glob("easy_vqa-*.whl"))
    if not found:
        subprocess.run(["pip", "download", "--no-deps", "-d", str(cache), "easy-vqa"], check=True)
        found = sorted(cache.glob("easy_vqa-*.whl"))
    with zipfile.ZipFile(found[0]) as wheel:
        questions = json.loads(wheel.read("easy_vqa/data/train/questions.json"))
        count = 1 + max(question[2] for question in questions)
        pictures = np.stack(
            [
                np.asarray(Image.open(io.BytesIO(wheel.read(f"easy_vqa/data/train/images/{index}.png"))).convert("RGB"))
                for index in range(count)
            ]
        )
    np.savez_compressed(out / "easy_vqa_train.npz", pictures=pictures, questions=json.dumps(questions))
    print(f"easy-vqa: {count} training pictures, {len(questions)} questions")


def main() -> None:
    """Build every pack, or the ones named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/demo/downloads"))
    parser.add_argument("--training-out", type=Path, default=Path("build/demo"))
    parser.add_argument("packs", nargs="*", default=["pictograms", "fonts", "words", "easy_vqa"])
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    args.training_out.mkdir(parents=True, exist_ok=True)
    ASSETS.mkdir(parents=True, exist_ok=True)
    if "pictograms" in args.packs:
        build_pictograms(args.cache)
    if "fonts" in args.packs:
        build_fonts(args.cache)
    if "words" in args.packs:
        build_words(args.cache)
    if "easy_vqa" in args.packs:
        build_easy_vqa(args.cache, args.training_out)


if __name__ == "__main__":
    main()
