"""The data set ``voices``: acted exclamations of the game Hedgewars in five groups of affect, whole voices held out.

The groups are DERIVED: from the events of the game at which a clip is played, by the table below; nobody rated the clips.
Events whose sound need not be one of the five are left out.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_atomic, write_json
from mitrain_demo.deb import members
from mitrain_demo.dialogue import counted
from mitrain_demo.packages import HEDGEWARS
from mitrain_demo.pairs import write_splits
from mitrain_demo.splits import split_groups

SOUNDS = "games/hedgewars/Data/Sounds/voices/"
SHARES = {"train": 0.6, "test": 0.26, "val": 0.14}
GROUPS = {
    "anger": "Bugger Coward Cutitout Drat Gonnagetyou Illgetyou Justyouwait Leavemealone Nutter Revenge Stupid Traitor"
    " Youllregretthat",
    "fear": "Incoming Nooo Ohdear Runaway Takecover Uh-oh Watchit Whatthe",
    "joy": "Amazing Brilliant Enemydown Excellent Firstblood Flawless Laugh Victory",
    "neutral": "Byebye Fire Grenade Hello Hmm Melon Reinforcements Solong Watchthis Yessir",
    "pain": "Ooff1 Ooff2 Ooff3 Ouch Ow1 Ow2 Ow3 Ow4",
}
GROUP_OF = {event: group for group, events in GROUPS.items() for event in events.split()}

README = """Exclamations of the game Hedgewars, made by mitrain from the Debian package hedgewars-data.

DERIVED LABELS: five groups of the events at which the game plays a clip (anger, fear, joy, neutral, pain); nobody rated the
clips. Sounds: the Hedgewars project, GFDL-1.3 (see COPYRIGHT); they are as the package has them (Ogg Vorbis).

Whole voices are held out, some of them in other languages than English. What several voices share is one clip.

{split}.jsonl: a clip a line: id, speech, text (empty), label (the group), object (the voice), kind (the event).
summary.json: counts, and the share of the commonest label.
"""


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill the empty folder ``target`` from the Debian package ``archives[0]``. Raises PrepareError."""
    found = dict(members(archives[0], "usr/share", (".ogg", f"{HEDGEWARS}/copyright")))
    copyright = found.pop(f"doc/{HEDGEWARS}/copyright", b"")
    clips: dict[tuple[str, str], bytes] = {}
    known: set[bytes] = set()
    for path, content in sorted(found.items()):
        voice, _, event = path.removeprefix(SOUNDS).removesuffix(".ogg").partition("/")
        digest = hashlib.sha256(content).digest()
        if path.startswith(SOUNDS) and event in GROUP_OF and digest not in known:
            known.add(digest)
            clips[voice, event] = content
    voices = [voice for voice, _ in clips]
    if len(set(voices)) < len(SHARES):
        raise PrepareError(f"{archives[0].name} holds {len(set(voices))} of the game's voices: get the original package")
    rows: dict[str, list[dict]] = {split: [] for split in ("train", "val", "test")}
    splits = split_groups(voices, f"{HEDGEWARS} {seed}", SHARES)
    for split, ((voice, event), content) in zip(splits, clips.items(), strict=True):
        path = target / "clips" / voice / f"{event}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        rows[split].append(record(voice, event))
    write_atomic(target / "README.txt", README)
    write_atomic(target / "COPYRIGHT", copyright)
    write_splits(target, rows)
    write_json(target / "summary.json", {split: counted(part) for split, part in rows.items()})


def record(voice: str, event: str) -> dict[str, str]:
    return {
        "id": f"{voice}/{event}",
        "speech": f"clips/{voice}/{event}.ogg",
        "text": "",
        "label": GROUP_OF[event],
        "object": voice,
        "kind": event,
    }
