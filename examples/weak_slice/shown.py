"""Which hazards retrieval misses: for each, in how many records of one split its card comes first, and in how many it is shown at all.

In: `outputs/data/embedded/SPLIT.jsonl`, which `emergency-kit data build` makes. Out: the hazards with the fewest, and the whole split.
For hazards that are named, also what came first instead; never a record's text, so that whoever writes cues stays blind to the test split.
No model is asked. Limit: records of one hazard only. Run: `python examples/weak_slice/shown.py test [HAZARD ...]`.
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

from emergency_kit.knowledge.cards import SAFE_MINIMUM, load_cards
from emergency_kit.knowledge.retrieve import Retriever

split, wanted = sys.argv[1], sys.argv[2:]
retriever = Retriever(load_cards(), 2)  # dataset.top_k
found = defaultdict(list)
for line in Path(f"outputs/data/embedded/{split}.jsonl").read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    if len(record["hazards"]) == 1 and record["hazards"] != [SAFE_MINIMUM]:
        found[record["hazards"][0]].append(retriever.find(record["input"]).ids)


def count(hazards: list[str]) -> tuple[int, int, int]:
    """Records where the right card is first, where it is shown, and all."""
    pairs = [(hazard, ids) for hazard in hazards for ids in found[hazard]]
    return sum(hazard in ids[:1] for hazard, ids in pairs), sum(hazard in ids for hazard, ids in pairs), len(pairs)


for hazard in wanted or sorted(found, key=lambda name: (count([name])[0] / len(found[name]), name))[:6]:
    first, shown, number = count([hazard])
    print(f"{hazard:14} first in {first} of {number}, shown in {shown}")
    if wanted:
        others = Counter(ids[0] if ids else "no card" for ids in found[hazard] if hazard not in ids[:1])
        print("  instead: " + ", ".join(f"{name} {times}" for name, times in others.most_common()))
first, shown, number = count(list(found))
print(f"{'all hazards':14} first in {first} of {number}, shown in {shown}")
