"""Packages of a few kilobytes laid out like Open Clip Art's two, the emoji's three and the food tables' two."""

import gzip
import io
import json
from pathlib import Path

import tiny_deb
from PIL import Image, ImageDraw

WORDS = {"animals": "animal", "food": "food", "people": "people"}
AUTHORS = 9
CLIPART = "./usr/share/openclipart/"


def drawing(number: int) -> bytes:
    """A PNG with shapes of its own on transparent ground."""
    image = Image.new("RGBA", (80, 60))
    draw = ImageDraw.Draw(image)
    for part in range(6):
        bits = (number * 2654435761 + part * 40503) & 0xFFFFFF
        x, y = bits % 60, (bits >> 8) % 40
        draw.rectangle((x, y, x + 8 + bits % 11, y + 6 + (bits >> 4) % 13), fill=(bits % 251, (bits >> 5) % 241, 40, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def stamps(folder: Path) -> list[Path]:
    """Tux Paint's package, each stamp drawn unlike the others."""
    files = tiny_deb.stamps_files()
    for number, name in enumerate(files):
        if name.endswith(".png"):
            files[name] = drawing(number)
    return [tiny_deb.deb(folder / "stamps.deb", files)]


def svg(title: str, keywords: tuple[str, ...], author: str) -> bytes:
    words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        f"<svg><metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title><dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject>"
        "<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>"
        f"<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator></cc:Work></rdf:RDF></metadata></svg>"
    ).encode()


def clipart(folder: Path) -> list[Path]:
    """The packages -svg and -png: 30 drawings of each of three keywords, some of them variants, and what is left out."""
    blurbs = {"./usr/share/doc/openclipart-svg/copyright": b"public domain\n"}
    pictures = {}

    def add(path: str, number: int, title: str, keywords: tuple[str, ...], suffix: str = ".svg") -> None:
        text = svg(title, keywords, f"author {number % AUTHORS}")
        blurbs[f"{CLIPART}svg/{path}{suffix}"] = gzip.compress(text, mtime=0) if suffix == ".svgz" else text
        pictures[f"{CLIPART}png/{path}.png"] = drawing(number)

    for i, (place, word) in enumerate(WORDS.items()):
        for j in range(30):
            number = 100 * i + j
            title = f"{word} &amp; {chr(97 + j % 26)}{chr(97 + j // 26)}{chr(97 + i)}"
            add(
                f"{place}/{word}{chr(97 + j % 26)}{j // 26}x",
                number,
                title,
                (word.upper(), f"rare {j}"),
                ".svgz" if j == 3 else ".svg",
            )
    add("animals/twin_01", 900, "first twin", ("animal",))
    add("animals/other", 900, "second twin", ("animal", "food"))  # the same picture
    add("animals/twin_02", 901, "third", ("animal",))  # numbered like the first
    add("food/late", 902, "First  Twin 7", ("food",))  # titled like the first
    add("computer/icon", 903, "an icon", ("animal",))
    add("animals/untitled", 904, "", ("animal",))
    pictures[f"{CLIPART}png/animals/animalaax.png"] = b"torn"
    return [tiny_deb.deb(folder / "svg.deb", blurbs), tiny_deb.deb(folder / "png.deb", pictures)]


def tgz(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(gzip.compress(tiny_deb.tar({f"package/{name}": content for name, content in files.items()})))
    return path


def emoji(folder: Path, count: int = 60) -> list[Path]:
    """The two vendors' packages and CLDR's; the vendors draw the first three alike."""
    categories = ["Animals & Nature", "Food & Drink", "Objects", "Flags"]
    table, spoken, art = [], {}, {"google": {}, "twitter": {}}
    for i in range(count):
        code = f"{0x1F400 + i:04X}"
        table.append({"unified": f"{code}-FE0F", "image": f"{code.lower()}-fe0f.png", "category": categories[i % 4]})
        spoken[chr(0x1F400 + i)] = {"default": ["x"], "tts": [f"thing {chr(97 + i % 26)}{chr(97 + i // 26)}"]}
        for vendor, shift in (("google", 0), ("twitter", 500 if i > 2 else 0)):
            art[vendor][f"img/{vendor}/64/{code.lower()}-fe0f.png"] = drawing(i + shift)
    for i, sex in enumerate(("man", "woman")):  # one thing, drawn for two sexes
        file = f"1f93{i}.png"
        table.append({"unified": f"1F93{i}", "image": file, "category": "People & Body"})
        spoken[chr(0x1F930 + i)] = {"tts": [f"{sex} juggling"]}
        for vendor, shift in (("google", 700), ("twitter", 800)):
            art[vendor][f"img/{vendor}/64/{file}"] = drawing(shift + i)
    table.append({"unified": "1F999", "image": "1f999.png", "category": "Objects"})  # without a name
    notes = json.dumps({"annotations": {"annotations": spoken}}).encode()
    return [
        tgz(folder / "google.tgz", {"emoji.json": json.dumps(table).encode(), **art["google"]}),
        tgz(folder / "twitter.tgz", {"emoji.json": b"[]", **art["twitter"]}),
        tgz(folder / "cldr.tgz", {"annotations/en/annotations.json": notes}),
    ]


FOOD_HEADER = ("Food Code; code", "Food Name; name", "Scientific Name; scie", "Total Fat; fatce")
FOOD_HEADER += ("Carbohydrate; choavldf", "Protein; protcnt", "Moisture; water")
FOODS = [  # code, name, species, fat, carbohydrate, protein, water; the last: the photograph's number
    ("B901", "Bean, red", "Phaseolus a", 0.5, 50, 20, 10, 901),
    ("D901", "Bean, green", "Phaseolus b", 0.2, 5, 2, 90, 902),  # named as B901
    ("D902", "Tall stalk-1", "Phaseolus b", 0.2, 5, 2, 90, 903),  # of D901's species
    ("D903", "Tall stalk - all varieties", "", 0.2, 5, 2, 90, 903),  # D902's photograph
    ("O901", "Yak, leg", "", 5, 0, 20, 70, 904),
    ("O902", "Yak, brain", "", 12, 0, 9, 78, 904),  # less protein and more water than O901
    ("I901", "Jaggery, cane", "", 0, 85, 1, 4, 905),  # of a group that is left out
    ("E901", "Plum, green and red", "", 0.1, 12, 1, 85, 906),  # of two colours
]


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(drawing(number))).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def food(folder: Path) -> list[Path]:
    """The packages pictures and compositions: six foods of each of three groups, and FOODS."""
    plain = [
        (f"{g}{i:03}", f"Food {'abcdef'[i]}{g}", f"species {g}{i}", i % 2, 4 * i, 4 * i, 90 - 5 * i, 100 + n * 20 + i)
        for n, g in enumerate("ACE")
        for i in range(6)
    ]
    lines = [FOOD_HEADER, *([*food[:-1]] for food in plain + FOODS)]
    table = "".join(",".join(f'"{value}"' for value in line) + "\n" for line in lines).encode()
    pictures = {f"assets/{food[0]}.jpeg": jpeg(food[-1]) for food in plain + FOODS}
    return [tgz(folder / "pictures.tgz", pictures | {"index.ts": b""}), tgz(folder / "table.tgz", {"index.csv": table})]
