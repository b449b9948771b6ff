"""Two processes that talk over gloo, and what each saw: run as `python -m ... RANK FOLDER`.

Cases that break a group have one of their own. The last case is rank 1's end.
"""

import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np

SECONDS = 3.0
"""The deadline of each group."""
GROUPS = ("sound", "absent", "slow", "dead")


def saw(work) -> dict:
    """What a piece of work returned or raised, and after how many seconds."""
    began = time.monotonic()
    try:
        found = {"value": work()}
    except Exception as error:
        found = {"error": type(error).__name__, "text": str(error)}
    return {**found, "seconds": time.monotonic() - began}


def sound_cases(comm, rank: int) -> dict:
    """Those after which the group is as good as before."""
    import torch

    from numflash.distributed.agreement import Shard, agree

    other = 1 - rank

    def bytes_of(kind):
        into = torch.zeros(3, dtype=torch.uint8) if kind == "torch" else np.zeros(3, "uint8")
        sent = np.array([1, 2, rank], "uint8")
        sent.flags.writeable = kind != "numpy, read-only"
        sent = torch.from_numpy(sent) if kind == "torch" else sent
        comm.exchange([(sent, other)], [(into, other)], "step 1")()
        return into.tolist()

    def many():
        into = np.zeros((300, 2), "uint8")
        sent = np.arange(600, dtype="uint16").astype("uint8").reshape(300, 2) + np.uint8(rank)
        sides = ([(x, other) for x in sent], [(x, other) for x in into])
        comm.exchange(*sides, "many")()
        return int((into.astype(int) - sent).astype("uint8").max()), into[299].tolist()

    def one_sided():
        into, empty = np.zeros(2, "uint8"), np.zeros(0, "uint8")
        sent = np.full(2, 7, "uint8")
        sends, receives = ([(sent, 1)], [(empty, 1)]), ([(empty, 0)], [(into, 0)])
        comm.exchange(*(receives if rank else sends), "one way")()
        comm.exchange([], [], "nothing")()
        return into.tolist()

    def gathered():
        array = torch.full((2, 2), 1.5 + rank, dtype=torch.bfloat16)
        whole = comm.all_gather(array.t(), "step")
        nothing = comm.all_gather(np.zeros((0, 3), "float32"), "step")
        return str(whole.dtype), whole.float().tolist(), nothing.shape

    def agreed(call="attention", **more):
        q = np.zeros((2, 5 + rank, 4, 16), "float16")
        return agree(comm, call, {"q": Shard(q, 1), "causal": True, **more}, lambda: "ok")

    def refused():
        def check():
            if rank:
                raise TypeError("k is no array")

        return agree(comm, "attention", {"softcap": 5.0}, check)

    half = np.zeros((2, 5, 4, 16), "float32" if rank else "float16")
    wide = np.zeros((2, 5, 4, 32 if rank else 16), "float16")
    return {
        "tensors": saw(lambda: bytes_of("torch")),
        "NumPy": saw(lambda: bytes_of("numpy")),
        "read-only": saw(lambda: bytes_of("numpy, read-only")),
        "many messages": saw(many),
        "one way": saw(one_sided),
        "gathered": saw(gathered),
        "texts": saw(lambda: [comm.agree("same"), comm.agree("longer, ä" * (1 + rank))]),
        "agreed": saw(agreed),
        "agreed again": saw(lambda: (agreed(), len(comm.agreed.digests))),
        "another dtype": saw(lambda: agreed("a", q=Shard(half, 1))),
        "another shape": saw(lambda: agreed("b", q=Shard(wide, 1))),
        "another option": saw(lambda: agreed("c", causal=not rank)),
        "refused": saw(refused),
        "no such rank": saw(lambda: comm.exchange([(half.view("uint8"), 2)], [], "step 2")),
        "no array": saw(lambda: comm.exchange([([1], other)], [], "step 2")),
        "after all that": saw(lambda: bytes_of("torch")),
    }


def main(rank: int, folder: Path) -> None:
    """Go through the cases; write what this rank saw."""
    import torch.distributed as dist

    from numflash.distributed.communicators.torch_groups import of_torch

    warnings.simplefilter("error")
    store = dist.FileStore(str(folder / "store"), 2)
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    groups = {name: dist.new_group([0, 1], timeout=limit) for name in GROUPS}
    seen = sound_cases(of_torch(groups["sound"]), rank)
    into = np.zeros(12, "uint8")

    def receive(comm, what="ring step 2 of 4"):
        comm.exchange([(into, 1 - rank)], [(into, 1 - rank)], what)()

    absent, slow = of_torch(groups["absent"]), of_torch(groups["slow"], timeout=0.5)
    if rank == 0:
        seen["never comes"] = saw(lambda: receive(absent))
        store.set("waited", "1")
    else:
        store.wait(["waited"], timedelta(seconds=30))
        seen["comes too late"] = saw(lambda: receive(absent))
    seen["after a fault"] = saw(lambda: receive(absent, "ring step 3 of 4"))
    seen["agreement after a fault"] = saw(lambda: absent.agree("text"))
    if rank == 0:
        seen["never agrees"] = saw(lambda: slow.agree("text"))
    dead = of_torch(groups["dead"])
    seen["before the end"] = saw(lambda: dead.agree("text"))
    if rank == 0:
        seen["dies"] = saw(lambda: receive(dead))
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)  # groups that are broken would wait for their threads


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
