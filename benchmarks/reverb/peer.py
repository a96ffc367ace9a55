"""dm-reverb as its documentation uses it; runs in an environment that has it and not ours.

``serve`` prints its port and serves until its input ends. ``insert`` and ``sample`` print "ready",
begin at the next line of their input, and end with one line of JSON. ``sample`` has its server in
its own process, which spares it gRPC; of the settings that were tried these are the fastest.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import reverb
import tensorflow as tf

from benchmarks.frames import columns

CHUNK, BATCH = 64, 16
TABLE = "replay"


def signature() -> dict[str, tf.TensorSpec]:
    """Return the form of an item: 64 steps of every column."""
    made = columns("regular", CHUNK)
    return {name: tf.TensorSpec((CHUNK, *v.shape[1:]), v.dtype) for name, v in made.items()}


def make_server(items: int) -> reverb.Server:
    """Return a server of one table of so many items, drawn evenly, the oldest removed first."""
    table = reverb.Table(
        name=TABLE,
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=items,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=signature(),
    )
    return reverb.Server(tables=[table], port=None)


def serve(items: int) -> None:
    """Serve until the input ends."""
    server = make_server(items)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop()


def insert(port: int, kind: str, steps: int, begin: bool = True) -> int:
    """Append steps, with an item of the last 64 after every 64; return how many."""
    made = columns(kind, CHUNK)
    rows = [{name: value[at] for name, value in made.items()} for at in range(CHUNK)]
    client = reverb.Client(f"localhost:{port}")
    with client.trajectory_writer(num_keep_alive_refs=CHUNK) as writer:
        if begin:
            _begin()
        done = 0
        while done < steps:
            for row in rows:
                writer.append(row)
            whole = {name: column[-CHUNK:] for name, column in writer.history.items()}
            writer.create_item(table=TABLE, priority=1.0, trajectory=whole)
            writer.flush(block_until_num_items=4)
            done += CHUNK
        writer.flush()
        return done


def sample(items: int, kind: str, steps: int) -> int:
    """Take batches of 16 items from a dataset; return the steps in them."""
    server = make_server(items)
    insert(server.port, kind, items * CHUNK, begin=False)
    dataset = reverb.TrajectoryDataset.from_table_signature(
        server_address=f"localhost:{server.port}",
        table=TABLE,
        max_in_flight_samples_per_worker=100,
        num_workers_per_iterator=4,
    )
    batches = dataset.batch(BATCH).prefetch(4).as_numpy_iterator()
    for _ in range(8):
        next(batches)
    _begin()
    done = 0
    while done < steps:
        next(batches)
        done += BATCH * CHUNK
    return done


def _begin() -> None:
    global _began
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    _began = (time.perf_counter(), _cpu_s())


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


_began = (0.0, 0.0)


def main() -> None:
    """Do what the command line says."""
    what, words = sys.argv[1], sys.argv[2:]
    if what == "serve":
        serve(int(words[0]))
        return
    if what == "insert":
        done = insert(int(words[0]), words[1], int(words[2]))
    else:
        done = sample(int(words[0]), words[1], int(words[2]))
    result = {
        "steps": done,
        "seconds": time.perf_counter() - _began[0],
        "cpu_s": _cpu_s() - _began[1],
    }
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
